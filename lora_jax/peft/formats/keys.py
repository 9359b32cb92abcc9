"""Sorts the entries of a PEFT checkpoint by module, and tells kinds of modules by names."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeAlias

from lora_jax._io.tensor_files import CheckpointError

PREFIX = "base_model.model."
WEIGHT = "weight"
BIAS = "bias"
# Names of modules whose weights are (entries, width) in every framework.
_EMBEDDING = re.compile(r"emb|^(wte|wpe|shared)$", re.IGNORECASE)
_CONVOLUTION = re.compile(r"conv", re.IGNORECASE)
# Flat names: lora_te_text_model_encoder_layers_0_mlp_fc1.
FLAT = re.compile(r"lora_([a-z]+\d?)_(\w+)|lycoris_(\w+)")
# The models of a pipeline. These words have no index at their end.
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PIPELINE = ("unet", "transformer", *ENCODERS)
# From the beginnings of flat names to the models of a pipeline.
_SHORT = ("unet", "transformer", "te1", "te2", "te3", "te")
MODELS: dict[str, str] = dict(zip(_SHORT, (*PIPELINE, ENCODERS[0]), strict=True))
Kind: TypeAlias = Literal["linear", "embedding", "convolution", "experts"]
# From the end of an entry's name in a checkpoint to its name here. Older versions of PEFT
# add `.weight` to magnitudes and embeddings.
SUFFIXES: dict[str, str] = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "B_bias",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_A.weight": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_embedding_B.weight": "embedding_B",
    ".token_adapter.trainable_tokens_delta": "tokens",
}
ENDS = {entry: end for end, entry in reversed(SUFFIXES.items())}
"""From the name of an entry here to the end of its name in a file that is written."""
WRAPPED = ".base_layer"


class Dims(NamedTuple):
    """The sizes of a module's weight, by the shapes of its factors."""

    n_in: int
    n_out: int
    kernel: tuple[int, ...] = ()
    """Of a convolution."""
    experts: int = 0
    """The number of experts; 0 if the weight is not a stack of experts."""


@dataclasses.dataclass(frozen=True)
class Module:
    """The adapter of one module in a checkpoint.

    Args:
        name: of the module in the model, without the prefix of the checkpoint.
        kind: of the module.
        shapes: of the entries, by their names here.
        keys: from these names to the names in the checkpoint.
        experts: the number of experts in the factors; 0 for none.
    """

    name: str
    kind: Kind
    shapes: dict[str, tuple[int, ...]]
    keys: dict[str, str]
    experts: int = 0

    @property
    def model_name(self) -> str:
        """The name without the layers that PEFT puts around modules."""
        return without_wrapper(self.name)

    @property
    def rank(self) -> int:
        """The rank of the factors."""
        rank = self.shapes["A"][0]
        return rank // self.experts if self.experts else rank

    @property
    def dims(self) -> Dims:
        """The sizes of the module's weight."""
        a, b = self.shapes["A"], self.shapes["B"]
        return Dims(a[1], b[0], a[2:], self.experts)


class Entries(NamedTuple):
    """The entries of a checkpoint."""

    modules: dict[str, Module]
    """The adapters, by the name of the module."""
    tokens: dict[str, str]
    """Rows of embeddings: from the module to the name of the entry."""
    wholes: dict[str, str]
    """Full arrays of the model: from the parameter to the name of the entry."""

    def names(self) -> list[str]:
        """The names of all entries."""
        own = [key for module in self.modules.values() for key in module.keys.values()]
        return [*own, *self.tokens.values(), *self.wholes.values()]


