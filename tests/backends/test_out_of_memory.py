"""Without memory enough for a call the error is torch's, or one of its type that says how many bytes were asked for."""

import sys

import pytest

from tests.helpers import ROOT, interpreter
from tests.helpers.layers import needs_native

if sys.platform != "linux":
    pytest.skip("the system has no limit of a process's memory", allow_module_level=True)

CODE = """
    import gc, re, resource, sys, torch, fastlstm
    from fastlstm.backends import pool

    backend, kind, MB = *sys.argv[1:], 1 << 20
    is_int8 = backend == "int8"
    backend = "native" if is_int8 else backend
    torch.set_num_threads(1)  # threads that start need memory too

    def make(T, B, I, H):
        torch.manual_seed(0)
        module = fastlstm.LSTM(I, H, 2, bidirectional=kind == "both directions", backend=backend)
        if is_int8:
            module = fastlstm.quantize(torch.nn.ModuleList([module]))[0]
        return torch.randn(T, B, I), module

    def call(x, module):
        if kind == "stream":
            return module.stream(x.shape[1])(x[0])
        if kind == "inference":
            with torch.no_grad():
                return module(x)[0]
        module.zero_grad()
        output = module(x)[0]
        output.sum().backward()
        return output

    def allowed(bytes):
        resource.setrlimit(resource.RLIMIT_AS, (bytes, resource.RLIM_INFINITY))

    # With the first sizes, what is compiled and loaded is there. The others need more than what malloc has left.
    for sizes in ((3, 60, 40, 30), (900, 32, 100, 200) if is_int8 else (30, 16, 100, 700)):
        x, module = make(*sizes)
        expected = call(x, module).detach()
    counts = [0, 0]
    for extra in [*range(0, 48, 6), *range(48, 600, 24)]:
        x, module = make(*sizes)  # without packed weights
        pool.forget()
        gc.collect()
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        allowed(size + extra * MB)
        try:
            result, text = call(x, module).detach(), ""
        except RuntimeError as error:
            result, text = None, str(error)
        finally:
            allowed(resource.RLIM_INFINITY)
        if result is None:
            assert re.search("can't allocate memory: you tried to allocate [1-9][0-9]{4,} bytes", text), text
            counts[0] += 1
        else:
            assert torch.equal(result, expected)
            counts[1] += 1
            if counts[1] > 2:
                break
        del result
    assert all(counts), counts
"""
KINDS = "inference", "training", "both directions", "stream"


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        *(("numba", kind) for kind in KINDS),
        *(pytest.param("native", kind, marks=needs_native) for kind in KINDS),
        pytest.param("int8", "inference", marks=needs_native),
    ],
)
def test_the_error_says_how_many_bytes_were_asked_for(backend, kind):
    """And what succeeds all the same is right, as is the call after an error."""
    interpreter.run(CODE, backend, kind, cwd=ROOT, check=True)
