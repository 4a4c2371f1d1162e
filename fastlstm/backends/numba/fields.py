"""The fields of the structs that kernels read, a line each: its name, then what it holds. The structs begin with
the addresses of primitives, which `arguments` adds.

Every field is a 64-bit integer. Addresses, offsets and strides are in bytes, and an address of 0 says that there is no
such array. A shape in parentheses is that of the array at an address. Sizes are T steps, B batch rows of one stacked
layer, R batch rows of all of them, I inputs, H units, K heads, L lanes of a vector. A cell has S pre-activations, of
which X have a product with x and Y one with h, P params, Q inputs, and saves G vectors for each panel and row. In a
projected layer `h_width` stands for H in the shapes of h, of its gradients and of the columns of weight_hh, and for the
rows of weight_products.

What a thread writes and another reads ends with the order of both, in brackets. All else is read alone, or each thread
reads what it has written itself.

* team: the threads of a team write, each for its units, and if they split the rows also for these. The team
  reads after its next barrier, which is that of the step or of the phase.
* all: every thread writes a share. Any thread reads after the next barrier of all threads.
* chunk: as all, at the barrier of a time chunk. A thread overwrites a chunk when all have arrived at the barrier of the
  second one after it, and so have read it.
* host: any thread writes, in one atomic step or always the same number. The host reads after the run.
"""


def names(table: str) -> list[str]:
    """Return the field of each line."""
    return [line.split()[0] for line in table.splitlines() if line]


SIZES = """
size                    bytes of an element of states and pre-activations
lanes                   L, elements of a vector
T                       steps
B                       batch rows
rows                    R
I                       columns of x
H                       units
panels                  panels of H units, each of one vector
heads                   K
group_rows              batch rows of a row group, over which the gradients of params are summed: no thread splits one
head                    H / K, the units of a head
h_width                 units of h: H, or fewer in a projected layer, whose product of a value is h
span                    most columns of h that a panel multiplies: those of all heads that it has units of
has_compact             1 if a last panel that is not full is compact: its gates lie side by side without padding
reverse                 1 if the layer runs from the last step to the first
team_count              teams that split the batch rows
components              bfloat16 numbers whose sum stands for a float32 on the bf16 unit, 0 without the unit
is_bfloat16             1 if x, h, the weights and their gradients are bfloat16, and all else float32
original_size           bytes of an element of the original weights
"""

CELL = """
preacts                 S
x_preacts               X; these are the first pre-activations
h_preacts               Y; these are the last pre-activations
joint                   1 if X = Y = S
gate_blocks             int64: the gate block of weight_ih of each of the X, of weight_hh of each of the Y, of products
saved                   G, vectors of a panel's saved values of a row: enough also for those that its units share
params                  P
inputs                  Q
operands                Q + P
inner_states            states but the first
carries_h               1 if the gradient of h goes to the step before also beside its product
read_bits               bits of the pointer table's entries that the cell reads
phases                  phases of a step, more than 1 if the cell takes means or has products
terms                   S and the number of products: vectors of dpreact and of the gradients of products
products                products of values of the step
product_groups          values of the step that are multiplied
product_records         (product_groups, 4) int64: phase before which it is due or -1, first product, count, saved
later_values            values of a unit that later phases read
shared_values           values that a row's units share, and sums of means
"""

SCRATCH = """
table_bytes             bytes of a pointer table; a thread's scratch begins with two
product_vectors         vectors of a scratch row that hold products: of one panel or, with several phases, of all
operand_slot            first scratch slot of operands of products, which their results follow
slots                   scratch slots
later_slot              first scratch slot of the values that later phases read; the values that units share follow
panel_bytes             stride from one panel's products to the next one's, 0 with one phase
rows_together           batch rows that go through all phases before the next rows do
splits_rows             1 if the members of a team split the rows for the cell, 0 if each keeps its units
scratch_bytes           stride from one thread's scratch to the next one's
"""

