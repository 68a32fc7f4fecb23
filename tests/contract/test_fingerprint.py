"""A state belongs to a method and to the settings that give its arrays their meaning."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kradagrad_jax as kj
from tests.registry import grads_at, params_like, types
from tests.scale import defaults

# one tree of arrays, six meanings
MEANINGS = {
    "gram": lambda: kj.shampoo(0.1),
    "square_root": lambda: kj.shampoo(0.1, statistics="square_root"),
    "newton": lambda: kj.shampoo(0.1, root="newton"),
    "sum": lambda: kj.shampoo(0.1, beta2=1.0),
    "star": lambda: kj.kradagrad_star(0.1),
    "alternating": lambda: kj.kradagrad(0.1),
}
NUMBERS = {"damping": 1e-4, "beta2": 0.95, "beta1": 0.8, "refresh_every": 7}


@pytest.mark.parametrize("other", [name for name in MEANINGS if name != "gram"])
def test_a_state_of_another_meaning_is_refused(other):
    params = params_like()
    tx = MEANINGS["gram"]()
    state = MEANINGS[other]().init(params)
    with pytest.raises(ValueError) as error:
        tx.update(grads_at(params, 0), state, params)
    method = {"star": "kradagrad", "alternating": "kradagrad"}.get(other, "shampoo")
    assert "shampoo" in str(error.value) and method in str(error.value)


@pytest.mark.parametrize(
    "graft",
    ["adagrad", kj.Graft("adam", normalize=True), kj.Graft("rmsprop", normalize=True)],
    ids=str,
)
def test_a_state_of_other_accumulators_is_refused(graft):
    """A sum of squares is no average of them, and neither is one of unit gradients."""
    params = params_like()
    for field in ("graft", "fallback"):
        state = kj.shampoo(0.1, **{field: graft}).init(params)
        with pytest.raises(ValueError, match="was made by"):
            kj.shampoo(0.1).update(grads_at(params, 0), state, params)
    state = kj.shampoo(0.1, graft="rmsprop").init(params)  # averages, with other corrections
    kj.shampoo(0.1).update(grads_at(params, 0), state, params)


def test_structures_of_states_tell_meanings_apart():
    params = params_like()
    trees = {name: jax.tree.structure(make().init(params)) for name, make in MEANINGS.items()}
    for a, b in itertools.combinations(trees, 2):
        assert trees[a] != trees[b], (a, b)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_may_change_in_the_middle_of_a_run(name):
    """Damping, decay and intervals are no part of the meaning."""
    params = params_like()
    state = kj.shampoo(0.1).init(params)
    tx = kj.shampoo(0.1, **{name: NUMBERS[name]})
    assert jax.tree.structure(tx.init(params)) == jax.tree.structure(state)
    _, new = jax.jit(tx.update)(grads_at(params, 0), state, params)
    assert types(new) == types(state)


@defaults.over()
def test_the_state_of_an_alias_is_its_own(alias):
    """Two equal optimizers share states; their structure hashes and compares."""
    p = defaults.params()
    a, b = (jax.tree.structure(alias.make().init(p)) for _ in range(2))
    assert a == b and hash(a) == hash(b)


def named(tree: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: jax.tree_util.keystr(path), tree)


@defaults.over()
def test_map_params_with_a_second_tree(alias):
    """What is shaped like a parameter meets that parameter's entry, all else the other function."""
    p, tx = defaults.params(), alias.make()
    names, seen = named(p), []

    def of_parameter(x: jax.Array, name: str) -> jax.Array:
        shape = dict(zip(jax.tree.leaves(names), jax.tree.leaves(p), strict=True))[name].shape
        assert x.shape == shape, (name, x.shape)
        seen.append(name)
        return jnp.full_like(x, 7)

    state = tx.init(p)

    def of_others(x: Any) -> Any:  # optax hands on what stands at one leaf of its placeholder
        return jax.tree.map(lambda y: jnp.full_like(y, 3), x)

    mapped = optax.tree.map_params(tx, of_parameter, state, names, transform_non_params=of_others)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert int(optax.tree.get_all_with_path(mapped, "count")[0][1]) == 3
    if alias.name in ("shampoo", "kradagrad_star", "kradagrad"):
        assert not seen  # averages live with the blocks
        others = [np.all(np.asarray(x) == 3) for x in jax.tree.leaves(mapped[0])]
        assert all(others)
