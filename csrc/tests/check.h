// The whole test framework: a check that fails says where and what, and main() then returns 1.
#pragma once

#include <cstdio>

inline int failures = 0;

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      ++failures;                                                              \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);     \
    }                                                                          \
  } while (0)
