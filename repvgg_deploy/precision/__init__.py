"""ONNX → typed ONNX: chain, equalize, calibrate, round, int8, fp16. NumPy, onnx and ONNX Runtime; no torch, no GPU."""
