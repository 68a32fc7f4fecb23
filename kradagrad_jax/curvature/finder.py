"""Walks a trace and finds all uses of all parameters."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from kradagrad_jax.curvature import pointwise, products
from kradagrad_jax.curvature import views as view_rules
from kradagrad_jax.curvature.batch import BatchAxes
from kradagrad_jax.curvature.internals import REMAT, Block, Graph, Node
from kradagrad_jax.curvature.pairing import is_bias
from kradagrad_jax.curvature.uses import Rejected, Use
from kradagrad_jax.curvature.views import Concat, View

Views = dict[int, View | Concat]
RULES = {
    "dot_general": products.dot,
    "conv_general_dilated": products.conv,
    "gather": pointwise.gather,
    "mul": pointwise.elementwise,
    "add": pointwise.elementwise,
    "add_any": pointwise.elementwise,
    "sub": pointwise.elementwise,
}


@dataclasses.dataclass
class Found:
    """Result of the walk."""

    uses: list[Use] = dataclasses.field(default_factory=list)  # all uses, biases unpaired
    # per leaf what else consumes it: reason, primitive, source location
    others: dict[int, list[tuple[str, str, str]]] = dataclasses.field(
        default_factory=lambda: defaultdict(list)
    )
    # per bias use (its number) the uses of the weights whose output it is added to, with the part
    # of the bias that belongs to each
    pairs: list[tuple[int, list[int], list[View]]] = dataclasses.field(default_factory=list)


class Finder:
    """One walk over a graph; the result is in ``found``."""

    def __init__(self, graph: Graph, leaves: Sequence[tuple[int, ...]], batch: BatchAxes):
        self.graph, self.batch, self.found = graph, batch, Found()
        self.readers: Counter[int] = Counter()
        self._count(graph.block)
        self.images: dict[int, tuple[list[int], View]] = {}
        self.outputs = {n.index: n.outputs[0] for n in graph.block.walk() if n.outputs}
        views: Views = {
            value: View(i, view_rules.contiguous(shape))
            for i, (value, shape) in enumerate(zip(graph.block.inputs, leaves, strict=False))
        }
        self.walk(graph.block, views, _needed(graph.block))

    def _count(self, block: Block) -> None:
        self.readers.update(v for v in block.outputs if isinstance(v, int))
        for node in block.nodes:
            self.readers.update(v for v in node.inputs if isinstance(v, int))
            for inner in node.blocks:
                self._count(inner)

    def walk(self, block: Block, views: Views, needed: set[int] | None) -> None:
        for node in block.nodes:
            if needed is not None and node.index not in needed:
                continue
            self._spread(node)
            held = [
                (i, views[v])
                for i, v in enumerate(node.inputs)
                if isinstance(v, int) and v in views
            ]
            self._image(node)
            if not held:
                continue
            if node.blocks:
                self._enter(node, views)
            elif node.name == "concatenate":
                self._concatenate(node, views, held)
            elif node.name != "stop_gradient" and any(self.graph.floating[o] for o in node.outputs):
                self._consume(node, views, held)

    def _spread(self, node: Node) -> None:
        """What depends on values of a single example is one itself."""
        alone = self.batch.alone
        if not any(isinstance(v, int) and v in alone for v in node.inputs):
            return
        alone.update(node.outputs)
        for block in node.blocks:
            outer = node.inputs[-len(block.inputs) :]  # a branch does not get the index
            pairs = zip(block.inputs, outer, strict=True)
            alone.update(i for i, o in pairs if isinstance(o, int) and o in alone)

    def _consume(self, node: Node, views: Views, held: list[tuple[int, View | Concat]]) -> None:
        if len(held) > 1:
            for _, view in held:
                self._other(node, view, "combined with another parameter")
            return
        at, view = held[0]
        moved = view_rules.follow(node, view, at, self.graph)
        if moved is not None:
            views.update({o: v for o, v in zip(node.outputs, moved, strict=True) if v is not None})
            return
        try:
            if node.name not in RULES:
                raise Rejected("not a linear layer")
            found = RULES[node.name](node, at, view, self.graph, self.batch)
        except Rejected as reason:
            if not self._paired_concat(node, at, view) and not self._multiplied(
                node, at, view, views
            ):
                self._other(node, view, str(reason))
            return
        first = len(self.found.uses)
        self.found.uses += found
        numbers = list(range(first, first + len(found)))
        if not found[0].elementwise:
            shape = self.graph.shapes[node.outputs[0]]
            image = View(-1, view_rules.contiguous(shape))
            self.images[node.outputs[0]] = (numbers, image)
        elif found[0].kind == "bias" and node.name in ("add", "add_any"):
            self._pair(first, node, at, view)

    def _image(self, node: Node) -> None:
        """Follows layout-only images of outputs that nobody else reads."""
        if len(node.inputs) != 1 or not isinstance(node.inputs[0], int):
            return
        known = self.images.get(node.inputs[0])
        if known is None or self.readers[node.inputs[0]] != 1 or node.name == "neg":
            return
        moved = view_rules.follow(node, known[1], 0, self.graph)
        if moved is not None and len(moved) == 1 and isinstance(moved[0], View):
            self.images[node.outputs[0]] = (known[0], moved[0])

    def _added_to(self, node: Node, at: int) -> tuple[list[int], View] | None:
        """The uses whose output is the other operand of an addition, if nobody else reads it."""
        other = node.inputs[1 - at] if len(node.inputs) == 2 else None
        if not isinstance(other, int) or self.readers[other] != 1:
            return None
        if self.graph.shapes[other] != self.graph.shapes[node.outputs[0]]:
            return None  # the output is broadcast along some axis
        return self.images.get(other)

    def _pair(self, number: int, node: Node, at: int, view: View | Concat) -> None:
        known = self._added_to(node, at)
        if known is None or isinstance(view, Concat) or len(known[0]) != 1:
            return
        use = self.found.uses[known[0][0]]
        shape = self.graph.shapes[self.outputs[use.node]]
        if use.kind != "embed" and is_bias(view, use, known[1], shape):
            self.found.pairs.append((number, known[0], [view]))

    def _paired_concat(self, node: Node, at: int, view: View | Concat) -> bool:
        """A concatenated bias on the output of a weight concatenated in the same way.

        It is counted as paired only; the caller checks that every weight may take its bias.
        """
        known = self._added_to(node, at)
        if known is None or node.name not in ("add", "add_any") or not isinstance(view, Concat):
            return False
        weights = [self.found.uses[i] for i in known[0]]
        if [w.part for w in weights] != view.bounds or any(w.side != "columns" for w in weights):
            return False
        if (
            known[1].dims[-1:] != ((((view.bounds[-1][1], 1)),),)
            or view.axis != len(known[1].dims) - 1
        ):
            return False
        if any(any(s for _, s in d) for p in view.parts for d in p.dims[: view.axis]):
            return False
        self.found.pairs.append((-1, known[0], list(view.parts)))
        return True

    def _multiplied(self, node: Node, at: int, view: View | Concat, views: Views) -> bool:
        """Scale times a value without batch axis (batch normalisation): kept on the view."""
        if node.name != "mul" or isinstance(view, Concat) or view.multiplier is not None:
            return False
        other, out = node.inputs[1 - at], node.outputs[0]
        if not isinstance(other, int) or self.batch(out):
            return False
        atoms = view_rules.merge([a for d in view.dims for a in d])
        size = int(np.prod(self.graph.shapes[out]))
        whole = atoms == view_rules.merge([(size, 1)])
        if not whole or int(np.prod(self.graph.shapes[other])) not in (1, size):
            return False
        if sum(n != 1 for n in self.graph.shapes[out]) > 1:
            return False  # a matrix times a batch-free value is a masked or normalised weight
        views[out] = dataclasses.replace(view, multiplier=other)
        return True

    def _concatenate(self, node: Node, views: Views, held: list[tuple[int, View | Concat]]) -> None:
        parts = [v for _, v in held if isinstance(v, View)]
        plain = len(parts) == len(node.inputs) and all(p.multiplier is None for p in parts)
        if plain and len({p.loops for p in parts}) == 1:
            views[node.outputs[0]] = Concat(node.params["dimension"], tuple(parts))
            return
        for _, view in held:
            self._other(node, view, "concatenated with something else")

    def _enter(self, node: Node, views: Views) -> None:
        operands = [views.get(v) if isinstance(v, int) else None for v in node.inputs]
        if node.name == "cond":
            for block in node.blocks:
                self._descend(node, block, operands[1:])
        elif node.name in REMAT:
            self._descend(node, node.blocks[0], operands)
        else:
            self._scan(node, operands, views)

    def _descend(self, node: Node, block: Block, operands: Sequence[View | Concat | None]) -> Views:
        inner: Views = {
            v: view for v, view in zip(block.inputs, operands, strict=True) if view is not None
        }
        for value, view in list(inner.items()):
            if isinstance(view, View) and view.multiplier is not None:
                self._other(node, view, "multiplied by another value, then passed on")
                del inner[value]
        self.walk(block, inner, None)
        return inner

    def _scan(self, node: Node, operands: list[View | Concat | None], views: Views) -> None:
        block, p = node.blocks[0], node.params
        constants, carries = p["num_consts"], p["num_carry"]
        scanned = node.inputs[constants + carries :]
        if any(isinstance(v, int) and 0 in self.batch(v) for v in scanned):
            self.batch.alone.update(block.inputs[constants:])  # a loop over examples
        inner: list[View | Concat | None] = []
        for i, view in enumerate(operands):
            if view is None:
                inner.append(None)
            elif i < constants:
                inner.append(_shared(view, p["length"]))
            elif i < constants + carries:
                same = block.outputs[i - constants] == block.inputs[i]
                inner.append(_shared(view, p["length"]) if same else None)
                if same:
                    views[node.outputs[i - constants]] = view
                else:
                    self._other(node, view, "changed by the loop")
            else:
                inner.append(_stacked(view, p["length"]))
                if inner[-1] is None:
                    self._other(node, view, "iterated over in an unsupported layout")
        seen = self._descend(node, block, inner)
        for output in block.outputs[carries:]:
            if isinstance(output, int) and output in seen:
                self._other(node, seen[output], "returned by a loop")

    def _other(self, node: Node, view: View | Concat, reason: str) -> None:
        for part in view.parts if isinstance(view, Concat) else (view,):
            other = (reason, node.name, node.where)
            if other not in self.found.others[part.leaf]:
                self.found.others[part.leaf].append(other)


def _shared(view: View | Concat, length: int) -> View | Concat:
    if isinstance(view, Concat):
        return dataclasses.replace(view, parts=tuple(_shared(v, length) for v in view.parts))
    return dataclasses.replace(view, loops=(*view.loops, ("share", length)))


def _stacked(view: View | Concat, length: int) -> View | Concat | None:
    if isinstance(view, Concat):
        parts = [_stacked(v, length) for v in view.parts]
        if view.axis == 0 or any(v is None for v in parts):
            return None
        return Concat(view.axis - 1, tuple(parts))  # pyright: ignore[reportArgumentType]
    first, rest = view.dims[0], view.dims[1:]
    if len(first) > 1:
        return None
    if not first or first[0][1] == 0:
        return dataclasses.replace(view, dims=rest, loops=(*view.loops, ("share", length)))
    return dataclasses.replace(
        view, dims=rest, stack=(*view.stack, first[0]), loops=(*view.loops, ("stack", length))
    )


def _needed(block: Block) -> set[int]:
    """Nodes of the outermost block that the first output depends on."""
    wanted = {v for v in block.outputs[:1] if isinstance(v, int)}
    nodes = set()
    for node in reversed(block.nodes):
        if wanted.intersection(node.outputs):
            nodes.add(node.index)
            wanted.update(v for v in node.inputs if isinstance(v, int))
    return nodes
