"""The published package `guided_diffusion`: its names, signatures and behaviour, without MPI and blobfile.

Files and names are those of the published code, so that its programs run unmodified; what they do is in
admfast's floors. Source: github.com/openai/guided-diffusion.
"""
