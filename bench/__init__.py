"""The benchmarks: see README.md beside this file."""
