"""The goals that a GPU's times have, and whether they are met."""

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.gpu_rivals import installed
from benchmarks.shapes import MODES, Shape

Layer = tuple[Shape, str]  # and its precision
ROW, BEST_OF_CUDNN = Shape(28, 128, 28, 128), Shape(128, 128, 512, 512)
SMALLEST, *LARGER = (Shape(512, 64, H, H) for H in (64, 128, 256, 512, 1024))
# The layers that have goals, in the order in which they are measured: the widest is likeliest to miss them
WIDTHS = [(shape, "bf16") for shape in (LARGER[-1], Shape(1024, 16, 768, 768), SMALLEST, *LARGER[:-1])]
GOALS: list[Layer] = [(ROW, "bf16"), (ROW, "tf32"), (BEST_OF_CUDNN, "fp16"), *WIDTHS]


def speeds(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of times, judged by eager calls, in which the host's time counts; those from graphs are shown."""
    beside_torchrl = faster(found, "torchrl", 1.0, GOALS)
    if not installed("torchrl"):
        beside_torchrl = judged(beside_torchrl["goal"], {"torchrl is not installed": None})
    return [
        *(faster(found, "nn.LSTM", 3.0, [layer], ["training"]) for layer in GOALS[:2]),
        quick(found),
        faster(found, "nn.LSTM", 1.0, [(ROW, "bf16"), *WIDTHS]),
        faster(found, "nn.LSTM", 1.0, [(BEST_OF_CUDNN, "fp16")]),
        beside_torchrl,
    ]


def faster(
    found: dict[str, Any], rival: str, least: float, layers: Iterable[Layer], modes: Iterable[str] = MODES
) -> dict[str, Any]:
    facts = {}
    for layer in layers:
        for mode in modes:
            ratios = by_way(found, layer, mode, lambda row: row["ratios"].get(rival, {}).get("median"))
            facts[stated(layer, mode, ratios)] = ratios["eager"] >= least if "eager" in ratios else None
    return judged(f"at least {least} times as fast as {rival}", facts)


def quick(found: dict[str, Any]) -> dict[str, Any]:
    """At T 512: of a short layer's time a step, much is the call's own."""
    layer, mode = (LARGER[0], "bf16"), "inference"
    short, times = (by_way(found, a, mode, lambda row: row["microseconds_a_step"]) for a in (GOALS[0], layer))
    goal = f"forward at most 1 us a step at H 128 and T 512; beside it, {stated(GOALS[0], mode, short)}"
    return judged(goal, {stated(layer, mode, times): times["eager"] <= 1 if "eager" in times else None})


def by_way(found: dict[str, Any], layer: Layer, mode: str, value: Callable[[Any], Any]) -> dict[str, float]:
    """Eager and from a graph: the first measured of each that has a value."""
    rows = [r for r in found["results"] if (r["name"], r["precision"], r["mode"]) == (str(layer[0]), layer[1], mode)]
    return {row["way"]: value(row) for row in reversed(rows) if value(row) is not None}


def stated(layer: Layer, mode: str, values: dict[str, float]) -> str:
    figures = ", ".join(f"{way} {values[way]:.2f}" for way in sorted(values))
    return f"{layer[0]} {layer[1]} {mode} ({figures or 'no time'})"


def judged(goal: str, facts: dict[str, bool | None]) -> dict[str, Any]:
    """By what is known of each part: it holds, does not, or None."""
    verdict = "FAIL" if False in facts.values() else "not measured" if None in facts.values() else "pass"
    return {"goal": goal, "verdict": verdict, "facts": facts}


def told(goal: dict[str, Any]) -> str:
    """On one line, with what decided it."""
    deciding = {"FAIL": False, "not measured": None, "pass": True}[goal["verdict"]]
    facts = ", ".join(name for name, held in goal["facts"].items() if held is deciding)
    return f"{goal['verdict']}: {goal['goal']}: {facts}"
