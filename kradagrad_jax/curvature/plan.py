"""From the uses that were found to layers, statuses and taps."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from kradagrad_jax.curvature.finder import Found
from kradagrad_jax.curvature.internals import Block, Graph, Operand
from kradagrad_jax.curvature.layout import Kind, Layer, MatrixView
from kradagrad_jax.curvature.spec import CaptureSpec, LeafSpec, Status
from kradagrad_jax.curvature.uses import Use
from kradagrad_jax.curvature.views import Atom, View, matrix_view


@dataclasses.dataclass(frozen=True)
class Tap:
    """A use whose statistics are taken."""

    use: Use
    path: str
    layer: Layer | None  # its layer, None for elementwise uses
    # number of the slice of the leaf (parameters indexed in Python), and how many
    slice: tuple[int, int]

    @property
    def operands(self) -> tuple[Operand | None, int | None]:
        """The activation of the use and the multiplier of the leaf; None where there is none."""
        return self.use.activation, self.use.view.multiplier


@dataclasses.dataclass
class Plan:
    """What to tap, and the specification for the user."""

    graph: Graph
    taps: tuple[Tap, ...]
    spec: CaptureSpec
    at_node: dict[int, tuple[int, ...]]
    inside: dict[int, tuple[int, ...]]
    elementwise: dict[str, MatrixView]


@dataclasses.dataclass
class _Leaf:
    """Working state of one parameter."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    uses: list[int] = dataclasses.field(default_factory=list)
    view: MatrixView | None = None
    offsets: list[int] = dataclasses.field(default_factory=list)
    status: Status = "none"
    tied: bool = False
    reasons: list[str] = dataclasses.field(default_factory=list)
    bias: int | None = None
    bias_of: int | None = None


def make_plan(
    graph: Graph, found: Found, leaves: Sequence[tuple[str, tuple[int, ...], Any]], examples: int
) -> Plan:
    """Plan of a walked graph; ``leaves`` are path, shape and dtype of the parameters."""
    work = [_Leaf(path, tuple(shape), str(dtype)) for path, shape, dtype in leaves]
    for i, use in enumerate(found.uses):
        work[use.view.leaf].uses.append(i)
    for i, leaf in enumerate(work):
        _classify(leaf, found, i)
    _pair_biases(work, found)
    for i, leaf in enumerate(work):
        _explain(leaf, found.others.get(i, []))
    layers = {i: _layer(leaf, found, work) for i, leaf in enumerate(work) if _is_layer(leaf, found)}
    groups = _input_groups(work, found, layers)
    specs = [_leaf_spec(i, leaf, found, work, layers, groups) for i, leaf in enumerate(work)]
    spec = CaptureSpec(tuple(specs), tuple(layers.values()), examples)
    taps = []
    for i, leaf in enumerate(work):
        if leaf.status not in ("full", "inexact") or leaf.bias_of is not None:
            continue
        for number in leaf.uses:
            use = found.uses[number]
            place = leaf.offsets.index(use.view.offset)
            taps.append(Tap(use, leaf.path, layers.get(i), (place, len(leaf.offsets))))
    tapped = {tap.path for tap in taps if tap.layer is None}
    views = {leaf.path: leaf.view for leaf in work if leaf.view and leaf.path in tapped}
    return Plan(graph, tuple(taps), spec, *_places(graph.block, taps), views)


