"""The table of modules and the weights that they are."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lora_jax._core.immutable import FrozenDict
from lora_jax._core.tables import format_table
from lora_jax.peft._fitting import Reading


class Row(NamedTuple):
    """A module and its weight."""

    module: str
    path: str
    indices: tuple[int, ...]
    shape: tuple[int, ...]
    axes: str
    given: bool = False
    """Whether more than the shape said what the axes are."""
    stack: tuple[int, ...] = ()
    """The axis of each index."""
    fields: tuple[str, ...] = ()
    """What the number in the name that is each index is called."""

    @property
    def letters(self) -> str:
        """The axes, with the names of the numbers that are indexes of several."""
        return Reading(self.axes, self.stack).fields(self.fields)


class NameTable(FrozenDict[str, str | tuple[str, str]]):
    """From the names of modules to the paths of their weights. `print` shows a table.

    Where more than the shapes of weights says what their axes are, a value is the pair of
    a path and the letters of its axes, `{layers}` for the axis that is the index of layers.
    """

    rows: tuple[Row, ...] = ()

    @classmethod
    def of(cls, rows: Mapping[str, Row]) -> "NameTable":
        """A table of some rows."""
        table = cls(
            {
                name: (row.path, row.letters) if row.given else row.path
                for name, row in rows.items()
            }
        )
        table.rows = tuple(rows.values())
        return table

    def __str__(self) -> str:
        return "\n".join(format_table(_cells(self.rows)))


def _cells(rows: tuple[Row, ...]) -> Iterator[tuple[str, ...]]:
    yield "module", "path", "shape", "axes"
    for row in rows:
        pairs = sorted(zip(row.stack, row.indices, strict=True))
        index = f"[{', '.join(str(index) for _, index in pairs)}]" if pairs else ""
        yield row.module, row.path + index, str(row.shape), row.letters
