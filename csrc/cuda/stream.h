// What a launcher takes as its stream: a cudaStream_t, without CUDA's headers.
#pragma once

namespace adsc::cuda {

using Stream = void*;

}  // namespace adsc::cuda
