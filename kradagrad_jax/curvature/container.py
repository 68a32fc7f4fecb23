"""The statistics of one batch, addressed by parameter path."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.curvature import parts
from kradagrad_jax.curvature.given import given_grams, given_rows
from kradagrad_jax.curvature.layout import Layer
from kradagrad_jax.curvature.parts import Part
from kradagrad_jax.curvature.spec import CaptureSpec
from kradagrad_jax.factors.method import Grams, Rows


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stats", "terms", "fresh"],
    meta_fields=["spec", "reducer"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Curvature:
    """Inputs and output gradients of the layers of a model, raw or as second moments.

    A pytree whose arrays hang below parameter paths, not in the shape of the parameter tree: it
    passes unchanged through ``optax.chain``, ``masked``, ``partition`` and ``jit``.

    Attributes:
      stats: per path the parts of :mod:`~kradagrad_jax.curvature.parts`.
      terms: number M of loss terms (scalar); factors of gradients are divided by it.
      fresh: bool scalar, False if the statistics were switched off (``update_stats=False``).
      spec: the static description of the parameters.
      reducer: name of the reducer that made the parts.
    """

    stats: dict[str, tuple[Part, ...]]
    terms: jax.Array
    fresh: jax.Array
    spec: CaptureSpec
    reducer: str = "raw"

    def __contains__(self, path: str) -> bool:
        return path in self.stats

    def _parts(self, path: str) -> tuple[Part, ...]:
        if path not in self.stats:
            self.spec.layer(path)  # the better message, if the path has no layer at all
            raise KeyError(f"this Curvature holds no statistics of '{path}'")
        return self.stats[path]

    def _layer(self, path: str, bias: bool) -> tuple[Layer, bool]:
        layer = self.spec.layer(path)
        return layer, bias and layer.bias is not None

    def rows(self, path: str, approx: str = "expand", bias: bool = True) -> Rows:
        """Inputs and output gradients as scaled rows.

        Args:
          path: path of the weight.
          approx: ``"expand"``: every position is a row; ``"reduce"``: positions of an example are
            averaged (inputs) and summed (gradients) first (arXiv 2311.00636).
          bias: append the constant 1 to the inputs if the layer has a bias.

        Returns:
          :class:`Rows` with ``a: (stack, n, d_in [+ 1])`` and ``g: (stack, n, d_out)`` in float32
          or better, such that ``a^T a`` is the mean over positions of ``[a; 1] [a; 1]^T`` and
          ``g^T g`` the sum over positions, divided by the number of loss terms. Several uses of
          one weight are concatenated and their positions pooled.

        Raises:
          KeyError: the path has no layer statistics.
          ValueError: the statistics are not raw, the layer is an embedding, or ``approx`` is
            unknown.
        """
        layer, bias = self._layer(path, bias)
        _known(approx)
        if layer.kind == "embed":
            raise ValueError(
                f"'{path}' is an embedding: its inputs are row numbers; use grams(), whose `a` is "
                "a diagonal"
            )
        raw = self._parts(path)
        if any("a" not in part for part in raw):
            raise ValueError(
                f"rows of '{path}' need raw statistics, these were captured with "
                f"reducer={self.reducer!r}; capture with reducer='raw'"
            )
        each = [_raw(part, layer, approx, bias) for part in raw]
        count = sum(c for _, _, c in each)
        tiled = [parts.tiled_rows(a, g) for a, g, _ in each]
        a = jnp.concatenate([a for a, _ in tiled], axis=1)
        g = jnp.concatenate([g for _, g in tiled], axis=1)
        a = a / jnp.sqrt(_positive(count))[:, None, None].astype(a.dtype)
        return Rows(a, g / jnp.sqrt(_positive(self.terms)).astype(g.dtype))

    def grams(self, path: str, approx: str = "expand", bias: bool = True) -> Grams:
        """The two second moments of a layer, ``A (x) G`` being its curvature.

        Args:
          path, approx, bias: as in :meth:`rows`.

        Returns:
          :class:`Grams` with a leading axis ``stack``: ``a: (stack, d_in [+ 1], d_in [+ 1])`` and
          ``g: (stack, d_out, d_out)``, or diagonals without the last axis (embeddings, sides above
          the reducer's ``max_dim``). A tied embedding has ``a = 1`` (diagonal) and the traces of
          its two uses in ``g``.

        Raises:
          KeyError: the path has no layer statistics.
          ValueError: the statistics were reduced for another ``approx``, or lack the bias.
        """
        layer, bias = self._layer(path, bias)
        _known(approx)
        held = self._parts(path)
        if layer.tied:
            gathers = [p for p in held if _is_gather(p, layer)]
            logits = [p for p in held if not _is_gather(p, layer)]
            return parts.tied_grams(
                layer,
                self._grams(gathers, layer, approx, False),
                self._grams(logits, layer, approx, False),
            )
        return self._grams(list(held), layer, approx, bias)

    def _grams(self, held: list[Part], layer: Layer, approx: str, bias: bool) -> Grams:
        self._check_approx(held, layer, approx)
        each = [_sums(part, layer, approx, bias) for part in held]
        count = _positive(sum(c for _, _, c in each))
        a, g = (functools.reduce(jnp.add, [e[i] for e in each]) for i in (0, 1))
        return Grams(_divide(a, count), _divide(g, _positive(self.terms)))

    def _check_approx(self, held: list[Part], layer: Layer, approx: str) -> None:
        have = "reduce" if self.reducer == "kron_reduce" else "expand"
        summed = any("a" not in part and "ids" not in part for part in held)
        if summed and layer.shared and have != approx and self.reducer != "given":
            name = "kron_reduce" if approx == "reduce" else "kron"
            raise ValueError(
                f"approx={approx!r} of '{layer.path}': these sums were captured with "
                f"reducer={self.reducer!r}; capture with reducer={name!r} or 'raw'"
            )

    def diagonal(self, path: str) -> jax.Array:
        """Mean square of the per-example gradients of an elementwise parameter (scale or bias).

        Args:
          path: path of a leaf whose only uses are elementwise and not paired with a weight.

        Returns:
          An array of the shape of the leaf, in float32 or better.

        Raises:
          KeyError: there are no such statistics.
        """
        leaf = self.spec.leaf(path)
        held = [p["D"] for p in self.stats.get(path, ()) if "D" in p]
        if not held:
            raise KeyError(f"'{path}' has no elementwise statistics (kinds: {leaf.kinds})")
        return (sum(held[1:], held[0]) / _positive(self.terms)).reshape(leaf.shape)

    def __add__(self, other: "Curvature") -> "Curvature":
        """Statistics of two micro-batches together: exact, the number of loss terms adds up."""
        if self.spec.layers != other.spec.layers or self.reducer != other.reducer:
            raise ValueError("only Curvature objects of the same model and reducer can be added")
        stats = {}
        for path, mine in self.stats.items():
            theirs = other.stats[path]
            summed = all("scale" not in p and "v" not in p for p in mine)
            stats[path] = jax.tree.map(jnp.add, mine, theirs) if summed else mine + theirs
        return dataclasses.replace(
            self, stats=stats, terms=self.terms + other.terms, fresh=self.fresh | other.fresh
        )

    def scale_cotangents(self, c: Any) -> "Curvature":
        """The same statistics for output gradients multiplied by ``c``."""
        stats = {path: tuple(parts.scaled(p, c) for p in held) for path, held in self.stats.items()}
        return dataclasses.replace(self, stats=stats)

    @classmethod
    def from_rows(
        cls, rows: Mapping[str, tuple[jax.Array, jax.Array]], spec: CaptureSpec
    ) -> "Curvature":
        """Hand-made statistics from rows scaled as in :class:`Rows`.

        Args:
          rows: per weight path ``(a, g)``, ``a: ([stack,] n, d_in)`` or with the column of the
            bias ``([stack,] n, d_in + 1)``, ``g: ([stack,] n, d_out)``. A missing bias column is
            filled with ``1 / sqrt(n)``.
          spec: see :meth:`CaptureSpec.from_layers`.

        Raises:
          KeyError: a path that is no layer of ``spec``.
          ValueError: shapes that do not fit the layer.

        Examples:
          >>> import jax.numpy as jnp
          >>> from kradagrad_jax.curvature import CaptureSpec, Curvature, Layer
          >>> spec = CaptureSpec.from_layers([Layer.dense("w", (3, 2))])
          >>> rows = Curvature.from_rows({"w": (jnp.ones((4, 3)), jnp.ones((4, 2)))}, spec)
          >>> rows.grams("w").a.shape
          (1, 3, 3)
        """
        return cls._given(rows, spec, given_rows, "raw")

    @classmethod
    def from_grams(
        cls, grams: Mapping[str, tuple[jax.Array, jax.Array]], spec: CaptureSpec
    ) -> "Curvature":
        """Hand-made statistics from factors scaled as in :class:`Grams`.

        Args:
          grams: per weight path ``(A, G)``, matrices or diagonals, the stack axis optional for a
            stack of one; ``A`` over ``d_in + 1`` if the layer has a bias that is treated jointly.
          spec: see :meth:`CaptureSpec.from_layers`.

        Raises:
          KeyError: a path that is no layer of ``spec``.
          ValueError: shapes that do not fit the layer.
        """
        return cls._given(grams, spec, given_grams, "given")

    @classmethod
    def _given(
        cls,
        given: Mapping[str, tuple[jax.Array, jax.Array]],
        spec: CaptureSpec,
        make: Callable[[Layer, jax.Array, jax.Array], Part],
        reducer: str,
    ) -> "Curvature":
        stats = {}
        for path, (a, g) in given.items():
            stats[path] = (make(spec.layer(path), jnp.asarray(a), jnp.asarray(g)),)
        return cls(stats, jnp.ones((), jnp.float32), jnp.ones((), bool), spec, reducer)


def _known(approx: str) -> None:
    if approx not in ("expand", "reduce"):
        raise ValueError(f"approx must be 'expand' or 'reduce', got {approx!r}")


def _positive(count: Any) -> jax.Array:
    """Counts as divisors; nothing was counted where the statistics are switched off."""
    return jnp.where(count > 0, count, jnp.ones_like(count))


def _divide(x: jax.Array, by: jax.Array) -> jax.Array:
    return x / by.astype(x.dtype).reshape(by.shape + (1,) * (x.ndim - by.ndim) * (by.ndim > 0))


def _is_gather(part: Part, layer: Layer) -> bool:
    if "g" in part:
        return "ids" in part
    return "Adiag" in part and part["Adiag"].shape[-1] == layer.d_in


def _raw(part: Part, layer: Layer, approx: str, bias: bool) -> Any:
    """Rows of one part; hand-made ones may hold the column of the bias already."""
    has_column = part["a"].shape[-1] == layer.d_in + 1 and not layer.tied
    a, g, count = parts.raw_rows(part, approx, bias and not has_column)
    return (a[..., : layer.d_in] if has_column and not bias else a), g, count


def _sums(part: Part, layer: Layer, approx: str, bias: bool) -> Any:
    """Unscaled factors and the count of one part, from sums or from raw rows."""
    if "ids" in part:
        g = parts.wide(part["g"]) * parts.wide(part["scale"])
        counts = parts.row_counts(part["ids"], part.get("mask"), layer.d_in)
        return counts, parts.gram(g.reshape(g.shape[0], -1, g.shape[-1])), parts.wide(part["P"])
    if "a" in part:
        a, g, count = _raw(part, layer, approx, bias)
        return parts.gram(a), parts.gram(g.reshape(g.shape[0], -1, g.shape[-1])), count
    a = part["A"] if "A" in part else part["Adiag"]
    if a.shape[-1] == layer.d_in + 1 and not layer.tied:  # hand-made, with the bias
        a = a if bias else a[(slice(None), *(slice(0, layer.d_in),) * (a.ndim - 1))]
    elif bias and "A" in part and "abar" not in part:
        raise ValueError(
            f"the factor A of '{layer.path}' has no row for the bias '{layer.bias}': give A over "
            "d_in + 1 inputs, or use bias=False (joint_bias=False)"
        )
    elif bias:
        a = parts.with_bias(part)
    return a, part["G"] if "G" in part else part["Gdiag"], parts.wide(part["P"])