def _classify(leaf: _Leaf, found: Found, number: int) -> None:
    """Status of a leaf and, if its uses tile it consistently, its matrix view."""
    matrices = [i for i in leaf.uses if not found.uses[i].elementwise]
    if matrices and len(matrices) < len(leaf.uses):
        found.others[number].append(("elementwise as well", "mul or add", "another place"))
        leaf.uses = matrices
    if not leaf.uses:
        return
    leaf.status = "partial"
    leaf.offsets = sorted({found.uses[i].view.offset for i in leaf.uses})
    step = leaf.offsets[1] - leaf.offsets[0] if len(leaf.offsets) > 1 else 0
    if leaf.offsets != [k * step for k in range(len(leaf.offsets))]:
        leaf.reasons.append("uses see slices that do not tile the parameter")
        return
    found_views = {_view(found.uses[i], leaf, step) for i in leaf.uses}
    if None in found_views:
        leaf.reasons.append("uses see only slices of the parameter")
    elif len(found_views) > 1:
        _tied(leaf, found, found_views)
    elif len({found.uses[i].kind == "embed" for i in leaf.uses}) > 1:
        leaf.reasons.append("gathered and multiplied in the same orientation")
    else:
        leaf.view, leaf.status = found_views.pop(), "full"


def _tied(leaf: _Leaf, found: Found, views: set[MatrixView | None]) -> None:
    """A gather and products in the opposite orientation make a tied embedding."""
    uses = [found.uses[i] for i in leaf.uses]
    gathers = {(u.rows, u.columns) for u in uses if u.kind == "embed"}
    products = {(u.columns, u.rows) for u in uses if u.kind != "embed"}
    plain = not any(u.view.stack or u.group for u in uses) and len(leaf.offsets) == 1
    if plain and len(views) == 2 and gathers == products and len(gathers) == 1:
        embed = next(u for u in uses if u.kind == "embed")
        leaf.view, leaf.status, leaf.tied = _view(embed, leaf, 0), "full", True
        return
    leaf.reasons.append("used as different matrices")


def _view(use: Use, leaf: _Leaf, step: int) -> MatrixView | None:
    pieces: list[Atom] = [(len(leaf.offsets), step)] if len(leaf.offsets) > 1 else []
    return matrix_view(leaf.shape, [*use.view.stack, *pieces, *use.group], use.rows, use.columns)


def _is_layer(leaf: _Leaf, found: Found) -> bool:
    if leaf.view is None or leaf.bias_of is not None:
        return False
    return not found.uses[leaf.uses[0]].elementwise


def _pair_biases(work: list[_Leaf], found: Found) -> None:
    """Keeps the pairs in which all uses of the weight take this bias, and no other."""
    of_bias: dict[int, list[tuple[int, int, View]]] = defaultdict(list)
    for number, weights, views in found.pairs:
        for w, v in zip(weights, views, strict=True):
            of_bias[v.leaf].append((number, w, v))
    for b, pairs in of_bias.items():
        weights = {found.uses[w].view.leaf for _, w, _ in pairs}
        bias, owner = work[b], weights.pop()
        numbers = [n for n, _, _ in pairs if n >= 0]
        good = not weights and _is_layer(work[owner], found) and not work[owner].tied
        good = good and sorted(numbers) == sorted(bias.uses)
        good = good and sorted(w for _, w, _ in pairs) == sorted(work[owner].uses)
        good = good and work[owner].bias is None and _bias_view(bias, work[owner], found, pairs)
        if good:
            work[owner].bias, bias.bias_of, bias.status = b, owner, "full"
            bias.uses = [w for _, w, _ in pairs]
        elif len(numbers) < len(pairs):
            found.others[b].append(("joined with other biases", "add", "the output of a weight"))


def _bias_view(bias: _Leaf, weight: _Leaf, found: Found, pairs: Sequence[Any]) -> bool:
    """Whether the bias splits like the weight; stores how it becomes ``(stack, 1, d_out)``."""
    assert weight.view is not None
    stack, _, d_out = weight.view.target
    place = {found.uses[w].view.offset: v.offset for _, w, v in pairs}
    offsets = [place[o] for o in weight.offsets]
    view, use = pairs[0][2], found.uses[pairs[0][1]]
    if (view.stack and len(use.view.stack) != len(view.stack)) or len(set(offsets)) < len(offsets):
        return False
    step = offsets[1] - offsets[0] if len(offsets) > 1 else 0
    if offsets != [k * step for k in range(len(offsets))]:
        return False
    pieces = [(len(offsets), step)] if step else []
    size = d_out
    for n, _ in use.group:
        size *= n
    bias.view = matrix_view(bias.shape, [*view.stack, *pieces], (), [(size, 1)])
    if bias.view is None:
        return False
    bias.view = dataclasses.replace(bias.view, target=(stack, 1, d_out))
    bias.offsets = offsets
    return True


