"""Typed ONNX → TensorRT plan. Owns TensorRT's builder and parser; the plan and its passport are written by `pipeline.build`."""
