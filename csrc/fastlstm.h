/* LSTM and GRU layers on the CPU: one layer in one direction, all its time steps in one call.
 *
 * Sizes are T time steps, B batch rows, I inputs, H hidden units, each at least 1. Arrays are row-major and hold float32
 * or float64, and weights also int8; strides count elements, and the last dimension's is always 1. Weights are torch's:
 * G blocks of H rows, for an LSTM G = 4 in the order i, f, g, o, for a GRU G = 3 in the order r, z, n. Their rows do not
 * overlap: a row stride is at least the number of columns. Other strides may be 0 or negative. Each array begins at a multiple
 * of the size of its elements: 4 bytes for float32, 8 for float64 and int64. Packed weights may begin anywhere.
 *
 * An LSTM has the states h and c. A GRU has h alone: the fields c, c_0, c_n, dc, dc_n and dc_0 must be NULL.
 *
 * The caller owns every array. Those that are written to may not overlap others unless the field's comment says so. Between
 * calls the library keeps the threads of its own pool, and what a caller has made and not yet freed. Functions may be called from several threads at once.
 * They return FASTLSTM_OK or an error code, and never abort. On an error nothing has been written, except with
 * FASTLSTM_NO_MEMORY. A row's result is the same bits whatever the number of threads and the rows beside it, and with int8
 * weights whatever the instruction set.
 */
#ifndef FASTLSTM_H
#define FASTLSTM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FASTLSTM_API __attribute__((visibility("default")))
#define FASTLSTM_VERSION 7 /* of this interface; raised when a structure or a meaning changes */

enum fastlstm_error {
    FASTLSTM_OK = 0,
    FASTLSTM_BAD_VERSION = 1,      /* the structure's `version` is not the library's */
    FASTLSTM_BAD_ARGUMENT = 2,     /* a size, stride or pointer that cannot be, or an array that is not aligned */
    FASTLSTM_NO_MEMORY = 3,
    FASTLSTM_NO_INSTRUCTIONS = 4,  /* this processor, or this build, lacks the instruction set asked for */
    FASTLSTM_CANNOT_READ = 5,      /* the file cannot be opened or read */
    FASTLSTM_NOT_A_MODEL = 6,      /* the file is something else */
    FASTLSTM_MODEL_VERSION = 7,    /* the file's format is newer than this library */
    FASTLSTM_TRUNCATED = 8,        /* the file ends early, or goes on too long */
    FASTLSTM_CORRUPT = 9,          /* the file's checksum or a size in it is wrong */
    FASTLSTM_NOT_A_FILE = 10       /* the path is that of a folder, a pipe or a device */
};

/* What the arrays hold. With the last two, for inference alone, weights are int8 and all other arrays float32. Each weight
 * row stands for its numbers, from -127 to 127, times the row's scale. x and the states h are rounded to 8 or 16 bits
 * within the call, by the largest number of each row. I and H are at most 65536. */
enum fastlstm_dtype {
    FASTLSTM_FLOAT32 = 0,
    FASTLSTM_FLOAT64 = 1,
    FASTLSTM_INT8 = 2,         /* x and h in 8 bits: the fastest */
    FASTLSTM_INT8_BY_INT16 = 3 /* x and h in 16 bits: half the error or less */
};

/* What one step computes: that of torch.nn.LSTM or torch.nn.GRU. Packed weights and saved gates belong to one cell. */
enum fastlstm_cell { FASTLSTM_LSTM = 0, FASTLSTM_GRU = 1 };

/* Which kernels run. Packed weights and saved gates belong to one set; FASTLSTM_BEST is the processor's widest. With int8
 * weights FASTLSTM_AVX512 also needs the processor's VNNI, and FASTLSTM_BEST is AVX2 where that is missing. On 64-bit ARM under
 * Linux FASTLSTM_BEST multiplies int8 weights by sdot where the processor has it. */
enum fastlstm_instructions { FASTLSTM_BEST = 0, FASTLSTM_BASE = 1, FASTLSTM_AVX2 = 2, FASTLSTM_AVX512 = 3 };

/* The library's FASTLSTM_VERSION. */
FASTLSTM_API int fastlstm_version(void);

