import pytest

pytest.register_assert_rewrite("tests.contract", "tests.layers", "tests.modules")
