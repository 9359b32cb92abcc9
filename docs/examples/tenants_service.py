"""A service that trains and samples many adapters over one frozen model.

Its verbs are pure functions of a state. Each is compiled once and serves all traffic:
`slots` says whose adapters each row has. Shapes: `rows` texts of `length` tokens.
"""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import smollm

import lora_jax
from lora_jax import optim


class Batch(NamedTuple):
    """Texts, where their prompts end, the tokens behind, and the weights of their losses.

    `tokens (rows, length)`, `last (rows,)`, `answer (rows, count)`, `weights (rows,)`.
    """

    tokens: Any
    last: Any
    answer: Any
    weights: Any


class State(NamedTuple):
    """All adapters, the gradients since their last steps, and the optimizer's state."""

    stack: Any
    grads: Any
    moments: Any


def compiled(*donated: int) -> Callable[[Any], Any]:
    """Compiles a verb, and counts how often."""

    def decorate(verb: Any) -> Any:
        @functools.wraps(verb)
        def traced(self: "Service", *args: Any) -> Any:
            self.compilations[verb.__name__] += 1  # runs when JAX traces it, and not later
            return verb(self, *args)

        return jax.jit(traced, static_argnums=0, donate_argnums=donated)

    return decorate


@dataclasses.dataclass(frozen=True, eq=False)
class Service:
    """The verbs of a fine-tuning service.

    Attributes:
        model: has `answer(params, tokens, last)`, which returns logits `(rows, count,
            vocabulary)`, and `generate(params, tokens)`.
        plan: of the stack of adapters.
        optimizer: of `optax.inject_hyperparams`, with a `learning_rate`.
        compilations: how often each verb was compiled.
    """

    model: Any
    plan: lora_jax.AdapterPlan
    optimizer: Any
    compilations: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )

    @compiled()
    def start(self, stack: Any) -> State:
        """Returns a state with the adapters of a stack."""
        zeros = jax.tree.map(jnp.zeros_like, stack)
        return State(stack, zeros, optim.per_slot(self.optimizer).init(stack))

    @compiled(1)
    def join(
        self, state: State, slot: Any, adapters: Any, plan: lora_jax.AdapterPlan, rate: Any
    ) -> State:
        """Puts adapters into a slot, with moments and a learning rate of their own."""
        new = self.start(lora_jax.put_adapters(state.stack, slot, adapters, plan))
        state = jax.tree.map(lambda old, new: old.at[slot].set(new[slot]), state, new)
        rates = optax.tree_utils.tree_get(state.moments, "learning_rate")
        rates = rates.at[slot].set(rate)
        moments = optax.tree_utils.tree_set(state.moments, learning_rate=rates)
        return state._replace(moments=moments)

    @compiled()
    def forward(self, state: State, params: Any, slots: Any, batch: Batch) -> jax.Array:
        """Returns the loss of each row, `(rows,)`."""
        return self.losses(state.stack, params, slots, batch)

    @compiled(1)
    def forward_backward(
        self, state: State, params: Any, slots: Any, batch: Batch
    ) -> tuple[State, jax.Array]:
        """Adds the gradients of the rows to those of their slots."""

        def loss(stack: Any) -> tuple[jax.Array, jax.Array]:
            losses = self.losses(stack, params, slots, batch)
            return jnp.sum(batch.weights * losses), losses

        grads, losses = jax.grad(loss, has_aux=True)(state.stack)
        grads = jax.tree.map(jnp.add, state.grads, grads)
        return state._replace(grads=grads), losses

    @compiled(1)
    def optim_step(self, state: State, step: Any) -> State:
        """Steps in the slots of a mask `(slots,)`, and clears their gradients."""
        stack, grads, moments = state
        update = optim.per_slot(self.optimizer).update
        updates, moments = update(grads, moments, stack, step=step)
        stack = optax.apply_updates(stack, updates)
        cleared = jax.vmap(lambda own, step: jax.tree.map(lambda g: g * ~step, own))
        return State(stack, cleared(grads, step), moments)

    @compiled()
    def sample(self, state: State, params: Any, slots: Any, tokens: Any) -> jax.Array:
        """Generates behind prompts `(rows, length)` of one length."""
        generate = lora_jax.adapt_rows(self.model.generate, self.plan)
        return generate(params, state.stack, slots, tokens)

    def save(self, state: State, slot: int, plan: Any, folder: pathlib.Path) -> None:
        """Saves the adapters of a slot, in this library's form and in PEFT's."""
        smollm.save(folder, lora_jax.take_adapters(state.stack, slot, plan=plan), plan)

    def losses(self, stack: Any, params: Any, slots: Any, batch: Batch) -> jax.Array:
        """Returns the mean cross-entropy of each answer, `(rows,)`."""
        answer = lora_jax.adapt_rows(self.model.answer, self.plan)
        logits = answer(params, stack, slots, batch.tokens, batch.last)
        return cross_entropy(logits, batch)


def cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    """Returns the mean over the tokens of each answer, `(rows,)`."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.answer)
    return losses.mean(axis=1)
