"""The PyTorch reference model: block, network, checkpoint families, reparameterize. Needs the `export` extra."""
