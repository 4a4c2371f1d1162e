import os

import pytest

pytest.register_assert_rewrite("tests.helpers")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes share the cores: a thread that spins while it waits takes its core from another's work. Read by libgomp
    # when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
