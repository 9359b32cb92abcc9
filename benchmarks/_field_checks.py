"""Whether the contestants of `bench_field.py` compute the same."""

from collections.abc import Mapping, Sequence

from _field_case import CONTESTANTS

TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (1e-3, 3e-3)}
"""Relative, of the first loss and of the one after the checked updates."""


def check_losses(losses: Mapping[str, Sequence[float]], dtype: str) -> None:
    """Compares the losses of the first steps.

    The first loss is that of the frozen model for everyone. The last is compared among the
    contestants that train the same, and has to be another one than the first wherever
    something is trained, or nothing could be told from it.

    Args:
        losses: by contestant, one loss a step.
        dtype: of the weights, which says what differences are rounding.

    Raises:
        ValueError: if they do not agree.
    """
    initial, final = TOLERANCES[dtype]
    first = next(iter(losses))
    for name, own in losses.items():
        _compare("before training", name, own[0], first, losses[first][0], initial)
    for trains in dict.fromkeys(CONTESTANTS[name].trains for name in losses):
        group = [name for name in losses if CONTESTANTS[name].trains == trains]
        for name in group:
            other = losses[group[0]][-1]
            _compare(
                f"of training {trains}", name, losses[name][-1], group[0], other, final
            )
            moved = abs(losses[name][-1] / losses[name][0] - 1)
            if trains != "nothing" and not moved > final:
                raise ValueError(
                    f"the loss of {name!r} went from {losses[name][0]} to "
                    f"{losses[name][-1]}, by no more than a relative {final}: whether "
                    "training is the same cannot be told. Take other sizes."
                )


def _compare(
    when: str, name: str, loss: float, other: str, other_loss: float, tolerance: float
) -> None:
    # Written so that NaN is a difference too.
    if not abs(loss / other_loss - 1) <= tolerance:
        raise ValueError(
            f"losses {when} differ: expected {name!r} to agree with {other!r}, which has "
            f"{other_loss}, to a relative {tolerance}, and got {loss}. There is nothing to "
            "compare before they do."
        )
