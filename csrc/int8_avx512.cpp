// The kernels of int8 weights for x86-64 processors with AVX-512 and its VNNI: compile with -mavx512f -mavx512dq
// -mavx512vl -mavx512vnni.
#include "job.h"

#ifdef __x86_64__
#include <immintrin.h>
#if !defined(__AVX512F__) || !defined(__AVX512DQ__) || !defined(__AVX512VL__) || !defined(__AVX512VNNI__)
#error "compile this file with -mavx512f -mavx512dq -mavx512vl -mavx512vnni"
#endif
#define VECTOR_BYTES 64
#define REGISTERS 32
#define TILE_ROWS 6  // 24 accumulators

namespace {
#include "kernels.h"
#include "int8.h"
}

const fastlstm::Int8Kernels fastlstm::avx512_int8 = INT8_KERNELS;
#endif
