"""The calls that an Engine makes to CUDA, through cuda-bindings or pycuda."""
