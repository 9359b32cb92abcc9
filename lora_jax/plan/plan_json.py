"""The JSON text of a plan."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from lora_jax._core import checks
from lora_jax.plan import mesh_layout
from lora_jax.plan.config import from_fields
from lora_jax.plan.target import ROLES, Target, TrainedLeaf, Use

FIELDS = ("config", "targets", "trained", "skipped", "uses", "total", "layout")
# Left out for a whole weight, as in plans of versions without parts.
_WHOLE = {"part": "", "use": ""}


def to_text(fields: Mapping[str, Any]) -> str:
    """Writes the `FIELDS` of a plan as a JSON object."""
    kinds = {
        name: {path: _as_dict(entry) for path, entry in fields[name].items()}
        for name in ("targets", "trained")
    }
    uses = {path: [*map(_use_as_dict, own)] for path, own in fields["uses"].items()}
    config = json.loads(fields["config"].to_json())
    layout = mesh_layout.as_json(fields["layout"])
    written = {**fields, **kinds, "config": config, "uses": uses, "layout": layout}
    return json.dumps(written, indent=2, default=dict)


def _as_dict(entry: Target | TrainedLeaf) -> dict[str, Any]:
    fields = dataclasses.asdict(entry)
    return {name: value for name, value in fields.items() if _WHOLE.get(name) != value}


def from_text(text: str) -> dict[str, Any]:
    """Reads the fields that `to_text` wrote.

    Raises:
        TypeError, ValueError: if the text is not JSON, a field is missing, unknown or there
            twice, or a value is not valid for its field.
    """
    with checks.reading_json("the JSON of a lora_jax AdapterPlan", text) as given:
        return _fields_of_plan(given)


def _fields_of_plan(given: Any) -> dict[str, Any]:
    if isinstance(given, dict):  # plans of earlier versions lack these
        given = {"trained": {}, "layout": None, **given}
    _check_fields("AdapterPlan", given, FIELDS)
    for name in ("targets", "trained", "skipped", "uses"):
        checks.check_json(name, given[name], dict, "an object with paths as its names")
    for path, reason in given["skipped"].items():
        checks.check_json(f"skipped[{path!r}]", reason, str, "a reason")
    checks.check_json("total", given["total"], int, "a number of parameters")
    if given["total"] < 0:
        raise ValueError(f"total must be at least 0, got {given['total']}.")
    read = {
        "config": from_fields(given["config"]),
        "targets": _entries(Target, given["targets"]),
        "trained": _entries(TrainedLeaf, given["trained"]),
    }
    layout = mesh_layout.from_json(given["layout"])
    entries, uses = read["targets"] | read["trained"], {}
    for path, own in given["uses"].items():
        with checks.at_path(path):
            checks.check_json("uses", own, list, "a list of uses")
            uses[path] = tuple(_use(use, entries.get(path)) for use in own)
    return {**given, **read, "uses": uses, "layout": layout}


def _entries(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    names, entries = tuple(field.name for field in dataclasses.fields(kind)), {}
    for path, fields in given.items():
        with checks.at_path(path):
            if kind is Target and isinstance(fields, dict):
                fields = {**_WHOLE, **fields}
            _check_fields(kind.__name__, fields, names)
            entries[path] = kind(**fields)
    return entries


def _check_fields(kind: str, given: Any, names: tuple[str, ...]) -> None:
    """Raises unless a JSON object has the fields of a class, and no others."""
    what = f"the JSON of a lora_jax {kind}"
    checks.check_fields(what, given, names)
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(f"{what} lacks the fields {', '.join(missing)}.")


def _use_as_dict(use: Use) -> dict[str, Any]:
    fields = use._asdict()
    return fields if use.window else {n: own for n, own in fields.items() if n != "window"}


def _use(given: Any, leaf: Target | TrainedLeaf | None) -> Use:
    given = {"window": [], **given} if isinstance(given, dict) else given
    _check_fields("Use", given, Use._fields)
    roles = given["roles"]
    checks.check_json("roles", roles, list, "a list of words")
    for name in ("primitive", "where", "merged"):
        checks.check_json(name, given[name], str, "a text")
    checks.check_json("linear", given["linear"], bool, "true or false")
    for role in roles:
        checks.check_choice("each of roles", role, ROLES)
    if leaf is not None and len(roles) != len(leaf.shape):
        raise ValueError(
            f"roles must have a word for each of the {len(leaf.shape)} axes of the "
            f"weight, got {len(roles)}."
        )
    checks.check_json("window", given["window"], list, "a list of axes")
    if not all(type(axis) is int and 0 <= axis < len(roles) for axis in given["window"]):
        raise ValueError(f"window must have axes of the weight, got {given['window']}.")
    fields = {**given, "roles": tuple(roles), "window": tuple(given["window"])}
    return Use(**fields)
