"""What the site adds to the pages: links out of them, pictures, reports. `make docs` builds it without warnings."""

import json
import logging
import re
import statistics
from types import SimpleNamespace

import pytest

from benchmarks import pictures
from tests.helpers import script
from tests.helpers.pages import PAGES, rows, text_of

links, reports = script("docs/hooks/links.py"), script("docs/hooks/reports.py")


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """import-linter, which another test runs in this process, disables the loggers that are there before it."""
    monkeypatch.setattr(links.log, "disabled", False)


def test_every_page_has_its_place():
    placed = re.findall(r"^ +- .+: (\S+\.md)$", text_of("mkdocs.yml"), re.MULTILINE)
    assert sorted(f"docs/{path}" for path in placed) == [page for page in PAGES if page.startswith("docs/")]


@pytest.mark.parametrize(
    ("page", "link", "led"),
    [
        ("cpu.md", "[a](../CONTRIBUTING.md)", "[a]({address}/blob/main/CONTRIBUTING.md)"),
        ("cpu.md", "[a](../README.md#speed)", "[a]({address}/blob/main/README.md#speed)"),
        ("notes/a.md", "[a](../../tests)", "[a]({address}/blob/main/tests)"),
        ("notes/a.md", "[a](../cpu.md#speed)", "[a](../cpu.md#speed)"),
        ("cpu.md", "[a](../benchmarks/results/one.md)", "[a](benchmarks/one.md)"),
        ("notes/a.md", "[a](../../benchmarks/results/one.md)", "[a](../benchmarks/one.md)"),
    ],
)
def test_links_out_of_the_pages(page, link, led, caplog, monkeypatch):
    files = SimpleNamespace(get_file_from_path=lambda path: path if path == "benchmarks/one.md" else None)
    monkeypatch.setattr(links.Path, "exists", lambda path: True)
    of = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    found = links.on_page_markdown(link, of, None, files)
    assert found == led.format(address=links.address())
    assert not caplog.records


def test_a_link_to_a_file_that_is_missing_is_told(caplog):
    of, files = (
        SimpleNamespace(file=SimpleNamespace(src_uri="a.md")),
        SimpleNamespace(get_file_from_path=lambda _: None),
    )
    links.on_page_markdown("[a](../no/such.md)", of, None, files)
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.WARNING, "a.md links to no/such.md, which the repository has not")
    ]


@pytest.mark.parametrize(
    ("html", "told"),
    [
        ('<script src="https://elsewhere.org/a.js"></script>', True),
        ('<script src="//elsewhere.org/a.js"></script>', True),
        ('<img alt="" src="http://elsewhere.org/a.png">', True),
        ('<link rel="stylesheet" href="https://elsewhere.org/a.css">', True),
        ('<script src="assets/a.js"></script><link rel="stylesheet" href="a.css">', False),
        ('<a href="https://elsewhere.org">elsewhere</a>', False),
    ],
)
def test_what_a_page_would_load_from_another_host_is_told(html, told, caplog):
    links.on_post_page(html, SimpleNamespace(file=SimpleNamespace(src_uri="a.md")), None)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * told


FIRST_PAGES = ["README.md", "docs/index.md"]


def on_one_line(page: str) -> str:
    return " ".join(text_of(page).split())


def ranges() -> list[str]:
    """The least and the largest ratio of the newest report, in training and in inference."""
    found = [[ratio[mode] for mode in pictures.MODES] for _, ratio in pictures.sequences(pictures.newest())]
    assert len(found) == 10  # as the pages say
    return [f"{min(each):.2f} to {max(each):.2f}" for each in zip(*found)]


def of_gru(mode: str) -> list[float]:
    """The ratios of the newest report on GRUs, of its shapes of several steps."""
    title = pictures.TITLE.replace("LSTM", "GRU")
    ratios = [ratio[mode] for _, ratio in pictures.sequences(pictures.newest(title))]
    assert len(ratios) == 10
    return ratios


@pytest.mark.parametrize("page", FIRST_PAGES)
def test_the_figures_of_a_first_page_are_those_of_the_newest_report(page):
    medians, (training, inference) = pictures.medians(pictures.newest()), ranges()
    assert (
        f"trains an LSTM {medians['training']:.1f} times as fast as `torch.nn.LSTM` (median of ten sizes, {training}), "
        f"and runs inference {medians['inference']:.1f} times as fast ({inference})."
    ) in on_one_line(page)
    gru = statistics.median(of_gru("training"))
    assert f"trains {gru:.1f} times as fast as `torch.nn.GRU` (median of the same sizes)." in on_one_line(page)
    others = [row for row in rows("docs/cpu.md", "| two cores of |")[1:] if row[1].startswith("[float32]")]
    others = [row for row in others if "Zen 5" not in row[0]]
    in_training, in_inference = ([float(row[column]) for row in others] for column in (5, 3))
    assert (
        f"an LSTM's medians are {min(in_training):.1f} to {max(in_training):.1f} in training, "
        f"and {min(in_inference):.1f} to {max(in_inference):.1f} in inference."
    ) in on_one_line(page)
    shown = f"is {training} times as fast as torch.nn.LSTM in training, and {inference} times in inference"
    assert text_of(page).count(shown) == text_of(page).count("Bars of ten sizes") > 0


