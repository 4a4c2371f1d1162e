"""Every speed that a page states is of the results: the pages are as the command writes them, and say no other."""

import re
from copy import deepcopy

import pytest

from benchmarks import pages, pictures
from benchmarks.shared.clock import times_as_fast
from benchmarks.shared.figures import Figures
from benchmarks.shared.results import newest, reports
from tests.helpers import ROOT
from tests.helpers.pages import text_of

PAGES = [path.relative_to(ROOT).as_posix() for path in pages.pages()]
SPEED = re.compile(
    r"\d[\d.]*(?: to [\d.]+)?\]? times\b|\d[\d.]*(?: to [\d.]+)? of (?:the|its) time\b"
    r"|\d ?% (?:faster|slower|less|more|of the time)|GFLOP"
    r"|\b(?:half|thirds?|quarters?|tenth) of (?:the|its|that) time\b|\b(?:half|twice|thrice) as (?:fast|slow|long)\b"
    r"|\b\d[\d.]*(?: to [\d.]+)? (?:s|ms|us|µs|ns|seconds|microseconds|milliseconds|nanoseconds)\b"
)
# pages that state times which the benchmarks do not measure, and why
OTHER_TIMES = {
    "docs/notes/cpu.md": "what was tried and is not kept cannot be measured any more",
    "docs/notes/gpu.md": "estimates from data sheets, since no GPU has run the kernels",
    "docs/notes/arm.md": "what others have reported of processors that have not been at hand",
    "docs/design.md": "what was rejected is not in the code, and cannot be measured any more",
    "docs/install.md": "how long a compilation takes, once",
}
DOCUMENTS = sorted(
    {"README.md", *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))} - set(OTHER_TIMES)
)


def own_text(page):
    """The text of a page but for what is written from results, and for blocks of code."""
    return re.sub(r"^```.*?^```$", "", pages.BLOCK.sub("", text_of(page)), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_as_the_results_say(page):
    assert text_of(page) == pages.placed(text_of(page), newest()), "run python -m benchmarks.pages"


@pytest.mark.parametrize("theme", pictures.THEMES)
@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_as_the_results_say(name, theme):
    drawn = pictures.PICTURES[name](theme, Figures(newest()))
    assert text_of(f"docs/images/{name}-{theme}.svg") == drawn, "run python -m benchmarks.pages"


@pytest.mark.parametrize("page", PAGES)
def test_other_results_change_a_page(page):
    others = deepcopy(newest())
    for row in (row for report in others for row in report["rows"]):
        row["seconds"] = {name: 3 * seconds for name, seconds in row["seconds"].items()}
        for ratio in row["ratios"].values():
            ratio |= {name: 3 * value for name, value in ratio.items()}
    text = pages.placed(text_of(page), others)
    if re.search(r"^\| .* \| [*~]*\d+\.\d", text_of(page), re.MULTILINE):
        assert text != text_of(page)
    assert pages.placed(text, newest()) == text_of(page)


def in_first_table(rows):
    """The line of sequences in inference of README.md's table, of these rows: group, name, and times as fast."""
    report = deepcopy(newest()[0])
    report["rows"] = [
        {"group": group, "name": name, "mode": "inference", "is_noisy": False, "commit": "1", "date": "2"}
        | {"seconds": {}, "ratios": {rival: {"quartile": times} for rival in ("torch", "ONNX Runtime")}}
        for group, name, times in rows
    ]
    return next(line for line in pages.first_page(Figures([report])) if line.startswith("| inference"))


def test_a_size_on_two_pages_counts_once_in_the_first_table():
    """And what stands beside all other runtimes is what counts."""
    rows = [
        ("layers", "T28-B128-I28-H128", 9),
        ("runtimes", "T28-B128-I28-H128", 2),
        ("runtimes", "T100-B1-I40-H128", 4),
    ]
    assert in_first_table(rows).split(" | ")[2] == "3.00 (2.00 to 4.00)"


def test_the_first_table_says_which_batches_and_how_many_layers_its_figures_are_of():
    rows = [
        ("layers", "T28-B128-I28-H128", 2),
        ("layers", "T50-B32-I80-H256-L2-bi", 2),
        ("runtimes", "GRU-T100-B1-I40-H128", 2),
    ]
    assert in_first_table(rows).startswith("| inference of sequences: batch 1 to 128, 1 to 2 layers |")
    assert in_first_table(rows[:1]).startswith("| inference of sequences: batch 128, 1 layer |")


def test_every_table_stands_on_a_page():
    there = {name for page in PAGES for _, name, _ in pages.BLOCK.findall(text_of(page))}
    assert there == {*pages.BLOCKS, "machines"}


@pytest.mark.parametrize("page", DOCUMENTS)
def test_a_page_states_no_speed_beside_the_written_ones(page):
    text = own_text(page)
    assert [found[0] for found in SPEED.finditer(text)] == []


def test_a_page_that_states_its_own_times_is_named_only_where_it_does():
    assert [page for page in OTHER_TIMES if not SPEED.search(own_text(page))] == []


def test_one_file_of_each_machine_is_there_and_its_rows_are_of_cases():
    assert len(reports()) == len(newest()) > 0
    for report in newest():
        for row in report["rows"]:
            assert {"group", "name", "mode", "seconds", "ratios", "is_noisy", "commit", "date"} <= set(row)
            for ratio in row["ratios"].values():
                assert ratio["low"] <= times_as_fast(ratio) <= ratio["high"]


def test_a_figure_says_who_is_faster_and_how_sure_that_is():
    def row(low, quartile, high, is_noisy=False):
        return {"ratios": {"torch": {"low": low, "quartile": quartile, "high": high}}, "is_noisy": is_noisy}

    assert pages.times(row(1.48, 1.5, 1.52), "torch") == "1.50"
    assert pages.times(row(0.8, 0.82, 0.84), "torch") == "**0.82**"
    assert pages.times(row(0.9, 0.98, 1.1), "torch") == "**~0.98**"
    assert pages.times(row(0.99, 0.997, 1.01), "torch") == "1.00"
    assert pages.times(row(9, 12.34, 13, is_noisy=True), "torch") == "noisy"
    assert pages.times(row(12, 12.34, 13), "torch") == "12.3"
    assert pages.times(row(1, 1, 1), "another") == ""
    assert pages.times(None, "torch") == ""
