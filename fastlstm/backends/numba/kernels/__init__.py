"""The loops of both passes, which `llvm.emit` translates.

`products` says what a product has to offer. `forward` and `backward` are the loops of a layer. They take the products
of `vector_*`, `matrix_*` or `mixed_*`. `layout`, `states`, `row_masks`, `weights` and `threads` serve both passes.
`heads`, `in_place`, `few_pairs` and `gradients` are parts of one pass.
"""
