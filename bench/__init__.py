"""Benchmarks: the speed that a machine can reach (`bench.ceilings`), and the speed of this package on it."""
