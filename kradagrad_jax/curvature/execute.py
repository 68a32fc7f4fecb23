"""Evaluates a graph with taps: identities whose backward pass fills the cotangent of a sink.

The statistics are the cotangents of zero arrays, the *sinks*: nothing has to be threaded out of
loops, branches and rematerialised functions, output gradients are never stored, and statistics
that nobody reads cost nothing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kradagrad_jax.curvature import internals
from kradagrad_jax.curvature.internals import REMAT, Block, Constant, Node
from kradagrad_jax.curvature.plan import Plan, Tap
from kradagrad_jax.curvature.reducers import Reducer, reduce_use

Sinks = dict[str, Any]  # by number of the tap; one key type, so that pytrees can be sorted


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the taps need besides activation and cotangent; operands, never closed over.

    Attributes:
      gate: bool scalar: take statistics at this step; None: always.
      scale: scalar by which cotangents are multiplied before a custom reducer sees them.
      extra: by number of the tap, for custom reducers.
    """

    gate: Any
    scale: Any
    extra: Sinks


@dataclasses.dataclass
class Context:
    """State of one evaluation at one depth of loops."""

    plan: Plan
    reducer: Reducer
    sinks: Sinks
    inputs: Inputs
    depth: int = 0

    def at(self, sinks: Sinks, gate: Any, scale: Any, extra: Sinks, depth: int) -> "Context":
        return Context(self.plan, self.reducer, sinks, Inputs(gate, scale, extra), depth)

    def below(self, node: Node) -> tuple[Sinks, Sinks]:
        """Sinks and extras of the taps inside a node."""
        keys = [str(k) for k in self.plan.inside[node.index]]
        extra = self.inputs.extra
        return {k: self.sinks[k] for k in keys}, {k: extra[k] for k in keys if k in extra}


