from tests.ptx.processes import EMULATED, INSTALLED, INTERPRETS

collect_ignore = EMULATED if INTERPRETS or not INSTALLED else []