/* An error code in words, a string of the library's. That of FASTLSTM_NO_MEMORY says how many bytes the thread has last asked
 * for in vain, and lasts until the thread's next call of this function. */
FASTLSTM_API const char *fastlstm_error_text(int code);

/* "avx512", "avx2", "neon" or "base": what `instructions` stands for here, or NULL where it cannot run. */
FASTLSTM_API const char *fastlstm_instructions_name(int instructions);

/* How a call's work is spread. `count` threads are asked for; fewer may come. */
typedef void (*fastlstm_task)(void *argument, int thread, int threads);
typedef struct {
    int64_t count;
    /* Calls task(argument, k, n) for all k from 0 to n - 1, at the same time, for an n from 1 to `threads`, and returns when
     * all have returned. NULL: the library's own pool of threads. */
    void (*parallel)(void *context, fastlstm_task task, void *argument, int threads);
    void *context;
} fastlstm_threads;

/* A `parallel` for the GNU OpenMP runtime of the caller's process: `context` points to these three functions of it. */
typedef struct {
    void (*GOMP_parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*omp_get_thread_num)(void);
    int (*omp_get_num_threads)(void);
} fastlstm_openmp;
FASTLSTM_API void fastlstm_parallel_openmp(void *context, fastlstm_task task, void *argument, int threads);

/* One layer's forward pass. Fields marked "or NULL" may be absent. */
typedef struct {
    int64_t version;      /* FASTLSTM_VERSION */
    int64_t dtype;        /* enum fastlstm_dtype */
    int64_t instructions; /* enum fastlstm_instructions */
    int64_t cell;         /* enum fastlstm_cell */
    int64_t T, B, I, H;
    int64_t reverse;      /* not 0: from the last step to the first, on the same arrays */
    const void *x;         int64_t x_step, x_row;  /* (T, B, I) */
    const void *weight_ih; int64_t weight_ih_row;  /* (G H, I) */
    const void *weight_hh; int64_t weight_hh_row;  /* (G H, H) */
    const void *bias_ih, *bias_hh;                 /* (G H,), each or NULL for zeros */
    const float *weight_ih_scale, *weight_hh_scale; /* (G H,), of each row of int8 weights; NULL for others */
    const void *packed;    /* of fastlstm_pack, or NULL; the weights and biases are then read only if `changed` is given */
    int64_t *changed;      /* with `packed`, or NULL: written, the number of packed parts that differ from the weights. All
                            * weights, scales and biases are looked at; the weights' row strides must be those that were
                            * packed. If not 0, the results are of no use: pack again. */
    const void *h_0;       int64_t h_0_row;        /* (B, H), or NULL for zeros */
    const void *c_0;       int64_t c_0_row;        /* (B, H), or NULL for zeros */
    const uint8_t *reset;  /* (T, B), or NULL: not 0 where the states are zero before a step, unless the step is held */
    const int64_t *lengths; /* (B,), or NULL: row b is held at steps t >= lengths[b], in either direction. Its states pass
                             * through them, in c as well, and its x is not looked at. */
    void *h, *h_n, *c_n;   /* written: (T, B, H), zero at held steps, or NULL if T is 1; (B, H) and (B, H) */
    void *c, *gates;       /* written for the backward pass: (T, B, H) and fastlstm_gates_size bytes; or both NULL. A
                            * GRU has `gates` alone, and a layer with int8 weights neither. */
} fastlstm_forward_args;
FASTLSTM_API int fastlstm_forward(const fastlstm_forward_args *args, const fastlstm_threads *threads);

