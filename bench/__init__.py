"""Benchmarks: what a machine can do (`bench.ceilings`) and what this package reaches of it."""