LAYOUT = """
gate_panels             panels of saved values: one more than of units if a row's units share saved values
inner_step_stride       stride of a step in the sequences of inner states, 0 if only the last states are stored
k_block_stride          stride from one K block of 32 columns to the next in a row operand of the bf16 unit
x_step_stride           stride of a step of x
x_row_stride            stride of a row of x
ih_row_stride           stride of a row of weight_ih
hh_row_stride           stride of a row of weight_hh
relax                   address of a function that a waiting thread calls, or 0
constants               address of 1024 bytes of zeros, then a one
"""

BUFFERS = """
barrier                 counters at which threads wait for each other, a cache line each [atomic]
scratch                 each thread's scratch; with several phases the first of a team has its products [team]
overflow_flag           int64 that becomes 1 if the bf16 unit cannot take a number [host]
inner_records           record of each inner state
operand_records         record of each input, then of each param
dparam_addresses        address of the gradient of each param, then of each product's weight, or 0
"""
TAILS = "inner_records", "operand_records", "dparam_addresses"

DIGESTS = """
digests                 a digest of each block of the original weights, 0 if the packed weights are not cached [host]
mismatches              int64 that counts blocks whose digests differ; 0: pack, and store the digests [host]
"""

WEIGHTS = """
weight_ih               (X H, I)
weight_hh               (Y H, H / K)
bias                    (X H,) or 0
bias_hh                 (Y H,) or 0
weight_products         (products H, H / K) or 0
original_ih             weight_ih before it is cast, contiguous, which digests are computed from
original_hh             weight_hh before it is cast
original_bias           bias before it is cast
original_bias_hh        bias_hh before it is cast
original_products       weight_products before it is cast
"""

LAYER = """
x                       (T, B, I)
h_0                     (B, H)
h_0_row_stride          stride of a row of h_0
lengths                 (R,) int64, the steps of each row, or 0
reset                   (T, R) bytes, 1 where a row starts from zeros, or 0
h                       (T, B, H), which the forward pass writes [team]
h_step_stride           stride of a step of h
h_row_stride            stride of a row of h: more than H elements where the other direction writes beside it
gates                   (T, gate_panels, B, G, L), the saved values, or 0
"""

FORWARD = """
packed_panels           panels that `packed` has room for: all, one a thread, or those that are not read in place
in_place_panels         panels, the first ones, whose weights are read unpacked
x_k_block               columns of x in a K block, 0 if x and h share their K blocks
k_block                 columns of h in a K block, or of x and h
value_k_block           columns in a K block of a value that products multiply
input_steps             steps of an input block, for which the products of x are computed at once, or 0
"""

FORWARD_BUFFERS = """
h_float32               (2, B, H) float32, h of two steps, if is_bfloat16 [team]
row_operand             x and h of two steps, as row operands of the bf16 unit [team]
input_preact            (panels, input_steps, B or, if x_k_block is 0, 2, S, L) products of x
"""

FORWARD_PACKED = """
packed                  (.., span, Y, L) of h, (.., I, X, L) of x, (.., span, N, L) of values; or column operands [all]
biases                  (panels, S, L) [all]
"""

FORWARD_CALL = """
h_n                     (B, H); of a stream it is h_0, which all have looked at before [all]
flip                    1 if the first step takes the panels from last to first
"""

FORWARD_STATE = """
initial                 (B, H) before the first step
initial_row_stride      stride of a row of it
sequence                (T, B, H) after each step, or (B, H) if inner_step_stride is 0 [team]
last                    (B, H) after the last step
"""

FORWARD_OPERAND = """
operand                 (T, B, H) of an input, (H,) of a param
operand_step_stride     stride of a step of it, 0 of a param
operand_row_stride      stride of a row of it, 0 of a param
"""

