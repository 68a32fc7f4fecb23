"""Any pytree of parameters: containers, masks, shapes, and what optax.tree does with our states."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kradagrad_jax as kj
from tests.registry import (
    assert_close,
    assert_equal,
    compiled,
    grads_at,
    over_aliases,
    over_entries,
    params_like,
    types,
)


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


W, B = (4, 3), (3,)
EMPTY = [{}, (), [], {"a": None}, {"a": {}, "b": optax.MaskedNode()}]
CONTAINERS = {  # all keep the order of the leaves
    "list": lambda p: [p["b"], p["w"], p["x"]],
    "tuple": lambda p: (p["b"], (p["w"], p["x"])),
    "named": lambda p: Pair(p["b"], Pair(p["w"], p["x"])),
    "nested": lambda p: {"layers": [{"b": p["b"]}, {"w": p["w"], "x": p["x"]}], "none": None},
    "masked": lambda p: {"a": p["b"], "gone": optax.MaskedNode(), "z": [p["w"], p["x"]]},
}
RANKS = {
    "scalar": (),
    "one": (1,),
    "ones": (1, 1),
    "row": (1, 4),
    "column": (4, 1),
    "empty": (0, 3),
    "rank3": (2, 3, 2),
    "rank4": (2, 2, 3, 2),
    "rank5": (2, 1, 3, 2, 2),
}


@over_entries
@pytest.mark.parametrize("tree", EMPTY, ids=str)
def test_trees_without_arrays(entry, tree):
    tx = entry.make()
    state = tx.init(tree)
    updates, new = tx.update(tree, state, tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert jax.tree.structure(new) == jax.tree.structure(state)


def program(tx, grads, params):
    """The traced update, as text: equal texts are equal computations."""
    return str(jax.make_jaxpr(tx.update)(grads, tx.init(params), params))


@over_entries
def test_the_container_does_not_matter(entry):
    """The same arrays in any container: the very same program."""
    params = params_like()
    tx = entry.make()
    expected = program(tx, params, params)
    for build in CONTAINERS.values():
        tree = build(params)
        assert program(tx, tree, tree) == expected


@over_aliases
def test_a_bare_array_is_a_tree(entry):
    tx = entry.make()
    both = {"w": params_like({"w": W})["w"]}
    bare, _ = tx.update(both["w"], tx.init(both["w"]), both["w"])
    dictionary, _ = tx.update(both, tx.init(both), both)
    assert_close(bare, dictionary["w"])


@over_entries
def test_every_rank(entry):
    """Scalars to rank 5 and zero-size arrays at once: shapes and dtypes kept, values finite."""
    params = params_like(RANKS)
    tx = entry.make()
    state = tx.init(params)
    own = entry.twin().init(params)
    assert all(x.size for x in jax.tree.leaves(own))  # orbax cannot save zero-size arrays
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    assert types(new) == types(jax.eval_shape(tx.init, params))


@over_aliases
def test_every_rank_in_numbers(entry):
    params = params_like(RANKS)
    tx = entry.make()
    updates, state = jax.jit(tx.update)(grads_at(params, 0), tx.init(params), params)
    for x in jax.tree.leaves((updates, state)):
        assert np.isfinite(np.asarray(x)).all()
    assert all(np.any(np.asarray(u) != 0) for u in jax.tree.leaves(updates) if u.size)


@over_entries
def test_map_params(entry):
    """All of our state is stacks of blocks, which belong to no single parameter."""
    tx, init, _ = compiled(entry.name)
    params = params_like()
    state = init(params)
    assert_equal(optax.tree.map_params(tx, lambda v: v, state), state)

    def sevens(x, like):  # whatever else is in the chain is shaped like the parameters
        assert x.shape == like.shape
        return jnp.full_like(x, 7)

    def threes(tree):
        return jax.tree.map(lambda x: jnp.full_like(x, 3), tree)

    mapped = optax.tree.map_params(tx, sevens, state, params, transform_non_params=threes)
    assert types(mapped) == types(state)
    ours = [is_ours(x) for x in jax.tree.leaves(mapped, is_leaf=is_ours)]
    assert any(ours)
    for new in jax.tree.leaves(mapped, is_leaf=is_ours):
        if is_ours(new):
            assert {float(v) for x in jax.tree.leaves(new) for v in np.ravel(x)} == {3.0}
        else:
            assert np.all(np.asarray(new) == (3 if new.dtype == jnp.int32 else 7))


def is_ours(x):
    return isinstance(x, kj.BlockState)


@over_entries
def test_counts_and_fields(entry):
    """int32 counts found and set by name; one up per step."""
    params = params_like()
    _, init, update = compiled(entry.name)
    state = init(params)
    for t in range(3):
        counts = [c for _, c in optax.tree.get_all_with_path(state, "count")]
        assert counts
        assert all(c.dtype == jnp.int32 and c.shape == () for c in counts)
        assert {int(c) for c in counts} == {t}
        _, state = update(grads_at(params, t), state, params)
    state = optax.tree.set(state, count=jnp.asarray(7, jnp.int32))
    _, state = update(grads_at(params, 3), state, params)
    assert int(optax.tree.get_all_with_path(state, "count")[0][1]) == 8
    saturated = optax.tree.set(state, count=jnp.asarray(np.iinfo(np.int32).max, jnp.int32))
    _, state = update(grads_at(params, 4), saturated, params)
    assert int(optax.tree.get_all_with_path(state, "count")[0][1]) == np.iinfo(np.int32).max
    assert optax.tree.get(state, "factors") is not None
    assert optax.tree.get(state, "no_such_field") is None


@over_aliases
def test_masked_leaves_do_not_change_the_others(entry):
    params = params_like()
    grads = grads_at(params, 0)
    part = {k: v for k, v in params.items() if k != "x"}
    tx = entry.make()
    alone, _ = jax.jit(tx.update)({k: grads[k] for k in part}, tx.init(part), part)
    mask = {"b": True, "w": True, "x": False}
    masked = optax.masked(entry.make(), mask)
    updates, _ = jax.jit(masked.update)(grads, masked.init(params), params)
    assert_close({k: updates[k] for k in part}, alone)
    assert_equal(updates["x"], grads["x"])
    by_function = optax.masked(entry.make(), lambda tree: mask)
    assert program(by_function, grads, params) == program(masked, grads, params)
    prefix = optax.masked(entry.make(), {"in": True, "out": False})
    tree = {"in": part, "out": {"x": grads["x"]}}
    assert program(prefix, tree, tree) == program(masked, grads, params)


@over_aliases
def test_partition_and_friends(entry):
    params = params_like()
    grads = grads_at(params, 0)
    labels = {"b": "sgd", "w": "ours", "x": "ours"}
    parts = optax.partition({"ours": entry.make(), "sgd": optax.sgd(0.1)}, labels)
    updates, _ = jax.jit(parts.update)(grads, parts.init(params), params)
    part = {k: params[k] for k in ("w", "x")}
    alone = optax.named_chain(("clip", optax.identity()), ("ours", entry.make()))
    expected, _ = jax.jit(alone.update)({k: grads[k] for k in part}, alone.init(part), part)
    assert_close({k: updates[k] for k in part}, expected)
    assert_close(updates["b"], -0.1 * grads["b"])
    frozen = optax.selective_transform(
        entry.make(), freeze_mask={"b": True, "w": False, "x": False}
    )
    updates, _ = jax.jit(frozen.update)(grads, frozen.init(params), params)
    assert_close({k: updates[k] for k in part}, expected)
    assert not np.any(updates["b"])


def test_flattening_leaves_one_long_vector():
    """optax.flatten hides all shapes: the whole model is one vector, left to the fallback."""
    params = params_like()
    tx = optax.flatten(kj.shampoo(0.1))
    updates, state = tx.update(params, tx.init(params), params)
    assert optax.tree.get(state, "factors") == {}
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_regular_expressions_see_slash_joined_paths():
    layout = kj.Layout(include="layer/kernel", vectors="block")
    params = {"layer": {"kernel": jnp.ones(W), "bias": jnp.ones(B)}, "head": [jnp.ones(W)]}
    text = str(kj.describe(kj.shampoo(0.1, layout=layout), params))
    assert "layer/kernel" in text
    assert "head/0" in text
    assert text.count("excluded") == 2
