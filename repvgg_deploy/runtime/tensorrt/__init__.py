"""TensorRT plans behind the Engine."""
