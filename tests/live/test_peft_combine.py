"""Combinations of adapters are those of PEFT, where PEFT is right."""

import jax
import numpy as np
import pytest

import lora_jax
import lora_jax.peft
from tests import reference
from tests.support import assert_close

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
support = pytest.importorskip("tests.live.support")

pytestmark = [pytest.mark.live, *support.FILTERS]

FIELDS = {
    "a": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "b": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]},
}
SMALL = FIELDS | {"b": FIELDS["b"] | {"r": 2}}
STABLE = FIELDS | {"b": FIELDS["b"] | {"use_rslora": True}}
# The name of PEFT, the adapters, the weights, and options of PEFT and of this library.
CASES = {
    "cat": ("cat", SMALL, (0.7, -0.6), {}, ("exact", {})),
    "svd": ("svd", SMALL, (0.7, -0.6), {"svd_rank": 3}, ("svd", {"rank": 3})),
    "linear": ("linear", FIELDS, (0.7, -0.6), {}, ("linear", {})),
    **{
        f"{name}, {weights}, {density}, {sign}": (
            name,
            FIELDS,
            weights,
            {"density": density, "majority_sign_method": sign},
            (
                name.replace("_prune", ""),
                {"density": density} | ({"majority_sign": sign} if "ties" in name else {}),
            ),
        )
        for name in ("magnitude_prune", "magnitude_prune_svd", "ties", "ties_svd")
        for weights, density, sign in (
            ((0.7, 0.6), 0.3, "total"),
            ((1.5, -0.6), 0.6, "frequency"),
        )
    },
    **{
        f"{name}, all entries": (
            name,
            FIELDS,
            (0.7, -0.6),
            {"density": 1.0},
            (name, {"density": 1.0, "key": jax.random.key(0)}),
        )
        for name in ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")
    },
}


def loaded(folder, fields):
    """PEFT's model with some adapters, the params of the base, and the adapters here."""
    for seed, (name, own) in enumerate(fields.items(), start=2):
        support.train("llama", folder / name, seed=seed, **own)
    base = support.model("llama")
    params = support.params_of(base)
    first, *others = fields
    whole = peft.PeftModel.from_pretrained(base, folder / first, adapter_name=first)
    for name in others:
        whole.load_adapter(folder / name, name)
    here = [lora_jax.peft.load(folder / n, params, layout="torch") for n in fields]
    return whole, params, [own.adapters for own in here], [own.plan for own in here]


def updates_of_peft(whole, name):
    """What an adapter adds to each weight, `(in, out)`, by the path of the weight."""
    return {
        f"{module.removeprefix('base_model.model.')}.weight": support.array(
            layer.get_delta_weight(name)
        ).T
        for module, layer in whole.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


def assert_updates(made, want):
    assert made.plan.targets.keys() == want.keys()
    for path, target in made.plan.targets.items():
        adapter = reference.f64(made.adapters[path])
        got = target.scale * adapter["A"] @ adapter["B"]
        assert_close(got, want[path], 2**10, "float32")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_combinations(case, tmp_path):
    kind, fields, weights, options, (method, own) = case
    whole, _, adapters, plans = loaded(tmp_path, fields)
    with support.quiet():  # of a density of 1
        whole.add_weighted_adapter([*fields], list(weights), "c", kind, **options)
    made = lora_jax.combine_adapters(adapters, plans, weights, method, **own)
    assert_updates(made, updates_of_peft(whole, "c"))


def test_rank_stabilized_adapters(tmp_path):
    whole, _, adapters, plans = loaded(tmp_path, STABLE)
    a, b = (updates_of_peft(whole, name) for name in STABLE)
    made = lora_jax.combine_adapters(adapters, plans, (0.7, -0.6))
    assert_updates(made, {path: 0.7 * a[path] - 0.6 * b[path] for path in a})
    # PEFT's combination is too strong by the square root of the rank.
    whole.add_weighted_adapter(["b"], [1.0], "again", "cat")
    for path, value in updates_of_peft(whole, "again").items():
        assert_close(value, 2.0 * b[path], 2**8, "float32")


@pytest.mark.parametrize("cut", [{"rank": 2}, {"energy": 0.8}, {"energy": 1.0}])
def test_resize_is_the_conversion_to_lora(cut, tmp_path):
    whole, _, adapters, plans = loaded(tmp_path, {"a": FIELDS["a"]})
    made = lora_jax.resize_adapters(adapters[0], plans[0], **cut)
    (number,) = cut.values()
    number = min(number, 1 - 1e-6)  # the values that are zero have some energy there
    with support.quiet():
        _, state = peft.convert_to_lora(whole, cut.get("rank", number), adapter_name="a")
    want = {}
    for path in plans[0].targets:
        keys = (f"base_model.model.{path[:-6]}lora_{f}.weight" for f in "AB")
        a, b = (support.array(state[key]) for key in keys)
        assert made.plan.targets[path].rank == len(a)
        want[path] = (b @ a).T
    assert_updates(made, want)


def test_lora_from_dora(tmp_path):
    dora = {"a": FIELDS["a"] | {"use_dora": True}}
    whole, params, (adapters,), (plan,) = loaded(tmp_path, dora)
    merged = lora_jax.merge_adapters(params, adapters, plan)
    axes = dict.fromkeys(plan.targets, "oi")
    lora = lora_jax.plan_adapters(lora_jax.LoraConfig(64, 64.0, [*axes], axes=axes), params)
    made = lora_jax.extract_adapters(params, merged, lora)
    again = support.with_params("llama", lora_jax.merge_adapters(params, *made[:2]))
    support.assert_same(support.logits(again), support.logits(whole))
    # The conversion of PEFT leaves out the magnitude.
    with support.quiet():
        _, state = peft.convert_to_lora(whole, 8, adapter_name="a")
    path = next(iter(plan.targets))
    keys = (f"base_model.model.{path[:-6]}lora_{f}.weight" for f in "AB")
    a, b = (support.array(state[key]) for key in keys)
    lost = np.asarray(merged[path]) - params[path] - b @ a
    assert np.abs(lost).max() > 0.01
