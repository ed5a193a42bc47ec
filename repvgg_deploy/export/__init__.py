"""Checkpoint or module → verified ONNX. The entries are `export.export_checkpoint` and `module.export_module`. Needs torch, onnx and onnxsim."""
