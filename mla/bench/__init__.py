"""The benchmark runner: `python -m mla.bench`."""
