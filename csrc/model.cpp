// A row classifier from a file: an LSTM, then a linear layer on its last state.
//
// The file, all numbers little-endian: the 8 bytes "fastlstm"; uint32 version; uint32 I, H, C; uint32 CRC-32 of everything
// after it. Version 1 goes on with float32 weight_ih (4H, I), weight_hh (4H, H), bias (4H), weight (C, H), linear bias (C).
// In version 2 the LSTM has int8 weights: uint32 bits of x and h (8 or 16); float32 scales of the rows of weight_ih (4H) and
// of weight_hh (4H), bias (4H), weight (C, H), linear bias (C); then int8 weight_ih (4H, I) and weight_hh (4H, H).
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "job.h"

using fastlstm::allocate;

struct fastlstm_model {
    int64_t dtype, I, H, C;
    void *packed;                 // of fastlstm_pack
    const float *weight, *bias;   // of the linear layer, (C, H) and (C,)
};

namespace {

constexpr size_t HEADER = 28;
constexpr uint32_t FLOAT_FORMAT = 1, INT8_FORMAT = 2, LARGEST = 1 << 16;  // of I, H and C

uint32_t uint32_at(const unsigned char *bytes) {
    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

uint32_t crc32(const unsigned char *bytes, size_t size) {
    uint32_t crc = ~UINT32_C(0);
    for (size_t k = 0; k < size; k++) {
        crc ^= bytes[k];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? UINT32_C(0xEDB88320) : 0);
    }
    return ~crc;
}

void read_floats(const unsigned char *file, int64_t count, float *to) {
    for (int64_t k = 0; k < count; k++) {
        const uint32_t bits = uint32_at(file + 4 * k);
        memcpy(to + k, &bits, 4);
    }
}

size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

int fastlstm_model_read(const void *bytes, size_t size, fastlstm_model **model) {
    if (!model) return FASTLSTM_BAD_ARGUMENT;
    *model = nullptr;
    if (!bytes) return FASTLSTM_BAD_ARGUMENT;
    const unsigned char *file = (const unsigned char *)bytes;
    if (size < 8 || memcmp(file, "fastlstm", 8)) return FASTLSTM_NOT_A_MODEL;
    if (size < HEADER) return FASTLSTM_TRUNCATED;
    const uint32_t format = uint32_at(file + 8);
    if (format != FLOAT_FORMAT && format != INT8_FORMAT) return FASTLSTM_MODEL_VERSION;
    const bool int8 = format == INT8_FORMAT;
    const int64_t I = uint32_at(file + 12), H = uint32_at(file + 16), C = uint32_at(file + 20);
    if (I < 1 || H < 1 || C < 1 || I > LARGEST || H > LARGEST || C > LARGEST) return FASTLSTM_CORRUPT;
    // `floats` counts all float32: weights or scales, biases and the linear layer. Weights of int8 follow them
    const int64_t weights = 4 * H * (I + H), of_linear = C * (H + 1);
    const int64_t floats = (int8 ? 3 * 4 * H : weights + 4 * H) + of_linear, first = int8 ? HEADER + 4 : HEADER;
    if ((int64_t)size != first + floats * 4 + (int8 ? weights : 0)) return FASTLSTM_TRUNCATED;
    if (crc32(file + HEADER, size - HEADER) != uint32_at(file + 24)) return FASTLSTM_CORRUPT;
    const uint32_t bits = int8 ? uint32_at(file + HEADER) : 0;
    if (int8 && bits != 8 && bits != 16) return FASTLSTM_CORRUPT;
    const int64_t dtype = !int8 ? FASTLSTM_FLOAT32 : bits == 8 ? FASTLSTM_INT8 : FASTLSTM_INT8_BY_INT16;
    const int8_t *numbers = (const int8_t *)file + first + floats * 4;
    for (int64_t k = 0; int8 && k < weights; k++)
        if (numbers[k] == INT8_MIN) return FASTLSTM_CORRUPT;

    // one allocation: the model, packed weights, the linear layer; the layer's own numbers only while they are packed
    const size_t head = padded(sizeof(fastlstm_model));
    const size_t packed = padded(fastlstm_packed_size(dtype, FASTLSTM_BEST, FASTLSTM_LSTM, I, H));
    float *values = (float *)allocate((size_t)floats * 4);
    void *memory = values ? allocate(head + packed + (size_t)of_linear * 4) : nullptr;
    if (!memory) {
        free(values);
        return FASTLSTM_NO_MEMORY;
    }
    read_floats(file + first, floats, values);
    float *linear = (float *)((char *)memory + head + packed);
    memcpy(linear, values + floats - of_linear, (size_t)of_linear * 4);
    fastlstm_model *loaded = (fastlstm_model *)memory;
    *loaded = {dtype, I, H, C, (char *)memory + head, linear, linear + C * H};
    fastlstm_forward_args a = {};
    a.version = FASTLSTM_VERSION, a.dtype = dtype, a.I = I, a.H = H, a.weight_ih_row = I, a.weight_hh_row = H;
    if (int8) {
        a.weight_ih = numbers, a.weight_hh = numbers + 4 * H * I;
        a.weight_ih_scale = values, a.weight_hh_scale = values + 4 * H;
    } else {
        a.weight_ih = values, a.weight_hh = values + 4 * H * I;
    }
    a.bias_ih = values + floats - of_linear - 4 * H;
    int code = fastlstm_pack(&a, loaded->packed);
    free(values);
    if (code) fastlstm_model_free(loaded);
    else *model = loaded;
    return code;
}

int fastlstm_model_load(const char *path, fastlstm_model **model) {
    if (!model) return FASTLSTM_BAD_ARGUMENT;
    *model = nullptr;
    const int file = path ? open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC) : -1;  // which does not wait for a pipe's writer
    struct stat status = {};
    int code = file < 0 || fstat(file, &status) ? FASTLSTM_CANNOT_READ : FASTLSTM_OK;
    if (!code && !S_ISREG(status.st_mode)) code = FASTLSTM_NOT_A_FILE;
    const size_t size = (size_t)status.st_size;
    char *bytes = code ? nullptr : (char *)allocate(size + 1);
    if (!code && !bytes) code = FASTLSTM_NO_MEMORY;
    for (size_t done = 0; !code && done < size;) {
        const ssize_t count = read(file, bytes + done, size - done);
        if (count > 0) done += (size_t)count;
        else code = FASTLSTM_CANNOT_READ;
    }
    if (file >= 0) close(file);
    if (!code) code = fastlstm_model_read(bytes, size, model);
    free(bytes);
    return code;
}