BACKWARD = """
accumulates             1 if the gradients of weights, biases and params are added to what is there
gate_rows               batch rows from one panel of `gates` to the next
reach                   most panels of dpreact that a vector group of columns of h multiplies
chunk                   steps of a time chunk, whose dpreact becomes weight gradients together
ring                    time chunks that `strips` has room for
strip                   columns of a strip of [x, h, 1]
split_k                 sets of accumulators of the weight gradients, each over a share of the batch rows: 1 or 2
accumulator_vectors     vectors of an accumulator row: the most terms of x, of h or of a value; unit: S
accumulator_rows        accumulator rows: one for each column of [x, h, 1], with padding
first_h_row             first accumulator row of h
first_value_row         first accumulator row of the values that products multiply, strips of H rows each
ones_row                accumulator row of the ones
dpreact_steps           steps that `dpreact` has room for
dpreact_row_steps       steps that `dpreact_rows` has room for
group_stride            bytes of `param_sums` of a row group, divided by group_rows
strips_bytes            bytes of the strips of a time chunk
columns_bytes           bytes of `dpreact_columns` of a time chunk
"""

BACKWARD_BUFFERS = """
dpreact                 (panels, dpreact_steps, B, S, L) [team, chunk]
param_sums              (row groups, panels, P, L) sums of the gradients of params [team, chunk]
carried                 (inner_states + carries_h + 1, panels, B, L), of inner states, of h, then dh of held rows [team]
strips                  (ring, strips, chunk B, strip) columns of [x, h, 1]; unit: transposed [x, 1, h] [chunk]
dweights                (split_k, panels, accumulator_rows, max(X, Y), L), or 0 if few pairs are summed without it [all]
dpreact_rows            dpreact as a row operand of the bf16 unit, for the products with weights [team, chunk]
dpreact_columns         dpreact as a column operand, for the weight gradients [chunk]
"""

BACKWARD_PACKED = """
packed_hh               (vector groups of H, reach, Y L, 4 L) transposed weight_hh, or 0 if it is not read [all]
packed_ih               (vector groups of I, panels, X L, 4 L) transposed weight_ih, or 0 if it is not read [all]
packed_products         (vector groups of H, reach, N L, 4 L) transposed weights of the N products of each value [all]
"""

BACKWARD_CALL = """
dh                      (T, B, H), zeros with strides of 0 if there is none
dh_step_stride          stride of a step of dh
dh_row_stride           stride of a row of dh
dh_n                    (B, H) or 0
dh_n_row_stride         stride of a row of dh_n
dx                      (T, B, I) or 0
dweight_ih              (X H, I) or 0
dweight_hh              (Y H, H / K) or 0
dbias_ih                (X H,) or 0
dbias_hh                (Y H,) or 0
dh_0                    (B, H) or 0
"""

BACKWARD_STATE = """
initial                 (B, H) before the first step
initial_row_stride      stride of a row of it
sequence                (T, B, H) after each step, or 0 of a single step that does not read them
d_sequence              (T, B, H) gradient of the state after each step, or 0
d_sequence_step_stride  stride of a step of d_sequence
d_sequence_row_stride   stride of a row of d_sequence
d_last                  (B, H) gradient of the last state, or 0
d_last_row_stride       stride of a row of d_last
d_initial               (B, H) gradient of the initial state, or 0
"""

BACKWARD_OPERAND = f"""{FORWARD_OPERAND.rstrip()}
d_operand               (T, B, H) gradient of an input, or 0
"""

STACK = """
task                    address of the kernel
first                   address of the first layer's struct
struct_bytes            bytes from one struct to the next
count                   layers
buffer_sets             sets of buffers, each of neighbouring layers that one thread runs
"""

BOTH = """
task                    address of the kernel
first                   address of the first struct
struct_bytes            bytes from the first struct to the second
"""

REGION = """
task                    address of the kernel
arguments               address of its struct
get_thread_number       address of a function that returns a thread's number
get_thread_count        address of a function that returns the number of threads
"""
