// The primitives of the backend numba, compiled for ARM, beside plain loops in double: see `primitives.py` in
// fastlstm/backends/numba/llvm for their arguments, all of which are of 64 bits. A row's sums must have the same bits
// in any number of panels. Prints a line, and what differs.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <vector>

typedef int64_t I;
typedef std::vector<float> Floats;
typedef void Primitive8(I, I, I, I, I, I, I, I);
typedef void Primitive13(I, I, I, I, I, I, I, I, I, I, I, I, I);
typedef void Primitive17(I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I);
extern "C" Primitive17 gemm1, gemm2, gemm3, gemm4, gemv1, gemv2, gemv3, gemv4;
extern "C" Primitive8 accumulate1, accumulate2, accumulate3, accumulate4;
extern "C" Primitive13 masked;

constexpr I L = 4, SIZE = 4;  // lanes, and bytes of an element
int failures = 0, cases = 0;

Floats random_floats(I count) {
    Floats values(count);
    for (float &value : values) value = (float)(rand() / (double)RAND_MAX * 2 - 1);
    return values;
}
I address(const Floats &a, I element = 0) { return (I)(a.data() + element); }

void compare(const char *name, I vectors, I count, float got, double want) {
    if (fabs(got - want) < 2e-5) return;
    if (failures++ < 20) printf("%s of %d vectors, %d rows or panels: %g, not %g\n", name, (int)vectors, (int)count, got, want);
}

double sum(const Floats &a, I begin, I step, const Floats &w, I column, I row, I count) {
    double total = 0;
    for (I k = 0; k < count; k++) total += (double)a[begin + k * step] * w[column + k * row];
    return total;
}

// Some rows, whose columns lie side by side or whose rows do, by `vectors` vectors
void check_rows(I vectors, I rows, I count, bool is_transposed) {
    cases++;
    const I width = vectors * L, w_row = width + L, count2 = count / 2, a2_row = count2 + 1;
    const I a_row = is_transposed ? 1 : count + 3, a_step = is_transposed ? rows + 1 : 1;
    const Floats a = random_floats((rows + 1) * (count + 4)), a2 = random_floats(rows * a2_row),
                 w = random_floats((count + count2) * w_row), start = random_floats(rows * width);
    Floats out(rows * width + L, NAN), added = start, some = start;
    Primitive17 *const gemms[] = {gemm1, gemm2, gemm3, gemm4};
    gemms[vectors - 1](rows, address(start), width * SIZE, address(out), width * SIZE, address(w), w_row * SIZE, address(a),
                       a_row * SIZE, a_step * SIZE, count, 1, 0, count * w_row * SIZE, address(a2), a2_row * SIZE, count2);
    Primitive8 *const accumulates[] = {accumulate1, accumulate2, accumulate3, accumulate4};
    if (!is_transposed)
        accumulates[vectors - 1](rows, address(a), a_row * SIZE, address(w), w_row * SIZE, count, address(added), width * SIZE);
    if (!is_transposed && vectors == 1)
        masked(rows, address(some), L * SIZE, address(w), w_row * SIZE, address(a), a_row * SIZE, count, 1, 0, 0, 1, 3);
    for (I m = 0; m < rows; m++) {
        for (I n = 0; n < width; n++) {
            const I k = m * width + n;
            const double one = start[k] + sum(a, m * a_row, a_step, w, n, w_row, count);
            compare("gemm", vectors, rows, out[k], one + sum(a2, m * a2_row, 1, w, count * w_row + n, w_row, count2));
            if (is_transposed) continue;
            compare("accumulate", vectors, rows, added[k], one);
            if (vectors == 1) compare("masked", vectors, rows, some[k], n == 1 || n == 2 ? one : start[k]);
        }
    }
    for (I n = 0; n < L; n++) failures += !std::isnan(out[rows * width + n]);
}

// One row by some panels, from the first one on or from the last one back
void check_panels(I vectors, I panels, I count, I count2, I block, I sign) {
    cases++;
    const I width = vectors * L, first = block > 4 ? block - 2 : block;
    const Floats a = random_floats(count), a2 = random_floats(count2 + 1), w = random_floats(panels * count * width),
                 w2 = random_floats(panels * (count2 + 1) * width), start = random_floats(panels * width),
                 part = random_floats(panels * width);
    Floats together(panels * width + L, NAN), alone = together;
    auto run = [&](I number, I p, Floats &out) {
        Primitive17 *const gemvs[] = {gemv1, gemv2, gemv3, gemv4};
        const I step = sign * width * SIZE;
        gemvs[vectors - 1](number, address(start, p * width), step, address(out, p * width), step, address(a),
                           address(w, p * count * width), count * step, count, address(a2),
                           address(w2, p * (count2 + 1) * width), (count2 + 1) * step, count2, first, block,
                           address(part, p * width), step);
    };
    run(panels, sign > 0 ? 0 : panels - 1, together);
    for (I p = 0; p < panels; p++) run(1, p, alone);
    for (I p = 0; p < panels; p++) {
        for (I n = 0; n < width; n++) {
            const I k = p * width + n;
            const double products = sum(a, 0, 1, w, p * count * width + n, width, count) +
                                    sum(a2, 0, 1, w2, p * (count2 + 1) * width + n, width, count2);
            compare("gemv", vectors, panels, together[k], (double)start[k] + part[k] + products);
            failures += together[k] != alone[k];
        }
    }
}

int main() {
    for (I vectors = 1; vectors <= 4; vectors++) {
        for (I rows = 1; rows <= 40; rows++)
            for (I count : {1, 2, 3, 4, 5, 9, 16, 23})
                for (bool is_transposed : {false, true}) check_rows(vectors, rows, count, is_transposed);
        for (I panels = 1; panels <= 21; panels++)
            for (I count : {1, 3, 8, 17})
                for (I count2 : {0, 2, 9})
                    for (I block : {4, 7, 64})
                        for (I sign : {1, -1}) check_panels(vectors, panels, count, count2, block, sign);
    }
    printf("%d cases, %d failures\n", cases, failures);
    return failures > 0;
}
