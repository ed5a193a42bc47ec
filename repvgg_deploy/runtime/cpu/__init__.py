"""ONNX Runtime and OpenVINO behind the Engine."""
