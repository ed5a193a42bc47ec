"""Typed ONNX → TensorRT plan and its passport. The entry is `build.build_plan`."""