/* The gradients of one layer. Incoming ones that are NULL are zero, outgoing ones that are NULL are not computed. */
typedef struct {
    int64_t version, dtype, instructions, cell, T, B, I, H, reverse; /* as in the forward pass, like all inputs */
    const void *x;         int64_t x_step, x_row;
    const void *weight_ih; int64_t weight_ih_row;
    const void *weight_hh; int64_t weight_hh_row;
    const void *h_0;       int64_t h_0_row;
    const void *c_0;       int64_t c_0_row;
    const uint8_t *reset;
    const int64_t *lengths;
    const void *h, *c, *gates;                     /* what the forward pass wrote; h may be NULL if T is 1 */
    const void *dh;        int64_t dh_step, dh_row; /* (T, B, H), or NULL; not looked at where steps are held */
    const void *dc;        int64_t dc_step, dc_row; /* (T, B, H), or NULL */
    const void *dh_n;      int64_t dh_n_row;       /* (B, H), or NULL */
    const void *dc_n;      int64_t dc_n_row;       /* (B, H), or NULL */
    void *dx, *dweight_ih, *dweight_hh;            /* written: (T, B, I), (G H, I), (G H, H), each or NULL */
    void *dbias_ih, *dbias_hh;                     /* written: (G H,), each or NULL. They are equal for an LSTM. */
    void *dh_0, *dc_0;                             /* written: (B, H), each or NULL */
} fastlstm_backward_args;
FASTLSTM_API int fastlstm_backward(const fastlstm_backward_args *args, const fastlstm_threads *threads);

/* Lanes of a vector, or 0 where `dtype` has no gates or `instructions` are not available. The gates of either cell are
 * (T, ceil(H / lanes), B, 4, lanes). */
FASTLSTM_API int64_t fastlstm_lanes(int64_t dtype, int64_t instructions);
/* Bytes of the saved gates, and of packed weights; 0 where an argument is invalid. */
FASTLSTM_API size_t fastlstm_gates_size(int64_t dtype, int64_t instructions, int64_t cell, int64_t T, int64_t B,
                                        int64_t H);
FASTLSTM_API size_t fastlstm_packed_size(int64_t dtype, int64_t instructions, int64_t cell, int64_t I, int64_t H);

/* Writes fastlstm_packed_size bytes to `packed`, which serve forward passes until the weights change. Of `args`, version,
 * dtype, instructions, cell, I, H, the weights, scales and biases are read. The two types with int8 weights pack alike. */
FASTLSTM_API int fastlstm_pack(const fastlstm_forward_args *args, void *packed);

/* Single time steps of a layer. Its arguments are checked, its weights packed and its threads chosen once. */
typedef struct fastlstm_steps fastlstm_steps;

/* Makes steps that the caller frees. Of `args`, version, dtype, instructions, cell, B, I, H, the weights, scales and biases
 * are read. They may be freed afterwards, and so may `threads`, but not its context. On an error *steps is NULL. */
FASTLSTM_API int fastlstm_steps_make(const fastlstm_forward_args *args, const fastlstm_threads *threads,
                                     fastlstm_steps **steps);
FASTLSTM_API void fastlstm_steps_free(fastlstm_steps *steps); /* NULL is allowed */

/* Runs one step: contiguous x (B, I), h and c (B, H) to h_next and c_next (B, H). c_next may be c. For a GRU both are NULL. */
FASTLSTM_API int fastlstm_step(const fastlstm_steps *steps, const void *x, const void *h, const void *c, void *h_next,
                               void *c_next);

/* A row classifier, as `python -m fastlstm.export` writes it: an LSTM with weights in float32 or int8, then a linear layer
 * on its last state. */
typedef struct fastlstm_model fastlstm_model;

/* Makes a model that the caller frees, from a file or its bytes. These may be freed afterwards. On an error *model is NULL. */
FASTLSTM_API int fastlstm_model_load(const char *path, fastlstm_model **model);
FASTLSTM_API int fastlstm_model_read(const void *bytes, size_t size, fastlstm_model **model);
FASTLSTM_API void fastlstm_model_free(fastlstm_model *model); /* NULL is allowed */

FASTLSTM_API int64_t fastlstm_model_inputs(const fastlstm_model *model);  /* I */
FASTLSTM_API int64_t fastlstm_model_classes(const fastlstm_model *model); /* C */

/* x (B, T, I), contiguous, to logits (B, C). */
FASTLSTM_API int fastlstm_model_run(const fastlstm_model *model, int64_t B, int64_t T, const float *x, float *logits,
                                    const fastlstm_threads *threads);

#ifdef __cplusplus
}
#endif
#endif
