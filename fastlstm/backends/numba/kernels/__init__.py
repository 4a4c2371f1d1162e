"""The loops of both passes, which `llvm.translate` translates.

Python itself runs `forward_with` and `backward_with` alone. Every other function is compiled into each kernel that
calls it. `forward` and `backward`, the loops of a layer, take the `products` of `vector_*` or `matrix_*`.
`layout`, `states`, `row_masks`, `digests` and `threads` serve both passes; `values` has the products of values that a
step computes. `backward_step`, `heads`, `in_place` and `weight_gradients` are parts of one pass.
"""
