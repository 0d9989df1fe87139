// How an op is registered, in the file that bears its name. On PyTorch's stable ABI, so that one
// binary serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>

#if defined(ADSC_SIMT)  // the emulator's copy: what serves CUDA, for tensors on the CPU
#define ADSC_NAMESPACE adsc_simt
#else
#define ADSC_NAMESPACE adsc_kernels
#endif

#if defined(ADSC_WITH_CUDA) && !defined(ADSC_SIMT)
#define ADSC_OP_ON_CUDA(name, ...) \
  STABLE_TORCH_LIBRARY_IMPL(ADSC_NAMESPACE, CUDA, m) { m.impl(name, __VA_ARGS__); }
#else
#define ADSC_OP_ON_CUDA(name, ...)
#endif

// torch.ops.adsc_kernels.<name>, perhaps with an overload: its schema, and the function that takes
// and leaves its arguments and results on a stack, which serves every device.
#define ADSC_BOXED_OP(name, boxed, schema)                                   \
  STABLE_TORCH_LIBRARY_FRAGMENT(ADSC_NAMESPACE, m) { m.def(name schema); }   \
  STABLE_TORCH_LIBRARY_IMPL(ADSC_NAMESPACE, CPU, m) { m.impl(name, boxed); } \
  ADSC_OP_ON_CUDA(name, boxed)

// The same of the function `name`.
#define ADSC_OP(name, schema) ADSC_BOXED_OP(#name, TORCH_BOX(&name), schema)
