/* Hands mutated copies of a model file to the loader, and runs those that it takes: for sanitizers.
 *
 *     fuzz MODEL COUNT SEED
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../fastlstm.h"

enum { HEADER = 28 };

static uint64_t state;
static uint32_t draw(uint32_t below) {
    state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)((state >> 33) % below);
}

static void put(unsigned char *bytes, uint32_t value) {
    for (int k = 0; k < 4; k++) bytes[k] = (unsigned char)(value >> 8 * k);
}

static void mend_checksum(unsigned char *bytes, size_t size) {
    uint32_t crc = ~UINT32_C(0);
    for (size_t k = HEADER; k < size; k++) {
        crc ^= bytes[k];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? UINT32_C(0xEDB88320) : 0);
    }
    put(bytes + 24, ~crc);
}

/* A changed copy of exactly *size bytes. */
static unsigned char *mutated(const unsigned char *file, size_t *size) {
    const uint32_t odd[] = {0, 1, 2, 0x7fffffff, 0x80000000, 0xffffffff, 65536, 65537, 0x10000000};
    size_t length = draw(3) ? *size : draw(2) ? draw((uint32_t)*size + 1) : *size + draw(64);
    if (draw(8) == 0) length = draw(HEADER + 8);
    unsigned char *bytes = calloc(length ? length : 1, 1);
    if (!bytes) return NULL;
    memcpy(bytes, file, length < *size ? length : *size);
    for (uint32_t k = draw(4); length && k > 0; k--) bytes[draw((uint32_t)length)] ^= (unsigned char)(1 << draw(8));
    if (length >= HEADER && draw(3) == 0) put(bytes + 8 + 4 * draw(4), draw(2) ? odd[draw(9)] : draw(64));
    if (length >= HEADER && draw(2)) mend_checksum(bytes, length);
    *size = length;
    return bytes;
}

static int run(const fastlstm_model *model) {
    const int64_t I = fastlstm_model_inputs(model), C = fastlstm_model_classes(model);
    float *x = calloc((size_t)(6 * I), sizeof *x), *logits = calloc((size_t)(2 * C), sizeof *logits);
    int code = x && logits ? fastlstm_model_run(model, 2, 3, x, logits, NULL) : FASTLSTM_NO_MEMORY;
    free(x), free(logits);
    return code;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    FILE *stream = fopen(argv[1], "rb");
    static unsigned char file[1 << 20];
    const size_t size = stream ? fread(file, 1, sizeof file, stream) : 0;
    if (stream) fclose(stream);
    if (size < HEADER || size == sizeof file) return 2;
    state = strtoull(argv[3], NULL, 10);
    long counts[16] = {0};
    for (long k = strtol(argv[2], NULL, 10); k > 0; k--) {
        size_t length = size;
        unsigned char *bytes = mutated(file, &length);
        fastlstm_model *model;
        int code = bytes ? fastlstm_model_read(bytes, length, &model) : FASTLSTM_NO_MEMORY;
        free(bytes);
        if (code < 0 || code > 15 || (bytes && !code != (model != NULL)) || (!code && run(model))) return 1;
        if (!code) fastlstm_model_free(model);
        counts[code]++;
    }
    for (int code = 0; code < 16; code++)
        if (counts[code]) printf("%d %ld\n", code, counts[code]);
    return 0;
}
