// The kernels for x86-64 processors with AVX-512: compile with -mavx512f -mavx512dq -mavx512vl.
#ifdef __x86_64__
#if !defined(__AVX512F__) || !defined(__AVX512DQ__) || !defined(__AVX512VL__)
#error "compile this file with -mavx512f -mavx512dq -mavx512vl"
#endif
#define VECTOR_BYTES 64
#include "job.h"

namespace {
#include "kernels.h"
}

const fastlstm::Kernels fastlstm::avx512_kernels = KERNELS("avx512");
const fastlstm::Tasks fastlstm::avx512_backward = BACKWARD;
#endif