def sort_entries(where: str, shapes: Mapping[str, tuple[int, ...]]) -> Entries:
    """Sorts the entries of a checkpoint by module, from the shapes by name.

    Raises if the kind of an entry is not known, or a module lacks an entry.
    """
    found: dict[str, dict[str, str]] = {}
    entries = Entries({}, {}, {})
    for key in shapes:
        if not key.startswith(PREFIX):
            raise CheckpointError(
                f"{where}: the entry {key!r} does not start with {PREFIX!r}, as the "
                "entries of a PEFT adapter do: was it saved with save_pretrained?"
            )
        name = key.removeprefix(PREFIX)
        module, entry = _split(name)
        if entry == "tokens":
            entries.tokens[module] = key
        elif entry:
            own = found.setdefault(module, {})
            if entry in own:
                raise CheckpointError(
                    f"{where}: {own[entry]!r} and {key!r} are the same entry."
                )
            own[entry] = key
        elif ".lora_" in name or "token_adapter" in name:
            raise CheckpointError(
                f"{where}: the kind of the entry {key!r} is not known: names must end in "
                f"{', '.join(SUFFIXES)}."
            )
        else:
            other = entries.wholes.setdefault(without_wrapper(name), key)
            if other != key:
                raise CheckpointError(f"{where}: {other!r} and {key!r} are the same array.")
    for module, keys in found.items():
        entries.modules[module] = _module(where, module, keys, shapes)
    return entries


def _split(name: str) -> tuple[str, str]:
    """The module of an entry, and its name here; empty if no adapter has it."""
    for suffix, entry in SUFFIXES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), entry
    return name, ""


