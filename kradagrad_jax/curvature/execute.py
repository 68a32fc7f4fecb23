"""Evaluates a graph with taps: identities whose backward pass fills the cotangent of a sink.

The statistics are the cotangents of zero arrays, the *sinks*: nothing has to be threaded out of
loops, branches and rematerialised functions, output gradients are never stored, and statistics
that nobody reads cost nothing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kradagrad_jax.curvature import internals
from kradagrad_jax.curvature.internals import REMAT, Block, Constant, Node
from kradagrad_jax.curvature.plan import Plan
from kradagrad_jax.curvature.reducers import Reducer, reduce_use

Sinks = dict[str, Any]  # by number of the tap; one key type, so that pytrees can be sorted


class Inputs(NamedTuple):
    """What the taps need besides activation and cotangent; operands, never closed over."""

    gate: Any  # bool scalar: take statistics at this step; None: always
    scale: Any  # scalar by which cotangents are multiplied before a custom reducer sees them
    extra: Sinks  # by number of the tap, for custom reducers


@dataclasses.dataclass
class Context:
    """State of one evaluation at one depth of loops."""

    plan: Plan
    reducer: Reducer
    sinks: Sinks
    inputs: Inputs
    depth: int = 0

    def of(self, numbers: Sequence[int]) -> tuple[Sinks, Inputs]:
        """Sinks and inputs of these taps."""
        keys, extra = [str(n) for n in numbers], self.inputs.extra
        own = {k: extra[k] for k in keys if k in extra}
        return {k: self.sinks[k] for k in keys}, self.inputs._replace(extra=own)


def _tap(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """Identity in y; ``reduce(x, g, inputs)`` becomes the cotangent of the sink."""

    @jax.custom_vjp
    def tap(y: Any, x: Any, sink: Any, inputs: Inputs) -> Any:
        return y

    def forward(y: Any, x: Any, sink: Any, inputs: Inputs) -> Any:
        return y, (x, sink, inputs)

    def backward(kept: Any, g: Any) -> Any:
        x, sink, inputs = kept

        def like(v: jax.Array, s: jax.Array) -> jax.Array:
            return internals.vary(v.astype(s.dtype), internals.varying_axes(s))

        def compute() -> Any:
            return jax.tree.map(like, reduce(x, g, inputs), sink)

        # only the reducer is conditional: convolutions inside `cond` are slow on CPU
        gate = inputs.gate
        stats = compute() if gate is None else lax.cond(gate, compute, lambda: sink)
        return g, None, stats, None

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

    def reduce(x: Any, g: Any, inputs: Inputs) -> Any:
        return {
            k: reduce_use(context.reducer, t, x[k], g, inputs.scale, inputs.extra.get(k))
            for k, t in taps.items()
        }

    x = {k: [None if v is None else read(v) for v in tap.operands] for k, tap in taps.items()}
    return _tap(reduce)(y, x, *context.of(numbers))


def _inner(context: Context, node: Node, operands: list[Any]) -> Sequence[Any]:
    sinks, inputs = context.of(context.plan.inside[node.index])
    if node.name == "scan":
        return _scan(context, node, operands, sinks, inputs)

    def body(block: Block) -> Callable[..., list[Any]]:
        return lambda values, sinks, inputs: _block(
            dataclasses.replace(context, sinks=sinks, inputs=inputs), block, values
        )

    if node.name in REMAT:
        return internals.remat(node, body(node.blocks[0]))(operands, sinks, inputs)
    index, *rest = operands
    branches = [body(block) for block in node.blocks]
    return lax.switch(jnp.asarray(index, jnp.int32), branches, rest, sinks, inputs)


def _scan(
    context: Context, node: Node, operands: list[Any], sinks: Sinks, inputs: Inputs
) -> Sequence[Any]:
    """Sinks of parameters iterated over, and of all raw statistics, are scanned as well."""
    depth, p, extra = context.depth, node.params, inputs.extra
    stacked = {k for k in sinks if context.plan.taps[int(k)].use.view.loops[depth][0] == "stack"}
    scanned = set(sinks) if context.reducer.keeps_positions else stacked
    constants, carries = p["num_consts"], p["num_carry"]
    kept = operands[:constants]
    moving = ({k: sinks[k] for k in scanned}, {k: extra[k] for k in extra if k in stacked})
    fixed_sinks = {k: s for k, s in sinks.items() if k not in scanned}
    fixed_extra = {k: e for k, e in extra.items() if k not in stacked}

    def body(carry: Any, xs: Any) -> tuple[Any, Any]:
        values, (some, more) = xs
        own = inputs._replace(extra=fixed_extra | more)
        inner = Context(context.plan, context.reducer, fixed_sinks | some, own, depth + 1)
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
        view = tap.use.view
        y, *operands = (_aval(graph, v) for v in (shape_of[tap.use.node], *tap.operands))
        depth = len(view.stack)
        inner = jax.tree.map(
            lambda e, k=depth: jax.ShapeDtypeStruct(e.shape[k:], e.dtype), extra.get(str(number))
        )
        parts = jax.eval_shape(
            lambda x, g, e, tap=tap: reduce_use(reducer, tap, x, g, 1.0, e), operands, y, inner
        )
        loops = [n for flag, n in view.loops if flag == "stack" or reducer.keeps_positions]
        out[str(number)] = jax.tree.map(
            lambda s, loops=loops: internals.vary(jnp.zeros((*loops, *s.shape), s.dtype), axes),
            parts,
        )
    return out


def _aval(graph: internals.Graph, operand: Any) -> jax.ShapeDtypeStruct | None:
    if isinstance(operand, Constant):
        return jax.ShapeDtypeStruct(np.shape(operand.value), jnp.result_type(operand.value))
    if operand is None:
        return None
    return jax.ShapeDtypeStruct(graph.shapes[operand], graph.dtypes[operand])
