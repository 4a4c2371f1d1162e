#pragma once

#include "fastlstm.h"

namespace fastlstm {

// task(argument, k, n) for k from 0 to n - 1 on the library's own threads, n at most `threads`: where another call holds
// the pool, or no thread can be started, the caller works alone.
void run_in_pool(fastlstm_task task, void *argument, int threads);

}  // namespace fastlstm
