"""What an optimizer does with a tree of parameters, and how it is doing: tables and numbers."""

import contextlib
import contextvars
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.engine import placement, trees
from kradagrad_jax.engine.layout import Layout, factor_dtype_of
from kradagrad_jax.engine.packing import LAYERS, REST, Packing
from kradagrad_jax.engine.plan import Leaves, block_origins
from kradagrad_jax.engine.state import BlockState
from kradagrad_jax.engine.static import Static, plan_of

Shape = tuple[int, ...]


class Row(NamedTuple):
    """How parameters of one shape are treated.

    Attributes:
      paths: of these parameters.
      shape: of each.
      treated: shape that is preconditioned, modes without a factor in brackets; or what else is
        done with them.
      blocks: number and shape of the blocks of one parameter.
      why: what is not as one would expect, and the reason.
      nbytes: state of all of them.
    """

    paths: tuple[str, ...]
    shape: Shape
    treated: str
    blocks: str
    why: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How each parameter is treated; ``print`` it.

    Attributes:
      rows: one per shape and treatment, see :class:`Row`.
      nbytes: of the whole optimizer state.
      parameters: number of entries of all parameters.
    """

    rows: tuple[Row, ...]
    nbytes: int
    parameters: int

    def __str__(self) -> str:
        table = [("parameters", "shape", "treated as", "blocks", "bytes/entry", "why")]
        for row in self.rows:
            entries = len(row.paths) * math.prod(row.shape)
            per = f"{row.nbytes / entries:.1f}" if entries else "-"
            name = _joined(row.paths)
            table.append((name, _show(row.shape), row.treated, row.blocks, per, row.why))
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        each = self.nbytes / max(self.parameters, 1)
        return "\n".join(
            [*lines, f"state: {self.nbytes / 1e6:.3g} MB, {each:.1f} bytes a parameter"]
        )


def _show(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _joined(paths: tuple[str, ...]) -> str:
    """One name for all: with * for numbers where they differ in nothing else."""
    if len(paths) == 1:
        return paths[0]
    stars = {re.sub(r"\d+", "*", p) for p in paths}
    return f"{stars.pop() if len(stars) == 1 else paths[0] + ', ..'} ({len(paths)})"


class Record(NamedTuple):
    """One transformation of the engine that was initialised."""

    static: Static
    params: Any
    packing: Packing | None = None


_RECORDS: contextvars.ContextVar[list[Record] | None] = contextvars.ContextVar(
    "records", default=None
)


@contextlib.contextmanager
def _recording() -> Iterator[list[Record]]:
    records: list[Record] = []
    token = _RECORDS.set(records)
    try:
        yield records
    finally:
        _RECORDS.reset(token)


def record(s: Static, params: Any) -> None:
    """Notes an initialisation, where :func:`describe` is asking."""
    records = _RECORDS.get()
    if records is not None:
        records.append(Record(s, params))


def amend(packing: Packing) -> None:
    """Notes that the last one is of packed layers."""
    records = _RECORDS.get()
    if records:
        records[-1] = records[-1]._replace(packing=packing)


def describe(tx: Any, params: Any) -> Coverage:
    """What an optimizer does with each parameter, why, and the bytes of its state.

    Args:
      tx: an optax transformation: one of this package, or anything around one.
      params: arrays or ShapeDtypeStructs; nothing is allocated.

    Returns:
      A :class:`Coverage`; ``print`` it.

    Raises:
      ValueError: ``tx`` holds no transformation of this package.
    """
    with _recording() as records:
        state = jax.eval_shape(lambda p: tx.init(p), params)  # not the one that is cached
    if not records:
        raise ValueError(
            "describe(tx, params): tx holds no transformation of kradagrad_jax (or the parameters "
            "are empty); give the optimizer first, the parameters second"
        )
    rows = [row for r in records for row in _rows(r)]
    known = {path for row in rows for path in row.paths}
    leaves, paths = trees.flatten(params)[0], trees.paths_of(params)
    pairs = [(p, x) for p, x in zip(paths, leaves, strict=True) if not trees.is_masked(x)]
    others: dict[Shape, list[str]] = {}
    for path, x in pairs:
        if path not in known:
            others.setdefault(tuple(x.shape), []).append(path)
    rows += [
        Row(tuple(names), shape, "-", "-", "left to other transformations", 0)
        for shape, names in others.items()
    ]
    first = {path: i for i, (path, _) in enumerate(pairs)}
    rows.sort(key=lambda row: first.get(row.paths[0], len(first)))
    return Coverage(tuple(rows), _nbytes(state), sum(math.prod(x.shape) for _, x in pairs))


def _nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _rows(record: Record) -> list[Row]:
    s, packing = record.static, record.packing
    rows = []
    for number, group in enumerate(s.plan.covered):
        per_leaf: dict[Shape, int] = {}
        nbytes = 0
        for bucket in s.plan.buckets:
            one = _nbytes(jax.eval_shape(lambda b=bucket: placement.new_kept(s, b, 1)))
            for slot in bucket.slots:
                if slot.leaves == number:
                    nbytes += one * slot.count
                    n = slot.count // max(len(group.indices), 1)
                    per_leaf[bucket.shape] = per_leaf.get(bucket.shape, 0) + n
            if s.plan.joined:  # of the one block its share
                nbytes = one * math.prod(group.merged) // math.prod(bucket.shape)
                per_leaf = {bucket.shape: 1}
        blocks = " + ".join(f"{n} of {_show(shape)}" for shape, n in per_leaf.items())
        rows += _covered(group, packing, blocks, nbytes)
    uncovered: dict[tuple[Shape, str], list[str]] = {}
    for _, path, shape, reason in s.plan.uncovered:
        path = path.removeprefix(f"{REST}/" if packing else "")
        uncovered.setdefault((shape, reason), []).append(path)
    o = s.options
    kept = (o.leaf_graft is not None and o.leaf_graft.adaptive) + (
        o.beta1 is not None and not o.runs_fallback
    )
    how = o.leaf_graft.kind if o.leaf_graft else ("own fallback" if o.runs_fallback else "identity")
    for (shape, reason), paths in uncovered.items():
        nbytes = 4 * kept * len(paths) * math.prod(shape)
        reason = "no layer" if packing else reason
        rows.append(Row(tuple(paths), shape, how, "-", reason, nbytes))
    return rows


def _covered(group: Leaves, packing: Packing | None, blocks: str, nbytes: int) -> list[Row]:
    modes = [
        str(n) if own else f"({n})" for n, own in zip(group.merged, group.factored, strict=True)
    ]
    treated = "x".join(modes) + (f", {group.stack} stacked" if group.stack > 1 else "")
    why = "; ".join(dict.fromkeys(r for r in group.reasons if r))
    if not group.tiles:
        treated = "part of one vector"
    if packing is None:
        return [Row(group.paths, group.shape, treated, blocks, why, nbytes)]
    paths = tuple(p.removeprefix(f"{LAYERS}/") for p in group.paths)
    layers = [packing.layers[p] for p in paths]
    rows = [Row(paths, layers[0][0].shape, treated, blocks, why, nbytes)]
    biases = tuple(layer.bias for layer, _, bias in layers if bias is not None)
    if biases:
        shape = layers[0][0].bias_shape
        rows.append(Row(biases, shape, "last row of its layer", "-", "", 0))
    return rows


def diagnostics(state: Any) -> dict[str, jax.Array]:
    """Numbers that say how an optimizer is doing, found anywhere in a state. May be jitted.

    Args:
      state: any tree that holds a :class:`BlockState`: that of a chain, of inject_hyperparams, ...

    Returns:
      float32 scalars by name: ``count``; ``skipped`` (updates whose gradient was not finite) and
      ``rejected`` (block updates undone); ``statistics`` and ``refreshes``, the least over the
      blocks, with ``statistics_max`` and ``refreshes_max``; ``idle``, blocks that have had no
      statistic; and for each array of the factors ``BUCKET/NAME/norm_min`` and ``norm_max``,
      Frobenius norms over the blocks. With several BlockStates in the tree, names start with
      their number.

    Raises:
      ValueError: there is none.
    """
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(x)]
    if not found:
        raise ValueError("diagnostics(state): the state holds no BlockState of kradagrad_jax")
    out: dict[str, jax.Array] = {}
    for i, own in enumerate(found):
        prefix = f"{i}/" if len(found) > 1 else ""
        out |= {prefix + name: jnp.asarray(x, jnp.float32) for name, x in _numbers(own).items()}
    return out


def _is_state(x: Any) -> bool:
    return isinstance(x, BlockState)


def _numbers(state: BlockState) -> dict[str, Any]:
    out: dict[str, Any] = {name: getattr(state, name) for name in ("count", "skipped", "rejected")}
    clocks = list(state.clock.values()) if isinstance(state.clock, dict) else []
    if not clocks:
        return out
    for name in ("statistics", "refreshes"):
        values = jnp.concatenate([jnp.asarray(getattr(c, name)).reshape(-1) for c in clocks])
        most = jnp.max(values)
        out[name] = jnp.min(jnp.where(values < 0, most, values))  # -1: fills a stack up
        out[f"{name}_max"] = most
        if name == "statistics":
            out["idle"] = jnp.sum(values == 0)
    for key, factor in state.factors.items():
        for path, x in jax.tree_util.tree_flatten_with_path(factor)[0]:
            if jnp.issubdtype(x.dtype, jnp.floating):
                x = x.astype(factor_dtype_of(x.dtype)).reshape(x.shape[0], -1)
                norms = jnp.sqrt(jnp.sum(x * x, axis=1))
                name = f"{key}/{trees.path_name(path)}"
                out[f"{name}/norm_min"], out[f"{name}/norm_max"] = jnp.min(norms), jnp.max(norms)
    return out


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
    found: dict[str, list[tuple[Any, Any]]] = {p: [] for g in plan.covered for p in g.paths}
    named = {i: p for g in plan.covered for i, p in zip(g.indices, g.paths, strict=True)}
    for bucket in plan.buckets:
        for slot in bucket.slots:
            for row, origin in enumerate(block_origins(plan, slot), slot.offset):
                factor = jax.tree.map(lambda x, row=row: x[row], state.factors[bucket.key])
                found[named[origin.index]].append((origin, factor))
    return {
        path: [f for _, f in sorted(pairs, key=lambda p: p[0])] for path, pairs in found.items()
    }
