"""The exponent of every mode of a block."""

from collections.abc import Mapping, Sequence
from typing import Any

from kradagrad_jax.factors.kron import Factored
from kradagrad_jax.factors.numbers import is_number


def exponents(factored: Sequence[bool], given: Any, default: float) -> tuple[Any, ...]:
    """One exponent per mode of a block; None for a mode without factor.

    Args:
      factored: per mode, whether it has a factor.
      given: None: ``default`` for every mode; a nonnegative number (may be traced) for all modes; a
        tuple with one per mode, None standing for the default; a mapping from the number of modes
        to any of these (the default for numbers that are not in it).
      default: what a mode gets that is not named.

    Returns:
      Exponents; a mode of exponent zero (a Python number) has none: it is left alone.

    Raises:
      ValueError: a tuple whose length is not the number of modes.
    """
    if isinstance(given, Mapping):
        given = given.get(len(factored))
    if not isinstance(given, (tuple, list)):
        given = (given,) * len(factored)
    if len(given) != len(factored):
        raise ValueError(
            f"exponent names {len(given)} modes, a block has {len(factored)}: give one number for "
            f"all, or a mapping {{{len(factored)}: (..)}} from the number of modes"
        )
    filled = [default if e is None else e for e in given]
    kept = [has and not is_number(e, 0) for has, e in zip(factored, filled, strict=True)]
    return tuple(e if has else None for e, has in zip(filled, kept, strict=True))


def with_factor(shape: Sequence[int], factored: Factored, given: Any) -> tuple[bool, ...]:
    """Which modes of a block have a factor: those that may, and whose exponent is not zero."""
    kept = (True,) * len(shape) if factored is None else tuple(factored)
    return tuple(e is not None for e in exponents(kept, given, 1.0))


def shared_out(statistics: Sequence[Any], given: Any) -> tuple[Any, ...]:
    """Exponents of a block: by default 1/(2j) for each of its j modes with a factor.

    Beside exponents that are given one by one it is 1/(2k) of all its k modes.
    """
    factored = [s is not None for s in statistics]
    named = given.get(len(factored)) if isinstance(given, Mapping) else given
    modes = len(factored) if isinstance(named, (tuple, list)) else sum(factored)
    return exponents(factored, given, 0.5 / max(modes, 1))
