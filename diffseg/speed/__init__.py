"""Benchmarks of speed, each a command that writes results/benchmarks/; nothing here is asserted in a test."""
