"""What servers need: Triton model repositories and what Triton would refuse in one (extra `serving`); KServe v2, statistics for Prometheus."""
