"""What a user may get wrong in `lora_jax.optim`, and what the error says."""

import jax.numpy as jnp
import optax
import pytest

import lora_jax
from lora_jax import optim
from lora_jax.optim import _leaves
from tests.optim import support

TREE, ADAPTER = support.tree(), support.adapter()
ADAM, SGD = optax.adam(0.1), optax.sgd(1.0)
HEAD = {"head": {"kernel": jnp.ones((3, 2))}}
RIEMANNIAN = optim.scale_by_riemannian()
PLAN = lora_jax.plan_adapters(lora_jax.LoraConfig(), {"q": jnp.zeros((12, 9))})


def choose(*patterns, tree=TREE):
    return _leaves.choose("rates", patterns, _leaves.flatten(tree)[0])


def update(optimizer, grads=TREE, params=None):
    return optimizer.update(grads, optimizer.init(grads), params)


def precondition(grads, params):
    return RIEMANNIAN.update(grads, optax.EmptyState(), params)


LABELS = [
    (lambda: optim.adapter_labels(TREE, {"head/*": 3}), TypeError, "a label .* got 3 "),
    (lambda: optim.adapter_labels(TREE, other=None), TypeError, "be a string, got None"),
    (lambda: optim.adapter_labels(TREE, ["a"]), TypeError, "patterns must be a dict"),
    (lambda: optim.adapter_labels(TREE, {"haed": "x"}), ValueError, "no leaf: 'haed"),
    (lambda: optim.adapter_labels(TREE, {"": "x"}), ValueError, "patterns is empty"),
    (lambda: optim.weight_decay_mask(TREE, "head/kernal"), ValueError, "are 'head/kernel'"),
    (lambda: optim.weight_decay_mask(TREE, {"head"}), TypeError, "exclude must be a patt"),
    (lambda: optim.weight_decay_mask(TREE, "re:("), ValueError, "not a valid regular expr"),
    (lambda: choose("zzz"), ValueError, "of rates matches no leaf: 'zzz'; the first"),
    (lambda: choose("layers*", "embed/tabel"), ValueError, "are 'embed/table'.* glob"),
    (lambda: choose("head/kernel", tree={"head": optax.MaskedNode()}), ValueError,
     r"masked: if the pattern .* leaf by leaf"),
]  # fmt: skip

FREEZING = [
    (("head/*", "heads/*"), ValueError, r"of trainable matches no leaf: 'heads/\*'"),
    (lambda path: False, ValueError,
     "none of the 9 leaves; .* are 'adapters/embed.*/A', '.*/B', '.*/q/kernel/A'.$"),
    ((), ValueError, "chooses none of the 9 leaves"),
    (lambda path: None, TypeError, "must return True or False, got None for 'adapters"),
    (3, TypeError, "trainable must be a pattern or a tuple"),
]  # fmt: skip

LORA_PLUS = [
    (lambda: optim.lora_plus("1e-3"), TypeError, "learning_rate must be a n.* got '1e-3'"),
    (lambda: optim.lora_plus(1e-3, 0), ValueError, "ratio must be positive, got 0"),
    (lambda: optim.lora_plus(1e-3, "16"), TypeError, "ratio must be a number"),
    (lambda: optim.lora_plus(1e-3, optimizer=ADAM), TypeError, "and not optax.adam"),
    (lambda: optim.lora_plus(1e-3, optimizer=float), TypeError,
     r"optimizer\(learning_rate\) must be .* got float"),
    (lambda: optim.lora_plus(1e-3, rates={"*": None}), TypeError, r"rates\['\*'\] must be"),
    (lambda: optim.lora_plus(1e-3, rates=[("*", 1)]), TypeError, "rates must be a dict"),
    (lambda: optim.lora_plus(1e-3).init(HEAD), ValueError, "lora_plus got a tree without"),
    (lambda: optim.lora_plus(1e-3, rates={"embed/tabel": 1e-6}).init(TREE), ValueError,
     "of rates matches no leaf: 'embed/tabel'"),
]  # fmt: skip

LORA_FA = [
    (lambda: optim.lora_fa(optax.sgd, 2.0), TypeError, "be an optax.* got function"),
    (lambda: optim.lora_fa(SGD, "2"), TypeError, "a number or an AdapterPlan, got '2'"),
    (lambda: optim.lora_fa(SGD, 0.0), ValueError, "scale must not be 0"),
    (lambda: optim.lora_fa(SGD, float("inf")), ValueError, "scale must be finite"),
    (lambda: optim.lora_fa(SGD, 2.0, damping=0), ValueError, "must be positive, got 0"),
    (lambda: update(optim.lora_fa(SGD, 2.0)), ValueError,
     r"lora_fa needs the params.*call update\(grads"),
    (lambda: optim.lora_fa(SGD, 2.0).init(HEAD), ValueError,
     "lora_fa got a tree without .* are 'head/kernel'"),
    (lambda: update(optim.lora_fa(SGD, PLAN), {"qq": ADAPTER}, {"qq": ADAPTER}), KeyError,
     "the plan has no weight 'qq'; .* 'q'"),
]  # fmt: skip

