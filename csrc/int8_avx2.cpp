// The kernels of int8 weights for x86-64 processors with AVX2 and FMA: compile with -mavx2 -mfma.
#ifdef __x86_64__
#define VECTOR_BYTES 32
#include "int8.h"

const fastlstm::Kernels fastlstm::avx2_int8 = INT8_KERNELS("avx2");
#endif
