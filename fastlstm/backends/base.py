"""What a backend says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """What a backend can do beyond `forward` and `backward` of float32 layers. A name that is not here is an error when
    the backend is imported.

    Attributes:
        takes_sixteen_bits: `forward` and `backward` take tensors of bfloat16 and float16. Otherwise they get float32.
        takes_bfloat16: x, the weights and dh may be of bfloat16, beside states, biases, dh_n and dc_n of float32. Then
            h and the gradients of x and of the weights are bfloat16; h_n, c_n, c, the gates and all other gradients are
            float32.
        takes_biases_apart: `forward` takes bias_hh, layer_axis and shown too, and `backward` hides. Both take None for
            states of zeros, and states of shape (1, B, H). Gradients that nobody wants come back as None.
        keeps_weights: it has `pack`, which gives weights that stay packed from call to call.
        keeps_steps: packed weights serve a call of one step with gradients as well.
        keeps_narrow_steps: so they do for weights of 16 bits, which it packs in float32.
        sorts_lengths: it is faster where the rows that last longest come first.
    """

    takes_sixteen_bits: bool = False
    takes_bfloat16: bool = False
    takes_biases_apart: bool = False
    keeps_weights: bool = False
    keeps_steps: bool = False
    keeps_narrow_steps: bool = False
    sorts_lengths: bool = False
