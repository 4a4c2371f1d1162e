from tests.ptx.test_emulated import EMULATED, INTERPRETS, TRIED

collect_ignore = EMULATED if INTERPRETS or not TRIED else []
