"""Dtypes of updates and state; everything here is traced, little is compiled."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kradagrad_jax as kj
from tests.registry import assert_close, compiled, grads_at, over_aliases, over_entries, params_like
from tests.x64 import x64

FLOATS = ["float16", "bfloat16", "float32", "float64"]
PAIRS = [(name, name) for name in FLOATS] + [  # of parameters and gradients
    ("float32", "bfloat16"),
    ("bfloat16", "float32"),
    ("float32", "float64"),
]
SHAPES = {"b": (3,), "w": (4, 3), "s": ()}


def context(*dtypes):
    return x64() if "float64" in dtypes else contextlib.nullcontext()


def abstract_step(tx, params, grads):
    """(updates, state before, state after) as shapes and dtypes."""
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, grads, state, params)
    return updates, state, new


def described(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype.name, getattr(x, "weak_type", False)), tree)


@over_entries
@pytest.mark.parametrize(("dtype", "grad_dtype"), PAIRS)
def test_updates_follow_gradients_and_the_state_keeps_its_type(entry, dtype, grad_dtype):
    with context(dtype, grad_dtype):
        params = params_like(SHAPES, dtype)
        grads = jax.tree.map(lambda p: p.astype(grad_dtype), params)
        # optax.trace returns its own dtype where gradients have another one
        tx = entry.make() if dtype == grad_dtype else entry.twin()
        updates, state, new = abstract_step(tx, params, grads)
        assert {u.dtype.name for u in jax.tree.leaves(updates)} == {grad_dtype}
        assert described(new) == described(state)
        assert not any(x.weak_type for x in jax.tree.leaves(state))


@over_entries
def test_float32_parameters_in_x64_mode(entry):
    """Nothing is promoted to float64 just because it could be."""
    with x64():
        params = params_like(SHAPES, "float32")
        updates, state, new = abstract_step(entry.make(), params, params)
        names = {x.dtype.name for x in jax.tree.leaves((updates, state, new))}
        assert names == {"float32", "int32"}


@over_entries
def test_factors_are_float32_or_better(entry):
    for dtype, expected in (("bfloat16", "float32"), ("float64", "float64")):
        with context(dtype):
            state = jax.eval_shape(entry.make().init, params_like(SHAPES, dtype))
            factors = jax.tree.leaves(optax.tree.get(state, "factors"))
            assert {x.dtype.name for x in factors} == {expected}


@over_aliases
def test_storage_dtypes(entry):
    """mu_dtype and factor_dtype, apart from each other and from the parameters' dtype."""
    params = params_like(SHAPES, "bfloat16")
    with x64():
        tx = entry.make(mu_dtype="float16", factor_dtype="float64")
        updates, state, new = abstract_step(tx, params, params)
        assert {x.dtype.name for x in jax.tree.leaves(optax.tree.get(state, "mu"))} == {"float16"}
        factors = jax.tree.leaves(optax.tree.get(new, "factors"))
        assert {x.dtype.name for x in factors} == {"float64"}
        assert {u.dtype.name for u in jax.tree.leaves(updates)} == {"bfloat16"}
    with pytest.raises(ValueError, match="factor_dtype"):
        entry.make(factor_dtype="bfloat16").init(params_like())


@over_aliases
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes_give_the_numbers_of_float32(entry, dtype):
    """One update of gradients that both dtypes can hold, to the precision of the coarser one."""
    with context(dtype):
        params = params_like(SHAPES, "float32")
        exact = jax.tree.map(lambda x: x.astype("bfloat16").astype("float16"), params)
        params = jax.tree.map(lambda x: x.astype("float32"), exact)
        coarse = jax.tree.map(lambda x: x.astype(dtype), exact)
        tx = entry.make()
        expected, _ = jax.jit(tx.update)(params, tx.init(params), params)
        ours, _ = jax.jit(tx.update)(coarse, tx.init(coarse), coarse)
        assert all(u.dtype == dtype for u in jax.tree.leaves(ours))
        rtol = {"float16": 2e-3, "bfloat16": 1e-2, "float64": 1e-4}[dtype]
        assert_close(jax.tree.map(lambda u: u.astype("float32"), ours), expected, rtol, 1e-4)
        applied = optax.apply_updates(coarse, ours)
        assert all(p.dtype == dtype for p in jax.tree.leaves(applied))


