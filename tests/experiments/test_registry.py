"""Optimizers and tasks by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kradagrad_jax as kj
from kradagrad_jax.curvature import CaptureSpec, Layer
from kradagrad_jax.experiments import optimizers, tasks
from kradagrad_jax.experiments.names import UsageError, lookup

PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}


@pytest.mark.parametrize("name", sorted(optimizers.OPTIMIZERS))
def test_every_entry_takes_a_traced_learning_rate(name):
    if reason := optimizers.absent(name):
        pytest.skip(reason)
    recipe = optimizers.resolve(name, {})
    spec = CaptureSpec.from_layers([Layer.dense("w", (4, 3), bias="b")])
    if name in ("b_kfac", "br_kfac", "bc_kfac", "brc_kfac"):
        spec = dataclasses.replace(spec, examples=8)
    extra = {} if recipe.capture is None else {"curvature": None}

    @jax.jit
    def update(rate):
        tx = optax.with_extra_args_support(recipe(rate, spec))
        grads = jax.tree.map(lambda p: p + 1.0, PARAMS)
        return tx.update(grads, tx.init(PARAMS), PARAMS, **extra)[0]

    small, large = update(jnp.float32(1e-3)), update(jnp.float32(1e-2))
    assert jax.tree.all(jax.tree.map(lambda u: bool(jnp.all(jnp.isfinite(u))), large))
    np.testing.assert_allclose(large["w"], 10 * small["w"], rtol=1e-4)


def test_one_line_registers_an_optimizer(monkeypatch):
    monkeypatch.setattr(optimizers, "OPTIMIZERS", dict(optimizers.OPTIMIZERS))
    optimizers.register("halved", optax.sgd, "an example", momentum=0.5)
    tx = optimizers.resolve("halved", {"nesterov": True})(0.1)
    expected = optax.sgd(0.1, momentum=0.5, nesterov=True)
    for one in (tx, expected):
        updates = one.update(PARAMS, one.init(PARAMS), PARAMS)[0]
        np.testing.assert_allclose(updates["w"], -0.15, rtol=1e-6)


def test_tables_become_config_objects():
    options = {"layout": {"block_size": 2}, "timing": {"start": 2}, "graft": {"kind": "sgd"}}
    tx = optimizers.resolve("shampoo_sqrt", options | {"statistics": {"fold_every": 2}})(0.1)
    reference = kj.shampoo(
        0.1,
        layout=kj.Layout(block_size=2),
        timing=kj.Timing(start=2),
        graft=kj.Graft("sgd"),
        statistics=kj.SquareRoot(fold_every=2),
    )
    shapes = jax.tree.map(jnp.shape, tx.init(PARAMS))
    assert shapes == jax.tree.map(jnp.shape, reference.init(PARAMS))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shampo", {}, "did you mean 'shampoo'"),
        ("shampoo", {"refresh": 3}, "did you mean 'refresh_every'"),
        ("shampoo", {"timing": {"strat": 3}}, "did you mean 'start'"),
        ("adamw", {"preset": "paper"}, "optimizer 'adamw' has no option 'preset'"),
    ],
)
def test_mistakes_name_the_remedy(name, options, message):
    with pytest.raises(UsageError, match=message):
        optimizers.resolve(name, options)


def test_absent_library_is_named(monkeypatch):
    monkeypatch.setattr(optimizers, "OPTIMIZERS", dict(optimizers.OPTIMIZERS))
    optimizers.register("gone", "optax.contrib:no_such_optimizer", "an example")
    with pytest.raises(UsageError, match=r"'gone' needs optax\.contrib\.no_such_optimizer"):
        optimizers.resolve("gone", {})


def test_lookup_lists_what_is_known():
    with pytest.raises(UsageError, match=r"unknown thing 'zzz' \(known: a, b\)"):
        lookup({"b": 1, "a": 2}, "zzz", "thing")


def test_task_mistakes():
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        tasks.make_task("digit", {})
    with pytest.raises(UsageError, match="task 'quadratic' has no option 'm'"):
        tasks.make_task("quadratic", {"m": 3})
