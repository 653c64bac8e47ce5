"""Benches of the guided step of every preset, and of the first image, compared with other implementations."""
