"""How fast a model runs, and how fast it could. The entry is `bench.run_benchmark`."""
