/* Reads the images of an IDX file with a model of `python -m fastlstm.export`, and prints each one's class on a line.
 *
 *     mnist row_lstm.flstm t10k-images-idx3-ubyte [batch [threads]]
 */
#include <stdio.h>
#include <stdlib.h>

#include "../fastlstm.h"

static int fail(const char *what, const char *why) {
    fprintf(stderr, "mnist: %s: %s\n", what, why);
    return 1;
}

static unsigned long big_endian(const unsigned char *bytes) {
    return (unsigned long)bytes[0] << 24 | (unsigned long)bytes[1] << 16 | (unsigned long)bytes[2] << 8 | bytes[3];
}

/* Rows of an image are its time steps: x (B, T, I) from the next images of the file, at most `batch`; how many there were. */
static long read_images(FILE *file, long batch, long pixels, unsigned char *bytes, float *x) {
    long count = (long)fread(bytes, (size_t)pixels, (size_t)batch, file);
    for (long k = 0; k < count * pixels; k++) x[k] = (float)bytes[k] / 255.0f;
    return count;
}

static int classify(const fastlstm_model *model, FILE *images, long batch, const fastlstm_threads *threads) {
    unsigned char head[16];
    if (fread(head, 1, 16, images) != 16 || big_endian(head) != 0x803) return fail("images", "not an IDX file of images");
    long count = (long)big_endian(head + 4), T = (long)big_endian(head + 8), I = (long)big_endian(head + 12);
    long C = (long)fastlstm_model_classes(model), done = 0;
    if (I != fastlstm_model_inputs(model) || T < 1 || T > 4096) return fail("images", "not of the model's size");

    unsigned char *bytes = malloc((size_t)(batch * T * I));
    float *x = malloc((size_t)(batch * T * I) * sizeof *x), *logits = malloc((size_t)(batch * C) * sizeof *logits);
    int failed = !bytes || !x || !logits ? fail("images", "no memory") : 0;
    while (!failed && done < count) {
        long rows = read_images(images, batch < count - done ? batch : count - done, T * I, bytes, x);
        if (!rows) {
            failed = fail("images", "the file is truncated");
            break;
        }
        int code = fastlstm_model_run(model, rows, T, x, logits, threads);
        if (code) failed = fail("run", fastlstm_error_text(code));
        for (long b = 0; !code && b < rows; b++) {
            long best = 0;
            for (long c = 1; c < C; c++)
                if (logits[b * C + c] > logits[b * C + best]) best = c;
            printf("%ld\n", best);
        }
        done += rows;
    }
    free(bytes), free(x), free(logits);
    return failed;
}

int main(int argc, char **argv) {
    if (argc < 3) return fail("usage", "mnist MODEL IMAGES [BATCH [THREADS]]");
    long batch = argc > 3 ? strtol(argv[3], NULL, 10) : 128;
    fastlstm_threads threads = {argc > 4 ? strtol(argv[4], NULL, 10) : 1, NULL, NULL};
    if (batch < 1 || batch > 100000) return fail(argv[3], "must be a batch size from 1 to 100000");

    fastlstm_model *model;
    int code = fastlstm_model_load(argv[1], &model);
    if (code) return fail(argv[1], fastlstm_error_text(code));
    FILE *images = fopen(argv[2], "rb");
    int failed = images ? classify(model, images, batch, &threads) : fail(argv[2], "cannot be opened");
    if (images) fclose(images);
    fastlstm_model_free(model);
    return failed;
}
