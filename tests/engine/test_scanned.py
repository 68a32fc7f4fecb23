"""Scanned layers, fused kernels and heads are what their parts are alone; thin leaves are lean.

In double precision, at every default.
"""

import functools
import inspect
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kradagrad_jax as kj
from kradagrad_jax import curvature
from tests.scale import defaults
from tests.x64 import x64

LAYERS, M, N, STEPS = 3, 6, 4, 5


def layout_of(alias: defaults.Default, **changes: Any) -> kj.Layout:
    """The layout of the default preset, changed. Whole parameters where vectors are blocks, too."""
    whole = {"block_size": None, "merge": "none", "vectors": "block"}
    return kj.Layout(**(whole if alias.name in ("sirfshampoo", "tnt", "ginger") else {}) | changes)


def make(alias: defaults.Default, **changes: Any) -> Any:
    """An optimizer of gradients alone."""
    empirical = {"fisher": "empirical"} if alias.kind == "samples" else {}
    return alias.make(0.1, layout=layout_of(alias, **changes), **empirical)


def run(tx: Any, grads: list[Any], extras: Any = None) -> list[Any]:
    state, update, out = tx.init(grads[0]), jax.jit(tx.update), []
    for t, g in enumerate(grads):
        updates, state = update(g, state, g, **({} if extras is None else extras[t]))
        out.append(updates)
    assert defaults.diagnostics(state)["rejected"] == 0
    return out


