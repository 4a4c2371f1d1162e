// The kernels for x86-64 processors with AVX2 and FMA: compile with -mavx2 -mfma.
#ifdef __x86_64__
#define VECTOR_BYTES 32
#include "kernels.h"

const fastlstm::Kernels fastlstm::avx2_kernels = KERNELS("avx2");
const fastlstm::Tasks fastlstm::avx2_backward = BACKWARD;
#endif
