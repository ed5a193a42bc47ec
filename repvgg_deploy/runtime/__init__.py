"""A model file → answers. The entry is `engine.Engine`. Never imports torch or onnx."""
