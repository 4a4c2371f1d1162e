"""What emits LLVM instructions: statements of the loops, products and other primitives, and cells."""
