// The kernels for any processor of this kind: NEON on 64-bit ARM, SSE2 on x86-64.
#include "job.h"

#ifdef __aarch64__
#include <arm_neon.h>
#define REGISTERS 32
#define TILE_ROWS 6  // 24 accumulators
#else
#ifdef __SSE2__
#include <emmintrin.h>
#endif
#define REGISTERS 16
#define TILE_ROWS 3
#endif
#define VECTOR_BYTES 16

namespace {
#include "kernels.h"
}

#ifdef __aarch64__
const fastlstm::Kernels fastlstm::base_kernels = KERNELS("neon");
#else
const fastlstm::Kernels fastlstm::base_kernels = KERNELS("base");
#endif
const fastlstm::Tasks fastlstm::base_backward = BACKWARD;
