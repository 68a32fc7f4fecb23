"""Values that are layout-only functions of one parameter leaf, tracked through a trace."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kradagrad_jax.curvature.internals import Constant, Graph, Node
from kradagrad_jax.curvature.layout import MatrixView

Atom = tuple[int, int]  # size and stride in elements of the flat leaf; stride 0: broadcast
Dims = tuple[tuple[Atom, ...], ...]

SAME = (
    "convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint",
    "device_put", "reshard", "name", "mesh_cast", "pvary", "pcast",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class View:
    """A value made of the elements of one leaf."""

    leaf: int
    dims: Dims  # per dimension the atoms whose row-major product it is; none for size 1
    offset: int = 0
    factor: float = 1.0  # scalar by which the elements are multiplied
    stack: tuple[Atom, ...] = ()  # atoms that enclosing scans iterate over, outermost first
    # enclosing loops from the outermost: ("stack" or "share", length)
    loops: tuple[tuple[str, int], ...] = ()
    # value that multiplies the leaf elementwise and carries no batch axis, or None
    multiplier: int | None = None


@dataclasses.dataclass(frozen=True)
class Concat:
    """Views of several leaves joined along one axis."""

    axis: int
    parts: tuple[View, ...]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Begin and end of every part along the axis."""
        ends = np.cumsum([_size(p.dims[self.axis]) for p in self.parts]).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))


def _size(dim: Sequence[Atom]) -> int:
    return math.prod(n for n, _ in dim)


def merge(atoms: Sequence[Atom]) -> tuple[Atom, ...]:
    """Joins neighbours that lie contiguously, drops atoms of size 1."""
    out: list[Atom] = []
    for n, stride in atoms:
        if n == 1:
            continue
        if out and out[-1][1] == n * stride:
            out[-1] = (out[-1][0] * n, stride)
        else:
            out.append((n, stride))
    return tuple(out)


