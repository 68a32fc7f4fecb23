"""Which dimension of every value is the batch: by tracing with twice as many examples."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from kradagrad_jax.curvature import internals
from kradagrad_jax.curvature.internals import Graph


@dataclasses.dataclass(frozen=True)
class BatchAxes:
    """Dimensions that carry the batch."""

    examples: int  # N, the number of examples
    # per value the dimensions that doubled with the batch; None: unknown, guess
    grown: tuple[tuple[int, ...], ...] | None
    shapes: tuple[tuple[int, ...], ...]
    guessed: str = ""  # why they had to be guessed; "" if they are known
    # values of a single example, inside loops over examples; found while walking
    alone: set[int] = dataclasses.field(default_factory=set)

    def __call__(self, value: int) -> tuple[int, ...]:
        if self.grown is not None:
            return self.grown[value]
        shape = self.shapes[value]
        return (0,) if shape and shape[0] and shape[0] % self.examples == 0 else ()


def batch_axes(
    graph: Graph, fn: Callable[..., Any], args: Sequence[Any], batch: Sequence[int], examples: int
) -> BatchAxes:
    """Retraces ``fn`` with axis 0 of the arguments ``batch`` doubled and compares the graphs."""
    shapes = tuple(graph.shapes)
    twice = [internals.abstract(x, 2 if i in batch else 1) for i, x in enumerate(args)]
    try:
        other = internals.trace(fn, twice)
        problem = "" if _alike(graph, other) else "the two traces differ"
    except Exception as error:
        other, problem = graph, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    if problem:
        warnings.warn(
            f"curvature capture: retrace with a doubled batch failed ({problem}). The batch axis "
            "was guessed: axis 0 wherever its length is a multiple of the batch. Pass "
            "batch_argnums=, and avoid a hard-coded batch size.",
            stacklevel=4,
        )
        return BatchAxes(examples, None, shapes, problem)
    grown = tuple(
        tuple(i for i, (n, m) in enumerate(zip(a, b, strict=True)) if m == 2 * n != n)
        for a, b in zip(graph.shapes, other.shapes, strict=True)
    )
    usable = tuple(
        tuple(d for d in dims if shape[d] % examples == 0 or examples % shape[d] == 0)
        for dims, shape in zip(grown, shapes, strict=True)
    )
    return BatchAxes(examples, usable, shapes)


def _alike(a: Graph, b: Graph) -> bool:
    if len(a.shapes) != len(b.shapes) or a.nodes != b.nodes:
        return False
    if any(len(s) != len(t) for s, t in zip(a.shapes, b.shapes, strict=True)):
        return False
    return all(m.name == n.name for m, n in zip(a.block.walk(), b.block.walk(), strict=True))
