"""What users of optax take for granted, for every entry of the registry."""

import pickle
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.optax_contract.entries import DEFAULTS, ENTRIES, FACTORIZATIONS, primitives
from tests.x64 import x64

every = pytest.mark.parametrize("entry", ENTRIES, ids=str)
default = pytest.mark.parametrize("entry", DEFAULTS, ids=str)


def params():
    return {"w": jnp.ones((4, 3)), "b": jnp.ones(3), "s": jnp.ones(())}


def grads(scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype), params()
    )


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def finite(tree):
    return all(np.all(np.isfinite(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree))


@every
def test_protocol(entry):
    tx = entry.make()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert optax.with_extra_args_support(tx) is tx
    state = tx.init(params())
    update = jax.jit(tx.update)
    u, new = update(grads(), state)  # params=None
    v, _ = update(grads(), state, params(), unexpected_extra_args_your_optimizer_doesnt_expect=1)
    jax.tree.map(np.testing.assert_array_equal, u, v)
    assert finite((u, new))
    assert types(new) == types(state)
    count = optax.tree.get(new, "count")
    assert count.dtype == jnp.int32 and int(count) == 1
    w, _ = update(grads(), state)
    jax.tree.map(np.testing.assert_array_equal, u, w)


@every
def test_descends_and_converges(entry):
    tx, target = entry.make(3e-2), grads(seed=5)

    def loss(p):
        return sum(
            jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (p, target)), strict=True)
        )

    def body(carry, _):
        p, state = carry
        g = jax.grad(loss)(p)
        u, state = tx.update(g, state, p)
        descent = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (g, u)), strict=True))
        return (optax.apply_updates(p, u), state), (loss(p), descent)

    start = params()
    run = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), None, length=400))
    (_, state), (losses, descent) = run(start)
    assert losses[-1] < (0.7 if "paper" in entry.name else 0.02) * losses[0]
    if "paper" in entry.name or "official" in entry.name:
        assert np.all(descent <= 0)  # positive definite: beta1 averages in the others
    assert int(state[0].rejected) == int(state[0].skipped) == 0


@every
def test_trees(entry):
    tx = entry.make()
    trees = [
        {}, (), {"a": None}, {"a": optax.MaskedNode(), "b": jnp.ones((2, 2))}, jnp.ones((3, 2)),
        [jnp.ones((2, 2)), (jnp.ones(3), None)], {"e": jnp.ones((0, 3)), "r": jnp.ones((1, 4))},
        {"k": jnp.ones((2, 2, 3)), "o": jnp.ones((2, 1, 3, 2, 2))},
    ]  # fmt: skip
    for tree in trees:
        state = tx.init(tree)
        u, new = tx.update(tree, state, tree)
        assert jax.tree.structure(u) == jax.tree.structure(tree)
        assert types(new) == types(state)
        assert all(x.size for x in jax.tree.leaves(state))


@every
def test_state_without_arrays(entry):
    tx, shapes = entry.make(), jax.eval_shape(params)
    state = jax.eval_shape(tx.init, params())
    abstract = tx.init(shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )


@every
def test_map_params_reaches_every_array_but_counts(entry):
    tx = entry.make()
    state = tx.init(params())
    mapped = optax.tree.map_params(tx, lambda v: jnp.full_like(v, 7), state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for x in jax.tree.leaves(mapped):
        assert np.all(x == 7) or x.dtype == jnp.int32


@default
@pytest.mark.parametrize("gradient_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes_are_kept(entry, dtype, gradient_dtype):
    tx = entry.make()
    p = jax.tree.map(lambda x: x.astype(dtype), params())
    g = jax.tree.map(lambda x: x.astype(gradient_dtype), grads())
    state = tx.init(p)
    u, new = jax.jit(tx.update)(g, state, p)
    assert {x.dtype for x in jax.tree.leaves(u)} == {jnp.dtype(gradient_dtype)}
    assert types(new) == types(state) and finite((u, new))


@default
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtypes_under_x64(entry, dtype):
    with x64():
        tx = entry.make()
        p = {"w": jnp.ones((4, 3), dtype), "b": jnp.ones(3, dtype)}
        state = tx.init(p)
        u, new = jax.jit(tx.update)(p, state, p)
        assert types(new) == types(state) and u["w"].dtype == dtype
        floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert {x.dtype for x in floats} == {jnp.dtype(dtype)}


@every
def test_control_flow_and_vmap(entry):
    tx, p, g = entry.make(), params(), grads()
    state = tx.init(p)

    def three():
        return jax.lax.scan(lambda s, _: (tx.update(g, s, p)[1], None), state, length=3)[0]

    scanned = jax.jit(three)()
    assert int(optax.tree.get(scanned, "count")) == 3
    jax.jit(lambda: jax.lax.cond(True, lambda: tx.update(g, state, p), lambda: (g, state)))()
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), g)
    states = jax.vmap(tx.init)(jax.tree.map(lambda x: jnp.stack([x, x]), p))
    u, _ = jax.jit(jax.vmap(tx.update))(two, states)
    single, _ = jax.jit(tx.update)(g, state)
    for a, b in zip(jax.tree.leaves(u), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-6)


