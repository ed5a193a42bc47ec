"""Algebra on ONNX graphs: reading and editing, linear regions, folding. The entry is `fold_branches`.

Needs onnx and NumPy, no torch.
"""
