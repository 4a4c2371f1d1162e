// The kernels of int8 weights for x86-64 processors with AVX2 and FMA: compile with -mavx2 -mfma.
#include "job.h"

#ifdef __x86_64__
#include <immintrin.h>
#if !defined(__AVX2__) || !defined(__FMA__)
#error "compile this file with -mavx2 -mfma"
#endif
#define VECTOR_BYTES 32
#define REGISTERS 16
#define TILE_ROWS 3  // 12 accumulators

namespace {
#include "kernels.h"
#include "int8.h"
}

const fastlstm::Int8Kernels fastlstm::avx2_int8 = INT8_KERNELS;
#endif
