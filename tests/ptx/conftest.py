from tests.ptx.processes import EMULATED, INTERPRETS, TRIED

collect_ignore = EMULATED if INTERPRETS or not TRIED else []
