"""Kernels of the Triton backend as PTX for a chip that need not be there: see README.md."""
