"""Kernel microbenchmarks: ``python -m benchmarks`` checks every contestant, then times it."""
