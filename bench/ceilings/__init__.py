"""Ceilings: what this machine can do, measured with nothing but torch (and Triton's timer on a GPU).

`python -m bench.ceilings` writes one row per measurement to `ceilings.jsonl` and a table to `ceilings.md`.
"""
