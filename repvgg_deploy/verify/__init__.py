"""Two models, the same batches → a certificate. Needs NumPy and, for ONNX models, ONNX Runtime."""
