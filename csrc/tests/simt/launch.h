// In place of csrc/cuda/launch.h: a launch has run when it returns.
#pragma once

#include <cstdint>
#include <tuple>
#include <type_traits>

#include "../../cuda/stream.h"
#include "engine.h"

namespace adsc::simt {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_bytes,
            const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_cv_t<Parameters>...> values;
  };
  const Call call{kernel, {arguments...}};
  run_grid(
      grid, block, dynamic_bytes,
      [](const void* data) {
        const Call& call = *static_cast<const Call*>(data);
        std::apply(call.kernel, call.values);
      },
      &call, sizeof call);
}

}  // namespace adsc::simt

namespace adsc::cuda {

inline int64_t enough_threads() { return simt::options().enough_threads; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t dynamic_bytes, Stream,
            const Arguments&... arguments) {
  if (grid == 0) return;
  simt::launch(kernel, dim3(static_cast<unsigned>(grid)), dim3(static_cast<unsigned>(block)),
               dynamic_bytes, arguments...);
}

}  // namespace adsc::cuda
