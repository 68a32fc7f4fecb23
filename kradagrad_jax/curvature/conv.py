"""Patches of a convolution's input: one row per output position."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kradagrad_jax.curvature.parts import wider


@dataclasses.dataclass(frozen=True)
class Patches:
    """Input of a convolution as ``(S, N, R, window * channels of one group)``.

    Padding and one strided slice per window offset; on CPU this is 1.8 to 5 times faster than
    ``lax.conv_general_dilated_patches``.
    """

    order: tuple[int, ...]  # permutation of the input to (batch, *space, channels)
    window: tuple[int, ...]
    # of the convolution
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int
    examples: int  # N; the batch axis holds N or a multiple of it

    @classmethod
    def of(cls, p: dict[str, Any], sizes: Sequence[int], n: int) -> "Patches":
        """From the parameters of an equation; ``sizes`` = window and channels of one group."""
        spec = p["dimension_numbers"].lhs_spec
        k = len(sizes) - 1
        return cls(
            (spec[0], *spec[2:], spec[1]),
            tuple(sizes[:-1]),
            tuple(p["window_strides"]),
            tuple((int(a), int(b)) for a, b in p["padding"]),
            tuple(p["lhs_dilation"] or (1,) * k),
            tuple(p["rhs_dilation"] or (1,) * k),
            int(p["feature_group_count"]),
            n,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        slices = self._slices(x)
        n, k = self.examples, len(slices)
        if self.groups == 1:  # joined along channels: faster than a stack on CPU
            rows = jnp.concatenate(slices, axis=-1)
            return rows.reshape(1, n, -1, rows.shape[-1])
        rows = jnp.stack(slices, axis=-2)  # (batch, *space, window, channels)
        rows = rows.reshape(n, -1, k, self.groups, rows.shape[-1] // self.groups)
        return jnp.moveaxis(rows, 3, 0).reshape(self.groups, n, rows.shape[1], -1)

    def means(self, x: jax.Array) -> jax.Array:
        """Mean over the positions of each example ``(S, N, 1, d_in)``, without building patches."""
        n, wide = self.examples, wider(x.dtype)
        each = [jnp.mean(s.reshape(n, -1, s.shape[-1]).astype(wide), 1) for s in self._slices(x)]
        rows = jnp.stack(each, axis=1).reshape(n, 1, len(each), self.groups, -1)
        return jnp.moveaxis(rows, 3, 0).reshape(self.groups, n, 1, -1)

    def _slices(self, x: jax.Array) -> list[jax.Array]:
        """One strided slice ``(batch, *space, channels)`` of the padded input per offset."""
        x = x.transpose(self.order)
        edges = [
            (low, high, inner - 1)
            for (low, high), inner in zip(self.padding, self.lhs_dilation, strict=True)
        ]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        spans = [(k - 1) * d for k, d in zip(self.window, self.rhs_dilation, strict=True)]
        space = [
            (n - span - 1) // step + 1
            for n, span, step in zip(x.shape[1:-1], spans, self.strides, strict=True)
        ]
        slices = []
        for offset in itertools.product(*(range(k) for k in self.window)):
            start = [o * d for o, d in zip(offset, self.rhs_dilation, strict=True)]
            stop = [b + (m - 1) * s + 1 for b, m, s in zip(start, space, self.strides, strict=True)]
            slices.append(
                lax.slice(
                    x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *self.strides, 1)
                )
            )
        return slices
