// Error messages.
#pragma once

#include <sstream>
#include <string>

namespace adsc {

template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace adsc
