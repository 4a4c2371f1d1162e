// The instructions of AMX that amx.h uses, as plain loops: with FASTLSTM_EMULATE_TILES its sums are checked on any processor.
#pragma once

static thread_local uint8_t emulated_tiles[8][16][64];
static thread_local int emulated_rows = 0;  // 0 until tiles are configured
static void load_emulated(int tile, const void *from, int64_t row) {
    for (int m = 0; m < emulated_rows; m++) __builtin_memcpy(emulated_tiles[tile][m], (const char *)from + m * row, 64);
}
static void store_emulated(int tile, void *to, int64_t row) {
    for (int m = 0; m < emulated_rows; m++) __builtin_memcpy((char *)to + m * row, emulated_tiles[tile][m], 64);
}
static void multiply_emulated(int to, int a, int b) {
    int32_t sums[16][16];
    __builtin_memcpy(sums, emulated_tiles[to], sizeof sums);
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 64; k++)
            for (int n = 0; n < 16; n++)
                sums[m][n] += emulated_tiles[a][m][k] * (int8_t)emulated_tiles[b][k / 4][4 * n + k % 4];
    __builtin_memcpy(emulated_tiles[to], sums, sizeof sums);
}
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#define _tile_loadconfig(sizes) (void)(emulated_rows = ((const uint8_t *)(sizes))[48])
#define _tile_release() (void)(emulated_rows = 0)
#define _tile_loadd load_emulated
#define _tile_stored store_emulated
#define _tile_dpbusd multiply_emulated
