"""A model in production: Triton's repository, the KServe protocol, Prometheus. The entry is `triton.write_triton`."""
