"""Parameters as operands of dot products and as kernels of convolutions."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from kradagrad_jax.curvature.batch import BatchAxes
from kradagrad_jax.curvature.conv import Patches
from kradagrad_jax.curvature.internals import Constant, Graph, Node
from kradagrad_jax.curvature.uses import Rejected, Use, arrange, batch_axis, no_broadcast
from kradagrad_jax.curvature.views import Atom, Concat, View, merge, regroup


def dot(node: Node, at: int, view: View | Concat, graph: Graph, batch: BatchAxes) -> list[Use]:
    """Uses of a leaf in ``dot_general``, as operand ``at``."""
    x = node.inputs[1 - at]
    if isinstance(x, Constant):
        raise Rejected("product with a constant")
    contract, batched = node.params["dimension_numbers"]
    leaf_in, act_in = contract[at], contract[1 - at]
    leaf_b, act_b = batched[at], batched[1 - at]
    first = view if isinstance(view, View) else view.parts[0]
    axis = view.axis if isinstance(view, Concat) else None
    if first.multiplier is not None:
        raise Rejected("the weight is multiplied by another value first")
    group, place = _split_batch(first, leaf_b, axis)
    leaf_free = [d for d in range(len(first.dims)) if d not in (*leaf_in, *leaf_b)]
    no_broadcast(first, [*leaf_in, *leaf_free], axis)
    shape = graph.shapes[x]
    act_free = [d for d in range(len(shape)) if d not in (*act_in, *act_b)]
    positions = sorted([*act_free, *(act_b[i] for i in place)])
    example, n = batch_axis(batch, x, shape, positions, "the other operand")
    out = _output_dims(len(act_b), act_b, act_free, len(leaf_free), at)
    y = graph.shapes[node.outputs[0]]
    act_group = [act_b[i] for i in group]
    inputs = arrange(shape, act_group, example, positions, act_in, n)
    out_free = out["leaf"]
    out_group = [out[d] for d in act_group]
    out_example = None if example is None else out[example]
    outputs = arrange(y, out_group, out_example, [out[d] for d in positions], out_free, n)
    base = Use("dense", node.index, x, inputs, outputs, first, out_dims=(*out_group, *out_free))

    def one(v: View) -> Use:
        rows = merge([a for d in leaf_in for a in v.dims[d]])
        columns = merge([a for d in leaf_free for a in v.dims[d]])
        groups = merge([a for i in group for a in v.dims[leaf_b[i]]])
        size = math.prod(k for k, _ in rows)
        return dataclasses.replace(
            base, view=v, rows=rows, columns=columns, group=groups, in_shape=(size,)
        )

    if isinstance(view, View):
        return [one(view)]
    return _parts(view, one, leaf_in, leaf_free)


def _parts(view: Concat, one: Callable[[View], Use], rows: Sequence[int], columns: Sequence[int]):
    """One use per joined leaf: its slice of the inputs or of the outputs."""
    for side, dims in (("rows", rows), ("columns", columns)):
        if list(dims) == [view.axis]:
            return [
                dataclasses.replace(one(part), part=bounds, side=side)
                for part, bounds in zip(view.parts, view.bounds, strict=True)
            ]
    raise Rejected("concatenated weight with several input or output axes")


def _split_batch(view: View, dims: Sequence[int], axis: int | None) -> tuple[list[int], list[int]]:
    """Batch dimensions of the leaf: numbers of those that are groups, and of mere positions."""
    group, place = [], []
    for i, d in enumerate(dims):
        strides = {s for _, s in view.dims[d]}
        if d == axis or (0 in strides and len(strides) > 1):
            raise Rejected("a batch dimension of the weight mixes groups and broadcasting")
        (place if strides <= {0} else group).append(i)
    return group, place


def _output_dims(
    batched: int, act_b: Sequence[int], act_free: Sequence[int], leaf_free: int, at: int
) -> dict:
    """Dimension of the output for each dimension of the activation; "leaf": those of the leaf."""
    out: dict = {d: i for i, d in enumerate(act_b)}
    start = batched + (leaf_free if at == 0 else 0)
    out.update({d: start + i for i, d in enumerate(act_free)})
    begin = batched + (0 if at == 0 else len(act_free))
    out["leaf"] = list(range(begin, begin + leaf_free))
    return out


def conv(node: Node, at: int, view: View | Concat, graph: Graph, batch: BatchAxes) -> list[Use]:
    """Uses of a leaf as the kernel of ``conv_general_dilated``."""
    p, x = node.params, node.inputs[0]
    if at != 1 or isinstance(x, Constant) or isinstance(view, Concat):
        raise Rejected("the parameter is not the kernel of the convolution")
    if p["batch_group_count"] != 1:
        raise Rejected("convolution with batch groups")
    if view.multiplier is not None:
        raise Rejected("the kernel is multiplied by another value first")
    no_broadcast(view, range(len(view.dims)))
    spec = p["dimension_numbers"]
    _, n = batch_axis(batch, x, graph.shapes[x], [spec.lhs_spec[0]], "the input")
    out_dim, in_dim, *window = spec.rhs_spec
    groups = p["feature_group_count"]
    group, columns = _cut_groups(view.dims[out_dim], groups)
    rows = merge([a for d in (*window, in_dim) for a in view.dims[d]])
    y = graph.shapes[node.outputs[0]]
    batch_dim, feature, *space = spec.out_spec
    k = len(y)
    split = (*y[:feature], groups, y[feature] // groups, *y[feature + 1 :])
    shift = lambda d: d + (d > feature)  # noqa: E731
    outputs = arrange(
        split, [feature], shift(batch_dim), [shift(d) for d in (batch_dim, *space)],
        [feature + 1], n,
    )  # fmt: skip
    assert len(outputs.split) == k + 2
    sizes = [math.prod(m for m, _ in view.dims[d]) for d in (*window, in_dim)]
    patches = Patches.of(p, sizes, n)
    return [
        Use(
            "conv", node.index, x, patches, outputs, view, group, rows, columns, tuple(sizes),
            out_dims=(feature,),
        )
    ]  # fmt: skip


def _cut_groups(dim: Sequence[Atom], groups: int) -> tuple[tuple[Atom, ...], tuple[Atom, ...]]:
    size = math.prod(n for n, _ in dim)
    cut = regroup((tuple(dim),), (groups, size // groups))
    if cut is None:
        raise Rejected("the output channels do not split into groups")
    return cut[0], cut[1]
