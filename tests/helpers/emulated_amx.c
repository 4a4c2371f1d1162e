/* The instructions of AMX that products of bfloat16 take, as Intel defines them. Every thread has eight tiles of its own.
   One function stands for each of LLVM's intrinsics, whose arguments it takes as 64-bit integers. */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local struct {
    int is_configured;
    int rows[8], row_bytes[8];
    uint8_t bytes[8][16][64] __attribute__((aligned(64)));
} amx;

void amx_ldtilecfg(int64_t config)
{
    memset(&amx, 0, sizeof amx);
    amx.is_configured = 1;
    for (int tile = 0; tile < 8; tile++) {
        uint16_t row_bytes;
        memcpy(&row_bytes, (void *)(config + 16 + 2 * tile), 2);
        amx.row_bytes[tile] = row_bytes;
        amx.rows[tile] = *(uint8_t *)(config + 48 + tile);
        if (amx.rows[tile] > 16 || row_bytes > 64)
            abort();
    }
}

void amx_tilerelease(void)
{
    memset(&amx, 0, sizeof amx);
}

static void check(int64_t tile)
{
    if (!amx.is_configured || tile < 0 || tile > 7 || amx.rows[tile] == 0)
        abort(); /* where a processor raises an exception */
}

void amx_tileloadd64(int64_t tile, int64_t address, int64_t stride)
{
    check(tile);
    memset(amx.bytes[tile], 0, sizeof amx.bytes[tile]);
    for (int row = 0; row < amx.rows[tile]; row++)
        memcpy(amx.bytes[tile][row], (void *)(address + row * stride), amx.row_bytes[tile]);
}

void amx_tilestored64(int64_t tile, int64_t address, int64_t stride)
{
    check(tile);
    for (int row = 0; row < amx.rows[tile]; row++)
        memcpy((void *)(address + row * stride), amx.bytes[tile][row], amx.row_bytes[tile]);
}

/* Sums of the even and of the odd products are fused, then added, and their sum is added to the total. Numbers below the
   smallest normal one count as zero. */
void amx_tdpbf16ps(int64_t total, int64_t left, int64_t right)
{
    check(total), check(left), check(right);
    unsigned control = _mm_getcsr();
    _mm_setcsr((control & ~0x6000u) | 0x8040);
    int pairs = amx.row_bytes[left] / 4, width = amx.row_bytes[total] / 4;
    if (amx.rows[right] < pairs || amx.rows[total] != amx.rows[left] || amx.row_bytes[right] != amx.row_bytes[total])
        abort();
    for (int m = 0; m < amx.rows[total]; m++) {
        float even[16] = {0}, odd[16] = {0}, *sum = (float *)amx.bytes[total][m];
        for (int k = 0; k < pairs; k++) {
            uint32_t numbers, low, high;
            float first, second;
            memcpy(&numbers, amx.bytes[left][m] + 4 * k, 4);
            low = numbers << 16, high = numbers & 0xffff0000;
            memcpy(&first, &low, 4), memcpy(&second, &high, 4);
            for (int n = 0; n < width; n++) {
                uint32_t weights, w_low, w_high;
                float w_first, w_second;
                memcpy(&weights, amx.bytes[right][k] + 4 * n, 4);
                w_low = weights << 16, w_high = weights & 0xffff0000;
                memcpy(&w_first, &w_low, 4), memcpy(&w_second, &w_high, 4);
                even[n] = __builtin_fmaf(first, w_first, even[n]);
                odd[n] = __builtin_fmaf(second, w_second, odd[n]);
            }
        }
        for (int n = 0; n < width; n++)
            sum[n] += even[n] + odd[n];
    }
    _mm_setcsr(control);
}
