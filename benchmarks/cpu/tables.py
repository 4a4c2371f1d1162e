"""All cases of the CPU, in the order of their groups."""

from benchmarks.cpu import cells, integrations, layers, models, runtimes, steps, transforms
from benchmarks.shared.case import Case

FAMILIES = layers, cells, steps, runtimes, models, integrations, transforms
GROUPS = (
    "layers", "gru", "sixteen", "cells", "steps", "streams", "int8", "models", "integrations", "runtimes",
    "transforms", "threads",
)  # fmt: skip
CASES: list[Case] = sorted((case for family in FAMILIES for case in family.CASES), key=lambda c: GROUPS.index(c.group))
