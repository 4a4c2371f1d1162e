// The kernels of int8 weights for AVX-512 and its VNNI: -mavx512f -mavx512dq -mavx512vl -mavx512vnni.
#ifdef __x86_64__
#define VECTOR_BYTES 64
#include "int8.h"

const fastlstm::Kernels fastlstm::avx512_int8 = INT8_KERNELS("avx512");
#endif
