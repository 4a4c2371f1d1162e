// The kernels of int8 weights for 64-bit ARM processors with `sdot`: compile with -march=armv8.2-a+dotprod.
#if defined(__aarch64__) && defined(__linux__)
#define VECTOR_BYTES 16
#include "int8.h"

const fastlstm::Kernels fastlstm::dotprod_int8 = INT8_KERNELS(BASE_NAME);
#endif
