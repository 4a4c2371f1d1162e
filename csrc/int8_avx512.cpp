// The kernels of int8 weights for x86-64 processors with AVX-512 and its VNNI: compile with -mavx512f -mavx512dq
// -mavx512vl -mavx512vnni.
#ifdef __x86_64__
#if !defined(__AVX512F__) || !defined(__AVX512DQ__) || !defined(__AVX512VL__) || !defined(__AVX512VNNI__)
#error "compile this file with -mavx512f -mavx512dq -mavx512vl -mavx512vnni"
#endif
#define VECTOR_BYTES 64
#include "job.h"

namespace {
#include "int8.h"
}

const fastlstm::Kernels fastlstm::avx512_int8 = INT8_KERNELS("avx512");
#endif
