// Sums of products of bytes by Intel's AMX, whose tiles have 16 rows of 64 bytes. Vectors compute the rest.
#pragma once

constexpr int64_t AMX_ROWS = 16, AMX_GROUPS = 16;  // of a tile: rows of bytes, and groups of 4 columns

#if VECTOR_BYTES == 64 && defined(FASTLSTM_EMULATE_TILES)
#include "checks/tiles.h"
#define WITH_AMX
#elif VECTOR_BYTES == 64 && defined(__linux__) && defined(__has_include)
#if __has_include(<amxint8intrin.h>) || __has_include(<amxintrin.h>)
#define WITH_AMX __attribute__((target("amx-tile,amx-int8")))
#endif
#endif

#ifdef WITH_AMX
constexpr bool HAS_AMX = true;

// Gives this thread tiles 0 to 7 of AMX_ROWS rows, until `release_amx`.
NOINLINE WITH_AMX void configure_amx() {
    alignas(64) uint8_t sizes[64] = {1};
    for (int tile = 0; tile < 8; tile++) sizes[16 + 2 * tile] = 64, sizes[48 + tile] = AMX_ROWS;
    _tile_loadconfig(sizes);
}
NOINLINE WITH_AMX void release_amx() { _tile_release(); }

// Computes sums[m, n] = starts[n] + sum of a[m, k] * w[k, n] for AMX_ROWS rows of bytes, N vectors of n, and `steps`
// times 64 columns. In a panel, the weights of 64 columns and one vector are a tile.
template <int N>
NOINLINE WITH_AMX void amx_sums(const int32_t *starts, const uint8_t *a, int64_t a_row, const int8_t *w, int64_t steps,
                                int32_t *sums) {
#define EACH_SUM(action) action(0, 5) action(1, 6) action(2, 7) if constexpr (N == 4) { action(3, 5) }
#define START(n, other) _tile_loadd(n, starts + 16 * n, 0);
#define MULTIPLY(n, other) _tile_loadd(other, w + 64 * n, row); _tile_dpbusd(n, 4, other);
#define STORE(n, other) _tile_stored(n, sums + 16 * n, row);
    static_assert(N == 3 || N == 4, "there are tiles for this many vectors");
    constexpr int64_t row = N * 64;
    EACH_SUM(START)
    for (; steps > 0; steps--, a += 64, w += AMX_GROUPS * row) {
        _tile_loadd(4, a, a_row);
        EACH_SUM(MULTIPLY)
    }
    EACH_SUM(STORE)
}
#else
constexpr bool HAS_AMX = false;
template <int N> void amx_sums(const int32_t *, const uint8_t *, int64_t, const int8_t *, int64_t, int32_t *);
inline void configure_amx() {}
inline void release_amx() {}
#endif