@pytest.mark.parametrize("page", FIRST_PAGES)
def test_when_a_first_page_says_not_to_use_it(page):
    name, text = "T100-B32-I128-H512", " ".join(text_of(page).replace("\n> ", "\n").split())
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in pictures.ROOT.glob("benchmarks/results/*.json")]
    results = [row for report in reports if report.get("title") == pictures.TITLE for row in report["results"]]
    large = [row["ratio"]["median"] for row in results if (row["name"], row["mode"]) == (name, "inference")]
    assert f"{min(large):.2f} to {max(large):.2f} times at 100 steps, 32 rows and 512 units" in text
    newest, *_ = rows("docs/cpu.md", "| other processors |")
    assert f"[{newest[2]} times](" in text
    seconds = re.findall(r"\b\d\.\d s\b", text)
    assert len(seconds) == 3
    assert set(seconds) <= set(re.findall(r"\b\d\.\d s\b", text_of("docs/limits.md")))


def test_the_ranges_of_the_table_in_the_readme_are_those_of_the_newest_report():
    assert f"the ten sizes above | `nn.LSTM` | {' | '.join(ranges())} |" in text_of("README.md")
    gru = [f"{min(ratios):.2f} to {max(ratios):.2f}" for ratios in map(of_gru, pictures.MODES)]
    assert f"the same sizes | `nn.GRU` | {' | '.join(gru)} |" in text_of("README.md")


def test_the_ratios_of_integrations_are_the_quotients_of_their_columns():
    found = rows("docs/integrations.md", "| what | the library alone |")
    assert len(found) == 10
    for name, *columns, ratio in found:
        alone, ours = (float(figure.replace(" ", "")) for figure in columns)
        quotient = alone / ours if name.endswith(": ms") else ours / alone  # others are numbers a second
        assert ratio.startswith(f"**{quotient:.1f}** ("), name
    alone_replaced = on_one_line("docs/integrations.md").partition("With `fastlstm.replace` alone")[2]
    replaced = re.findall(r"(\d+) (?:steps a second )?at H \d+, which is (\d\.\d) times", alone_replaced)
    assert len(replaced) == 2
    for (steps, ratio), (_, alone, *_) in zip(replaced, found, strict=False):
        assert ratio == f"{float(steps) / float(alone):.1f}"


def test_the_time_of_a_stream_on_the_first_pages():
    (row,) = [row for row in rows("docs/streaming.md", "| I, H |") if row[0] == "40, 128"]
    stream, int8, _, theirs, runtime, _ = (float(cell.split()[0]) for cell in row[1:])
    assert f"{runtime / stream:.0f} (ONNX Runtime), {theirs / stream:.0f} (`nn.LSTM`)" in text_of("README.md")
    assert f"takes {stream} microseconds, and {int8} with" in on_one_line("docs/index.md")


def test_the_address_of_the_readme_is_the_repository_s():
    assert re.findall(r"git clone (\S+)", text_of("README.md")) == [links.address()]


def test_the_figures_of_the_readme_stand_on_the_pages_that_its_table_links():
    """Those with a decimal point."""
    for row in rows("README.md", "| work |"):
        (page,) = re.findall(r"\]\(([^)#]+)", row[0])
        for figure in re.findall(r"\d+\.\d+", " ".join(row[2:4])):
            assert re.search(rf"(?<![\d.]){figure}(?!\d)", text_of(page)), f"{page} has no {figure}"


@pytest.mark.parametrize("theme", pictures.THEMES)
@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_as_its_script_draws_it(name, theme):
    drawn = str(pictures.PICTURES[name](theme))
    assert text_of(f"docs/images/{name}-{theme}.svg") == drawn, "run python -m benchmarks.pictures"


def test_reports_have_a_row_in_the_table_and_a_page_with_its_own_title_and_plot():
    table = reports.on_page_markdown(reports.PLACE, None, None, None)
    titles = set()
    for name in reports.reports():
        assert f"](benchmarks/{name}.md)" in table
        shown = reports.page(name)
        titles |= set(re.findall("^# .+$", shown, re.MULTILINE))
        plotted = (reports.RESULTS / f"{name}.png").exists()  # a source distribution has no plots
        assert (f"]({name}.png){{ .plot }}\n\n## Inference\n" in shown) == plotted
    assert len(titles) == len(reports.reports())


def test_processors_are_named_without_the_marks_of_trademarks():
    report = {"title": "fastlstm", "machine": {"cpu": "Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz"}, "date": "2026-01-02"}
    assert reports.title(report) == "Intel Core i7-8650U CPU @ 1.90GHz, float32, 2026-01-02"


def test_intervals_and_shapes_are_not_broken():
    found = reports.on_page_content('<td title="T1-B1-I2-H3">T1-B1-I2-H3-L2 is 1.50 (1.40–1.60)</td>', None, None, None)
    assert found == (
        '<td title="T1-B1-I2-H3"><span class="whole">T1-B1-I2-H3-L2</span> is 1.50 '
        '<span class="whole">(1.40–1.60)</span></td>'
    )
