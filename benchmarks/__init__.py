"""What users would pick instead, measured beside COMPACT: `python -m benchmarks.run CASE`."""
