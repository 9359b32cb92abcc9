"""The files of mlx-lm, of kohya's trainers and of diffusers, with PEFT's entries.

A `Dialect` has the names that a trainer gives to the entries of its files.
"""

import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lora_jax._io import tensor_files
from lora_jax._io.tensor_files import CheckpointError, TensorFile
from lora_jax.peft import checkpoint as peft_files
from lora_jax.peft.checkpoint import CONFIG, MLX_TENSORS, TENSORS
from lora_jax.peft.fields import shorten
from lora_jax.peft.keys import PREFIX, SUFFIXES, Kind
from lora_jax.peft.words import is_embedding

PEFT, MLX, KOHYA, DIFFUSERS = DIALECTS = ("peft", "mlx", "kohya", "diffusers")
DialectName = Literal["peft", "mlx", "kohya", "diffusers"]
FILES = (KOHYA, DIFFUSERS)
"""The dialects of one file, not of a directory."""
_DIFFUSERS_TENSORS = "pytorch_lora_weights.safetensors"


class Dialect(NamedTuple):
    """The names of a trainer for the entries of a module."""

    ends: Mapping[str, str]
    """From the end of an entry's name to its name in `SUFFIXES`, or `"alpha"`. Of several
    ends with one name, the first is written."""
    kinds: tuple[Kind, ...]
    """Of the modules that its files hold."""
    old: tuple[tuple[str, str], ...] = ()
    """Patterns in the names of older files, and their replacements."""

    def split(self, key: str) -> tuple[str, str]:
        """The module of an entry, and its name here; empty if it is not known."""
        for pattern, new in self.old:
            key = re.sub(pattern, new, key)
        end = next(filter(key.endswith, self.ends), "")
        return key.removesuffix(end), self.ends.get(end, "")

    def named(self, module: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of a module, from their names here, by their names in a file."""
        ends = {entry: end for end, entry in reversed([*self.ends.items()])}
        return {module + ends[own]: np.asarray(x, order="C") for own, x in arrays.items()}


BY_NAME = {
    MLX: Dialect(
        {".lora_a": "A", ".lora_b": "B", ".m": "m"}, ("linear", "embedding", "experts")
    ),
    KOHYA: Dialect(
        {
            ".lora_down.weight": "A",
            ".lora_up.weight": "B",
            ".dora_scale": "m",
            ".alpha": "alpha",
        },
        ("linear", "convolution"),
    ),
    DIFFUSERS: Dialect(
        {**SUFFIXES, ".lora.down.weight": "A", ".lora.up.weight": "B", ".alpha": "alpha"},
        ("linear", "convolution", "embedding"),
        (
            (r"\.processor\.", "."),
            (r"^(text_encoder.*)\.to_([qkv])_lora\.", r"\1.\2_proj.lora."),
            (r"^(text_encoder.*)\.to_out_lora\.", r"\1.out_proj.lora."),
            (r"\.to_([qkv])_lora\.", r".to_\1.lora."),
            (r"\.to_out_lora\.", ".to_out.0.lora."),
            (r"\.lora_linear_layer\.", ".lora."),
        ),
    ),
}
_PEFT_ENDS = {entry: end for end, entry in reversed(SUFFIXES.items())}
_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
# What else such files hold: patterns in the names of entries, what the file looks like,
# and what to do.
MERGE = "merge it into the weights of the model with the program that trained it"
_FULL = "use the weights as params"
_OTHERS = (
    (re.escape(PREFIX), "PEFT", f"give the directory with {CONFIG} and {TENSORS}"),
    (r"\.lora_[ab]\.weight$", "torchtune", "load it with lora_jax.peft.load_torchtune"),
    (r"\.hada_[wt]\d", "LoHa (LyCORIS)", MERGE),
    (r"\.lokr_[wt]\d", "LoKr (LyCORIS)", MERGE),
    (r"\.lora_mid\.", "a Tucker decomposition (LyCORIS)", MERGE),
    (r"\.(?:oft|boft)_", "OFT", MERGE),
    (r"\.on_input$", "IA3 (LyCORIS)", MERGE),
    (r"\.[ab][12]\.weight$", "GLoRA (LyCORIS)", MERGE),
    (r"\.(?:diff|diff_b|w_norm|b_norm)$", "weights trained in full", MERGE),
    (r"emb_params|^clip_[lg]$|string_to_param", "textual inversion", "leave it out"),
    (r"^lora_controlnet$|\.(?:down|up)$", "Control-LoRA", MERGE),
    (r"(?:^|[./])(?:weight|bias|kernel|embedding)$", "the weights of a model", _FULL),
)


class _Entry(NamedTuple):
    """An entry of a file, in PEFT's layout."""

    key: str
    """The name in the file."""
    axes: tuple[int, ...]
    """The order of its axes."""
    shape: tuple[int, ...]
    """Its shape in that order."""


class _Renamed(Mapping[str, jax.ShapeDtypeStruct]):
    """The arrays of a file by PEFT's names, in PEFT's layout."""

    def __init__(self, file: TensorFile, entries: Mapping[str, _Entry]) -> None:
        self._file, self._entries = file, entries

    def __getitem__(self, name: str) -> jax.ShapeDtypeStruct:
        entry = self._entries[name]
        return tensor_files.abstract(entry.shape, self._file[entry.key].dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, name: str, /) -> np.ndarray:
        """The array of a name."""
        entry = self._entries[name]
        return self._file.read(entry.key).transpose(entry.axes).reshape(entry.shape)


def find_file(place: pathlib.Path) -> pathlib.Path | None:
    """The file of arrays at a path, if it is of another dialect than PEFT; else None."""
    named = place.suffix == ".safetensors" and not place.is_dir()
    if named or (place.is_file() and place.suffix != ".json"):
        return place
    for name in (MLX_TENSORS, _DIFFUSERS_TENSORS):
        if (place / name).is_file() and not (place / TENSORS).is_file():
            return place / name
    return None


def find_dialect(place: pathlib.Path) -> str | None:
    """The dialect of the adapter at a path; None if there is none."""
    path = find_file(place)
    if path is None:
        return PEFT if peft_files.is_checkpoint(place) else None
    return _recognize(str(path), _open(path))


class ForeignFile(NamedTuple):
    """The entries of a file that is not of PEFT, as PEFT would have them."""

    dialect: str
    file: TensorFile
    arrays: "_Renamed"
    """By PEFT's names."""
    ranks: dict[str, int]
    """By module; and so are the others."""
    alphas: dict[str, float]
    """In entries of their own."""
    entries: dict[str, frozenset[str]]
    """The names of entries here."""
    stacks: list[str]
    """The modules that are stacks of experts."""


def open_foreign(path: pathlib.Path) -> ForeignFile:
    """Opens a file of another dialect than PEFT, and translates its entries."""
    where, file = str(path), _open(path)
    name = _recognize(where, file)
    found = _by_module(where, name, file)
    alphas = {
        module: _alpha(where, own.pop("alpha"), file)
        for module, own in found.items()
        if "alpha" in own
    }
    entries, ranks, stacks = dict[str, _Entry](), dict[str, int](), list[str]()
    for module, own in found.items():
        layouts, ranks[module], is_stack = _as_peft(where, name, module, own, file)
        stacks += [module] if is_stack else []
        for entry, layout in layouts.items():
            entries[f"{PREFIX}{module}{_PEFT_ENDS[entry]}"] = layout
    arrays = _Renamed(file, entries)
    peft_files.check_dtypes(where, arrays)
    names = {module: frozenset(own) for module, own in found.items()}
    return ForeignFile(name, file, arrays, ranks, alphas, names, stacks)


def _open(path: pathlib.Path) -> TensorFile:
    """Opens a file; raises for other files that people take for adapters."""
    tensor_files.check_is_file(path)
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        raise CheckpointError(
            f"{path} is a GGUF file, from which no adapters are read: give the adapter "
            "that it was made from, as a safetensors file."
        )
    if path.suffix in _PICKLES or start == b"PK\3\4":
        raise CheckpointError(
            f"{path} looks like a pickle, which runs code when it is read, and is not read "
            "here: save its tensors with safetensors.torch.save_file."
        )
    return TensorFile(path)


def _recognize(where: str, file: TensorFile) -> str:
    """The dialect of a file, by the names of its entries."""
    found = {
        name: key
        for key in file
        for name, dialect in BY_NAME.items()
        if not key.startswith(PREFIX)
        and dialect.split(key)[1] in ("A", "B", "embedding_A", "embedding_B")
    }
    if len(found) > 1:
        pair = " and ".join(f"{key!r} of {name}" for name, key in found.items())
        raise CheckpointError(f"{where} has entries of several trainers: {pair}.")
    if not found:
        raise _unknown(where, next(iter(file), ""), sorted(file))
    return next(iter(found))


def _unknown(where: str, key: str, keys: Iterable[str]) -> CheckpointError:
    """The error for an entry that no adapter has. It names what `keys` look like."""
    for pattern, what, advice in _OTHERS:
        for each in keys:
            if re.search(pattern, each):
                return CheckpointError(
                    f"{where} is or contains something else than LoRA and DoRA: its entry "
                    f"{each!r} looks like {what}. It is not read here: {advice}."
                )
    ends = (end for dialect in BY_NAME.values() for end in dialect.ends)
    return CheckpointError(
        f"{where}: the entry {key!r} is not of an adapter that is known here: names end in "
        f"{', '.join(dict.fromkeys(ends))}."
    )


def _by_module(where: str, name: str, file: TensorFile) -> dict[str, dict[str, str]]:
    """The keys of a file by module and entry."""
    found: dict[str, dict[str, str]] = {}
    for key in file:
        module, entry = BY_NAME[name].split(key)
        if not entry or entry == "tokens" or not module:
            raise _unknown(where, key, [key])
        other = found.setdefault(module, {}).setdefault(entry, key)
        if other != key:
            raise CheckpointError(f"{where}: {other!r} and {key!r} are the same entry.")
    for module, own in found.items():
        ends = {entry.removeprefix("embedding_") for entry in own}
        if not {"A", "B"} <= ends:
            raise CheckpointError(
                f"{where}: {module!r} must have both factors of an adapter, got "
                f"{', '.join(map(repr, own.values()))}: is the file whole?"
            )
    return found


def _alpha(where: str, key: str, file: TensorFile) -> float:
    """The value of an entry `.alpha`."""
    value = file.read(key).astype(np.float64).reshape(-1)
    if value.size != 1 or not np.isfinite(value).all() or not value.any():
        raise CheckpointError(
            f"{where}: {key!r} must be one number that is finite and not 0, got "
            f"{shorten(value[:4].tolist())}. Kohya's trainers read 0 as the rank, and "
            "other programs as 0: write the alpha that is meant."
        )
    return value[0].item()


def _as_peft(
    where: str, name: str, module: str, keys: Mapping[str, str], file: TensorFile
) -> tuple[dict[str, _Entry], int, bool]:
    """The entries of a module in PEFT's layout, its rank, and whether it is a stack."""
    shapes = {entry: tuple(file[key].shape) for entry, key in keys.items()}
    entries = {
        entry: _Entry(keys[entry], tuple(range(len(shape))), shape)
        for entry, shape in shapes.items()
    }
    if name == KOHYA and "m" in shapes:
        shape = shapes["m"]
        if shape[:1] != shapes["B"][:1] or math.prod(shape[1:]) != 1:
            raise CheckpointError(
                f"{where}: {keys['m']!r} must be ({', '.join(map(str, shapes['B'][:1]))}, "
                f"1, ...), one magnitude for each output, got {shape}. Magnitudes of "
                f"inputs are not DoRA as it is here: {MERGE}."
            )
        entries["m"] = entries["m"]._replace(shape=shape[:1])
    if name != MLX:
        first = shapes.get("A", shapes.get("embedding_A", ()))
        return entries, (*first, 0)[0], False
    a, b = shapes["A"], shapes["B"]
    if len(b) == 3 and "m" not in shapes:  # (experts, out, r)
        experts, n_out, rank = b
        if a not in ((experts, rank, *a[-1:]), (experts * rank, *a[-1:])):
            raise _wrong_shapes(where, module, a, b)
        entries["A"] = entries["A"]._replace(shape=(experts * rank, a[-1]))
        entries["B"] = _Entry(keys["B"], (1, 2, 0), (n_out, rank * experts))
        return entries, rank, True
    if len(a) != 2 or len(b) != 2:
        raise _wrong_shapes(where, module, a, b)
    for entry in "AB":
        entries[entry] = _Entry(keys[entry], (1, 0), shapes[entry][::-1])
    if is_embedding(module):
        if "m" in shapes:
            raise CheckpointError(
                f"{where}: {keys['m']!r} has a magnitude for each row of an embedding, and "
                f"DoRA here has one for each output: {MERGE}."
            )
        entries = {f"embedding_{entry}": own for entry, own in entries.items()}
    return entries, a[1], False


def _wrong_shapes(where: str, module: str, a: Any, b: Any) -> CheckpointError:
    return CheckpointError(
        f"{where}: the factors of {module!r} do not fit each other: expected (in, r) and "
        f"(r, out), or (experts, r, in) and (experts, out, r), got {a} and {b}."
    )
