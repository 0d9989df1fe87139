// The pybind11 module adsc_kernels._C: what this build is made of.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "build_info.h"

namespace py = pybind11;

namespace {

std::optional<std::string> some(const char* text) {
  return *text ? std::optional<std::string>(text) : std::nullopt;
}

py::object cuda_archs() {
  std::vector<std::string> archs;
  std::istringstream stream(ADSC_CUDA_ARCHS);
  for (std::string arch; std::getline(stream, arch, ';');) archs.push_back(arch);
  if (archs.empty()) return py::none();
  return py::tuple(py::cast(archs));
}

py::dict build_info() {
  py::dict info;
  info["version"] = ADSC_VERSION;
  info["compiler"] = ADSC_COMPILER;
  info["build_type"] = ADSC_BUILD_TYPE;
  info["cxx_flags"] = ADSC_CXX_FLAGS;
  info["torch"] = ADSC_TORCH_VERSION;
  info["cuda_compiler"] = some(ADSC_CUDA_COMPILER);
  info["cuda_archs"] = cuda_archs();
  info["cuda_reason"] = some(ADSC_CUDA_REASON);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The host side of adsc_kernels in C++: build information.";
  module.def("build_info", &build_info,
             "What this build is made of: version, compiler, build_type, cxx_flags, torch (the one built\n"
             "against), cuda_compiler, cuda_archs, and cuda_reason: why there is no CUDA, or None.");
}
