// The kernels for x86-64 processors with AVX-512: compile with -mavx512f -mavx512dq -mavx512vl.
#ifdef __x86_64__
#define VECTOR_BYTES 64
#include "kernels.h"

const fastlstm::Kernels fastlstm::avx512_kernels = KERNELS("avx512");
const fastlstm::Tasks fastlstm::avx512_backward = BACKWARD;
#endif