void fastlstm_model_free(fastlstm_model *model) { free(model); }

int64_t fastlstm_model_inputs(const fastlstm_model *model) { return model ? model->I : 0; }
int64_t fastlstm_model_classes(const fastlstm_model *model) { return model ? model->C : 0; }

int fastlstm_model_run(const fastlstm_model *model, int64_t B, int64_t T, const float *x, float *logits,
                       const fastlstm_threads *threads) {
    const int64_t limit = INT64_C(1) << 40;
    if (!model || !x || !logits || (uintptr_t)logits % sizeof(float) || B < 1 || T < 1 || B > limit / T || B * T > limit / (model->H + model->I))
        return FASTLSTM_BAD_ARGUMENT;
    const int64_t H = model->H;
    float *h = (float *)allocate((size_t)((T + 2) * B * H) * 4);
    if (!h) return FASTLSTM_NO_MEMORY;
    float *h_n = h + T * B * H;
    fastlstm_forward_args a = {};
    a.version = FASTLSTM_VERSION, a.dtype = model->dtype, a.T = T, a.B = B, a.I = model->I, a.H = H;
    a.x = x, a.x_step = model->I, a.x_row = T * model->I, a.packed = model->packed;
    a.h = h, a.h_n = h_n, a.c_n = h_n + B * H;
    int code = fastlstm_forward(&a, threads);
    for (int64_t b = 0; !code && b < B; b++) {
        for (int64_t c = 0; c < model->C; c++) {
            float sum = model->bias[c];
            for (int64_t k = 0; k < H; k++) sum += h_n[b * H + k] * model->weight[c * H + k];
            logits[b * model->C + c] = sum;
        }
    }
    free(h);
    return code;
}
