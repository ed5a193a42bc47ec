"""Parts of `benchmarks/gpu.py`: models, the bare loop, what is measured of one plan, the report."""
