"""The hot path, piece by piece, with pytest-benchmark: `python -m bench.micro`."""
