"""The JSON text of a plan."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from lora_jax._core import checks
from lora_jax.plan.config import LoraConfig, from_fields
from lora_jax.plan.target import ROLES, Target, Use

_FIELDS = ("config", "targets", "skipped", "uses", "total")
_TARGET_FIELDS = tuple(field.name for field in dataclasses.fields(Target))


def to_text(
    config: LoraConfig,
    targets: Mapping[str, Target],
    skipped: Mapping[str, str],
    uses: Mapping[str, tuple[Use, ...]],
    total: int,
) -> str:
    """Writes the fields of a plan as a JSON object.

    Raises:
        TypeError: if the config's `init` is a function.
    """
    values = (
        json.loads(config.to_json()),
        {path: dataclasses.asdict(target) for path, target in targets.items()},
        dict(skipped),
        {path: [use._asdict() for use in own] for path, own in uses.items()},
        total,
    )
    return json.dumps(dict(zip(_FIELDS, values, strict=True)), indent=2)


def from_text(text: str) -> dict[str, Any]:
    """Reads the fields that `to_text` wrote.

    Raises:
        TypeError, ValueError: if the text is not JSON, a field is missing, unknown or there
            twice, or a value is not valid for its field.
    """
    with checks.reading_json("the JSON of a lora_jax AdapterPlan", text) as given:
        return _fields_of_plan(given)


def _fields_of_plan(given: Any) -> dict[str, Any]:
    _check_fields("AdapterPlan", given, _FIELDS)
    for name in ("targets", "skipped", "uses"):
        checks.check_json(name, given[name], dict, "an object with paths as its names")
    for path, reason in given["skipped"].items():
        checks.check_json(f"skipped[{path!r}]", reason, str, "a reason")
    checks.check_json("total", given["total"], int, "a number of parameters")
    if given["total"] < 0:
        raise ValueError(f"total must be at least 0, got {given['total']}.")
    targets, uses = {}, {}
    for path, target in given["targets"].items():
        with checks.at_path(path):
            _check_fields("Target", target, _TARGET_FIELDS)
            targets[path] = Target(**target)
    for path, own in given["uses"].items():
        with checks.at_path(path):
            checks.check_json("uses", own, list, "a list of uses")
            uses[path] = tuple(_use(use, targets.get(path)) for use in own)
    config = from_fields(given["config"])
    return {**given, "config": config, "targets": targets, "uses": uses}


def _check_fields(kind: str, given: Any, names: tuple[str, ...]) -> None:
    """Raises unless a JSON object has the fields of a class, and no others."""
    what = f"the JSON of a lora_jax {kind}"
    checks.check_fields(what, given, names)
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(f"{what} lacks the fields {', '.join(missing)}.")


def _use(given: Any, target: Target | None) -> Use:
    _check_fields("Use", given, Use._fields)
    roles = given["roles"]
    checks.check_json("roles", roles, list, "a list of words")
    for name in ("primitive", "where", "merged"):
        checks.check_json(name, given[name], str, "a text")
    checks.check_json("linear", given["linear"], bool, "true or false")
    for role in roles:
        checks.check_choice("each of roles", role, ROLES)
    if target is not None and len(roles) != len(target.shape):
        raise ValueError(
            f"roles must have a word for each of the {len(target.shape)} axes of the "
            f"weight, got {len(roles)}."
        )
    return Use(**{**given, "roles": tuple(roles)})
