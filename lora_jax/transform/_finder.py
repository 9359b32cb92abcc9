"""Follows the axes of weights through a program, equation by equation.

No equation runs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from lora_jax._core import compat
from lora_jax.plan.products import StatementError
from lora_jax.plan.target import NOT_FOLLOWED
from lora_jax.transform._context import Frame, changed
from lora_jax.transform._interpreter import keeps_rows
from lora_jax.transform._parameters import NotFactorableError, no_rule
from lora_jax.transform._tracked import Dense, Tracked, Uses, is_tracked

Step: TypeAlias = Callable[..., list[Any]]

# In the body of a merged call, axes are also followed through these primitives.
_ENTRYWISE = frozenset(
    {
        *("abs", "add", "ceil", "clamp", "convert_element_type", "div", "exp", "exp2"),
        *("floor", "integer_pow", "logistic", "max", "min", "mul", "pow", "round"),
        *("rsqrt", "select_n", "sign", "sqrt", "square", "sub", "tanh"),
    }
)


class Finder:
    """Follows weights through a program.

    Attributes:
        steps: for each primitive, a function from the tracked operands of an equation to
            its tracked results.
        uses: the uses found so far.
        frame: the jaxpr that is being read.
        products: the equations of stated functions; see `LoraConfig`.
        called: the names of the functions that weights reach.
    """

    def __init__(
        self,
        steps: Mapping[str, Step],
        products: Mapping[str, str],
        *,
        closed_over_is_constant: bool,
    ):
        self.steps = steps
        self.products = products
        self.called: list[str] = []
        self.uses = Uses()
        self.frame = Frame()
        self._constants = Dense(closed_over_is_constant)
        # Whether the finder is inside the body of a call that merges its weights.
        self._reading = False

    def is_weight(self, value: Any) -> bool:
        """Whether a value of the program is a weight."""
        return is_tracked(value)

    def follow(self, jaxpr: Any, arguments: Sequence[Any]) -> list[Any]:
        """Follows the arguments to the outputs of a jaxpr, any of which may be tracked."""
        jaxpr, _ = compat.open_jaxpr(jaxpr)
        frame = Frame()
        frame.values.update(dict.fromkeys(jaxpr.constvars, self._constants))
        frame.values.update(zip(jaxpr.invars, arguments, strict=True))
        with changed(self, frame=frame):
            for equation in jaxpr.eqns:
                values = self._operands(equation)
                out = self._apply(equation, values)
                if all(value.is_constant for value in values):
                    out = [dataclasses.replace(value, is_constant=True) for value in out]
                frame.values.update(zip(equation.outvars, out, strict=True))
        return [_read(frame, atom) for atom in jaxpr.outvars]

    def _operands(self, equation: Any) -> list[Any]:
        return [_read(self.frame, atom) for atom in equation.invars]

    def _apply(self, equation: Any, values: list[Any]) -> list[Any]:
        """The results of an equation: from its step, or with its operands merged."""
        name = equation.primitive.name
        if name == "broadcast_in_dim":
            self.frame.broadcasts[equation.outvars[0]] = equation
        if not any(map(is_tracked, values)):
            return dense(equation)
        values = self._merge_rows(equation, values)
        if not any(map(is_tracked, values)):
            return dense(equation)
        step, reason = self.steps.get(name), no_rule(equation)
        if name in compat.NAMED_CALLS:
            self.called.append(compat.function_name(equation))
        if step is not None:
            try:
                with changed(self.uses, callers=[*self.uses.callers, equation]):
                    return _with_rows(values, step(self, equation, *values))
            except NotFactorableError as error:
                reason = str(error)
            except StatementError:
                raise
            except Exception as error:
                return self._not_followed(equation, values, error)
        return self._inside(equation, values, reason)

    def _merge_rows(self, equation: Any, values: list[Any]) -> list[Any]:
        """Records which rows of tables an equation uses as activations."""
        name = equation.primitive.name
        weights = [value for value in values if isinstance(value, Tracked)]
        only_rows = all(value.gathered for value in weights)
        for i, (atom, value) in enumerate(zip(equation.invars, values, strict=True)):
            if not isinstance(value, Tracked) or not value.gathered:
                continue
            if name == "dot_general" and len(weights) > 1:
                continue  # see `_product_of_weights`
            if not keeps_rows(name, i, only_rows=only_rows):
                self.uses.use_rows(value)
                self.frame.values[atom] = Dense()
        return self._operands(equation)

    def _inside(self, equation: Any, values: list[Any], reason: str) -> list[Any]:
        """Records a merged use, with the roles that the body of the call shows.

        A function with a custom derivative gets the dense weight, for example, but its body
        shows the roles of the axes. The rule of the derivative is not read.
        """
        roles: dict[str, list[dict[int, str]]] = {}
        passed: list[Any] = []
        if (body := compat.body_of(equation)) is not None:
            if self._reading:
                return self.follow(body[0], values)
            passed = self.read_aside(body[0], values, roles)
        weights = [value for value in values if isinstance(value, Tracked)]
        for value in weights:
            self.uses.use_rows(value)
            if not value.gathered:
                self.uses.see_merged(value, equation, reason, roles)
        if any(map(is_tracked, passed)):  # the call returns a weight, such as a rounded one
            return [_merged_before(reason, value) for value in passed]
        if not self._reading or equation.primitive.name not in _ENTRYWISE:
            return dense(equation)
        # Entrywise operations, such as a rounding, keep the axes of the merged weight.
        shape = equation.outvars[0].aval.shape
        axes = tuple(own for value in weights if value.shape == shape for own in value.axes)
        return [Tracked(shape, axes)] if axes else dense(equation)

    def read_aside(self, body: Any, values: list[Any], roles: Any) -> list[Any]:
        """The outputs of the body of a call, whose uses are only added to `roles`."""
        with changed(self, _reading=True), changed(self.uses, found=[]):
            out = self.follow(body, values)
            for found in self.uses.found:
                if found.roles:
                    roles.setdefault(found.weight, []).append(found.roles)
        return out

    def _not_followed(
        self, equation: Any, values: Sequence[Any], error: Exception
    ) -> list[Any]:
        """Records the error of a step as a reason: the plan may not need this weight."""
        line = str(error).partition("\n")[0]
        reason = f"{NOT_FOLLOWED}: {type(error).__name__}: {line}"
        for value in filter(is_tracked, values):
            self.uses.see(value, equation, merged=reason)
        return dense(equation)

    def merge(self, value: Tracked, equation: Any, reason: str) -> Dense:
        """Records that a value is merged, unless it is rows of a table."""
        self.uses.use_rows(value)
        if not value.gathered:
            self.uses.see(value, equation, merged=reason)
        return Dense()

    def merge_all(self, values: Sequence[Any], equation: Any, reason: str) -> list[Any]:
        """The values, with every tracked one merged."""
        return [
            self.merge(value, equation, reason) if isinstance(value, Tracked) else value
            for value in values
        ]


def _read(frame: Frame, atom: Any) -> Any:
    """The value of a variable or a literal."""
    return Dense(True) if isinstance(atom, compat.Literal) else frame.values[atom]


def dense(equation: Any) -> list[Any]:
    """The results of an equation that returns no weight."""
    return [Dense()] * len(equation.outvars)


def _with_rows(values: Sequence[Any], out: list[Any]) -> list[Any]:
    """Marks the outputs of a step as table rows if all weights among `values` are rows."""
    kinds = {value.gathered for value in values if isinstance(value, Tracked)}
    if "" in kinds:
        return out
    kind = "data" if "data" in kinds else "constants"
    return [
        dataclasses.replace(value, gathered=value.gathered or kind)
        if isinstance(value, Tracked)
        else value
        for value in out
    ]


def _merged_before(reason: str, value: Any) -> Any:
    """An output of a merged call; if it is a weight, its axes are marked as merged."""
    if not isinstance(value, Tracked):
        return Dense()
    axes = [dataclasses.replace(own, merged=reason) for own in value.axes]
    return Tracked(value.shape, tuple(axes))
