"""Writes every table and chart of speeds in README.md and docs/ from the newest results of each machine.

python -m benchmarks.pages

A page says where a table stands: between `<!-- figures: NAME -->` and `<!-- end of figures -->`, by a name in `BLOCKS`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

from benchmarks import pictures
from benchmarks.cpu import cells, integrations, layers, models, runtimes, steps, transforms
from benchmarks.shared.case import OURS, Case, Row
from benchmarks.shared.clock import times_as_fast
from benchmarks.shared.figures import OTHERS, Figures, named
from benchmarks.shared.results import Report, newest
from benchmarks.shared.shapes import GRID, MODES
from benchmarks.shared.tables import table

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
LOOSE = 1.1  # the highest bound of an interval beside its lowest, above which a figure is marked
Block = Callable[[Figures], list[str]]


def number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def marked(ratio: float, mark: str = "") -> str:
    """Return how many times as fast as another ours is, bold below 1, where the other is faster."""
    text = number(ratio)
    return f"**{mark}{text}**" if float(text) < 1 else mark + text


def times(row: Row | None, rival: str) -> str:
    """Return how many times as fast as a rival ours is, or that the row is noisy, or nothing if there is no result."""
    ratio = None if row is None else row["ratios"].get(rival)
    if row is None or ratio is None:
        return ""
    if row["is_noisy"]:
        return "noisy"
    return marked(times_as_fast(ratio), "~" * (ratio["high"] > LOOSE * ratio["low"]))


def microseconds(row: Row | None) -> str:
    seconds = None if row is None else row["seconds"].get(OURS)
    return "" if seconds is None else f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


def by_machine(head: str, cases: Sequence[Case], *rivals: str, cut: str = "", part: str = "") -> Block:
    """Return a table with columns for each machine and mode, and a line for each case and rival.

    Args:
        head: of the column of cases.
        rivals: beside which ours is; torch without them.
        cut: what is left out of the cases' names.
        part: what is a part of the first rival. Its per cent of the rival's time in inference is a column, where known.
    """

    modes = [mode for mode in (*MODES, "step") if any(mode in case.modes for case in cases)]

    def share(figures: Figures, case: Case) -> str:
        rows = (figures.row(k, case, "inference") for k in figures.having([case]))
        row = next((row for row in rows if row and part in row["seconds"]), None)
        if row is None:
            return ""
        percent = 100 * row["seconds"][part] / row["seconds"]["torch"]
        return "noisy" if row["is_noisy"] or percent > 100 else f"{percent:.0f}"

    def block(figures: Figures) -> list[str]:
        columns = [(k, mode) for k in figures.having(cases) for mode in modes]
        header = [head, "recurrent, % of torch's inference", "beside"]
        header += [f"{figures.name(k)}, {mode}" for k, mode in columns]
        rows = [
            [case.name.removeprefix(cut), share(figures, case), rival if len(rivals) > 1 else ""]
            + [times(figures.row(k, case, mode), rival) for k, mode in columns]
            for case in cases
            for rival in rivals or ("torch",)
        ]
        return measured(header, rows, len(columns), len(columns))

    return block


def by_rival(head: str, cases: Sequence[Case], *rivals: str, modes: Sequence[str] = ("inference", "step")) -> Block:
    """Return a table of the newest machine that has the cases: microseconds of ours, and a column for each rival."""

    def block(figures: Figures) -> list[str]:
        k, rows = next(iter(figures.having(cases)), None), []
        for case, mode in [(each, mode) for each in cases for mode in each.modes if mode in modes]:
            row = None if k is None else figures.row(k, case, mode)
            label = f"{case.name}, {mode}" if len(modes) > 2 else case.name
            rows.append([label, microseconds(row), *(times(row, rival) for rival in rivals)])
        header = [head, "ours, us" if k is None else f"ours, us on {figures.name(k)}", *rivals]
        return measured(header, rows, len(header) - 1)

    return block


def measured(header: list[str], rows: list[list[str]], columns: int, wanted: int = 0) -> list[str]:
    """Return a table of the rows that have a figure in one of their last columns, and how many have none yet. Columns
    in which nothing stands are left out, but for the last `wanted` ones.
    """
    there = [row for row in rows if any(row[len(row) - columns :])]
    first, missing = len(header) - wanted, len(rows) - len(there)
    used = [n for n in range(len(header)) if n >= first or any(row[n] for row in there)]
    lines = table([header[n] for n in used], [[row[n] for n in used] for row in there]) if there else []
    note = f"{missing} of {len(rows)} rows have not been measured yet." if there else "Not measured yet."
    return [*lines, *([""] if lines else []), note] if missing else lines


def in_group(family: object, group: str) -> list[Case]:
    return [case for case in family.CASES if case.group == group]  # type: ignore[attr-defined]


LAYERS, GRUS, STREAMS = (in_group(*of) for of in ((layers, "layers"), (layers, "gru"), (runtimes, "streams")))
FIXED, RANDOM = [case for case in LAYERS if case.name in map(str, GRID)], named(LAYERS, "random")
SEQUENCES, BESIDE_OTHERS = pictures.SEQUENCES, pictures.LAYERS
GRU_SEQUENCES = [case for case in GRUS if "T1-" not in case.name]
SIXTEEN = [case for case in in_group(layers, "sixteen") if case.name in map(str, GRID)]
THREADS = in_group(layers, "threads")
ALL = ("inference", "step", "training")
LSTM_OTHERS, GRU_OTHERS = ([case for case in BESIDE_OTHERS if ("GRU" in case.name) == is_gru] for is_gru in (0, 1))
LSTM_STEPS, GRU_STEPS = (
    [case for case in (*STREAMS, *BESIDE_OTHERS) if ("GRU" in case.name) == is_gru and "T1-" in case.name]
    for is_gru in (0, 1)
)
OF_SEQUENCES = (SEQUENCES, [*SEQUENCES, *LSTM_OTHERS]), (GRU_SEQUENCES, [*GRU_SEQUENCES, *GRU_OTHERS])
FIRST_PAGE = (  # what runs, the mode, and for LSTMs and GRUs the cases beside torch and those beside other runtimes
    ("training on sequences", "training", OF_SEQUENCES),
    ("inference of sequences", "inference", OF_SEQUENCES),
    ("a step of a stream", "step", ((LSTM_STEPS, LSTM_STEPS), (GRU_STEPS, GRU_STEPS))),
    ("training `LSTMCell` or `GRUCell` between other layers", "training",
     ((named(steps.BETWEEN_CASES, "LSTM"), ()), (named(steps.BETWEEN_CASES, "GRU"), ()))),
)  # fmt: skip


def spread(ratios: Sequence[float]) -> str:
    """Return the median, the lowest and the highest of ratios."""
    return f"{marked(median(ratios))} ({marked(min(ratios))} to {marked(max(ratios))})" if ratios else ""


def span(counts: Sequence[int]) -> str:
    """Return the lowest and the highest of counts."""
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def sizes(names: Sequence[str]) -> str:
    """Return of the cases with these names the batches, and of layers how many they have."""
    batches = [int(B) for name in names for B in re.findall(r"\bB ?(\d+)", name)]
    layers = [int(shape[1] or 1) for name in names if (shape := re.search(r"-H\d+(?:-L(\d+))?", name))]
    return f"batch {span(batches)}" + (f", {span(layers)} layer{'s' * (max(layers) > 1)}" if layers else "")


def ranges(figures: Figures) -> list[str]:
    """Return a line for each kind of layers, with the median and the range on each machine."""
    kinds = {"LSTM, ten sizes": SEQUENCES, "LSTM, random sizes": RANDOM, "GRU, ten sizes": GRU_SEQUENCES}
    kinds["LSTM in bfloat16, ten sizes"] = [case for case in SIXTEEN if "T1-" not in case.name]
    columns = [(k, mode) for k in figures.having(SEQUENCES) for mode in MODES]
    rows = [[label, *(spread(figures.ratios(k, of, mode)) for k, mode in columns)] for label, of in kinds.items()]
    return table(["layers", *(f"{figures.name(k)}, {mode}" for k, mode in columns)], rows)


def summary(figures: Figures) -> list[str]:
    """Return the sentence on the newest machine with which the first pages begin."""
    k, texts = figures.having(SEQUENCES)[0], []
    for name, cases in (("an LSTM", SEQUENCES), ("a GRU", GRU_SEQUENCES)):
        inference, training = (f"{median(figures.ratios(k, cases, mode)):.1f}" for mode in MODES)
        texts.append(f"{name} {training} times as fast as torch's, and runs it {inference} times as fast")
    cores, name = figures.reports[k]["machine"]["cores"], figures.name(k)
    gains = ". It trains ".join(texts)
    return [f"On {cores} cores of a {name} it trains {gains}. These are medians of up to ten sizes."]


def first_page(figures: Figures) -> list[str]:
    """Return the table of README.md: kinds of work on one machine, beside torch and the fastest other runtime."""
    k = figures.having(SEQUENCES)[0]
    rows = []
    for label, mode, kinds in FIRST_PAGE:
        texts, names = [], []
        for beside_torch, beside_others in kinds:  # A size that two tables have counts once, as in the later one.
            torchs = {case.name: ratio for case in beside_torch for ratio in figures.ratios(k, [case], mode)}
            others = {case.name: ratio for case in beside_others for _, ratio in figures.best_other(k, case, mode)}
            texts += [spread([*torchs.values()]), spread([*others.values()])]
            names += [*torchs, *others]
        rows.append([f"{label}: {sizes(names)}" if names else label, *texts])
    machine = f"{figures.reports[k]['machine']['cores']} cores of a {figures.name(k)}"
    columns = [f"{kind}, beside {rival}" for kind in ("LSTM", "GRU") for rival in ("torch", "the best other")]
    return table([machine, *columns], rows)


def machines(figures: Figures) -> list[str]:
    """Return a line for each machine of which the page has figures."""
    lines = []
    for k, runs in sorted(figures.used.items()):
        machine, dates = figures.reports[k]["machine"], sorted({date for date, _ in runs})
        torch = machine["versions"]["torch"].partition("+")[0]
        commits = ", ".join(dict.fromkeys(commit for _, commit in sorted(runs)))
        when = f"{dates[0]}, commit {commits}" if len(runs) == 1 else f"{dates[0]} to {dates[-1]}, commits {commits}"
        cpu = re.sub(r"\((R|TM)\)", "", machine["cpu"])
        lines.append(f"* **{figures.name(k)}**: {cpu}, {machine['cores']} cores; torch {torch}; {when}.")
    return lines


def versions(figures: Figures) -> list[str]:
    """Return a line for each machine, with the releases that were measured there."""
    return [
        f"* **{figures.name(k)}**: " + ", ".join(f"{name} {text.partition('+')[0]}" for name, text in of.items()) + "."
        for k, of in enumerate(report["machine"]["versions"] for report in figures.reports)
    ]


def chart(name: str, label: Callable[[Figures], str], folder: str, is_site: bool = False) -> Block:
    """Return the pictures of a chart, for light and dark pages, as the site or GitHub chooses between them."""

    def block(figures: Figures) -> list[str]:
        light, dark = (f"{folder}{name}-{theme}.svg" for theme in ("light", "dark"))
        if is_site:
            return [f"![{label(figures)}]({path}#only-{theme})" for path, theme in ((light, "light"), (dark, "dark"))]
        source = f'  <source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        return ["<picture>", source, f'  <img alt="{label(figures)}" src="{light}">', "</picture>"]

    return block


def speed_label(figures: Figures) -> str:
    k = figures.having(SEQUENCES)[0]
    texts = [f"{spread(figures.ratios(k, SEQUENCES, mode))} in {mode}" for mode in reversed(MODES)]
    return f"Bars of ten sizes: how many times as fast as torch.nn.LSTM fastlstm.LSTM is, {' and '.join(texts)}"


def runtimes_label(figures: Figures) -> str:
    return "Bars: how many times as fast as the fastest other runtime each layer is"


LOOP, WITHOUT = "a loop in PyTorch", transforms.WITHOUT
PRODUCTS = [
    case
    for case in cells.CASES
    if case.name.startswith(tuple(f"{cell.name}, {size}" for cell in cells.WITH_PRODUCTS for size in cells.SIZES))
    and "compiled" not in case.name
]
TORCHS = [case for case in cells.CASES if case.name in [f"{cell.name}, {cells.USUAL}" for cell in cells.TORCH]]
BLOCKS: dict[str, Block] = {
    "summary": summary,
    "speed-chart": chart("speed", speed_label, "docs/images/"),
    "speed-chart-site": chart("speed", speed_label, "images/", is_site=True),
    "first-page": first_page,
    "versions": versions,
    "ranges": ranges,
    "layers": by_machine("LSTM", FIXED),
    "layers-others": by_rival("LSTM", FIXED, *layers.OTHERS),
    "random": by_machine("LSTM", RANDOM, cut="random "),
    "projections": by_machine("LSTM with a projection", named(LAYERS, "-P")),
    "gru": by_machine("GRU", GRUS, cut="GRU-"),
    "gru-others": by_rival("GRU", GRUS, *layers.OTHERS),
    "packed": by_machine("lengths from 1 to T", named(LAYERS, "lengths, "), "torch", "ours, packed", cut="lengths, "),
    "sixteen": by_machine("LSTM in bfloat16", SIXTEEN),
    "sixteen-float32": by_machine("LSTM in bfloat16", SIXTEEN, "ours in float32"),
    "sixteen-cells": by_machine(
        "cell",
        [
            case
            for case in in_group(layers, "sixteen")
            if case.name.endswith(f", {layers.OF_CELLS}") and "by" not in case.name
        ],
        "ours in float32",
    ),
    "backends": by_machine("LSTM", named(in_group(layers, "sixteen"), "float32 by"), cut="float32 by "),
    "scaling": by_machine("LSTM", [case for case in THREADS if "asked" not in case.name], "one thread"),
    "threads-asked": by_machine("LSTM", named(THREADS, "asked")),
    "steps": by_machine("a cell between layers", steps.BETWEEN_CASES),
    "steps-models": by_machine("a model", steps.MODEL_CASES),
    "steps-others": by_machine("a step", named(steps.CASES, "steps of", "a step of", "4 MB")),
    "steps-alone": by_machine("a cell in a loop of its own", named(steps.CASES, "alone, B ")),
    "cells": by_machine("cell", named(cells.CASES, str(cells.USUAL)), LOOP),
    "cells-torch": by_machine("cell", TORCHS),
    "cells-products": by_machine("cell", PRODUCTS, LOOP),
    "cells-compiled": by_machine("cell", named(cells.CASES, "compiled"), LOOP, "the loop, compiled"),
    "cells-norms": by_machine("cell", named(cells.CASES, "layer_norm", "dreamer", "heads"), LOOP, "ours without norms"),
    "streams": by_rival(
        "LSTM or GRU", STREAMS, "torch", "step", "stream.step", "int8 stream", "ONNX Runtime", "ONNX Runtime int8"
    ),
    "int8": by_rival("LSTM", in_group(runtimes, "int8"), "float32", "int16", "torch", "ONNX Runtime int8"),
    "models": lambda figures: by_machine("model", sorted(models.CASES, key=figures.gain), part=models.PART)(figures),
    "integrations": by_machine("library and what runs", integrations.CASES, "before"),
    "runtimes": by_rival("layer", BESIDE_OTHERS, "torch", *OTHERS[:3], modes=ALL),
    "runtimes-second": by_rival("layer", BESIDE_OTHERS, *OTHERS[3:], modes=ALL),
    "runtimes-chart": chart("runtimes", runtimes_label, "images/"),
    "masks": by_machine("LSTM", named(transforms.CASES, "reset,", "lengths,"), WITHOUT),
    "compile": by_machine("LSTM", named(transforms.CASES, "torch.compile"), WITHOUT, cut="torch.compile, "),
    "derivatives": by_machine("derivative", named(transforms.CASES, *transforms.DERIVATIVES)),
    "ensembles": by_machine("LSTMs", named(transforms.CASES, " models, "), "torch", "a loop of ours", "vmap"),
    "operators": by_machine(
        "call", named(transforms.CASES, "patch_operators"), "torch", "ours by replace", cut="patch_operators, "
    ),
}


def placed(page: str, reports: Sequence[Report]) -> str:
    """Return a page with what these reports say between its marks. Its machines are those of its other figures."""
    figures = Figures(reports)

    def written(of_machines: bool) -> Callable[[re.Match[str]], str]:
        def block(match: re.Match[str]) -> str:
            if (match[2] == "machines") != of_machines:
                return match[0]
            lines = machines(figures) if of_machines else BLOCKS[match[2]](figures)
            return "\n".join([match[1], *lines, "", match[3]])

        return block

    return BLOCK.sub(written(True), BLOCK.sub(written(False), page))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def pages() -> Iterator[Path]:
    """Yield the pages that have figures."""
    yield from (
        path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if BLOCK.search(text_of(path))
    )


def main() -> None:
    for path in pages():
        text = placed(text_of(path), newest())
        if text != text_of(path):
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))
    pictures.main()


if __name__ == "__main__":
    main()