@every
def test_gradient_through_an_update_is_finite(entry):
    tx, state = entry.make(), entry.make().init(params())

    def f(g):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(tx.update(g, state)[0]))

    assert finite(jax.jit(jax.grad(f))(grads()))


@default
def test_inject_hyperparams_without_static_args(entry):
    tx = optax.inject_hyperparams(entry.alias)(
        learning_rate=1e-2, beta1=0.8, beta2=0.95, momentum=0.5, weight_decay=1e-3, refresh_every=2
    )
    plain = entry.alias(
        1e-2, beta1=0.8, beta2=0.95, momentum=0.5, weight_decay=1e-3, refresh_every=2
    )
    p = params()
    a, b = tx.init(p), plain.init(p)
    inject, update = jax.jit(tx.update), jax.jit(plain.update)
    for seed in range(4):
        u, a = inject(grads(seed=seed), a, p)
        v, b = update(grads(seed=seed), b, p)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), u, v)
    assert jax.tree.structure(a.inner_state) == jax.tree.structure(b)
    a.hyperparams["learning_rate"] = jnp.asarray(0.5, jnp.float32)
    inject(grads(), a, p)
    assert inject._cache_size() == 1


@default
def test_learning_rate_schedule_equals_float(entry):
    p = params()
    a, b = entry.make(1e-2), entry.make(optax.constant_schedule(1e-2))
    u, _ = a.update(grads(), a.init(p), p)
    v, _ = b.update(grads(), b.init(p), p)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), u, v)


@default
def test_wrappers(entry):
    tx, p = entry.make(), params()
    wrapped = {
        "masked": optax.masked(tx, {"w": True, "b": False, "s": True}),
        "partition": optax.partition(
            {"a": tx, "b": optax.sgd(0.1)}, {"w": "a", "b": "b", "s": "a"}
        ),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "chain": optax.chain(optax.clip_by_global_norm(1.0), tx),
        "named_chain": optax.named_chain(("a", tx)),
        "schedule_free": optax.contrib.schedule_free(tx, 1e-2),
    }
    for name, t in wrapped.items():
        update, state = jax.jit(t.update), t.init(p)
        for seed in range(2):
            u, state = update(grads(seed=seed), state, p)
        assert finite(u), name


@default
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_multi_steps_equals_the_mean_gradient(entry, dtype):
    p = jax.tree.map(lambda x: x.astype(dtype), params())
    parts = [jax.tree.map(lambda x, c=c: (c * x).astype(dtype), grads()) for c in (1, 3)]
    mean = jax.tree.map(lambda x: (2 * x).astype(dtype), grads())
    tx = entry.make()
    steps = optax.MultiSteps(tx, 2)
    state = steps.init(p)
    u, state = steps.update(parts[0], state, p)
    assert all(np.all(np.asarray(x, np.float32) == 0) for x in jax.tree.leaves(u))
    u, state = steps.update(parts[1], state, p)
    v, _ = tx.update(mean, tx.init(p), p)
    for a, b in zip(jax.tree.leaves(u), jax.tree.leaves(v), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=1e-5
        )


