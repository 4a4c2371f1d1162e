"""What an integration says where its library is absent or too old."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from fastlstm.integrations import keras
from tests.helpers.libraries import library

os.environ.setdefault("KERAS_BACKEND", "torch")


def test_a_library_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    for name in [name for name in sys.modules if name.split(".")[0] == "keras"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "keras", None)
    message = r"needs keras [\d.]+ or newer, which cannot be imported: \S.*$"
    with pytest.raises(ImportError, match=message) as raised:
        keras.enable()
    assert "\n" not in str(raised.value)


def test_a_library_that_is_not_installed(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r"needs keras .* No package metadata was found for keras$"):
        keras.enable()


def test_a_library_that_is_too_old(monkeypatch):
    library("keras")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.9")
    with pytest.raises(ImportError, match=r"needs keras [\d.]+ or newer, got 0\.0\.9$"):
        keras.enable()


def test_nothing_is_imported_before_it_is_used():
    libraries = "benchmarl", "keras", "rl_games", "rsl_rl", "sb3_contrib", "torchrl", "xlstm"
    names = [f"fastlstm.integrations.{library.removesuffix('_contrib')}" for library in libraries]
    code = f"import sys, fastlstm, {', '.join(names)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(names) <= set(loaded)
    assert set(libraries) & set(loaded) == set()
