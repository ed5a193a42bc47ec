"""Deploy model → clean ONNX: to_onnx, simplify, contract. Needs the `export` extra."""
