"""The published package `guided_diffusion`: its names, signatures and behaviour, without MPI and blobfile.

It has the published files and names, so that programs run unmodified; the other packages of admfast do the
work. Source: github.com/openai/guided-diffusion.
"""
