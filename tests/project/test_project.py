"""The project's own rules: `import fastlstm` stays light, public names are those that are meant."""

import inspect
import re

import pytest

from fastlstm import torch_private
from tests.helpers import ROOT, interpreter

LAZY = {"numba", "llvmlite", "triton", "matplotlib", "tqdm"}


@pytest.mark.skipif(torch_private.PUBLIC, reason="by public names torch's compiler is imported with the package")
def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); "
        "torch.library.register_autograd = lambda operator, *_, **__: print(operator); "
        "import fastlstm; print(*set(sys.modules) - before)"
    )
    added = set(interpreter.run(code, cwd=ROOT).stdout.split())
    assert "fastlstm" in added
    heavy = LAZY & {name.partition(".")[0] for name in added}
    assert heavy == set()
    # tracing's machinery costs over a second, and brings triton where it is installed
    assert "torch._dynamo" not in added
    assert "torch.onnx" not in added  # as much again as all of this package
    slow = {operator for operator in added if "::" in operator and "quantized" not in operator}
    assert slow == set()  # for each of two dozen cells it takes milliseconds
    demonstration = {name for name in added if name.startswith(("fastlstm.mnist", "fastlstm.train"))}
    assert demonstration == set()


def test_the_actions_of_the_workflows_are_commits():
    """A tag may come to name another commit, whose code would then run with the rights of a release."""
    workflows = [path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    used = re.findall(r"uses: (.*)", "\n".join(workflows))
    assert len(used) > 20
    assert [action for action in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action)] == []


def test_the_release_pins_its_tools():
    """What builds has hashes, and what checks has versions."""
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    tools = " ".join(re.findall(r"pip install (?!dist)(.*)", workflow)).split()
    of_hashes = [tool for tool in tools if tool.endswith(".github/build-tools.txt")]
    assert len(of_hashes) == workflow.count("--require-hashes -r") == 2
    others = [tool for tool in tools if tool not in (*of_hashes, "--require-hashes", "-r")]
    assert [tool for tool in others if "==" not in tool] == []
    assert not {tool.partition("==")[0] for tool in others} & {"build", "cibuildwheel", "setuptools"}
    lines = (ROOT / ".github" / "build-tools.txt").read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert {"build", "cibuildwheel", "setuptools"} <= {line.partition("==")[0] for line in pinned}
    assert [line for line in pinned if not re.match(r"[\w.-]+==\S+ (;.*)?( *--hash=sha256:[0-9a-f]{64})+$", line)] == []


def test_no_step_of_the_release_that_builds_knows_another_index():
    """Whose packages could take the place of a build tool."""
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    steps = re.split(r"^(?: +- |  \w+:)", workflow, flags=re.MULTILINE)  # and jobs
    with_index = [step for step in steps if "PIP_EXTRA_INDEX_URL" in step]
    assert len(with_index) == 2
    assert [step for step in with_index if "make -C unpacked test" not in step and "smoke.py" not in step] == []
    assert [step for step in with_index if re.search(r"-m build|cibuildwheel|--require-hashes", step)] == []


def test_all_texts_say_that_only_the_cpu_is_stable():
    """No GPU has run the kernels, and a classifier of a package index holds for all of it."""
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    description = re.search(r'^description = "(.*)"', metadata, re.MULTILINE)[1]
    summary = re.search(r"summary: (.*)", (ROOT / ".github/conda/recipe.yaml").read_text(encoding="utf-8"))[1]
    assert "Development Status :: 5 - Production/Stable" in metadata
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/promises.md", "docs/gpu.md")]
    for text in (description, summary, *pages):
        assert re.search(r"[Ss]table\W+on\s+(a\s+)?CPU", text)
        assert re.search(r"experimental\W+on\s+(a\s+)?GPU", text)


def test_the_package_shows_its_public_names_alone():
    import fastlstm

    assert dir(fastlstm) == sorted(["__version__", *fastlstm.__all__])
    assert all(getattr(fastlstm, name) is not None for name in dir(fastlstm))


@pytest.mark.parametrize(
    ("function", "options"),
    [("lstm", ["weight_hr", "lengths", "reset", "reverse", "return_cells", "backend"]), ("lstm_cell", ["backend"])],
)
def test_the_arguments_of_the_functions(function, options):
    import fastlstm

    parameters = inspect.signature(getattr(fastlstm, function)).parameters
    assert list(parameters) == ["x", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh", *options]
