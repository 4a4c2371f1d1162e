import pytest

import fastlstm


@pytest.fixture(autouse=True)
def ends_patches():
    yield
    fastlstm.unpatch_operators()
