"""Where the weights and adapters of a plan lie on a mesh: what its table says of it."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lora_jax._core import checks
from lora_jax._core.immutable import FrozenDict

HEADER = ("weight on", "A on", "B on", "bytes/device")


class Row(NamedTuple):
    """Where a weight and its adapter lie, and the size of the adapter.

    An axis that is not split is `-`. An axis that is split over several mesh axes has
    their names joined by `+`.
    """

    weight: str
    a: str
    b: str
    size: int
    """The bytes of the adapter on each device."""


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """Where the weights and adapters of a plan lie on a mesh.

    Args:
        mesh: the size of each mesh axis by its name.
        frozen_bytes: the bytes of the params on each device.
        rows: a row for each path of a plan.
    """

    mesh: Mapping[str, int]
    frozen_bytes: int
    rows: Mapping[str, Row]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mesh", FrozenDict(self.mesh))
        object.__setattr__(self, "rows", FrozenDict(self.rows))

    def cells(self, path: str) -> tuple[str, ...]:
        """The cells of the table for one path."""
        row = self.rows[path]
        return row.weight, row.a, row.b, f"{row.size:,}"

    def total(self, paths: Iterable[str]) -> tuple[str, ...]:
        """The cells of the table for all paths together."""
        return "", "", "", f"{sum(self.rows[path].size for path in paths):,}"

    def __str__(self) -> str:
        mesh = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        return f"on the mesh {mesh}: params of {self.frozen_bytes:,} bytes on each device"


def joined(first: MeshLayout | None, second: MeshLayout | None) -> MeshLayout | None:
    """The layout of the union of two plans; None if they are not on one mesh."""
    if first is None or second is None or first.mesh != second.mesh:
        return None
    return dataclasses.replace(first, rows={**second.rows, **first.rows})


def as_text(axes: Iterable[tuple[str, ...]]) -> str:
    """The mesh axes of each axis of an array, for a `Row`."""
    return ",".join("+".join(own) or "-" for own in axes)


def as_json(layout: MeshLayout | None) -> Any:
    """The layout as JSON has it."""
    return layout and {**vars(layout), "mesh": dict(layout.mesh), "rows": dict(layout.rows)}


def from_json(given: Any) -> MeshLayout | None:
    """Reads what `as_json` returned.

    Raises:
        TypeError, ValueError: if a value is not valid for its field.
    """
    if given is None:
        return None
    names = [field.name for field in dataclasses.fields(MeshLayout)]
    checks.check_fields("the layout of a lora_jax AdapterPlan", given, names)
    if len(given) < len(names):
        raise ValueError(
            f"the layout must have {', '.join(names)}, got {', '.join(given)}."
        )
    for name in ("mesh", "rows"):
        checks.check_json(name, given[name], dict, "an object")
    for name, size in given["mesh"].items():
        checks.check_json(f"the mesh axis {name!r}", size, int, "a size")
    rows = {}
    for path, row in given["rows"].items():
        with checks.at_path(path):
            checks.check_json("the row", row, list, "a list")
            if list(map(type, row)) != [str, str, str, int]:
                raise TypeError(f"a row must have three texts and a number, got {row!r}.")
            rows[path] = Row(*row)
    checks.check_json("frozen_bytes", given["frozen_bytes"], int, "a number of bytes")
    return MeshLayout(given["mesh"], given["frozen_bytes"], rows)
