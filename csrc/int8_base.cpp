// The kernels of int8 weights for any processor of this kind: NEON on 64-bit ARM, SSE2 on x86-64.
#define VECTOR_BYTES 16
#define EXACTLY_FUSED  // multiply-adds round once on any processor, so that the bits are those of the other sets
#include "int8.h"

const fastlstm::Kernels fastlstm::base_int8 = INT8_KERNELS(BASE_NAME);
