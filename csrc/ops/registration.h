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
#define ADSC_OP_ON_CUDA(name) \
  STABLE_TORCH_LIBRARY_IMPL(ADSC_NAMESPACE, CUDA, m) { m.impl(#name, TORCH_BOX(&name)); }
#else
#define ADSC_OP_ON_CUDA(name)
#endif

// torch.ops.adsc_kernels.<name>: its schema, and the function `name`, which serves every device.
#define ADSC_OP(name, schema)                                                            \
  STABLE_TORCH_LIBRARY_FRAGMENT(ADSC_NAMESPACE, m) { m.def(#name schema); }              \
  STABLE_TORCH_LIBRARY_IMPL(ADSC_NAMESPACE, CPU, m) { m.impl(#name, TORCH_BOX(&name)); } \
  ADSC_OP_ON_CUDA(name)
