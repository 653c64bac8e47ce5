// The Python module; its ops are registered by the *_ops.cpp files, each with its checks.
#include <torch/extension.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.doc() = "Compiled ops of admfast; use them through admfast.ops."; }
