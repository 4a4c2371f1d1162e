"""The examples run, and show what they say."""

import importlib.util

import pytest

from tests.helpers import ROOT


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(importlib.util.find_spec("silero_vad") is None, reason="needs the package silero-vad")
def test_voice_activity_keeps_its_decisions():
    for error, changed in example("voice_activity").main().values():
        assert error < 0.05  # of a probability: a weight may be off by a 254th of the largest in its row
        assert changed == 0


def test_voice_activity_says_what_it_needs(monkeypatch):
    module = example("voice_activity")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install silero-vad"):
        module.main()
