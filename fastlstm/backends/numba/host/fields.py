"""The fields of the structs that kernels read, a line each: its name, then what it holds.

Every field is a 64-bit integer. Addresses, offsets and strides are in bytes, and an address of 0 says that there is no
such array. A shape in parentheses is that of the array at an address. Sizes are T steps, B batch rows of one stacked
layer, R batch rows of all of them, I inputs, H units, K heads, L lanes of a vector. A cell has S pre-activations, of
which X have a product with x and Y one with h, P params, Q inputs, and saves G vectors for each panel and row.
"""


def names(table: str) -> list[str]:
    """Return the field of each line."""
    return [line.split()[0] for line in table.splitlines() if line]


SIZES = """
size                bytes of an element of states and sums
lanes               L, elements of a vector
T                   steps
B                   batch rows
rows                R
I                   columns of x
H                   units
panels              panels of H units, each of one vector
heads               K
head                H / K, the units of a head and the columns of weight_hh
span                columns of h that a panel multiplies: those of as many heads as one panel can have units of
dense               1 if a last panel that is not full has its pre-activations side by side, without padding
reverse             1 if the layer runs from the last step to the first
team_count          teams that split the batch rows
pieces              bfloat16 numbers that a float32 is split into for the matrix unit, 0 without it
is_narrow           1 if x, h, the weights and their gradients are bfloat16, and all else float32
original_size       bytes of an element of the original weights
"""

CELL = """
sums                S
of_x                X; these are the first pre-activations
of_h                Y; these are the last pre-activations
joint               1 if X = Y = S
blocks              (X + Y,) int64: the block of weight_ih of each pre-activation of x, then that of weight_hh of h
saved               G, vectors of a panel's saved values of a row: no fewer than hold those that its units share
params              P
inputs              Q
values              Q + P
others              states but the first
carries_h           1 if the gradient of h goes to the step before also beside its product
reads               bits of the pointer table's entries that the cell reads
phases              phases of a step, more than 1 if the cell takes means
later_values        values of a unit that later phases read
shared_values       values that a row's units share, and sums of means
"""

SCRATCH = """
table_bytes         bytes of a pointer table; a thread's scratch begins with two
wide                vectors of a scratch row that hold products: of one panel or, with several phases, of all
slots               vectors of a scratch row beside them
later_slot          first slot of the values that later phases read
shared_slot         first slot of the values that a row's units share
panel_bytes         bytes from one panel's products to the next one's, 0 with one phase
rows_together       batch rows that go through all phases before the next rows do
scratch_bytes       bytes from one thread's scratch to the next one's
"""

LAYOUT = """
gate_panels         panels of saved values: one more than of units if there are any that a row's units share
c_step              stride of a step in the states but the first, 0 if only the last ones are stored
pitch               stride of 32 columns in an operand of the matrix unit
x_step              stride of a step of x
x_row               stride of a row of x
weight_ih_row       stride of a row of weight_ih
weight_hh_row       stride of a row of weight_hh
relax               address of a function that a waiting thread calls, or 0
constants           address of 1024 bytes of zeros, then a one
"""

BUFFERS = """
barrier             counters at which threads meet, a cache line each
scratch             each thread's scratch
large               int64 that becomes 1 if the matrix unit cannot take a number
others_at           record of each state but the first
values_at           record of each input, then of each param
dparams_at          address of each param's gradient, or 0
"""
TAILS = "others_at", "values_at", "dparams_at"

KEPT = """
digests             a digest of each block of the original weights, 0 if the packed weights are not kept
stale               int64 that counts blocks whose digests differ; 0: weights are packed, and digests stored
"""

WEIGHTS = """
weight_ih           (X H, I)
weight_hh           (Y H, H / K)
bias                (X H,) or 0
bias_hh             (Y H,) or 0
original_ih         weight_ih before it is cast, contiguous, of which digests are
original_hh         weight_hh before it is cast
original_bias       bias before it is cast
original_bias_hh    bias_hh before it is cast
"""

LAYER = """
x                   (T, B, I)
h_0                 (B, H)
h_0_row             stride of a row of h_0
lengths             (R,) int64, the steps of each row, or 0
reset               (T, R) bytes, 1 where a row starts from zeros, or 0
h                   (T, B, H)
gates               (T, gate_panels, B, G, L), what is saved, or 0
"""

