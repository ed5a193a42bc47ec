"""A checkpoint file → a state dict in our names, without running any code of the file. The entry is `load.load_checkpoint`."""
