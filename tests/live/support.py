"""Adapters of PEFT with random values on small models, and params of these as trees."""

import contextlib
import copy
import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import lora_jax.peft
from tests.live.models import build
from tests.support import assert_close

# What PEFT and transformers warn of that has nothing to do with an adapter.
FILTERS = (
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # A tree of JAX does not say which matrices torch has the other way round.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
)

ULPS = 2**9  # of float32, of the largest logit: what sums in another order differ by
IDS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]]

_built: dict[str, torch.nn.Module] = {}


def model(name):
    """A new model of an architecture: random, none of its values 0 or 1."""
    if name not in _built:
        torch.manual_seed(0)
        _built[name] = disturb(build(name).eval(), seed=1)
    return copy.deepcopy(_built[name])


def disturb(module, seed, trainable=False):
    """Adds noise to the parameters of a module, or to those that are trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            if value.requires_grad or not trainable:
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return module


def run(module):
    """What a model makes of some tokens."""
    ids = torch.tensor(IDS)
    inputs = {"input_ids": ids}
    if getattr(getattr(module, "config", None), "model_type", "") == "t5":
        inputs["decoder_input_ids"] = ids[:, 2:]
    out = module(**inputs)
    return getattr(out, "logits", out)


def logits(module):
    """What a model makes of some tokens, as an array."""
    with torch.no_grad():
        return array(run(module))


def array(tensor):
    """The values of a tensor."""
    return tensor.detach().numpy().copy()


def params_of(module):
    """The state dict of a model, as arrays."""
    return {name: array(value) for name, value in module.state_dict().items()}


def modules_of(module):
    """The names of a model's modules and of their classes."""
    return {name: type(each).__name__ for name, each in module.named_modules()}


def with_params(name, params):
    """A new model with other params."""
    module = model(name)
    own = {key: torch.from_numpy(np.array(value)) for key, value in params.items()}
    module.load_state_dict(own)
    return module


def assert_same(got, want, ulps=ULPS):
    """Asserts that logits are the same, but for the order of sums."""
    assert_close(np.asarray(got, np.float32), want, ulps)


class Trained(NamedTuple):
    """An adapter of PEFT, as if it had been trained, and its files."""

    name: str
    """Of the base model."""
    model: Any
    folder: Any
    logits: np.ndarray


def train(name, folder, seed=2, **fields):
    """Makes an adapter with random values, and saves it."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **fields})
    with quiet():
        adapted = peft.get_peft_model(model(name), config).eval()
        disturb(adapted, seed, trainable=True)
        adapted.save_pretrained(folder)
    return Trained(name, adapted, folder, logits(adapted))


@contextlib.contextmanager
def quiet():
    """Without what PEFT warns of when it makes or saves an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def from_files(name, folder):
    """The base model with an adapter as PEFT loads it: all of its entries, and no others.

    PEFT only warns of missing entries, which is an error in this suite, and says nothing
    of those that it does not use.
    """
    loaded = peft.PeftModel.from_pretrained(model(name), folder).eval()
    state = peft.load_peft_weights(str(folder), device="cpu")
    result = peft.set_peft_model_state_dict(loaded, state)
    assert not result.unexpected_keys, result.unexpected_keys
    own = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    missing = own.keys() - state.keys()
    # A file may have some biases only.
    assert all(key.endswith(".bias") and ".lora_" not in key for key in missing), missing
    return loaded


def merged(params, loaded):
    """Params with an adapter that `load` returned folded in."""
    whole = lora_jax.peft.replace_leaves(params, loaded.replaced)
    return lora_jax.merge_adapters(as_jax(whole), loaded.adapters, loaded.plan)


def as_jax(params):
    """A dict of arrays, or a tree of dicts, with arrays of JAX."""
    return {
        name: as_jax(value) if isinstance(value, dict) else jnp.asarray(value)
        for name, value in params.items()
    }


class Leaf(NamedTuple):
    """Where a parameter of torch is in a tree of JAX, and how it lies there."""

    path: tuple[str, ...]
    turn: tuple[int, ...]
    """The axes of the parameter in the order of the leaf."""


def leaves_of(module):
    """The place of each parameter: as Flax names them, `model/layers_0/q_proj/kernel`."""
    kinds = modules_of(module)
    return {
        name: _leaf(name, value.ndim, kinds[name.rpartition(".")[0]])
        for name, value in module.state_dict().items()
    }


def _leaf(name, ndim, kind):
    *words, last = name.split(".")
    turn = tuple(range(ndim))
    if last == "weight":
        last = {"Embedding": "embedding"}.get(kind, "kernel" if ndim > 1 else "scale")
        if "kernel" in last and kind != "Conv1D":
            turn = (*range(2, ndim), 1, 0)
    elif last in ("gate_up_proj", "down_proj") and kind == "MixtralExperts":
        turn = (0, 2, 1)
    elif last == "in_proj_weight":
        turn = (1, 0)
    path = []
    for word in words:
        if word.isdecimal() and path:
            path[-1] += f"_{word}"
        else:
            path.append(word)
    return Leaf((*path, last), turn)


def as_tree(params, leaves):
    """Params of torch as nested dicts."""
    tree = {}
    for name, value in params.items():
        *path, last = leaves[name].path
        inner = tree
        for word in path:
            inner = inner.setdefault(word, {})
        inner[last] = value.transpose(leaves[name].turn)
    return tree


def from_tree(tree, leaves):
    """Undoes `as_tree`."""
    params = {}
    for name, leaf in leaves.items():
        value = tree
        for word in leaf.path:
            value = value[word]
        params[name] = np.asarray(value).transpose(np.argsort(leaf.turn))
    return params


def stacked(tree, names=("layers_0", "layers_1"), name="layers"):
    """A tree with the subtrees of layers as one, whose arrays have an axis of layers."""
    if not isinstance(tree, dict):
        return tree
    rest = {key: stacked(value) for key, value in tree.items() if key not in names}
    return {**rest, name: _stack([tree[n] for n in names])} if names[0] in tree else rest


def _stack(trees):
    if isinstance(trees[0], dict):
        return {key: _stack([tree[key] for tree in trees]) for key in trees[0]}
    return np.stack(trees)


def unstacked(tree, names=("layers_0", "layers_1"), name="layers"):
    """Undoes `stacked`."""
    if not isinstance(tree, dict):
        return tree
    rest = {key: unstacked(value) for key, value in tree.items() if key != name}
    if name not in tree:
        return rest
    return rest | {own: _index(tree[name], i) for i, own in enumerate(names)}


def _index(tree, i):
    if isinstance(tree, dict):
        return {key: _index(value, i) for key, value in tree.items()}
    return tree[i]


def random_like(adapters, seed):
    """Random values, no matrix 0, in place of those of some adapters."""
    rng = np.random.default_rng(seed)
    return {
        path: {
            name: jnp.asarray(
                rng.normal(1.0 if name == "m" else 0.0, 0.3, value.shape), value.dtype
            )
            for name, value in adapter.items()
        }
        for path, adapter in adapters.items()
    }
