"""What users can see of a state and of a plan: counters, and the table of `describe`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kradagrad_jax as kj
from tests.scale import defaults

pytestmark = pytest.mark.lenient_promotion  # the wrappers promote on their own

KEYS = {
    "count",
    "skipped",
    "rejected",
    "statistics",
    "statistics_max",
    "refreshes",
    "refreshes_max",
}
WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.identity()),
    "masked": lambda tx: optax.masked(tx, {"one": True, "two": False}),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(0.1)}, {"one": "a", "two": "b"}
    ),
    "accumulated": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


def rows(step: int) -> jax.Array:
    rng = np.random.default_rng(step)
    shape = (defaults.ROWS, defaults.WIDTH + defaults.DRAWN)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def stepped(tx: Any, alias: defaults.Default, steps: int) -> Any:
    tx = optax.with_extra_args_support(tx)
    p, update = defaults.params(), jax.jit(tx.update)
    state = tx.init(p)
    for t in range(steps):
        grads, extra = alias.measured(rows(t))
        _, state = update(grads, state, p, **extra)
    return state


@defaults.over()
def test_counters_of_every_alias(alias):
    state = stepped(alias.make(), alias, 3)
    found = kj.diagnostics(state)
    assert set(found) >= KEYS
    numbers = {k: float(v) for k, v in found.items()}
    for key, value in {"count": 3, "skipped": 0, "rejected": 0}.items():
        assert numbers[key] == value, key
    assert numbers["statistics"] == numbers["statistics_max"] == 3
    assert 0 <= numbers["refreshes"] <= numbers["refreshes_max"] <= 3
    jitted = jax.jit(kj.diagnostics)(state)
    assert {k: float(v) for k, v in jitted.items()} == pytest.approx(numbers, rel=1e-6)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["shampoo", "kradagrad"])
def test_found_inside_of_wrappers(name, wrapper):
    alias = next(d for d in defaults.DEFAULTS if d.name == name)
    found = defaults.diagnostics(stepped(WRAPPERS[wrapper](alias.make()), alias, 2))
    assert (found["count"], found["statistics"], found["refreshes"]) == (2, 2, 1)


def test_found_under_injected_hyperparameters():
    alias = next(d for d in defaults.DEFAULTS if d.name == "shampoo")
    tx = optax.inject_hyperparams(kj.shampoo)(0.1)
    assert defaults.diagnostics(stepped(tx, alias, 2))["statistics"] == 2


def test_a_state_of_nobody_is_an_error():
    with pytest.raises(ValueError, match="state"):
        kj.diagnostics(optax.adam(0.1).init(defaults.params()))


@defaults.over()
def test_describe_names_what_every_alias_does(alias):
    """Of the optimizer itself: its layout and its bytes, not those of a default."""
    tx, p = alias.make(), defaults.params()
    text = str(kj.describe(tx, p))
    assert all(name in text for name in ("one", "two", "kernel"))
    shapes = jax.eval_shape(lambda: p)
    assert str(kj.describe(tx, shapes)) == text


def test_describe_groups_equal_rows_and_counts_bytes():
    layers = {
        f"layer{i}": {"kernel": jnp.zeros((64, 32)), "bias": jnp.zeros(32)} for i in range(48)
    }
    tx = kj.shampoo(1e-3)
    text = str(kj.describe(tx, layers))
    assert len(text.splitlines()) < 30
    assert "48" in text
    total = sum(x.nbytes for x in jax.tree.leaves(tx.init(layers)))
    digits = text.replace(",", "").replace("_", "").replace(" ", "")
    assert str(total) in digits or any(unit in text for unit in ("kB", "KB", "KiB", "MB", "MiB"))


def described(**shapes: tuple[int, ...]) -> str:
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    return str(kj.describe(kj.shampoo(1e-3), params))


def test_describe_says_why_a_mode_has_no_factor():
    assert "max_dim" in described(embedding=(250_000, 64), w=(64, 64))
    assert "state_limit" in described(a=(4096, 8), b=(8, 4096))
    plain = described(w=(64, 64), head=(64, 10))
    assert "max_dim" not in plain and "state_limit" not in plain


def test_describe_shows_the_layout_of_the_optimizer():
    params = {"w": jax.ShapeDtypeStruct((96, 96), jnp.float32)}
    texts = {
        str(kj.describe(kj.shampoo(1e-3, layout=kj.Layout(block_size=b)), params))
        for b in (16, 32, None)
    }
    assert len(texts) == 3
