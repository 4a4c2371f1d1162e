"""Short runs of the demonstration, and what they report."""

import json

SMALL = ("--batch-size=32", "--hidden-size=7", "--backend=aten", "--threads=1")
PNG = b"\x89PNG\r\n\x1a\n"
TIMES = {"seconds", "ms_per_iteration", "time_ratio"}


def metrics(directory):
    """metrics.json, in which NaN and infinity are refused."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads((directory / "metrics.json").read_text(), parse_constant=refuse)


def figures(directory):
    """metrics.json without the times, which differ from run to run."""
    found = metrics(directory)
    found["compare"] = {key: value for key, value in found.get("compare", {}).items() if key not in TIMES}
    return {key: value for key, value in found.items() if key not in TIMES}
