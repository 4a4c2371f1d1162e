"""What is derived from a cell: straight-line functions."""

from dataclasses import dataclass

from fastlstm.cells.graph import Node, operations


@dataclass(eq=False)
class Function:
    """Results by their names, of arguments: nodes that are given, by their names. Straight-line code, see `emit`."""

    name: str
    arguments: dict[str, Node]
    results: dict[str, Node]

    def operations(self) -> dict[str, int]:
        """How often it does each operation."""
        return operations(self.results.values(), self.arguments.values())

    @property
    def count(self) -> int:
        """How many operations it does."""
        return sum(self.operations().values())
