"""CUDA, as far as an Engine needs it: `port` says what that is, a module each fulfils it with cuda-bindings and with pycuda."""