@over_aliases
def test_mixed_dtypes_in_one_tree(entry):
    """Blocks of one shape in two factor dtypes; each leaf keeps its own."""
    with x64():
        params = {
            "half": jnp.ones((4, 3), "bfloat16"),
            "single": jnp.ones((4, 3), "float32"),
            "double": jnp.ones((4, 3), "float64"),
        }
        tx = entry.make()
        updates, state = jax.jit(tx.update)(params, tx.init(params), params)
        assert {k: u.dtype.name for k, u in updates.items()} == {
            "half": "bfloat16",
            "single": "float32",
            "double": "float64",
        }
        factors = optax.tree.get(state, "factors")
        assert {x.dtype.name for x in jax.tree.leaves(factors)} == {"float32", "float64"}
        values = [np.asarray(u, np.float32) for u in updates.values()]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-2)
        np.testing.assert_allclose(values[2], values[1], rtol=1e-3)


@over_entries
@pytest.mark.parametrize("dtype", ["complex64", "int32", "bool"])
def test_dtypes_without_a_meaning_are_refused_by_name(entry, dtype):
    tx = entry.make()
    params = {"layer": {"kernel": jnp.ones((4, 3), dtype)}}
    with pytest.raises(ValueError, match=f"layer/kernel.*{dtype}"):
        tx.init(params)
    with pytest.raises(ValueError, match=f"layer/kernel.*{dtype}"):
        real = {"layer": {"kernel": jnp.ones((4, 3))}}
        tx.update(params, tx.init(real), real)


@pytest.mark.lenient_promotion  # of the wrapper
@over_aliases
def test_complex_parameters_as_the_error_says(entry):
    params = {"w": jnp.ones((4, 3), jnp.complex64) * (1 + 2j)}
    tx = optax.contrib.split_real_and_imaginary(entry.make())
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.complex64
    assert np.isfinite(np.asarray(updates["w"])).all()


def test_integer_leaves_beside_ours_with_masked():
    params = {"w": jnp.ones((4, 3)), "step": jnp.asarray(0)}
    tx = optax.masked(kj.shampoo(0.1), {"w": True, "step": False})
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["step"].dtype == jnp.int32


@pytest.mark.lenient_promotion  # of optax.apply_updates
@over_aliases
def test_bfloat16_gradients_of_float32_parameters(entry):
    """The usual mixed precision: 3 steps, state types stable, parameters float32."""
    params = params_like()
    _, init, update = compiled(entry.name)
    state = init(params)
    for t in range(3):
        grads = jax.tree.map(lambda g: g.astype("bfloat16"), grads_at(params, t))
        updates, new = update(grads, state, params)
        assert described(new) == described(state)
        params, state = optax.apply_updates(params, updates), new
        assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))


@pytest.mark.parametrize("grad_dtype", ["float32", "float64"])
def test_gradients_of_one_dtype_for_parameters_of_two(grad_dtype):
    """Blocks have the dtypes of the parameters: two buckets of one shape in any case."""
    with x64():
        params = {"a": jnp.ones((4, 3), jnp.float64), "b": jnp.ones((4, 3), jnp.float32)}
        grads = {name: jnp.ones((4, 3), grad_dtype) for name in params}
        tx = kj.scale_by_shampoo()
        updates, state, new = abstract_step(tx, params, grads)
        assert described(new) == described(state)
        assert {x.dtype.name for x in jax.tree.leaves(updates)} == {grad_dtype}
        assert len(state.factors) == 2
