// CHECK(condition): counts failures and says where; main returns failures().
#pragma once

#include <cstdio>

namespace adsc::test {

inline int& failures() {
  static int count = 0;
  return count;
}

}  // namespace adsc::test

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      ++adsc::test::failures();                                           \
    }                                                                     \
  } while (false)
