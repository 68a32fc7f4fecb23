"""What a user says about the cutting of parameters into blocks, and the reading of it.

Static: no arrays. :mod:`kradagrad_jax.engine.plan` turns a :class:`Layout` and shapes into a plan.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from kradagrad_jax.engine.rules import (
    MatrixAxes,
    Rules,
    Shape,
    as_axes,
    as_modes,
    as_split,
    as_stacked,
    mode_answer,
)
from kradagrad_jax.engine.trees import factor_dtype_of as factor_dtype_of


@dataclasses.dataclass(frozen=True)
class Layout:
    r"""How parameters are cut into blocks. Hashable, static, never traced.

    Paths are the '/'-joined names of a parameter's place in the tree; regular expressions are
    searched in them, and one that is found in no path at all is an error while planning. Mappings
    and trees are kept as tuples.

    Attributes:
      block_size: largest size of a mode of a block; ``None`` leaves every mode whole. The default
        keeps eigendecompositions small: on TPU, ``eigh`` above 256 compiles to a far slower
        algorithm. A mode without a factor is never cut.
      merge: ``"matrix"`` turns every tensor into its most balanced matricisation (convolution
        kernels ``(h, w, i, o)`` become ``(h*w*i, o)``); ``"greedy"`` multiplies neighbouring
        dims from left to right while the product is at most ``merge_cap`` (as the official
        Shampoo-like codes; beware: a small matrix becomes one long vector); ``"none"`` keeps the
        shape.
      merge_cap: cap of ``"greedy"``; ``None`` means ``block_size``.
      pieces: ``"even"`` cuts a long mode into nearly equal pieces, ``"tail"`` at multiples of
        ``block_size`` with a shorter last piece (as published codes do).
      vectors: ``"diagonal"`` leaves parameters with a single mode to the fallback, ``"block"``
        gives them dense factors (full-matrix AdaGrad).
      scalars: ``"diagonal"`` leaves parameters with one entry to the fallback, ``"block"`` makes
        them blocks of length one.
      max_dim: a (merged) mode that is longer has no factor, unless all modes are longer and can be
        cut; a parameter without any factored mode is left to the fallback. ``None``: no limit.
      state_limit: numbers of factor state (``2 * n**2`` for every factored mode of length ``n`` of
        every block) per weight, over the whole tree. Where there are more, and more than 2**18 in
        all, the shapes with most numbers per weight (adapters, embeddings) keep the factor of
        their shortest mode only, one shape after another, until the limit is kept. ``None``: no
        limit.
      modes: which modes of the merged shape have a factor: ``"shorter"`` (ties: the last),
        ``"longer"`` (ties: the first), ``"input"`` (the first), ``"output"`` (the last), one bool
        per mode (parameters of another number of modes are treated as with ``None``), a mapping
        from regular expressions to these, or a function ``(path, merged shape)`` that returns one
        of these or None. ``None``: all, as far as ``max_dim`` and ``state_limit`` allow;
        ``state_limit`` does not touch parameters for which ``modes`` says something.
      include: which parameters are preconditioned at all: a regular expression or a function
        ``(path, shape) -> bool``. ``None``: all.
      stacked: axes, anywhere in the shape, that stack layers or experts and are treated as batch:
        a regular expression for paths whose axis 0 is one; a mapping from regular expressions to
        an axis, axes or None; a function ``(path, shape)`` that returns True (axis 0), False
        (none), an axis, axes, or None (says nothing); or a tree of
        ``optax.contrib.MuonDimensionNumbers``: the reduction axes together and the output axes
        together are the matrix, all others are stacked, and a None leaves the parameter to the
        fallback. Negative axes count from the end.
      stacked_names: an axis to which flax's partitioning metadata gives one of these names is a
        stack axis, unless ``stacked`` says something about the parameter.
      split: cut points of fused parameters along an axis of the shape as given: a mapping from
        regular expressions to ``{axis: number of equal parts, or a tuple of cut points}`` (or the
        pair ``(axis, parts)``): ``{"qkv/kernel": {1: 3}}``. Each part is treated as a parameter of
        its own.
      biases: regular expression for parameters that are vectors however many axes they have
        (attention biases ``(heads, d)``). It may be found nowhere. ``None``: no such rule.
      group: name of the method that treats a parameter, ``(path, shape) -> str``, where the engine
        is given several. ``None``: there is one method.
      joined: all included parameters together are ONE vector and one block, of the widest factor
        dtype, whatever else is said here.

    Raises:
      ValueError: for a value outside the choices above.
    """

    block_size: int | None = 256
    merge: Literal["matrix", "greedy", "none"] = "matrix"
    merge_cap: int | None = None
    pieces: Literal["even", "tail"] = "even"
    vectors: Literal["diagonal", "block"] = "diagonal"
    scalars: Literal["diagonal", "block"] = "diagonal"
    max_dim: int | None = 8192
    state_limit: float | None = 10.0
    modes: Any = None
    include: str | Callable[[str, Shape], bool] | None = None
    stacked: Any = None
    stacked_names: tuple[str, ...] = ("layers", "experts")
    split: Any = None
    biases: str | None = r"bias(es)?$"
    group: Callable[[str, Shape], str] | None = None
    joined: bool = False

    def __post_init__(self):
        choices = {
            "merge": ("matrix", "greedy", "none"),
            "pieces": ("even", "tail"),
            "vectors": ("diagonal", "block"),
            "scalars": ("diagonal", "block"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Layout.{name} must be one of {allowed}, got {getattr(self, name)!r}"
                )
        for name in ("block_size", "merge_cap", "max_dim"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"Layout.{name} must be a positive integer or None, got {value!r}")
        if self.state_limit is not None and not self.state_limit > 0:
            raise ValueError(f"Layout.state_limit must be positive or None, got {self.state_limit}")
        for name, normal in (("modes", as_modes), ("stacked", as_stacked), ("split", as_split)):
            object.__setattr__(self, name, normal(getattr(self, name)))
        object.__setattr__(self, "stacked_names", tuple(self.stacked_names))


class Axes(NamedTuple):
    """Axes of a parameter: those that stack, and those of its matrix where they were given."""

    stack: Shape
    matrix: tuple[Shape, Shape] | None = None
    declared: bool = False  # whether the layout says anything about stack axes here


def axes_of(
    layout: Layout, path: str, shape: Shape, names: tuple[Any, ...] | None = None
) -> Axes | None:
    """Reads ``stacked`` and ``stacked_names``; None for a None among MuonDimensionNumbers.

    Raises:
      ValueError: for an axis out of range or named twice, and for a path that is not in the tree.
    """
    given = layout.stacked
    if isinstance(given, MatrixAxes):
        by_path = dict(given.pairs)
        if path not in by_path:
            raise ValueError(f"Layout.stacked has no MuonDimensionNumbers for parameter '{path}'")
        pair = by_path[path]
        if pair is None:
            return None
        rows, columns = (_checked(path, shape, axes, "stacked") for axes in pair)
        _checked(path, shape, rows + columns, "stacked")
        stack = tuple(a for a in range(len(shape)) if a not in rows + columns)
        return Axes(stack, (rows, columns), True)
    if isinstance(given, str):
        said = (0,) if re.search(given, path) else None
    elif isinstance(given, Rules):
        said = given.answer(path)
    else:
        said = None if given is None else as_axes(given(path, shape))
    if said is not None:
        return Axes(_checked(path, shape, said, "stacked"), None, True)
    if names is None or len(names) != len(shape):
        return Axes(())
    stack = tuple(a for a, name in enumerate(names) if _is_named(name, layout.stacked_names))
    return Axes(stack, None, bool(stack))


def _is_named(name: Any, wanted: tuple[str, ...]) -> bool:
    return any(n in wanted for n in (name if isinstance(name, tuple) else (name,)))


def _checked(path: str, shape: Shape, axes: Shape, field: str) -> Shape:
    """The axes counted from the front."""
    out = tuple(a + len(shape) if a < 0 else a for a in axes)
    if len(set(out)) != len(out) or not all(0 <= a < len(shape) for a in out):
        raise ValueError(
            f"parameter '{path}' has shape {shape}: Layout.{field} asks for axes {axes}, which are "
            "out of range or named twice"
        )
    return out


def bounds_of(layout: Layout, path: str, shape: Shape) -> dict[int, Shape]:
    """Reads ``split``: per axis of ``shape`` the bounds ``(0, cut, .., size)`` of its parts.

    Raises:
      ValueError: for axes out of range, cut points that do not rise from 0 to the size, and a
        number of parts that does not divide it.
    """
    answer: Sequence[tuple[int, Any]] = ()
    if layout.split is not None:
        answer = layout.split.answer(path) or ()
    axes = _checked(path, shape, tuple(a for a, _ in answer), "split")
    out = {}
    for axis, (_, cuts) in zip(axes, answer, strict=True):
        d = shape[axis]
        if isinstance(cuts, int):
            if cuts < 1 or d % cuts:
                raise ValueError(
                    f"parameter '{path}' has shape {shape}: Layout.split asks for {cuts} equal "
                    f"parts of axis {axis}, which do not divide its {d} entries"
                )
            bounds = tuple(range(0, d + 1, d // cuts))
        else:
            bounds = (0, *cuts, d)
            if any(a >= b for a, b in itertools.pairwise(bounds)):
                raise ValueError(
                    f"parameter '{path}' has shape {shape}: the cut points {cuts} of Layout.split "
                    f"must rise and lie between 0 and {d}"
                )
        out[axis] = bounds
    return out


def factored_modes(layout: Layout, path: str, merged: Shape) -> tuple[bool, ...] | None:
    """Reads ``modes``; None where it says nothing."""
    given = layout.modes
    if isinstance(given, Rules):
        given = given.answer(path)
    elif callable(given):
        given = mode_answer(given(path, merged))
    if isinstance(given, str):
        at = {
            "shorter": len(merged) - 1 - int(np.argmin(merged[::-1])),
            "longer": int(np.argmax(merged)),
            "input": 0,
            "output": len(merged) - 1,
        }[given]
        return tuple(i == at for i in range(len(merged)))
    return given if given is not None and len(given) == len(merged) else None


def is_included(layout: Layout, path: str, shape: Shape) -> bool:
    """Reads ``include``."""
    if callable(layout.include):
        return layout.include(path, shape)
    return layout.include is None or re.search(layout.include, path) is not None


def is_biases(layout: Layout, path: str) -> bool:
    """Reads ``biases``."""
    return layout.biases is not None and re.search(layout.biases, path) is not None


def check_patterns(layout: Layout, paths: Sequence[str]) -> None:
    """Raises ValueError for a regular expression that is found in none of the paths."""
    for field in ("include", "stacked", "split", "modes"):
        given = getattr(layout, field)
        given = getattr(given, "rules", given)  # of a function that asks rules first
        if isinstance(given, Rules):
            patterns = [pattern for pattern, _ in given.pairs]
        else:
            patterns = [given] if isinstance(given, str) and field != "modes" else []
        for pattern in patterns:
            if paths and not any(re.search(pattern, path) for path in paths):
                raise ValueError(
                    f"Layout.{field}: the pattern {pattern!r} is found in no parameter's path; "
                    f"the first paths are {list(paths[:3])}"
                )