MASKED = optax.partition({"A": SGD, "B": RIEMANNIAN}, optim.adapter_labels)
W = {"w": ADAPTER}
PRECONDITIONING = [
    *((lambda d=d: optim.scale_by_riemannian(d), ValueError, "damping must be (pos|fin)")
      for d in (0, -1.0, float("nan"))),
    (lambda: optim.scale_by_riemannian("small"), TypeError, "damping must be a number"),
    (lambda: update(RIEMANNIAN, W), ValueError, "riemannian needs the params, since"),
    (lambda: update(MASKED, W, W), ValueError, "at 'w': .* A is missing or masked: put it"),
    (lambda: RIEMANNIAN.init(HEAD), ValueError, "riemannian got a tree without"),
    (lambda: precondition(HEAD, HEAD), ValueError, "riemannian got a tree without"),
    (lambda: precondition(W, {"w": ADAPTER | {"B": jnp.ones((5, 9))}}), ValueError,
     "at 'w': A and B do not fit each other"),
    (lambda: precondition({"w": ADAPTER | {"A": jnp.ones((2, 2))}}, W), ValueError,
     r"at 'w': the gradient of A .* \(12, 4\), got \(2, 2\)"),
    (lambda: precondition(W, {"v": ADAPTER}), ValueError, "A and B is missing or masked"),
]  # fmt: skip

RITE = optim.scale_by_lora_rite()
HIDDEN = optax.partition({"A": SGD, "B": RITE}, optim.adapter_labels)
LORA_RITE = [
    (lambda: optim.lora_rite("1e-3"), TypeError, "learning_rate must be a n.* got '1e-3'"),
    (lambda: optim.lora_rite(0.1, weight_decay=None), TypeError, "weight_decay must be a"),
    (lambda: optim.lora_rite(0.1, b1=1.0), ValueError, "b1 must be .* below 1, got 1.0"),
    (lambda: optim.scale_by_lora_rite(b2=-0.1), ValueError, "b2 must be at least 0 and"),
    (lambda: optim.scale_by_lora_rite(eps=-1e-8), ValueError, "eps must be at least 0"),
    (lambda: RITE.init(dict.fromkeys("abcd", 0.0)), ValueError,
     "rite got a tree without .* are 'a', 'b', 'c'. Make"),
    (lambda: update(RITE, W), ValueError, "scale_by_lora_rite needs the params, since"),
    (lambda: update(HIDDEN, W, W), ValueError, "at 'w': .* A is missing or masked: put it"),
    (lambda: update(RITE, W, {"w": ADAPTER | {"A": None}}), ValueError, "A is missing or"),
    (lambda: RITE.update({"w": ADAPTER | {"A": None}}, RITE.init(W), W), ValueError,
     "at 'w': .* needs the gradients of A and B, and that of A is missing"),
    (lambda: RITE.update({"w": ADAPTER | {"A": jnp.ones((2, 2))}}, RITE.init(W), W),
     ValueError, r"at 'w': the gradient of A .* \(12, 4\), got \(2, 2\)"),
]  # fmt: skip

STACK = lora_jax.AdapterStack({"q": support.adapter(3)}, {"q": jnp.ones(3)}, {})
SLOTS = optim.per_slot(ADAM)


def step_slots(step=None, grads=STACK, params=STACK, state=STACK, **extra):
    return SLOTS.update(grads, SLOTS.init(state), params, step=step, **extra)


PER_SLOT = [
    (lambda: optim.per_slot(optax.adam), TypeError, "be an optax.* got function"),
    (lambda: SLOTS.init(STACK.adapters | {"x": jnp.ones(())}), ValueError,
     r"every array: params/x has the shape \(\), .* 3 slots"),
    (lambda: SLOTS.init({"x": jnp.ones((0, 2))}), ValueError, r"\(0, 2\), .* has 0 slots"),
    (lambda: SLOTS.init({"stack": STACK}), TypeError, "give the stack alone"),
    (lambda: step_slots(params=None), ValueError, "per_slot needs the params: call"),
    (lambda: step_slots(grads=STACK.adapters), TypeError, "gradients dict and params Ada"),
    (lambda: step_slots(grads={"q": ADAPTER}, params=STACK.adapters), ValueError,
     r"gradients/q/A has the shape \(12, 4\)"),
    (lambda: step_slots(state={"q": support.adapter(2)}), ValueError,
     r"state/0/count has the shape \(2,\), .* 3 slots. per_slot\(optimizer\).init"),
    (lambda: SLOTS.update(STACK, ADAM.init(ADAPTER), STACK), ValueError, "state/0/count h"),
    (lambda: step_slots(value=jnp.ones(2)), ValueError, r"value has the shape \(2,\)"),
    (lambda: step_slots([True] * 3), TypeError, r"a bool array \(3,\) .* got list"),
    (lambda: step_slots(jnp.ones(3)), TypeError, "got float32"),
    (lambda: step_slots(jnp.array(True)), ValueError, r"the shape \(3,\), .* got \(\)"),
]  # fmt: skip

CALLS = [*LABELS, *LORA_PLUS, *LORA_FA, *PRECONDITIONING, *LORA_RITE, *PER_SLOT]
CALLS += [
    (lambda t=t: optim.trainable_and_frozen(TREE, t, ADAM), *want) for t, *want in FREEZING
]
CALLS += [
    (lambda: optim.trainable_and_frozen({}, "*", ADAM), ValueError, "0 leaves; .* none"),
    (lambda: optim.trainable_and_frozen(TREE, "head/*", optax.adam), TypeError,
     "optimizer must be an optax.* got function"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