def draws(*shape: int, seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng((seed, *shape))
    return [jnp.asarray(rng.normal(size=shape)) for _ in range(STEPS)]


def check(ours: list[Any], theirs: list[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10), a, b)


@pytest.mark.parametrize("axis", [0, 1])
@defaults.over("gradients", "samples")
def test_scanned_layers_equal_unrolled_ones(alias, axis):
    scanned_is_unrolled(functools.partial(make, alias), axis)


GRAFTS = [
    pytest.param({"graft": kj.Graft("rmsprop", normalize=True)}, id="unit"),
    pytest.param({"graft": kj.Graft("adagrad", normalize=True, per="block")}, id="unit-block"),
    pytest.param({"graft": "sgd", "timing": kj.Timing(start=2, ramp=2)}, id="ramp"),
]


@pytest.mark.parametrize("options", GRAFTS)
def test_scanned_layers_equal_unrolled_ones_with_other_grafts(options):
    """Lengths are taken layer by layer, of vectors too."""
    scanned_is_unrolled(lambda **k: kj.shampoo(0.1, layout=kj.Layout(**k), **options), 0)


def scanned_is_unrolled(make: Any, axis: int) -> None:
    with x64():
        kernels, scales = draws(LAYERS, M, N), draws(LAYERS, N)
        unrolled = [
            {f"layer{i}": {"kernel": k[i], "scale": s[i]} for i in range(LAYERS)}
            for k, s in zip(kernels, scales, strict=True)
        ]
        scanned = [
            {"layers": {"kernel": jnp.moveaxis(k, 0, axis), "scale": jnp.moveaxis(s, 0, axis)}}
            for k, s in zip(kernels, scales, strict=True)
        ]
        theirs = [
            {
                "layers": {
                    name: jnp.stack([u[f"layer{i}"][name] for i in range(LAYERS)], axis)
                    for name in ("kernel", "scale")
                }
            }
            for u in run(make(), unrolled)
        ]
        check(run(make(stacked={"^layers/": axis}), scanned), theirs)


@defaults.over("layers")
def test_scanned_layers_of_layer_methods(alias):
    """One layer of the spec holds the whole stack."""
    dense = curvature.Layer.dense

    def spec(*layers: curvature.Layer) -> curvature.CaptureSpec:
        plain = curvature.CaptureSpec.from_layers(layers)
        return curvature.CaptureSpec(plain.leaves, plain.layers, defaults.ROWS)

    one = spec(dense("w", (LAYERS, M, N), bias="b"))
    each = spec(*(dense(f"{i}/w", (M, N), bias=f"{i}/b") for i in range(LAYERS)))
    build = getattr(kj, alias.name)
    with x64():
        a, g = draws(LAYERS, defaults.ROWS, M), draws(LAYERS, defaults.ROWS, N)
        stacked, parts, whole_found, parts_found = [], [], [], []
        for x, y in zip(a, g, strict=True):
            own = {"w": jnp.einsum("lri,lro->lio", x, y), "b": jnp.sum(y, axis=1) / 2}
            stacked.append(own)
            parts.append({str(i): {k: v[i] for k, v in own.items()} for i in range(LAYERS)})
            found = curvature.Curvature.from_rows({"w": (x, y)}, one)
            whole_found.append({"curvature": found})
            rows = {f"{i}/w": (x[i], y[i]) for i in range(LAYERS)}
            parts_found.append({"curvature": curvature.Curvature.from_rows(rows, each)})
        theirs = [
            {k: jnp.stack([u[str(i)][k] for i in range(LAYERS)]) for k in ("w", "b")}
            for u in run(build(0.1, each), parts, parts_found)
        ]
        check(run(build(0.1, one), stacked, whole_found), theirs)


FUSED = [
    pytest.param((M, 3 * N), {"w": {1: 3}}, 1, (N, 2 * N), id="qkv"),
    pytest.param((M, 3 * N), {"w": {1: (N, 3 * N - 2)}}, 1, (N, 3 * N - 2), id="uneven"),
    pytest.param((3 * M, N), {"w": {0: 3}}, 0, (M, 2 * M), id="rows"),
    pytest.param((M, 2, N), {"w": {1: 2}}, 1, (1,), id="heads"),
    pytest.param((2, N, M), {"w": {0: 2}}, 0, (1,), id="heads-of-the-output"),
]


@pytest.mark.parametrize(("shape", "split", "axis", "cuts"), FUSED)
@defaults.over("gradients", "samples")
def test_a_fused_kernel_is_its_parts(alias, shape, split, axis, cuts):
    """Cut points along an axis: every part has factors and a step length of its own."""
    with x64():
        fused = draws(*shape)
        parts = [{f"w{i}": x for i, x in enumerate(jnp.split(g, list(cuts), axis))} for g in fused]
        theirs = [{"w": jnp.concatenate(list(u.values()), axis)} for u in run(make(alias), parts)]
        check(run(make(alias, split=split), [{"w": g} for g in fused]), theirs)


def test_a_fused_kernel_is_cut_in_every_layer_of_a_stack():
    """Stack axis and cut points count in the shape as given."""
    alias = next(d for d in defaults.DEFAULTS if d.name == "shampoo")
    with x64():
        grads = [{"layers": {"qkv": x}} for x in draws(M, LAYERS, 3 * N)]
        parts = [
            {
                f"{i}{j}": g["layers"]["qkv"][:, i, j * N : (j + 1) * N]
                for i in range(LAYERS)
                for j in range(3)
            }
            for g in grads
        ]
        theirs = [
            {
                "layers": {
                    "qkv": jnp.stack(
                        [
                            jnp.concatenate([u[f"{i}{j}"] for j in range(3)], 1)
                            for i in range(LAYERS)
                        ],
                        1,
                    )
                }
            }
            for u in run(make(alias), parts)
        ]
        tx = make(alias, stacked={"^layers/": 1}, split={"qkv": {2: 3}})
        check(run(tx, grads), theirs)


def bytes_per_parameter(tx: Any, shapes: dict[str, tuple[int, ...]]) -> float:
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    arrays = jax.tree.leaves(jax.eval_shape(tx.init, params))
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    return total / sum(math.prod(s) for s in shapes.values())


@pytest.mark.parametrize("name", ["shampoo", "kradagrad_star"])
@pytest.mark.parametrize(
    ("shapes", "most"),
    [
        ({"a": (4096, 8), "b": (8, 4096)}, 40),
        ({f"{i}{k}": s for i in range(9) for k, s in (("a", (4096, 8)), ("b", (8, 4096)))}, 40),
        ({"embedding": (250_000, 1024)}, 17),
        ({"embedding": (50_257, 768), "w": (768, 3072)}, 17),
        ({"thin": (32_000, 3)}, 40),
    ],
    ids=["adapters", "many adapters", "embedding", "vocabulary", "thin"],
)
def test_bytes_of_thin_and_huge_leaves(name, shapes, most):
    """Adam needs 8; a factor of the long side of these would cost 30 to 1,000."""
    assert bytes_per_parameter(getattr(kj, name)(1e-3), shapes) <= most


@pytest.mark.parametrize("name", ["shampoo", "kradagrad_star"])
def test_a_small_head_keeps_both_factors(name):
    """Judged over the tree: 51 numbers per weight of the head are few among those of the model."""
    sizes = (784, 512, 512, 10)
    params = {
        f"layer{i}": jax.ShapeDtypeStruct(s, jnp.float32)
        for i, s in enumerate(itertools.pairwise(sizes))
    }
    state = jax.eval_shape(getattr(kj, name)(1e-3).init, params)
    engines = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kj.BlockState))
    engine = next(x for x in engines if isinstance(x, kj.BlockState))
    sides = [{x.shape[1:] for x in jax.tree.leaves(f)} for f in engine.factors.values()]
    assert any({(256, 256), (10, 10)} <= found for found in sides), sides


def test_every_alias_with_a_layout_is_covered():
    signatures = {d.name: inspect.signature(getattr(kj, d.name)) for d in defaults.DEFAULTS}
    with_layout = {name for name, s in signatures.items() if "layout" in s.parameters}
    assert with_layout == {d.name for d in defaults.DEFAULTS if d.kind != "layers"}
