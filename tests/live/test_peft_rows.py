"""Another adapter for each row: the outputs are those of PEFT's `adapter_names`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
import lora_jax.peft
from tests.live.test_peft_model import llama

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
support = pytest.importorskip("tests.live.support")

pytestmark = [pytest.mark.live, *support.FILTERS]

SOME = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
TENANTS = {
    "a": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "b": {"r": 8, "lora_alpha": 2, "rank_pattern": {"v_proj": 2}, **SOME},
    "c": {"r": 5, "lora_alpha": 7, "target_modules": "all-linear", "use_rslora": True},
}
DORA = {"d": {"r": 4, "lora_alpha": 6, "use_dora": True, **SOME}}
BASE = "__base__"  # PEFT's name of a row without an adapter
BATCHES = {
    "mixed": ["a", BASE, "b", "c", "b", BASE],
    "sorted": ["a", "a", "a", "b", "b", "c"],
    "one": ["c"] * 6,
    "base": [BASE] * 6,
}
IDS = np.random.default_rng(0).integers(0, 21, (6, 7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of all tenants."""
    folder = tmp_path_factory.mktemp("rows")
    for seed, (name, fields) in enumerate({**TENANTS, **DORA}.items(), start=2):
        support.train("llama", folder / name, seed=seed, **fields)
    return folder


def loaded(folder, names):
    """PEFT's model with some tenants' adapters, and a function of slots with the same."""
    base = support.model("llama")
    tree = support.as_tree(support.params_of(base), support.leaves_of(base))
    params = support.as_jax(support.stacked(tree))
    first, *others = names
    whole = peft.PeftModel.from_pretrained(base, folder / first, adapter_name=first)
    for name in others:
        whole.load_adapter(folder / name, name)
    own = [lora_jax.peft.load(folder / name, params) for name in names]
    stack, plan = lora_jax.stack_adapters(
        [each.adapters for each in own], [each.plan for each in own], slots=len(own) + 1
    )
    rows = jax.jit(lora_jax.adapt_rows(llama, plan))

    def run(rows_of):
        slots = [-1 if name == BASE else names.index(name) for name in rows_of]
        return rows(params, stack, jnp.array(slots), jnp.asarray(IDS))

    return whole.eval(), run


@pytest.mark.parametrize("batch", BATCHES)
def test_rows_are_those_of_adapter_names(batch, folder):
    whole, run = loaded(folder, [*TENANTS])
    names = BATCHES[batch]
    with torch.no_grad():
        want = whole(input_ids=torch.tensor(IDS), adapter_names=names).logits
    support.assert_same(run(names), support.array(want))


def test_rows_with_dora_are_those_of_one_adapter_after_the_other(folder):
    whole, run = loaded(folder, [*TENANTS, *DORA])
    names = ["d", "a", BASE, "c", "d", "b"]
    got = run(names)
    for row, (name, ids) in enumerate(zip(names, IDS, strict=True)):
        whole.set_adapter(name if name != BASE else "a")
        with torch.no_grad():
            if name == BASE:
                with whole.disable_adapter():
                    want = whole(input_ids=torch.tensor(ids[None])).logits
            else:
                want = whole(input_ids=torch.tensor(ids[None])).logits
        support.assert_same(got[row], support.array(want)[0])
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA"):
        whole(input_ids=torch.tensor(IDS), adapter_names=names)
