"""The table of modules and the weights that they are."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lora_jax._frozen import FrozenDict
from lora_jax._tables import format_table


class Row(NamedTuple):
    """A module and its weight."""

    module: str
    path: str
    indices: tuple[int, ...]
    shape: tuple[int, ...]
    axes: str
    given: bool = False
    """Whether the caller said what the axes are."""


class NameTable(FrozenDict[str, str | tuple[str, str]]):
    """From the names of modules to the paths of their weights. `print` shows a table.

    Where the caller gave the letters of the axes too, a value is the pair of both.
    """

    rows: tuple[Row, ...] = ()

    @classmethod
    def of(cls, rows: Mapping[str, Row]) -> "NameTable":
        """A table of some rows."""
        table = cls(
            {n: (row.path, row.axes) if row.given else row.path for n, row in rows.items()}
        )
        table.rows = tuple(rows.values())
        return table

    def __str__(self) -> str:
        return "\n".join(format_table(_cells(self.rows)))


def _cells(rows: tuple[Row, ...]) -> Iterator[tuple[str, ...]]:
    yield "module", "path", "shape", "axes"
    for row in rows:
        index = f"[{', '.join(map(str, row.indices))}]" if row.indices else ""
        yield row.module, row.path + index, str(row.shape), row.axes
