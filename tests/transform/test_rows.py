"""Another adapter for each row of a batch: the results are those of each adapter alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.transform import _following, _tracing
from lora_jax.transform._row_places import Atom, Rows
from tests.support import optimizations, x64
from tests.transform.cases import CASES, inputs
from tests.transform.support import assert_same, loss_of, plan_of, trained
from tests.transform.test_cases import DORA_GRADIENTS

SLOTS = 3
# Uses of a weight without an activation that has the rows.
NO_ROWS = {"integers", "vector", "summed", "stated_of_weights", "one_row"}
REFUSED = "adapt_rows|each row"
TOLERANCE = {"cast": 1e-5}
# With its former emitters, see `xla_flags`, XLA cannot compile the gradients of these.
ONLY_VALUES = {"positions", "tied_head"}


def row_axes(fn, params, args, axis, n_rows):
    """The axis with the rows in each output, None if it has none; they are followed."""
    traced = _tracing.trace(fn, params, tuple(args), {})
    places = [None] * len(traced.arguments)
    at = traced.paths.index(None)
    shape = traced.arguments[at].shape
    places[at] = Rows(
        tuple((Atom(size, 1 if i == axis else None),) for i, size in enumerate(shape))
    )
    axes = []
    for place in _following.follow(traced.jaxpr, places, n_rows).outputs:
        alone = [
            i
            for i, atoms in enumerate(getattr(place, "axes", ()))
            if len(atoms) == 1 and atoms[0].stride == 1 and atoms[0].size == n_rows
        ]
        axes.append(alone[0] if alone else None)
    return axes


def is_by_row(fn, params, args, axis, axes):
    """Whether row 1 of each output depends on row 1 of the first argument alone."""
    x, *rest = args
    other = np.moveaxis(np.array(x), axis, 0)
    other[[0, *range(2, len(other))]] += 1
    other = jnp.asarray(np.moveaxis(other, 0, axis))
    outs = [jax.tree.leaves(fn(params, given, *rest)) for given in (x, other)]
    outs = [list(map(np.asarray, out)) for out in outs]
    return all(
        at is not None and np.allclose(a.take(1, at), b.take(1, at), 1e-12)
        for a, b, at in zip(*outs, axes, strict=True)
    )


def of_own_rows(fn, model, slots, axes):
    """For each row the result of its adapter alone, run on the whole batch."""

    def run(params, tenants, *args):
        outs = [jax.tree.leaves(model(params, own, *args)) for own in tenants]
        frozen = jax.tree.leaves(fn(params, *args))
        total = []
        for k, axis in enumerate(axes):
            own = slots.reshape([-1 if i == axis else 1 for i in range(frozen[k].ndim)])
            total.append(jnp.where(own == -1, frozen[k], 0))
            for slot, out in enumerate(outs):
                total[-1] += jnp.where(own == slot, out[k], 0)
        return total

    return run


def with_slots(rows, slots, params, stack, *args):
    return rows(params, stack, slots, *args)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", CASES)
def test_each_row_has_its_own_adapter(name, method):
    case = CASES[name]
    if method == "dora" and name not in DORA_GRADIENTS:
        pytest.skip("its columns go the same ways")
    with x64(), optimizations(False):
        params, args = inputs(case)
        plan = plan_of(case.fn, params, *args, **case.config, use_dora=method == "dora")
        params = jax.tree.map(jnp.asarray, params)
        tenants = [trained(params, plan, seed=i) for i in range(SLOTS)]
        stack, own_plan = lora_jax.stack_adapters(tenants, plan)
        ran = 0
        for axis, n_rows in enumerate(args[0].shape):
            axes = row_axes(case.fn, params, args, axis, n_rows)
            in_axes = (axis, *[None] * (len(args) - 1))
            rows = lora_jax.adapt_rows(case.fn, own_plan, in_axes, **case.options)
            slots = jnp.arange(n_rows) % (SLOTS + 1) - 1
            equal = jnp.full(n_rows, 1)
            if n_rows == 1:
                continue
            by_row = None not in axes and is_by_row(case.fn, params, args, axis, axes)
            try:
                same = jax.jit(rows)(params, stack, equal, *args)
            except ValueError as error:
                if (by_row and name not in NO_ROWS) or not re.search(REFUSED, str(error)):
                    raise
                continue
            ran += 1
            model = lora_jax.adapt(case.fn, plan, **case.options)
            assert_same(same, jax.jit(model)(params, tenants[1], *args))
            if not by_row:
                continue
            wanted = of_own_rows(case.fn, model, slots, axes)
            got, want = (
                loss_of(functools.partial(f, params))
                for f in (functools.partial(with_slots, rows, slots), wanted)
            )
            if name in ONLY_VALUES:
                assert_same(jax.jit(got)(stack, *args), jax.jit(want)(tenants, *args))
                continue
            wrt = (0, 1) if jnp.issubdtype(args[0].dtype, jnp.inexact) else (0,)
            got, want = (
                jax.jit(jax.value_and_grad(loss, wrt, has_aux=True)) for loss in (got, want)
            )
            got, (of_stack, *got_x) = got(stack, *args)
            want, (of_tenants, *want_x) = want(tenants, *args)
            of_slots = jax.tree.map(lambda *x: jnp.stack(x), *of_tenants)
            pairs = (got, of_stack.adapters, got_x), (want, of_slots, want_x)
            assert_same(*pairs, tolerance=TOLERANCE.get(name, 1e-10))
        assert ran or name in NO_ROWS
