"""What is on disk: outputs that are whole or absent, our reader of ONNX, what a file is, passports, and where a plan runs."""
