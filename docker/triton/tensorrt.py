"""TensorRT's bindings (package tensorrt_bindings) under their usual name, where the libraries are the container's own."""

import sys

import tensorrt_bindings

sys.modules[__name__] = tensorrt_bindings
