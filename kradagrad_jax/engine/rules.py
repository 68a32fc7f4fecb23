"""Normal forms of what a :class:`~kradagrad_jax.engine.layout.Layout` is told: hashable tuples."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kradagrad_jax.engine import trees

Shape = tuple[int, ...]

MODE_NAMES = ("shorter", "longer", "input", "output")


class Rules(NamedTuple):
    """Answers by regular expression; the first one that is found in a path counts."""

    pairs: tuple[tuple[str, Any], ...]

    def answer(self, path: str) -> Any:
        """The answer for a path, None where no pattern is found."""
        return next((value for pattern, value in self.pairs if re.search(pattern, path)), None)


class MatrixAxes(NamedTuple):
    """Per path (reduction axes, output axes) of ``optax.contrib.MuonDimensionNumbers``, or None."""

    pairs: tuple[tuple[str, tuple[Shape, Shape] | None], ...]


def as_modes(given: Any) -> Any:
    if isinstance(given, Mapping):
        return Rules(tuple((pattern, mode_answer(v)) for pattern, v in given.items()))
    return given if isinstance(given, Rules) or callable(given) else mode_answer(given)


def mode_answer(value: Any) -> str | tuple[bool, ...] | None:
    if value is None or (isinstance(value, str) and value in MODE_NAMES):
        return value
    if isinstance(value, Sequence) and all(isinstance(v, bool | np.bool_) for v in value):
        return tuple(bool(v) for v in value)
    raise ValueError(f"Layout.modes: one of {MODE_NAMES} or one bool per mode, got {value!r}")


def as_axes(value: Any) -> Shape | None:
    """An axis or axes as a tuple; True and False as from a predicate; None says nothing."""
    if value is None:
        return None
    if isinstance(value, bool | np.bool_):
        return (0,) if value else ()
    if isinstance(value, int | np.integer):
        return (int(value),)
    if isinstance(value, Sequence) and all(isinstance(v, int | np.integer) for v in value):
        return tuple(int(v) for v in value)
    raise ValueError(f"Layout.stacked: an axis, a tuple of axes or None, got {value!r}")


def as_stacked(given: Any) -> Any:
    if given is None or isinstance(given, str | Rules | MatrixAxes):
        return given
    found = jax.tree_util.tree_flatten_with_path(given, is_leaf=_is_matrix_leaf)[0]
    if any(hasattr(x, "reduction_axis") for _, x in found):
        return MatrixAxes(tuple((trees.path_name(p), _matrix_axes(x)) for p, x in found))
    if isinstance(given, Mapping):
        # None in a mapping: no stack axes here, whatever the names say
        return Rules(tuple((pattern, as_axes(v) or ()) for pattern, v in given.items()))
    if callable(given):
        return given
    raise ValueError(
        "Layout.stacked must be a regular expression, a mapping from them to axes, a function or a "
        f"tree of MuonDimensionNumbers, got {given!r}"
    )


def _is_matrix_leaf(x: Any) -> bool:
    return x is None or hasattr(x, "reduction_axis")


def _matrix_axes(x: Any) -> tuple[Shape, Shape] | None:
    if not hasattr(x, "reduction_axis"):
        return None
    pair = as_axes(x.reduction_axis), as_axes(x.output_axis)
    return (pair[0] or (), pair[1] or ())


def as_split(given: Any) -> Rules | None:
    if given is None or isinstance(given, Rules):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(
            f"Layout.split must be a mapping {{regex: {{axis: parts}}}}, got {given!r}; how long "
            "modes are cut ('even' or 'tail') is Layout.pieces"
        )
    return Rules(tuple((pattern, _split_answer(v)) for pattern, v in given.items()))


def _split_answer(value: Any) -> tuple[tuple[int, int | Shape], ...]:
    items = value.items() if isinstance(value, Mapping) else [value]
    try:
        return tuple((int(a), n if isinstance(n, int) else tuple(map(int, n))) for a, n in items)
    except (TypeError, ValueError):
        raise ValueError(f"Layout.split: {{axis: parts or cut points}}, got {value!r}") from None
