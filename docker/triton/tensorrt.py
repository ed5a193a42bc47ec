"""TensorRT's bindings (package tensorrt_bindings) under their usual name, where the container has the libraries."""

import sys

import tensorrt_bindings

sys.modules[__name__] = tensorrt_bindings
