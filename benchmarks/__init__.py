"""What a conversion costs, measured beside a plain copy of the same files: `python -m benchmarks.convert --help`."""
