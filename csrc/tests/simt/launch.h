// In place of the launcher of csrc/cuda/launch.h: runs the grid before it returns.
#pragma once

#include <tuple>
#include <utility>

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