def contiguous(shape: Sequence[int]) -> Dims:
    """Atoms of a whole array in row-major order."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return tuple(merge([(n, s)]) for n, s in zip(shape, strides, strict=True))


def regroup(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """Reshape: splits and joins atoms; None if an atom does not divide as needed."""
    source = list(merge([a for dim in dims for a in dim]))
    out = []
    for want in shape:
        got: list[Atom] = []
        while want > 1:
            if not source:
                return None
            n, stride = source.pop(0)
            if n > want:  # the major part stays, the minor part goes back
                if n % want:
                    return None
                source.insert(0, (n // want, stride))
                n, stride = want, stride * (n // want)
            if want % n:
                return None
            got.append((n, stride))
            want //= n
        out.append(merge(got))
    return tuple(out) if not source else None


def matrix_view(
    shape: tuple[int, ...], stack: Sequence[Atom], rows: Sequence[Atom], columns: Sequence[Atom]
) -> MatrixView | None:
    """The view of a leaf as ``(stack, rows, columns)``; None unless the atoms tile it."""
    atoms = [a for group in (stack, rows, columns) for a in group]
    order = sorted(range(len(atoms)), key=lambda i: -atoms[i][1])
    sizes = tuple(atoms[i][0] for i in order)
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    if math.prod(sizes) != math.prod(shape) or strides != [atoms[i][1] for i in order]:
        return None
    place = {i: k for k, i in enumerate(order)}
    target = (_size(stack), _size(rows), _size(columns))
    return MatrixView(shape, sizes, tuple(place[i] for i in range(len(atoms))), target)


def _broadcast(view: View, shape: Sequence[int], axes: Sequence[int]) -> View:
    dims: list[tuple[Atom, ...]] = [merge([(n, 0)]) for n in shape]
    for i, axis in enumerate(axes):
        if view.dims[i] or shape[axis] == 1:
            dims[axis] = view.dims[i]
    return dataclasses.replace(view, dims=tuple(dims))


def _cut(view: View, starts: Sequence[int], limits: Sequence[int], steps: Any) -> View | None:
    dims, offset = list(view.dims), view.offset
    for i, (start, limit) in enumerate(zip(starts, limits, strict=True)):
        step = 1 if steps is None else steps[i]
        size = _size(view.dims[i])
        if (start, limit, step) == (0, size, 1):
            continue
        if len(view.dims[i]) != 1:
            return None
        stride = view.dims[i][0][1]
        offset += start * stride
        dims[i] = merge([(-(-(limit - start) // step), stride * step)])
    return dataclasses.replace(view, dims=tuple(dims), offset=offset)


def _one(node: Node, view: View, shape: Sequence[int]) -> View | None:
    """The layout rules for one view and one result of the given shape."""
    p = node.params
    dims: Dims | None
    if node.name in SAME:
        return view
    if node.name == "transpose":
        dims = tuple(view.dims[i] for i in p["permutation"])
    elif node.name == "reshape" and p.get("dimensions") is None:
        dims = regroup(view.dims, shape)
    elif node.name == "squeeze":
        gone = [d % len(view.dims) for d in p["dimensions"]]
        dims = tuple(dim for i, dim in enumerate(view.dims) if i not in gone)
    elif node.name == "expand_dims":
        dims = regroup(view.dims, shape)
    elif node.name == "broadcast_in_dim" and len(node.inputs) == 1:
        return _broadcast(view, shape, p["broadcast_dimensions"])
    elif node.name == "slice":
        return _cut(view, p["start_indices"], p["limit_indices"], p["strides"])
    elif node.name == "dynamic_slice":
        return _static_cut(node, view)
    else:
        return None
    return None if dims is None else dataclasses.replace(view, dims=dims)


def _static_cut(node: Node, view: View) -> View | None:
    starts = [s.value for s in node.inputs[1:] if isinstance(s, Constant)]
    if len(starts) != len(view.dims):
        return None
    sizes = node.params["slice_sizes"]
    limits = [int(s) + n for s, n in zip(starts, sizes, strict=True)]
    inside = all(
        s >= 0 and b <= _size(d) for s, b, d in zip(starts, limits, view.dims, strict=True)
    )
    return _cut(view, [int(s) for s in starts], limits, None) if inside else None


def _scaled(node: Node, view: View) -> View | None:
    """Negation, and product or quotient with a literal scalar."""
    if node.name == "neg":
        return dataclasses.replace(view, factor=-view.factor)
    if node.name not in ("mul", "div"):
        return None
    other = node.inputs[1]
    if node.name == "mul" and isinstance(node.inputs[0], Constant):
        other = node.inputs[0]
    if not isinstance(other, Constant) or np.ndim(other.value):
        return None
    c = float(other.value)
    return dataclasses.replace(
        view, factor=view.factor * c if node.name == "mul" else view.factor / c
    )


def _joined(node: Node, concat: Concat, shape: Sequence[int]) -> Concat | None:
    """Layout rules for a concatenation: what moves its axis without cutting it."""
    axis = concat.axis
    if node.name == "transpose":
        axis = list(node.params["permutation"]).index(concat.axis)
    elif node.name == "broadcast_in_dim":
        axis = node.params["broadcast_dimensions"][concat.axis]
    elif node.name in ("reshape", "squeeze", "expand_dims"):
        old = [_size(d) for d in concat.parts[0].dims]
        old[concat.axis] = concat.bounds[-1][1]
        real = [i for i, n in enumerate(shape) if n != 1]
        if [n for n in old if n != 1] != [shape[i] for i in real] or old[concat.axis] == 1:
            return None
        axis = real[[i for i, n in enumerate(old) if n != 1].index(concat.axis)]
    elif node.name not in SAME and node.name not in ("neg", "mul", "div"):
        return None
    parts = []
    for part, (begin, end) in zip(concat.parts, concat.bounds, strict=True):
        mine = [*shape[:axis], end - begin, *shape[axis + 1 :]]
        moved = _scaled(node, part) or _one(node, part, mine)
        if moved is None:
            return None
        parts.append(moved)
    return Concat(axis, tuple(parts))


def follow(
    node: Node, view: View | Concat, at: int, graph: Graph
) -> Sequence[View | Concat | None] | None:
    """Views of the results of a layout operation on operand ``at``; None if it is not one."""
    shapes = [graph.shapes[o] for o in node.outputs]
    if node.name == "optimization_barrier":
        return [view if i == at else None for i in range(len(shapes))]
    if at != 0 and node.name != "mul":
        return None
    if node.name in SAME and not all(graph.floating[o] for o in node.outputs):
        return None
    if isinstance(view, Concat):
        out = _joined(node, view, shapes[0])
        return None if out is None else [out]
    if node.name == "split":
        return _pieces(node, view)
    out = _scaled(node, view) or _one(node, view, shapes[0])
    return None if out is None else [out]


def _pieces(node: Node, view: View) -> Sequence[View] | None:
    axis, out, begin = node.params["axis"], [], 0
    for n in node.params["sizes"]:
        starts, limits = [0] * len(view.dims), [_size(d) for d in view.dims]
        starts[axis], limits[axis] = begin, begin + n
        piece = _cut(view, starts, limits, None)
        if piece is None:
            return None
        out.append(piece)
        begin += n
    return out
