"""The only module that reads JAX's internals: traces, equations, and how to bind them again.

A trace is copied to a small graph with integer values, in which calls are inlined and the bodies of
loops, branches and rematerialised functions are blocks of their own. Equations are told apart by
the *name* of their primitive; names and the form of bind parameters differ between JAX releases.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_INLINED = ("jit", "pjit", "closed_call", "core_call")
REMAT = ("remat", "remat2", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Constant:
    """A literal operand."""

    value: Any


Operand = int | Constant


@dataclasses.dataclass
class Node:
    """One equation: operands and results are numbers of values."""

    index: int
    name: str
    params: dict[str, Any]
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]
    blocks: tuple["Block", ...]
    equation: Any

    @property
    def where(self) -> str:
        """Source location, ``file.py:line``."""
        from jax.extend import source_info_util  # here, as jax.extend imports pallas

        text = source_info_util.summarize(self.equation.source_info)
        return text.split(" ")[0].rsplit("/", 1)[-1].rsplit("\\", 1)[-1]


@dataclasses.dataclass
class Block:
    """A list of equations with inputs, captured arrays and outputs."""

    inputs: tuple[int, ...] = ()
    constants: tuple[tuple[int, Any], ...] = ()
    nodes: list[Node] = dataclasses.field(default_factory=list)
    outputs: tuple[Operand, ...] = ()

    def walk(self) -> Iterator[Node]:
        """All nodes, those of inner blocks included."""
        for node in self.nodes:
            yield node
            for block in node.blocks:
                yield from block.walk()


@dataclasses.dataclass
class Graph:
    """A traced function; ``shapes``, ``dtypes`` and ``floating`` describe every value."""

    block: Block
    shapes: list[tuple[int, ...]]
    dtypes: list[Any]
    floating: list[bool]
    nodes: int


class _Builder:
    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[Any] = []
        self.floating: list[bool] = []
        self.count = 0

    def new(self, aval: Any) -> int:
        self.shapes.append(tuple(getattr(aval, "shape", ())))
        dtype = getattr(aval, "dtype", None)
        self.dtypes.append(dtype)
        self.floating.append(dtype is not None and jnp.issubdtype(dtype, jnp.inexact))
        return len(self.shapes) - 1

    def block(self, jaxpr: Any) -> Block:
        inner, consts = _open(jaxpr)
        inputs = tuple(self.new(v.aval) for v in inner.invars)
        captured = tuple(self.new(v.aval) for v in inner.constvars)
        env: dict[Any, Operand] = dict(
            zip((*inner.invars, *inner.constvars), (*inputs, *captured), strict=True)
        )
        out = Block(inputs, tuple(zip(captured, consts, strict=True)))
        out.outputs = self.fill(out, inner, env)
        return out

    def fill(self, block: Block, jaxpr: Any, env: dict[Any, Operand]) -> tuple[Operand, ...]:
        from jax.extend.core import Literal

        def read(atom: Any) -> Operand:
            return Constant(atom.val) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inputs = tuple(read(v) for v in eqn.invars)
            name = eqn.primitive.name
            if name in _INLINED:
                inner, consts = _open(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))
                scope = dict(zip(inner.invars, inputs, strict=True))
                for v, c in zip(inner.constvars, consts, strict=True):
                    number = self.new(v.aval)
                    scope[v] = number
                    block.constants += ((number, c),)
                results = self.fill(block, inner, scope)
                env.update(zip(eqn.outvars, results, strict=True))
                continue
            blocks = tuple(self.block(j) for j in _bodies(name, eqn.params))
            outputs = tuple(self.new(v.aval) for v in eqn.outvars)
            env.update(zip(eqn.outvars, outputs, strict=True))
            node = Node(self.count, name, eqn.params, inputs, outputs, blocks, eqn)
            block.nodes.append(node)
            self.count += 1
        return tuple(read(v) for v in jaxpr.outvars)


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Plain jaxpr and constants of an open or closed one."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, getattr(jaxpr, "consts", ())


def _bodies(name: str, params: dict[str, Any]) -> Sequence[Any]:
    if name == "scan" or name in REMAT:
        return (params["jaxpr"],)
    return params["branches"] if name == "cond" else ()


def trace(fn: Callable[..., Any], args: Sequence[Any]) -> Graph:
    """The graph of ``fn(*args)``, whose arguments and results are flat lists of arrays."""
    builder = _Builder()
    block = builder.block(jax.make_jaxpr(fn)(*args))
    return Graph(block, builder.shapes, builder.dtypes, builder.floating, builder.count)


def abstract(x: Any, times: int = 1) -> Any:
    """Type of ``x`` for a trace, with axis 0 ``times`` as long."""
    if times == 1:
        return x
    shape = (times * x.shape[0], *x.shape[1:])
    if varying_axes(x):  # inside shard_map, of which a ShapeDtypeStruct knows nothing
        return jax.typeof(x).update(shape=shape)
    return jax.ShapeDtypeStruct(shape, x.dtype)


def varying_axes(x: Any) -> frozenset[Any]:
    """Mesh axes over which a value inside ``jax.shard_map`` differs between devices."""
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(aval, "vma", ()) if kind is None else kind.varying)


def vary(x: Any, axes: frozenset[Any]) -> Any:
    """Casts ``x`` to vary over further mesh axes."""
    missing = tuple(sorted(axes - varying_axes(x)))
    if not missing:
        return x
    if hasattr(lax, "pcast"):
        return lax.pcast(x, missing, to="varying")
    return getattr(lax, "pvary")(x, missing)  # noqa: B009


def bind(node: Node, values: Sequence[Any]) -> Sequence[Any]:
    """Evaluates one equation as it is; always returns a sequence."""
    eqn = node.equation
    found = eqn.primitive.get_bind_params(eqn.params)  # a pair in older releases
    functions, params = found if isinstance(found, tuple) else ((), found)
    with getattr(eqn.ctx, "manager", contextlib.nullcontext()):
        out = eqn.primitive.bind(*functions, *values, **params)
    return out if eqn.primitive.multiple_results else [out]


def scan(node: Node, body: Callable[..., Any], carry: Any, xs: Any) -> tuple[Any, Any]:
    """``lax.scan`` with the length, direction and unrolling of a scan equation."""
    p = node.params
    more = {"_split_transpose": True} if p.get("_split_transpose") else {}
    return lax.scan(
        body, carry, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"], **more
    )


def remat(node: Node, fn: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.checkpoint`` with the policy of a rematerialisation equation."""
    return jax.checkpoint(fn, policy=node.params["policy"], prevent_cse=node.params["prevent_cse"])
