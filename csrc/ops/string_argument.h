// A `str` of an op's schema. torch's own conversion to std::string (2.10 to 2.13) never frees the
// string that it returns a copy of: some 50 bytes a call.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace adsc::ops {

struct StringArgument : std::string {
  using std::string::string;
};

}  // namespace adsc::ops

namespace torch::stable::detail {

template <>
struct ToImpl<adsc::ops::StringArgument> {
  static adsc::ops::StringArgument call(StableIValue value, uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    const char* data;
    size_t length;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    const adsc::ops::StringArgument text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace torch::stable::detail
