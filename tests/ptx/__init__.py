"""Kernels of the Triton backend as PTX for a chip that need not be there: see README.md.

with emulated(90) as device:
    ...  # Triton's kernels run on CPU tensors
assert not device.findings, device.findings
"""

from tests.ptx.device import Device, Launched, emulated

__all__ = ["Device", "Launched", "emulated"]
