"""The equations in which a parameter enters linearly, and their canonical form.

Every use is described by how its activation becomes ``a: (S, N, R, d_in)`` and its cotangent
``g: (S, N, R, d_out)``: S groups, N examples, R positions per example.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from kradagrad_jax.curvature.conv import Patches
from kradagrad_jax.curvature.internals import Constant, Graph, Node, Operand
from kradagrad_jax.curvature.views import Atom, Concat, View, merge

UseKind = Literal["dense", "conv", "embed", "scale", "bias"]
BatchDims = Callable[[int], tuple[int, ...]]


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
    """One linear use of one leaf in one equation.

    Attributes:
      kind: dense, conv, embed, scale or bias.
      node: index of the equation.
      activation: the other operand, or None (bias).
      inputs: how the activation becomes a, or ids; None for a bias.
      outputs: how the cotangent of the output becomes g.
      view: the leaf.
      group, rows, columns: atoms of the leaf's groups, inputs and outputs.
      in_shape: inputs as axes.
      part: begin and end within the joined inputs or outputs of a concatenated weight.
      side: "rows" or "columns": which of them ``part`` cuts; "" for all.
      bias: the bias added to the output, if paired.
      out_dims: dimensions of the output that are groups, then outputs.
    """

    kind: UseKind
    node: int
    activation: Operand | None
    inputs: Arrange | Patches | RowIds | None
    outputs: Arrange
    view: View
    group: tuple[Atom, ...] = ()
    rows: tuple[Atom, ...] = ()
    columns: tuple[Atom, ...] = ()
    in_shape: tuple[int, ...] = ()
    part: tuple[int, int] = (0, 0)
    side: str = ""
    bias: View | None = None
    out_dims: tuple[int, ...] = ()

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
    batch: int,
    positions: Sequence[int],
    features: Sequence[int],
    examples: int,
) -> Arrange:
    """Canonical form of an array; a batch axis of k N entries is split as (N, k)."""
    split: list[int] = []
    index: dict[int, list[int]] = {}
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


def _batch_axis(dims: tuple[int, ...], allowed: Sequence[int], what: str) -> int:
    if not dims:
        raise Rejected(f"{what} does not carry the batch axis")
    inside = [d for d in dims if d in allowed]
    if not inside:
        raise Rejected(f"the batch axis of {what} is contracted or paired with the parameter")
    return inside[0]


def dot(
    node: Node, at: int, view: View | Concat, graph: Graph, batch: BatchDims, n: int
) -> list[Use]:
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
    _no_broadcast(first, [*leaf_in, *leaf_free], axis)
    shape = graph.shapes[x]
    act_free = [d for d in range(len(shape)) if d not in (*act_in, *act_b)]
    positions = sorted([*act_free, *(act_b[i] for i in place)])
    example = _batch_axis(batch(x), positions, "the other operand")
    out = _output_dims(len(act_b), act_b, act_free, len(leaf_free), at)
    y = graph.shapes[node.outputs[0]]
    act_group = [act_b[i] for i in group]
    inputs = arrange(shape, act_group, example, positions, act_in, n)
    out_free = out["leaf"]
    out_group = [out[d] for d in act_group]
    outputs = arrange(y, out_group, out[example], [out[d] for d in positions], out_free, n)
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


def _no_broadcast(view: View, dims: Sequence[int], axis: int | None) -> None:
    if any(s == 0 for d in dims if d != axis for _, s in view.dims[d]):
        raise Rejected("the weight is broadcast along an input or output axis")


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


def conv(
    node: Node, at: int, view: View | Concat, graph: Graph, batch: BatchDims, n: int
) -> list[Use]:
    """Uses of a leaf as the kernel of ``conv_general_dilated``."""
    p, x = node.params, node.inputs[0]
    if at != 1 or isinstance(x, Constant) or isinstance(view, Concat):
        raise Rejected("the parameter is not the kernel of the convolution")
    if p["batch_group_count"] != 1:
        raise Rejected("convolution with batch groups")
    if view.multiplier is not None:
        raise Rejected("the kernel is multiplied by another value first")
    _no_broadcast(view, range(len(view.dims)), None)
    spec = p["dimension_numbers"]
    example = _batch_axis(batch(x), [spec.lhs_spec[0]], "the input")
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
    patches = Patches.of(p, graph.shapes[x], sizes, example, n)
    return [
        Use(
            "conv", node.index, x, patches, outputs, view, group, rows, columns, tuple(sizes),
            out_dims=(feature,),
        )
    ]  # fmt: skip


def _cut_groups(dim: Sequence[Atom], groups: int) -> tuple[tuple[Atom, ...], tuple[Atom, ...]]:
    from kradagrad_jax.curvature.views import regroup

    size = math.prod(n for n, _ in dim)
    cut = regroup((tuple(dim),), (groups, size // groups))
    if cut is None:
        raise Rejected("the output channels do not split into groups")
    return cut[0], cut[1]


def gather(
    node: Node, at: int, view: View | Concat, graph: Graph, batch: BatchDims, n: int
) -> list[Use]:
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
    _no_broadcast(view, range(len(sizes)), None)
    shape = graph.shapes[ids]
    example = _batch_axis(batch(ids), range(len(shape) - 1), "the index")
    y = graph.shapes[node.outputs[0]]
    out_pos = [i for i in range(len(y)) if i not in d.offset_dims]
    positions = list(range(len(shape) - 1))
    inputs = RowIds(arrange(shape, [], example, positions, [len(shape) - 1], n))
    outputs = arrange(
        y, [], out_pos[example], [out_pos[i] for i in positions], list(d.offset_dims), n
    )
    rows, columns = merge(view.dims[axes[0]]), merge([a for i in rest for a in view.dims[i]])
    return [
        Use(
            "embed", node.index, ids, inputs, outputs, view, (), rows, columns, (sizes[axes[0]],),
            out_dims=tuple(d.offset_dims),
        )
    ]  # fmt: skip


def elementwise(
    node: Node, at: int, view: View | Concat, graph: Graph, batch: BatchDims, n: int
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
    example = _batch_axis(batch(y), positions, "the other operand")
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


def find(
    node: Node, at: int, view: View | Concat, graph: Graph, batch: BatchDims, n: int
) -> list[Use]:
    """The uses of operand ``at`` of an equation.

    Raises:
      Rejected: the equation is none; the message says why.
    """
    kinds = {
        "dot_general": dot, "conv_general_dilated": conv, "gather": gather,
        "mul": elementwise, "add": elementwise, "add_any": elementwise, "sub": elementwise,
    }  # fmt: skip
    if node.name not in kinds:
        raise Rejected("not a linear layer")
    return kinds[node.name](node, at, view, graph, batch, n)


def canonical_scale(use: Use, x: jax.Array, g: jax.Array) -> jax.Array:
    """Per-position gradient ``(1, N, R, d)`` of an elementwise use."""
    v = use.outputs(g)
    if use.kind == "scale":
        v = v * use.outputs(jnp.broadcast_to(x, g.shape)).astype(v.dtype)
    return v
