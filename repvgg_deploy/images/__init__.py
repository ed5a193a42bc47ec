"""Image files → batches as a model takes them; the only place that normalises."""