@every
def test_donation_without_warnings(entry):
    tx, p = entry.make(), params()
    update = jax.jit(tx.update, donate_argnums=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, state = update(grads(), tx.init(p), p)
        update(grads(), state, p)


@every
def test_any_scale_stays_finite(entry):
    tx, p = entry.make(), params()
    update = jax.jit(tx.update)
    for scale in (0.0, 1e18, 1e-18, 1e30, 1e-30, np.nan):
        state = tx.init(p)
        for seed in range(3):
            u, state = update(grads(scale, seed), state, p)
            assert finite((u, state)), scale
        u, state = update(grads(), state, p)
        assert finite((u, state)), scale


@every
def test_a_nan_step_is_survived_inside_a_run(entry):
    tx, p = entry.make(), params()
    update, state = jax.jit(tx.update), tx.init(p)
    for seed in range(6):
        u, state = update(grads(np.nan if seed == 2 else 1.0, seed), state, p)
        assert finite((u, state))
    assert int(optax.tree.get(state, "skipped")) == 1


@every
def test_matmul_only_configurations_factorise_nothing(entry):
    tx, p = entry.make(), params()
    state = tx.init(p)
    found = primitives(jax.make_jaxpr(tx.update)(grads(), state, p).jaxpr) & FACTORIZATIONS
    assert bool(found) != entry.matmul_only, found


@every
def test_lowers_for_cpu_cuda_and_tpu(entry):
    tx, p = entry.make(), params()
    text = jax.export.export(jax.jit(tx.update), platforms=["cpu", "cuda", "tpu"])(
        grads(), tx.init(p), p
    ).mlir_module()
    assert "dot_general" in text and "HIGHEST" in text and "DEFAULT, DEFAULT" not in text


@default
def test_round_trips(entry, tmp_path):
    serialization = pytest.importorskip("flax.serialization")
    ocp = pytest.importorskip("orbax.checkpoint")
    tx, p = entry.make(), params()
    _, state = tx.update(grads(), tx.init(p), p)
    fresh = tx.init(p)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        restored = checkpointer.restore(tmp_path / "state", target)
    others = [
        restored,
        serialization.from_bytes(fresh, serialization.to_bytes(state)),
        pickle.loads(pickle.dumps(state)),
    ]
    expected, _ = tx.update(grads(seed=1), state, p)
    for other in others:
        assert jax.tree.structure(other) == jax.tree.structure(state)
        u, _ = tx.update(grads(seed=1), other, p)
        jax.tree.map(np.testing.assert_array_equal, u, expected)


@default
def test_flax_nnx(entry):
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, entry.make(3e-2), wrt=nnx.Param)
    x, losses = jnp.ones((2, 3)), []
    for _ in range(8):
        loss, g = nnx.value_and_grad(lambda m: jnp.sum((m(x) - 1) ** 2))(model)
        optimizer.update(model, g)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


@default
def test_flax_linen_train_state(entry):
    nn = pytest.importorskip("flax.linen")
    from flax.training.train_state import TrainState

    model, x = nn.Dense(4), jnp.ones((2, 3))
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), x)["params"], tx=entry.make(3e-2)
    )

    @jax.jit
    def step(state):
        loss, g = jax.value_and_grad(
            lambda p: jnp.sum((state.apply_fn({"params": p}, x) - 1) ** 2)
        )(state.params)
        return state.apply_gradients(grads=g), loss

    state, first = step(state)
    for _ in range(8):
        state, loss = step(state)
    assert loss < first


def test_nothing_is_printed(capsys):
    for entry in DEFAULTS:
        tx = entry.make()
        jax.jit(tx.update)(grads(), tx.init(params()), params())
    assert capsys.readouterr() == ("", "")


HANG = """
import jax, jax.numpy as jnp
from tests.optax_contract.entries import ENTRIES
p = {f"w{i}": jax.random.normal(jax.random.key(i), (24 + 8 * (i % 3), 24)) for i in range(8)}
for entry in ENTRIES:
    kw = {} if "staggered" in entry.name else {"refresh_every": 1}
    tx = entry.make(**kw)
    update, state = jax.jit(tx.update), tx.init(p)
    for _ in range(30):
        u, state = update(p, state, p)
    jax.block_until_ready((u, state))
print("finished")
"""


@pytest.mark.slow
def test_no_hang_with_default_flags():
    """Refresh at every step, 30 steps, every entry: batched LAPACK calls would lock up here."""
    import os

    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    env["PYTHONPATH"] = os.getcwd()
    done = subprocess.run(
        [sys.executable, "-c", HANG], env=env, capture_output=True, text=True, timeout=1200
    )
    assert done.stdout.strip() == "finished", done.stderr[-2000:]


EXPLICIT = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.optax_contract.entries import DEFAULTS, ENTRIES
for kind in (AxisType.Explicit, AxisType.Auto):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        for entry in ENTRIES if kind is AxisType.Explicit else DEFAULTS:
            tx = entry.make()
            specs = (P("x", None), P(None, "x"), P())
            for spec in specs if entry in DEFAULTS else specs[:1]:
                put = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
                p = {"w": put(jnp.ones((8, 4)), spec), "b": put(jnp.ones(8), P("x"))}
                state = jax.jit(tx.init)(p)
                u, new = jax.jit(tx.update)(p, state, p)
                if kind is AxisType.Explicit:
                    types = lambda t: jax.tree.map(jax.typeof, t)
                    assert types(tx.init(p)) == types(state) == types(new), (entry, spec)
                    assert types(u) == types(p), (entry, spec)
print("finished")
"""


@pytest.mark.slow
def test_explicit_and_auto_meshes():
    import os

    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.getcwd(),
    }
    done = subprocess.run(
        [sys.executable, "-c", EXPLICIT], env=env, capture_output=True, text=True, timeout=1200
    )
    assert done.stdout.strip() == "finished", done.stderr[-2000:]
