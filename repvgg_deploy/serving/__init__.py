"""A Triton model repository from plans or an ONNX, and what Triton would refuse in one. Needs the extra `serving`, no server."""