def _tap(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """Identity in y; ``reduce(x, g, extra, scale)`` becomes the cotangent of the sink."""

    @jax.custom_vjp
    def tap(y: Any, x: Any, sink: Any, gate: Any, scale: Any, extra: Any) -> Any:
        return y

    def forward(y: Any, x: Any, sink: Any, gate: Any, scale: Any, extra: Any) -> Any:
        return y, (x, sink, gate, scale, extra)

    def backward(kept: Any, g: Any) -> Any:
        x, sink, gate, scale, extra = kept

        def compute() -> Any:
            found = reduce(x, g, extra, scale)
            return jax.tree.map(
                lambda v, s: internals.vary(v.astype(s.dtype), internals.varying_axes(s)),
                found,
                sink,
            )

        # only the reducer is conditional: convolutions inside `cond` are slow on CPU
        stats = compute() if gate is None else lax.cond(gate, compute, lambda: sink)
        return g, None, stats, None, None, None

    tap.defvjp(forward, backward)
    return tap


def evaluate(context: Context, values: Sequence[Any]) -> list[Any]:
    """Results of the planned graph at ``values``."""
    return _block(context, context.plan.graph.block, values)


def _block(context: Context, block: Block, values: Sequence[Any]) -> list[Any]:
    env: dict[int, Any] = dict(zip(block.inputs, values, strict=True))
    env.update(block.constants)

    def read(operand: Any) -> Any:
        return operand.value if isinstance(operand, Constant) else env[operand]

    for node in block.nodes:
        operands = [read(v) for v in node.inputs]
        if context.plan.inside.get(node.index):
            results = _inner(context, node, operands)
        else:
            results = internals.bind(node, operands)
        taps = context.plan.at_node.get(node.index)
        if taps:
            first, *rest = results
            results = [_apply(context, taps, first, read), *rest]
        env.update(zip(node.outputs, results, strict=True))
    return [read(v) for v in block.outputs]


def _apply(context: Context, numbers: Sequence[int], y: Any, read: Callable[[Any], Any]) -> Any:
    taps = {str(n): context.plan.taps[n] for n in numbers}

    def reduce(x: Any, g: Any, extra: Sinks, scale: Any) -> Any:
        return {
            k: reduce_use(context.reducer, t, x[k][0], x[k][1], g, scale, extra.get(k))
            for k, t in taps.items()
        }

    x = {k: _operands(tap, read) for k, tap in taps.items()}
    sink = {k: context.sinks[k] for k in taps}
    inputs = context.inputs
    extra = {k: inputs.extra[k] for k in taps if k in inputs.extra}
    return _tap(reduce)(y, x, sink, inputs.gate, inputs.scale, extra)


def _operands(tap: Tap, read: Callable[[Any], Any]) -> tuple[Any, Any]:
    use = tap.use
    activation = None if use.activation is None else read(use.activation)
    return activation, None if use.view.multiplier is None else read(use.view.multiplier)


def _inner(context: Context, node: Node, operands: list[Any]) -> Sequence[Any]:
    sinks, extra = context.below(node)
    gate, scale, depth = context.inputs.gate, context.inputs.scale, context.depth
    if node.name == "scan":
        return _scan(context, node, operands, sinks, extra)
    if node.name in REMAT:

        def fn(values: Any, sinks: Any, gate: Any, scale: Any, extra: Any) -> list[Any]:
            inner = context.at(sinks, gate, scale, extra, depth)
            return _block(inner, node.blocks[0], values)

        return internals.remat(node, fn)(operands, sinks, gate, scale, extra)

    def branch(block: Block) -> Callable[..., list[Any]]:
        return lambda values, sinks, gate, scale, extra: _block(
            context.at(sinks, gate, scale, extra, depth), block, values
        )

    index, *rest = operands
    branches = [branch(block) for block in node.blocks]
    return lax.switch(jnp.asarray(index, jnp.int32), branches, rest, sinks, gate, scale, extra)


def _scan(
    context: Context, node: Node, operands: list[Any], sinks: Sinks, extra: Sinks
) -> Sequence[Any]:
    """Sinks of parameters iterated over, and of all raw statistics, are scanned as well."""
    depth, p = context.depth, node.params
    stacked = {k for k in sinks if context.plan.taps[int(k)].use.view.loops[depth][0] == "stack"}
    scanned = set(sinks) if context.reducer.keeps_positions else stacked
    constants, carries = p["num_consts"], p["num_carry"]
    kept, gate, scale = operands[:constants], context.inputs.gate, context.inputs.scale
    moving = ({k: sinks[k] for k in scanned}, {k: extra[k] for k in extra if k in stacked})
    fixed_sinks = {k: s for k, s in sinks.items() if k not in scanned}
    fixed_extra = {k: e for k, e in extra.items() if k not in stacked}

    def body(carry: Any, xs: Any) -> tuple[Any, Any]:
        values, (some, more) = xs
        inner = context.at({**fixed_sinks, **some}, gate, scale, {**fixed_extra, **more}, depth + 1)
        out = _block(inner, node.blocks[0], [*kept, *carry, *values])
        return out[:carries], out[carries:]

    first, xs = operands[constants : constants + carries], operands[constants + carries :]
    carry, ys = internals.scan(node, body, first, (xs, moving))
    return [*carry, *ys]


def make_sinks(plan: Plan, reducer: Reducer, extra: Sinks, axes: frozenset[Any]) -> Sinks:
    """Zeros of the shape of each tap's statistics, with the axes of the loops in front.

    Inside ``jax.shard_map`` they differ between devices over the mesh axes ``axes``.
    """
    graph, out = plan.graph, {}
    shape_of = {n.index: n.outputs[0] for n in graph.block.walk() if n.outputs}
    for number, tap in enumerate(plan.taps):
        use = tap.use
        y = _aval(graph, shape_of[use.node])
        x = None if use.activation is None else _operand_aval(graph, use.activation)
        m = None if use.view.multiplier is None else _aval(graph, use.view.multiplier)
        depth = len(use.view.stack)
        inner = jax.tree.map(
            lambda e, k=depth: jax.ShapeDtypeStruct(e.shape[k:], e.dtype), extra.get(str(number))
        )
        parts = jax.eval_shape(
            lambda x, m, g, e, tap=tap: reduce_use(reducer, tap, x, m, g, 1.0, e), x, m, y, inner
        )
        loops = [n for flag, n in use.view.loops if flag == "stack" or reducer.keeps_positions]
        out[str(number)] = jax.tree.map(
            lambda s, loops=loops: internals.vary(jnp.zeros((*loops, *s.shape), s.dtype), axes),
            parts,
        )
    return out


def _aval(graph: internals.Graph, value: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(graph.shapes[value], graph.dtypes[value])


def _operand_aval(graph: internals.Graph, operand: Any) -> jax.ShapeDtypeStruct:
    if isinstance(operand, Constant):
        return jax.ShapeDtypeStruct(np.shape(operand.value), jnp.result_type(operand.value))
    return _aval(graph, operand)
