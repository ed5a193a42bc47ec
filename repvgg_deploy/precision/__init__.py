"""FP32 ONNX → FP16 or INT8 ONNX, judged before it is written. The entry is `quantization.quantize`. Needs onnx and ONNX Runtime, no torch."""
