"""The equations in which a parameter enters linearly, and their canonical form.

Every use is described by how its activation becomes ``a: (S, N, R, d_in)`` and its cotangent
``g: (S, N, R, d_out)``: S groups, N examples, R positions per example.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from kradagrad_jax.curvature.batch import BatchAxes
from kradagrad_jax.curvature.conv import Patches
from kradagrad_jax.curvature.internals import Operand
from kradagrad_jax.curvature.views import Atom, View

UseKind = Literal["dense", "conv", "embed", "scale", "bias"]


@dataclasses.dataclass(frozen=True)
class Arrange:
    """Split, transpose and flatten to ``(S, N, R, d)``."""

    split: tuple[int, ...]
    order: tuple[int, ...]
    target: tuple[int, int, int, int]

    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.split).transpose(self.order).reshape(self.target)


@dataclasses.dataclass(frozen=True)
class RowIds:
    """Row numbers of a gather as ``(1, N, R)``."""

    arrange: Arrange

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.arrange(ids)[..., 0]


@dataclasses.dataclass(frozen=True)
class Use:
    """One linear use of one leaf in one equation."""

    kind: UseKind
    node: int  # index of the equation
    activation: Operand | None  # the other operand, or None (bias)
    # how the activation becomes a, or ids; None for a bias
    inputs: Arrange | Patches | RowIds | None
    outputs: Arrange  # how the cotangent of the output becomes g
    view: View
    # atoms of the leaf's groups, inputs and outputs
    group: tuple[Atom, ...] = ()
    rows: tuple[Atom, ...] = ()
    columns: tuple[Atom, ...] = ()
    in_shape: tuple[int, ...] = ()  # inputs as axes
    # begin and end within the joined inputs or outputs of a concatenated weight
    part: tuple[int, int] = (0, 0)
    side: str = ""  # "rows" or "columns": which of them ``part`` cuts; "" for all
    bias: View | None = None  # the bias added to the output, if paired
    out_dims: tuple[int, ...] = ()  # dimensions of the output that are groups, then outputs

    @property
    def elementwise(self) -> bool:
        return self.kind in ("scale", "bias")

    @property
    def examples(self) -> tuple[int, int]:
        """N and R."""
        return self.outputs.target[1:3]


class Rejected(Exception):
    """An equation that looks like a use but is none; the message is the reason."""


def arrange(
    shape: Sequence[int],
    group: Sequence[int],
    batch: int | None,
    positions: Sequence[int],
    features: Sequence[int],
    examples: int,
) -> Arrange:
    """Canonical form of an array; a batch axis of k N entries is split as (N, k).

    ``batch`` is None for a single example, inside a loop over examples.
    """
    split: list[int] = []
    index: dict[int | None, list[int]] = {None: []}
    for d, n in enumerate(shape):
        sizes = [examples, n // examples] if d == batch else [n]
        index[d] = list(range(len(split), len(split) + len(sizes)))
        split += sizes
    order = [i for d in group for i in index[d]] + index[batch]
    order += [i for d in positions if d != batch for i in index[d]]
    order += [i for d in features for i in index[d]]
    s, d_feature = (math.prod(shape[d] for d in dims) for dims in (group, features))
    rest = math.prod(shape) // max(s * d_feature * examples, 1)
    return Arrange(tuple(split), tuple(order), (s, examples, rest, d_feature))


def batch_axis(
    batch: BatchAxes, value: int, shape: Sequence[int], allowed: Sequence[int], what: str
) -> tuple[int | None, int]:
    """The dimension of ``value`` that counts examples, and their number.

    Raises:
      Rejected: there is none among the allowed ones.
    """
    dims = batch(value)
    if not dims and value in batch.alone:
        return None, 1
    if not dims:
        raise Rejected(f"{what} does not carry the batch axis")
    inside = [d for d in dims if d in allowed]
    if not inside:
        raise Rejected(f"the batch axis of {what} is contracted or paired with the parameter")
    size = shape[inside[0]]
    return inside[0], batch.examples if size % batch.examples == 0 else size


def no_broadcast(view: View, dims: Sequence[int], axis: int | None = None) -> None:
    """Raises Rejected if an input or output axis of the leaf is broadcast."""
    if any(s == 0 for d in dims if d != axis for _, s in view.dims[d]):
        raise Rejected("the parameter is broadcast along an input or output axis")


def canonical_scale(use: Use, x: jax.Array, g: jax.Array) -> jax.Array:
    """Per-position gradient ``(1, N, R, d)`` of an elementwise use."""
    v = use.outputs(g)
    if use.kind == "scale":
        v = v * use.outputs(jnp.broadcast_to(x, g.shape)).astype(v.dtype)
    return v
