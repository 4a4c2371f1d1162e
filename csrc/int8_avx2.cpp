// The kernels of int8 weights for x86-64 processors with AVX2 and FMA: compile with -mavx2 -mfma.
#ifdef __x86_64__
#if !defined(__AVX2__) || !defined(__FMA__)
#error "compile this file with -mavx2 -mfma"
#endif
#define VECTOR_BYTES 32
#include "job.h"

namespace {
#include "int8.h"
}

const fastlstm::Kernels fastlstm::avx2_int8 = INT8_KERNELS("avx2");
#endif