def _module(
    where: str, name: str, keys: dict[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> Module:
    """The adapter of a module, if its entries are complete and fit each other."""
    embedding = "embedding_A" in keys or "embedding_B" in keys
    renamed = {entry.removeprefix("embedding_"): key for entry, key in keys.items()}
    pair = {"embedding_A", "embedding_B"} if embedding else {"A", "B"}
    if not pair <= keys.keys() or len(renamed) < len(keys):
        raise CheckpointError(
            f"{where}: the module {name!r} must have one lora_A and one lora_B, got "
            f"{', '.join(map(repr, keys.values()))}."
        )
    own = {entry: tuple(shapes[key]) for entry, key in renamed.items()}
    kind: Kind = "embedding" if embedding else "linear"
    if not embedding and len(own["A"]) > 2:
        kind = "convolution"
    module = Module(name, kind, own, renamed)
    _check_shapes(where, module)
    return module


def _check_shapes(where: str, module: Module) -> None:
    a, b = module.shapes["A"], module.shapes["B"]
    ones = (1,) * (len(a) - 2)
    most = 5 if module.kind == "convolution" else 2
    fit = 2 <= len(a) <= most and len(a) == len(b) and b[1:] == (a[0], *ones)
    if not fit or 0 in (*a, *b):
        raise CheckpointError(
            f"{where}: the factors of {module.name!r} do not fit each other: expected "
            f"lora_A (r, in, ...) and lora_B (out, r, ...), got {a} and {b}."
        )
    n_out = b[0]
    expected = {"m": {(n_out,), (1, n_out, *ones)}, "B_bias": {(n_out,)}}
    for entry, allowed in expected.items():
        if entry in module.shapes and module.shapes[entry] not in allowed:
            raise CheckpointError(
                f"{where}: {module.keys[entry]!r} must have the shape ({n_out},), got "
                f"{module.shapes[entry]}."
            )
    if "B_bias" in module.shapes and module.kind == "embedding":
        raise CheckpointError(
            f"{where}: {module.keys['B_bias']!r} is the bias of an embedding, and PEFT has "
            "no such bias."
        )


def entry_of(kind: Kind, entry: str) -> str:
    """The name of an entry in `SUFFIXES`: factors of embeddings have names of their own."""
    return f"embedding_{entry}" if kind == "embedding" and entry in ("A", "B") else entry


def without_wrapper(name: str) -> str:
    """Removes the names of the layers that PEFT puts around modules."""
    return ".".join(word for word in name.split(".") if f".{word}" != WRAPPED)


def nesting(name: str) -> tuple[str, int]:
    """The module of adapted parameters, and the depth of the adapter in it."""
    depth = 0
    while name.endswith(WRAPPED):
        name, depth = name.removesuffix(WRAPPED), depth + 1
    return name, depth


def name_ends(name: str) -> list[str]:
    """A name, and each end of it after a dot."""
    words = name.split(".")
    return [".".join(words[start:]) for start in range(len(words))]


def is_embedding(name: str, path: str = "") -> bool:
    """Whether a module is an embedding, by its name or the path of its leaf."""
    words = path.replace(".", "/").split("/")[-2:]
    if "kernel" in words:  # a matrix, such as an output head called embed_out
        return False
    return _ends_with(name, _EMBEDDING) or "embedding" in words


def is_convolution(name: str) -> bool:
    """Whether a module is a convolution, by its name."""
    return _ends_with(name, _CONVOLUTION)


def _ends_with(name: str, pattern: re.Pattern[str]) -> bool:
    last = [word for word in name.split(".") if not word.isdecimal()][-1:]
    return any(map(pattern.search, last))


def is_flat(name: str) -> bool:
    """Whether the words of a module's name are joined by underscores."""
    return FLAT.fullmatch(name) is not None


class Parameters:
    """Finds the parameters of `target_parameters` by their module."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = [*names]
        self._by_parent: dict[str, list[tuple[int, str]]] = {}
        for place, name in enumerate(self._names):
            parent, _, last = name.rpartition(".")
            self._by_parent.setdefault(parent, []).append((place, last))

    def of(self, owner: str) -> list[str]:
        """The names of a module's parameters, in the order of the config."""
        ends = dict.fromkeys(["", *name_ends(owner)])
        found = sorted(pair for end in ends for pair in self._by_parent.get(end, ()))
        return [f"{owner}.{last}" if owner else last for _, last in found]

    def missing(self, entries: Entries) -> Iterator[str]:
        """Lists what `target_parameters` names and the file lacks."""
        owners = [nesting(n)[0] for n, m in entries.modules.items() if m.kind == "experts"]
        if self._names and not owners:
            first = self._names[0]
            yield f"the config targets the parameter {first!r}, and the file has none"
        for owner in dict.fromkeys(owners):
            names, count = self.of(owner), owners.count(owner)
            if count != len(names):
                yield (
                    f"the config targets {len(names)} parameters of {owner!r}, "
                    f"{', '.join(names)}, and the file has {count}"
                )


def as_experts(
    where: str,
    modules: Mapping[str, Module],
    parameters: Iterable[str],
    rank_of: Callable[[str], int],
) -> dict[str, Module]:
    """Marks the adapters that belong to parameters, not to modules: `target_parameters`.

    Args:
        where: the name of the file, for messages.
        modules: the adapters of a checkpoint.
        parameters: the value of `target_parameters`.
        rank_of: from the name of a parameter to its rank in the config.
    """
    named, marked = Parameters(parameters), dict(modules)
    owners: dict[str, list[Module]] = {}
    for module in modules.values():
        if module.kind == "linear":
            owners.setdefault(nesting(module.name)[0], []).append(module)
    for owner, own in owners.items():
        ranks = {rank_of(name) for name in named.of(owner)}
        counts = _experts(where, own, ranks) if ranks else []
        for module, experts in zip(own, counts, strict=False):
            marked[module.name] = dataclasses.replace(
                module, kind="experts", experts=experts
            )
    return marked


def _experts(where: str, modules: list[Module], ranks: set[int]) -> list[int]:
    """The number of experts in each of the parameters of one module.

    A checkpoint has the depth of a parameter and not its name. If ranks differ, the
    parameters must have the same number of experts.
    """
    rows = [module.shapes["A"][0] for module in modules]
    counts = [{n // rank for rank in ranks if not n % rank} for n in rows]
    if len(ranks) > 1:
        counts = [set.intersection(*counts)] * len(modules)
    for module, n, count in zip(modules, rows, counts, strict=True):
        if len(count) != 1:
            raise CheckpointError(
                f"{where}: the factors of {module.name!r} have {n} rows, and the config "
                f"has the ranks {sorted(ranks)}: these do not give a number of experts."
            )
    return [next(iter(count)) for count in counts]
