"""What the tests of csrc/ share."""

import ctypes

import torch

from fastlstm.backends import csrc, native
from tests.helpers import ROOT

SOURCES = ROOT / "csrc"


def instruction_sets():
    if native.supports(torch.device("cpu"), torch.float32) is not None:
        return []
    csrc.library.fastlstm_instructions_name.restype = ctypes.c_char_p
    return [k for k in (1, 2, 3) if csrc.library.fastlstm_instructions_name(k)]
