"""A page for each report of `make bench` in benchmarks/results, with its plot, and on benchmarks.md a table of them."""

import json
import re
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PLACE = "<!-- the table of reports -->"
MODES = ("inference", "training")
WHOLE = re.compile(r"\(\d+\.\d+–\d+\.\d+\)|(?:GRU-)?T\d+-B\d+-I\d+-H\d+[-\w]*")


def reports() -> dict[str, dict]:
    """Return the reports by the names of their files, the newest first. Files of other benchmarks are left out."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    found = {name: report for name, report in found.items() if report["results"] and "ratio" in report["results"][0]}
    return dict(sorted(found.items(), key=lambda item: item[1]["date"], reverse=True))


def on_files(files, config):
    from mkdocs.structure.files import File  # not above: the tests of this file need no mkdocs

    names = {name: f"benchmarks/{name}.md" for name in reports()}
    for name, uri in names.items():
        files.append(File.generated(config, uri, content=page(name)))
        if (plot := RESULTS / f"{name}.png").exists():  # a source distribution has no plots
            files.append(File.generated(config, f"benchmarks/{plot.name}", abs_src_path=str(plot)))
    pages = next(pages["Speed"] for pages in config.nav if "Speed" in pages)
    pages += [{"Reports": [{title(report): names[name]} for name, report in reports().items()]}]
    return files


def on_page_markdown(markdown, page, config, files):
    return markdown.replace(PLACE, overview()) if PLACE in markdown else markdown


def on_page_content(html, page, config, files):
    """Intervals and names of shapes are not broken, or each would take four lines of a table."""
    return re.sub(r">[^<]+<", lambda text: WHOLE.sub(r'<span class="whole">\g<0></span>', text[0]), html)


def page(name: str) -> str:
    """Return the report with a title of its own, and with its plot before its tables."""
    _, _, text = (RESULTS / f"{name}.md").read_text(encoding="utf-8").partition("\n")
    head, first_table, tables = text.partition("## Inference")
    plot = (
        f"![Speed relative to torch's layer, shape by shape]({name}.png){{ .plot }}"
        * (RESULTS / f"{name}.png").exists()
    )
    wide = "---\nhide: [toc]\n---\n"  # the tables need the place of the contents
    return f"{wide}# {title(reports()[name])}\n{head}{plot}\n\n{first_table}{tables}"


def title(report: dict) -> str:
    kind = "bfloat16" if "bfloat16" in report["title"] else "float32"
    cell = "GRU, " * ("nn.GRU" in report["title"])  # the others are of LSTMs
    return f"{processor(report)}, {cell}{kind}, {report['date']}"


def processor(report: dict) -> str:
    """Return the processor's name without the marks of trademarks."""
    return re.sub(r"\((?:R|TM)\)", "", report["machine"]["cpu"])


def rows(report: dict, mode: str) -> list[dict]:
    """Return the rows of the fixed shapes."""
    return [row for row in report["results"] if row["mode"] == mode and not row["random"]]


def overview() -> str:
    lines = ["| report | float32 in a vector | inference | training |", "|---|---|---|---|"]
    for name, report in reports().items():
        ranges = []
        for mode in MODES:
            taken = [row for row in rows(report, mode) if row["shape"]["T"] > 1 and not row.get("noisy")]
            ratios = [row["baseline_seconds"] / row["seconds"] for row in taken]  # of medians, in older reports too
            of_all = f"{min(ratios):.2f} to {max(ratios):.2f}, median {median(ratios):.2f}" if ratios else "–"
            ranges.append(of_all)
        lanes = report["machine"]["float32_lanes"]
        lines.append(f"| [{title(report)}](benchmarks/{name}.md) | {lanes} | {' | '.join(ranges)} |")
    return "\n".join(lines)
