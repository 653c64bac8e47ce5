// The name of the instruction set as a torch op.
#include <torch/library.h>

#include <string>

#include "cpu_isa.h"

namespace admfast {

TORCH_LIBRARY_FRAGMENT(admfast, m) {
  m.def("cpu_instruction_set() -> str", [] { return std::string(kCpuIsaNames[static_cast<int>(cpu_isa())]); });
}

}  // namespace admfast
