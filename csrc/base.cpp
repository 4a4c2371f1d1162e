// The kernels for any processor of this kind: NEON on 64-bit ARM, SSE2 on x86-64.
#define VECTOR_BYTES 16
#include "kernels.h"

const fastlstm::Kernels fastlstm::base_kernels = KERNELS(BASE_NAME);
const fastlstm::Tasks fastlstm::base_backward = BACKWARD;