FORWARD = """
h_step              stride of a step of h, or of `states`
h_row               stride of a row of h, or of `states`
out_step            stride of a step of h where `states` are apart
out_row             stride of a row of h where `states` are apart
places              panels that `packed` has room for: all; one a thread; or 0, then weights are read unpacked
block_x             columns of x in a block of its sum, 0 if x shares h's sum
block               columns of h in a block of its sum, or of x and h
input_steps         steps for which the products of x are computed at once, or 0
"""

FORWARD_BUFFERS = """
states              (2, B, H) float32 h of two steps, if is_narrow
operand             rows of x and h of two steps, or of x of 2 `input_steps` steps, for the matrix unit
input_preact        (panels, input_steps, B, S, L) products of x, 2 for B if block_x is 0; or (panels, pitch / 64, 4, L)
"""

FORWARD_KEPT = """
packed              (places, span, Y, L) weight_hh, then (places, I, X, L) weight_ih; or operands of the matrix unit
biases              (panels, S, L)
"""

FORWARD_CALL = """
h_n                 (B, H)
flip                1 if the first step takes the panels from last to first
"""

FORWARD_STATE = """
start               (B, H) before the first step
start_row           stride of a row of it
steps               (T, B, H) after each step, or (B, H) if c_step is 0
last                (B, H) after the last step
"""

FORWARD_VALUE = """
value               (T, B, H) of an input, (H,) of a param
value_step          stride of a step of it, 0 of a param
value_row           stride of a row of it, 0 of a param
"""

BACKWARD = """
gate_rows           batch rows from one panel of `gates` to the next
reach               panels of dpreact that a group of columns of h multiplies
chunk               steps whose dpreact becomes weight gradients together
ring                chunks of `strips` that are kept
strip               columns of a strip of [x, h, 1]
halves              sets of accumulators of the weight gradients, each over a share of the batch rows: 1 or 2
sum_rows            accumulator rows: one for each column of [x, h, 1], with padding
sums_of_h           first accumulator row of h
sum_of_one          accumulator row of the ones
kept                steps that `dpreact` has room for
packs               1 if transposed weights are read
rows_kept           steps that `dpreact_rows` has room for
strips_bytes        bytes of the strips of a chunk
columns_bytes       bytes of the columns of a chunk
"""

BACKWARD_BUFFERS = """
dpreact             (panels, kept, B, S + P, L)
carried             (others + carries_h + 1, panels, B, L), of states but the first, h, and dh of held rows
strips              (ring, strips, chunk B, strip) columns of [x, h, 1]; or rows of the transposed [x, 1, h] by the unit
dweights            (halves, panels, sum_rows, max(X, Y), L), or 0 if few rows are summed from `strips` at once
dpreact_rows        dpreact as rows of an operand of the matrix unit, for products with weights
columns             dpreact as columns of an operand, for the weight gradients
"""

BACKWARD_KEPT = """
packed_hh           (groups of 4 vectors of H, reach, Y L, 4 L) transposed weight_hh, or 0 if it is not read
packed_ih           (groups of 4 vectors of I, panels, X L, 4 L) transposed weight_ih, or 0 if it is not read
"""

BACKWARD_CALL = """
dh                  (T, B, H), zeros with strides of 0 if there is none
dh_step             stride of a step of dh
dh_row              stride of a row of dh
dh_n                (B, H) or 0
dh_n_row            stride of a row of dh_n
dx                  (T, B, I) or 0
dweight_ih          (X H, I) or 0
dweight_hh          (Y H, H / K) or 0
dbias_ih            (X H,) or 0
dbias_hh            (Y H,) or 0
dh_0                (B, H) or 0
"""

BACKWARD_STATE = """
start               (B, H) before the first step
start_row           stride of a row of it
steps               (T, B, H) after each step, or 0 of a single step that does not read them
d                   (T, B, H) gradient of the state after each step, or 0
d_step              stride of a step of d
d_row               stride of a row of d
d_last              (B, H) gradient of the last state, or 0
d_last_row          stride of a row of d_last
d_start             (B, H) gradient of the initial state, or 0
"""

BACKWARD_VALUE = f"""{FORWARD_VALUE.rstrip()}
d_value             (T, B, H) gradient of an input, or 0
"""

STACK = """
task                address of the kernel
first               address of the first layer's struct
bytes               bytes from one struct to the next
count               layers
lanes               sets of buffers; layer k uses set k % lanes
"""

REGION = """
task                address of the kernel
arguments           address of its struct
thread_number       address of a function that returns a thread's number
team_size           address of a function that returns how many threads there are
"""
