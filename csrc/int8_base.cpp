// The kernels of int8 weights for any processor of this kind: NEON on 64-bit ARM, SSE2 on x86-64.
#include "job.h"

#ifdef __aarch64__
#include <arm_neon.h>
#define REGISTERS 32
#define TILE_ROWS 6
#else
#ifdef __SSE2__
#include <emmintrin.h>
#endif
#define EXACTLY_FUSED  // the bits are to be those of the other sets
#define REGISTERS 16
#define TILE_ROWS 3
#endif
#define VECTOR_BYTES 16

namespace {
#include "kernels.h"
#include "int8.h"
}

const fastlstm::Int8Kernels fastlstm::base_int8 = INT8_KERNELS;
