"""What the engine does with a tree of parameters: a table, and the factors of each block."""

import dataclasses
from typing import Any

import jax

from kradagrad_jax.engine.layout import Layout, block_origins
from kradagrad_jax.engine.options import BlockState, plan_of


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How each parameter is treated; ``print`` it.

    Attributes:
      rows: per parameter (path, shape, merged shape or None, blocks as text or the reason why it
        is left to the fallback).
    """

    rows: tuple[tuple[str, tuple[int, ...], tuple[int, ...] | None, str], ...]

    def __str__(self) -> str:
        table = [("parameter", "shape", "as", "blocks")]
        for path, shape, merged, text in self.rows:
            table.append((path, _show(shape), "-" if merged is None else _show(merged), text))
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in table
        )


def _show(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def describe(params: Any, layout: Layout | None = None) -> Coverage:
    """Table of the blocks that ``layout`` gives to ``params`` (arrays or ShapeDtypeStructs)."""
    plan = plan_of(params, layout or Layout())
    rows: dict[int, tuple[str, tuple[int, ...], tuple[int, ...] | None, str]] = {}
    for leaf in plan.covered:
        counts: dict[tuple[int, ...], int] = {}
        for tile in leaf.tiles:
            pieces = leaf.stack
            for c in tile.counts:
                pieces *= c
            counts[tile.sizes] = counts.get(tile.sizes, 0) + pieces
        text = " + ".join(f"{n} of {_show(s)}" for s, n in counts.items())
        rows[leaf.index] = (leaf.path, leaf.shape, leaf.merged, text)
    for index, path, shape, reason in plan.uncovered:
        rows[index] = (path, shape, None, f"fallback ({reason})")
    return Coverage(tuple(rows[i] for i in sorted(rows)))


def block_factors(
    state: BlockState, params: Any, layout: Layout | None = None, factor_dtype: Any = None
) -> dict[str, list[Any]]:
    """Factors of each covered parameter, one per block, first mode slowest.

    Args:
      state: the :class:`BlockState`.
      params: the parameters, for their shapes.
      layout: the layout that the transformation was given.
      factor_dtype: likewise.

    Returns:
      ``{path: [factor of block 0, ...]}``, each without the stack axis.
    """
    plan = plan_of(params, layout or Layout(), factor_dtype)
    found: dict[str, list[tuple[Any, Any]]] = {leaf.path: [] for leaf in plan.covered}
    for bucket in plan.buckets:
        for slot in bucket.slots:
            leaf = plan.covered[slot.leaf]
            for i, origin in enumerate(block_origins(slot, leaf)):
                row = slot.offset + i
                factor = jax.tree.map(lambda x, row=row: x[row], state.factors[bucket.key])
                found[leaf.path].append((origin, factor))
    return {
        path: [f for _, f in sorted(pairs, key=lambda p: p[0])] for path, pairs in found.items()
    }
