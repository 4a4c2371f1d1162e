"""What an integration says where its library is absent or too old."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from fastlstm.integrations import keras, sb3

os.environ.setdefault("KERAS_BACKEND", "torch")
CALLS = {
    "sb3-contrib": ("sb3_contrib", lambda: sb3.accelerate(object())),
    "keras": ("keras", keras.enable),
}
parametrized = pytest.mark.parametrize("package", CALLS)


@parametrized
def test_a_library_that_cannot_be_imported(package, monkeypatch):
    module, call = CALLS[package]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"needs {package} [\d.]+ or newer, which cannot be imported: \S.*$"
    with pytest.raises(ImportError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


@parametrized
def test_a_library_that_is_not_installed(package, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=f"needs {package} .* No package metadata was found for {package}$"):
        CALLS[package][1]()


@parametrized
def test_a_library_that_is_too_old(package, monkeypatch):
    pytest.importorskip(CALLS[package][0], reason=f"needs the package {package}: pip install .[integrations]")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.9")
    with pytest.raises(ImportError, match=rf"needs {package} [\d.]+ or newer, got 0\.0\.9$"):
        CALLS[package][1]()


def test_nothing_is_imported_before_it_is_used():
    libraries = "benchmarl", "keras", "rl_games", "rsl_rl", "sb3_contrib", "torchrl"
    names = [f"fastlstm.integrations.{library.removesuffix('_contrib')}" for library in libraries]
    code = f"import sys, fastlstm, {', '.join(names)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(names) <= set(loaded)
    assert set(libraries) & set(loaded) == set()
