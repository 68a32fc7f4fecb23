"""Parameters as tables of rows, as scales and as biases."""

import dataclasses
import math

from kradagrad_jax.curvature.batch import BatchAxes
from kradagrad_jax.curvature.internals import Constant, Graph, Node
from kradagrad_jax.curvature.uses import (
    Rejected,
    RowIds,
    Use,
    UseKind,
    arrange,
    batch_axis,
    no_broadcast,
)
from kradagrad_jax.curvature.views import Concat, View, merge


def gather(node: Node, at: int, view: View | Concat, graph: Graph, batch: BatchAxes) -> list[Use]:
    """Uses of a leaf as a table of rows."""
    ids, p = node.inputs[1], node.params
    d = p["dimension_numbers"]
    if at != 0 or isinstance(ids, Constant) or isinstance(view, Concat):
        raise Rejected("gather from or by something else than a plain parameter")
    axes = tuple(d.start_index_map)
    plain = len(axes) == 1 and axes == tuple(d.collapsed_slice_dims)
    plain = plain and not getattr(d, "operand_batching_dims", ())
    sizes = [math.prod(k for k, _ in dim) for dim in view.dims]
    rest = [i for i in range(len(sizes)) if i not in axes]
    if (
        not plain
        or any(p["slice_sizes"][i] != sizes[i] for i in rest)
        or view.multiplier is not None
    ):
        raise Rejected("gather of something else than whole rows")
    no_broadcast(view, range(len(sizes)))
    shape = graph.shapes[ids]
    example, n = batch_axis(batch, ids, shape, range(len(shape) - 1), "the index")
    y = graph.shapes[node.outputs[0]]
    out_pos = [i for i in range(len(y)) if i not in d.offset_dims]
    positions = list(range(len(shape) - 1))
    out_example = None if example is None else out_pos[example]
    out_positions = [out_pos[i] for i in positions]
    inputs = RowIds(arrange(shape, [], example, positions, [len(shape) - 1], n))
    outputs = arrange(y, [], out_example, out_positions, list(d.offset_dims), n)
    rows, columns = merge(view.dims[axes[0]]), merge([a for i in rest for a in view.dims[i]])
    return [
        Use(
            "embed", node.index, ids, inputs, outputs, view, (), rows, columns, (sizes[axes[0]],),
            out_dims=tuple(d.offset_dims),
        )
    ]  # fmt: skip


def elementwise(
    node: Node, at: int, view: View | Concat, graph: Graph, batch: BatchAxes
) -> list[Use]:
    """Uses in ``mul``, ``add`` and ``sub``."""
    other = node.inputs[1 - at] if len(node.inputs) > 1 else None
    y = node.outputs[0]
    if isinstance(view, Concat):
        raise Rejected("elementwise use of concatenated parameters")
    if other is None or isinstance(other, Constant):
        raise Rejected("elementwise operation with a constant")
    dims, shape = view.dims, graph.shapes[y]
    if len(dims) != len(shape):
        if dims:
            raise Rejected("elementwise operation of unequal ranks")
        dims = tuple(merge([(k, 0)]) for k in shape)
    features = [i for i, dim in enumerate(dims) if any(s for _, s in dim)]
    if any(s == 0 for i in features for _, s in dims[i]):
        raise Rejected("a dimension mixes the parameter's elements and broadcasting")
    positions = [i for i in range(len(shape)) if i not in features]
    example, n = batch_axis(batch, y, shape, positions, "the other operand")
    outputs = arrange(shape, [], example, positions, features, n)
    columns = merge([a for i in features for a in dims[i]])
    kind: UseKind = "bias"
    inputs = None
    if node.name == "mul":
        kind, inputs = "scale", outputs
    if node.name == "sub" and at == 1:
        view = dataclasses.replace(view, factor=-view.factor)
    elif node.name not in ("mul", "add", "add_any", "sub"):
        raise Rejected(f"used by {node.name}")
    return [
        Use(kind, node.index, other if inputs else None, inputs, outputs, view, columns=columns)
    ]
