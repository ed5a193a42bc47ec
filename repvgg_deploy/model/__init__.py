"""The PyTorch reference: the network in training form and in deploy form, and reparameterization. Needs torch."""
