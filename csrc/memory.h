// The scratch memory of a call.
#pragma once

#include <stdint.h>
#include <stdlib.h>

namespace fastlstm {

// Scratch of one call, in one piece: told of everything first, then taken. Each part is on cache lines of its own.
class Memory {
    struct Part {
        void **place;
        int64_t at;
    } parts[8];
    int count = 0;
    int64_t total = 0;
    void *memory = nullptr;

  public:
    void want(void *&place, int64_t bytes) {
        parts[count++] = {&place, total};
        total += (bytes + 63) / 64 * 64;
    }
    bool take() {
        if (total && posix_memalign(&memory, 64, (size_t)total)) return false;
        for (int k = 0; k < count; k++) *parts[k].place = (char *)memory + parts[k].at;
        return true;
    }
    ~Memory() { free(memory); }
    Memory() = default;
    Memory(const Memory &) = delete;
};

}  // namespace fastlstm
