"""What values of arguments must be, where that can be told before a program is traced."""

import dataclasses
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any


@dataclasses.dataclass(frozen=True)
class Range:
    """Python numbers that an argument may be; schedules and arrays are not looked into."""

    text: str  # the rest of "must be .."
    holds: Callable[[Any], bool]  # whether a number is one of them
    static: bool = False  # arrays and functions are refused as well
    words: tuple[str, ...] = ()  # allowed beside numbers


Check = Range | tuple[str, ...]

_NOT_NEGATIVE = Range("at least 0", lambda x: x >= 0)
_POSITIVE = Range("above 0", lambda x: x > 0)
_SHARE = Range("from 0 to 1", lambda x: 0 <= x <= 1)
_DECAY = Range("at least 0 and below 1", lambda x: 0 <= x < 1)
_INTERVAL = Range("an interval: an integer of at least 1", lambda x: _integer(x, 1))
RANGES: dict[str, Check] = {
    "damping": _NOT_NEGATIVE,
    "relative_damping": _NOT_NEGATIVE,
    "root_damping": _NOT_NEGATIVE,
    "initial": _NOT_NEGATIVE,
    "beta1": _DECAY,
    "beta2": _SHARE,
    "ema": _SHARE,
    "riemannian_momentum": _DECAY,
    "lr_cov": Range(
        "at least 0 and below 1: a step of 1 takes a direction of large curvature out of the "
        "factor at once and for good",
        lambda x: 0 <= x < 1,
    ),
    "clip": _POSITIVE,
    "rms_clip": _POSITIVE,
    "norm_constraint": _POSITIVE,
    "max_rate": _POSITIVE,
    "fisher_scale": _POSITIVE,
    "batch_size": _POSITIVE,
    "refresh_every": _INTERVAL,
    "statistics_every": _INTERVAL,
    "rank": Range("an integer of at least 1", lambda x: _integer(x, 1), static=True),
    "max_dim": Range("an integer of at least 0", lambda x: _integer(x, 0), static=True),
    "approx": ("expand", "reduce"),
    "fisher": ("model", "empirical"),
}


def _integer(x: Any, least: int) -> bool:
    return isinstance(x, Integral) and int(x) >= least


def check(name: str, value: Any, must: Check) -> None:
    """Raises ValueError unless a value is one of the choices, or a number in the range."""
    if isinstance(must, tuple):
        if not (isinstance(value, str) and value in must):
            raise ValueError(f"{name} must be one of {must}, got {value!r}")
        return
    if isinstance(value, str) and value in must.words:
        return
    if must.static and not isinstance(value, Real):
        raise ValueError(
            f"{name} must be {must.text}, got {value!r}; under optax.inject_hyperparams name it in "
            "static_args"
        )
    known = isinstance(value, Real)
    if not (must.holds(value) if known else callable(value) or hasattr(value, "dtype")):
        raise ValueError(f"{name} must be {must.text}, got {value!r}")
