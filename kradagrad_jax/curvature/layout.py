"""How a parameter leaf is laid out as matrices, and the description of one layer."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["dense", "conv", "embed"]


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A reshape, a transposition and a reshape: leaf -> ``(stack, rows, columns)``."""

    shape: tuple[int, ...]
    sizes: tuple[int, ...]  # row-major split of the leaf, ``prod(sizes) == prod(shape)``
    order: tuple[int, ...]  # permutation of the axes of ``sizes``
    target: tuple[int, int, int]  # ``(stack, rows, columns)``

    def to_matrix(self, leaf: jax.Array) -> jax.Array:
        return leaf.reshape(self.sizes).transpose(self.order).reshape(self.target)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        split = matrix.reshape([self.sizes[i] for i in self.order])
        return split.transpose(np.argsort(self.order)).reshape(self.shape)


def plain_view(shape: tuple[int, ...], rows: int, columns: int, stack: int = 1) -> MatrixView:
    """The view of a leaf that lies as ``(stack, rows, columns)`` already."""
    return MatrixView(tuple(shape), tuple(shape), tuple(range(len(shape))), (stack, rows, columns))


def _check(leaf: Any, shape: tuple[int, ...], path: str) -> None:
    if tuple(leaf.shape) != shape:
        raise ValueError(
            f"the capture specification was built for '{path}' of shape {shape}, got "
            f"{tuple(leaf.shape)}; run kradagrad_jax.curvature.inspect on the current model"
        )


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight that acts as a matrix, with the bias that is added to its output.

    Attributes:
      path: path of the weight leaf.
      shape: its shape.
      bias: path of the bias leaf that belongs to the same layer, or None.
      bias_shape: its shape, or None.
      kind: ``"dense"``, ``"conv"`` or ``"embed"``.
      stack: number of matrices: lengths of the scans times groups (experts, heads, channels).
      d_in: inputs per matrix, without the bias.
      d_out: outputs per matrix.
      in_shape: the inputs as axes: ``(kh, kw, c)`` for a convolution, else ``(d_in,)``.
      shared: whether one example contains several positions.
      tied: whether an embedding also serves as a dense weight.
      view: how the weight becomes ``(stack, d_in, d_out)``.
      bias_view: how the bias becomes ``(stack, 1, d_out)``, or None.
    """

    path: str
    shape: tuple[int, ...]
    bias: str | None
    bias_shape: tuple[int, ...] | None
    kind: Kind
    stack: int
    d_in: int
    d_out: int
    in_shape: tuple[int, ...]
    shared: bool
    view: MatrixView
    bias_view: MatrixView | None = None
    tied: bool = False

    @classmethod
    def dense(
        cls,
        path: str,
        shape: tuple[int, ...],
        bias: str | None = None,
        *,
        transposed: bool = False,
        shared: bool = False,
    ) -> "Layer":
        """A hand-made dense layer.

        Args:
          path: path of the weight.
          shape: ``(d_in, d_out)``, or ``(stack, d_in, d_out)``.
          bias: path of a bias of shape ``(d_out,)`` or ``(stack, d_out)``.
          transposed: the weight is stored as ``(d_out, d_in)``.
          shared: one example contains several positions.

        Raises:
          ValueError: if the shape has neither two nor three axes.
        """
        shape = tuple(shape)
        if len(shape) not in (2, 3):
            raise ValueError(f"layer '{path}': a dense weight has 2 or 3 axes, got shape {shape}")
        stack = shape[0] if len(shape) == 3 else 1
        d_in, d_out = shape[-2:]
        view = plain_view(shape, d_in, d_out, stack)
        if transposed:
            d_in, d_out = d_out, d_in
            order = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)
            view = MatrixView(shape, shape, order, (stack, d_in, d_out))
        bias_shape = None if bias is None else (*shape[:-2], d_out)
        bias_view = None if bias_shape is None else plain_view(bias_shape, 1, d_out, stack)
        return cls(
            path, shape, bias, bias_shape, "dense", stack, d_in, d_out, (d_in,), shared, view,
            bias_view,
        )  # fmt: skip

    @classmethod
    def conv(
        cls, path: str, shape: tuple[int, ...], bias: str | None = None, groups: int = 1
    ) -> "Layer":
        """A hand-made convolution with a kernel ``(*window, channels in, channels out)``.

        Args:
          path: path of the kernel.
          shape: its shape, HWIO; the channels in are those of one group.
          bias: path of a bias of shape ``(channels out,)``.
          groups: feature groups; the output channels are ordered by group.
        """
        shape = tuple(shape)
        d_in, d_out = math.prod(shape[:-1]), shape[-1] // groups
        k = len(shape)
        view = MatrixView(
            shape, (*shape[:-1], groups, d_out), (k - 1, *range(k - 1), k), (groups, d_in, d_out)
        )
        bias_shape = None if bias is None else (shape[-1],)
        bias_view = None if bias_shape is None else plain_view(bias_shape, 1, d_out, groups)
        return cls(
            path, shape, bias, bias_shape, "conv", groups, d_in, d_out, shape[:-1], True, view,
            bias_view,
        )  # fmt: skip

    def to_matrix(self, leaf: jax.Array) -> jax.Array:
        """The weight as ``(stack, d_in, d_out)``."""
        _check(leaf, self.shape, self.path)
        return self.view.to_matrix(leaf)

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """Inverse of :meth:`to_matrix`."""
        return self.view.from_matrix(matrix)

    def pack(self, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """Weight and bias as one matrix ``(stack, d_in + 1, d_out)``, the bias as last row.

        Without ``bias`` the matrix is ``(stack, d_in, d_out)``.
        """
        matrix = self.to_matrix(weight)
        if bias is None:
            return matrix
        if self.bias is None or self.bias_shape is None or self.bias_view is None:
            raise ValueError(f"layer '{self.path}' has no bias to pack")
        _check(bias, self.bias_shape, self.bias)
        return jnp.concatenate([matrix, self.bias_view.to_matrix(bias)], axis=1)

    def unpack(self, matrix: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Inverse of :meth:`pack`: ``(weight, bias)``, the bias None if there is no last row."""
        weight = self.from_matrix(matrix[:, : self.d_in])
        if matrix.shape[1] == self.d_in or self.bias_view is None:
            return weight, None
        return weight, self.bias_view.from_matrix(matrix[:, self.d_in :])