def _explain(leaf: _Leaf, others: Sequence[tuple[str, str, str]]) -> None:
    if leaf.status == "full" and others:
        leaf.status = "inexact"
        leaf.reasons += [
            f"also used by `{name}` at {where} (regularizer?)" for _, name, where in others
        ]
    else:
        leaf.reasons += [f"{why} (`{name}` at {where})" for why, name, where in others]
    if leaf.status == "none" and not leaf.reasons:
        leaf.reasons.append("the result does not depend on it through any linear operation")


def _layer(leaf: _Leaf, found: Found, work: list[_Leaf]) -> Layer:
    assert leaf.view is not None
    uses = [found.uses[i] for i in leaf.uses]
    first = next((u for u in uses if u.kind == "embed"), uses[0])
    kinds: dict[str, Kind] = {"embed": "embed", "conv": "conv"}
    kind = kinds.get(first.kind, "dense")
    stack, d_in, d_out = leaf.view.target
    bias = None if leaf.bias is None else work[leaf.bias]
    shared = any(u.examples[1] > 1 or "share" in [f for f, _ in u.view.loops] for u in uses)
    shared = shared or len(uses) > len(leaf.offsets)
    return Layer(
        leaf.path, leaf.shape, bias.path if bias else None, bias.shape if bias else None,
        kind, stack, d_in, d_out, first.in_shape if kind == "conv" else (d_in,),
        shared, leaf.view, bias.view if bias else None, leaf.tied,
    )  # fmt: skip


def _input_groups(work: list[_Leaf], found: Found, layers: dict[int, Layer]) -> dict[int, int]:
    """Numbers for the layers that read the same values."""
    readers: dict[Any, list[int]] = defaultdict(list)
    for i in layers:
        uses = [found.uses[u] for u in work[i].uses]
        key = tuple(sorted((u.activation if isinstance(u.activation, int) else -1) for u in uses))
        readers[(key, uses[0].rows and layers[i].d_in, layers[i].stack)].append(i)
    shared = [members for members in readers.values() if len(members) > 1]
    return {i: number for number, members in enumerate(shared) for i in members}


def _leaf_spec(
    i: int,
    leaf: _Leaf,
    found: Found,
    work: list[_Leaf],
    layers: dict[int, Layer],
    groups: dict[int, int],
) -> LeafSpec:
    kinds = tuple(dict.fromkeys(found.uses[u].kind for u in leaf.uses))
    if leaf.bias_of is not None:
        kinds = ("bias",)
    stack, d_in, d_out = leaf.view.target if leaf.view else (1, 0, 0)
    return LeafSpec(
        leaf.path, leaf.shape, leaf.dtype, leaf.status, kinds, len(leaf.uses), stack, d_in, d_out,
        None if leaf.bias is None else work[leaf.bias].path,
        None if leaf.bias_of is None else work[leaf.bias_of].path,
        groups.get(i), tuple(leaf.reasons),
    )  # fmt: skip


def _places(block: Block, taps: Sequence[Tap]) -> tuple[dict, dict]:
    """Taps at each node, and taps inside the blocks of each node."""
    at_node: dict[int, tuple[int, ...]] = {}
    for number, tap in enumerate(taps):
        at_node[tap.use.node] = (*at_node.get(tap.use.node, ()), number)
    inside: dict[int, tuple[int, ...]] = {}

    def collect(block: Block) -> tuple[int, ...]:
        total: tuple[int, ...] = ()
        for node in block.nodes:
            for inner in node.blocks:
                inside[node.index] = (*inside.get(node.index, ()), *collect(inner))
            total = (*total, *at_node.get(node.index, ()), *inside.get(node.index, ()))
        return total

    collect(block)
    return at_node, inside
