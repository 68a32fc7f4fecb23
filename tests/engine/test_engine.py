"""Timing, grafting, guards and fallbacks of the engine, seen through Shampoo."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kradagrad_jax as kj


def params_and_grads(n=6, seed=0):
    keys = jax.random.split(jax.random.key(seed), n + 1)
    shapes = {"w": (6, 4), "b": (4,)}

    def draw(key):
        parts = jax.random.split(key, len(shapes))
        return {k: jax.random.normal(p, s) for (k, s), p in zip(shapes.items(), parts, strict=True)}

    return draw(keys[0]), [draw(k) for k in keys[1:]]


def run(tx, params, grads):
    state, out, update = tx.init(params), [], jax.jit(tx.update)
    for g in grads:
        u, state = update(g, state, params)
        out.append(u)
    return out, state


STILL = kj.BlockMethod(
    init=lambda shape, dtype: jnp.zeros((), dtype),
    accumulate=lambda factor, statistic, step: factor,
    refresh=lambda factor, step: factor,
    precondition=lambda factor, g, step: g,
)


def due(every, timing, steps=25, kind="refreshes"):
    """At which steps the clock of a block that never lacks a gradient goes on."""
    intervals = {"refresh_every": every} if kind == "refreshes" else {"statistics_every": every}
    tx = kj.scale_by_blocks(STILL, timing=timing, **intervals)
    params = {"w": jnp.ones((2, 2))}

    def step(state, _):
        new = tx.update(params, state)[1]
        return new, getattr(new.clock["2x2"], kind)[0]

    _, seen = jax.lax.scan(step, tx.init(params), length=steps - 1)
    return (1 + np.flatnonzero(np.diff(np.concatenate([[0], seen])))).tolist()


def test_due_steps():
    assert due(10, kj.Timing()) == [1, 11, 21]
    assert due(10, kj.Timing(start=5)) == [5, 11, 21]
    assert due(4, kj.Timing(start=3, phase=0)) == [3, 4, 8, 12, 16, 20, 24]
    assert due(4, kj.Timing(start=3, phase=0, first_refresh=4)) == [4, 8, 12, 16, 20, 24]
    assert due(1, kj.Timing(start=3)) == list(range(3, 25))
    assert due(10, kj.Timing(), kind="statistics") == [1, 11, 21]


def test_interval_may_be_traced_or_a_function_of_the_count():
    params, grads = params_and_grads(9)

    def with_every(every):
        return run(kj.scale_by_shampoo(refresh_every=every), params, grads)[0]

    plain = with_every(3)
    injected = optax.inject_hyperparams(kj.shampoo)(1.0, refresh_every=3)
    other = run(injected, params, grads)[0]
    for a, b, c in zip(plain, with_every(lambda count: 3), other, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, -y, rtol=1e-5, atol=1e-6), a, c)


def test_refresh_happens_only_when_due():
    params, grads = params_and_grads(7)
    tx, state = kj.scale_by_shampoo(refresh_every=3), None
    state = tx.init(params)
    changed = []
    for t, g in enumerate(grads, 1):
        old = state.factors["6x4"].preconditioners[0]
        _, state = tx.update(g, state)
        if np.any(old != state.factors["6x4"].preconditioners[0]):
            changed.append(t)
    assert changed == [1, 4, 7]


@pytest.mark.parametrize("kind", ["none", "sgd", "adagrad", "rmsprop", "adam"])
def test_before_start_the_graft_steps_alone_and_then_gives_the_length(kind):
    params, grads = params_and_grads(5)
    tx = kj.scale_by_shampoo(graft=kind, beta1="none", timing=kj.Timing(start=4), refresh_every=1)
    reference = {
        "none": optax.identity(),
        "sgd": optax.identity(),
        "adagrad": optax.scale_by_rss(0.0, 1e-8),
        "rmsprop": optax.scale_by_rms(0.999, 1e-8, eps_in_sqrt=False),
        "adam": optax.scale_by_adam(b1=0.0),
    }[kind]
    ours, theirs = run(tx, params, grads)[0], run(reference, params, grads)[0]
    for t, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        if t < 4:
            np.testing.assert_allclose(a["w"], b["w"], rtol=1e-4)
        elif kind != "none":
            norm = np.linalg.norm
            np.testing.assert_allclose(norm(a["w"]), norm(b["w"]), rtol=1e-4)
            assert np.max(np.abs(a["w"] - b["w"])) > 1e-3


def test_ramp_blends_the_preconditioned_direction_in():
    params, grads = params_and_grads(4)
    common = {"beta1": "none", "refresh_every": 1, "graft": "sgd"}
    full = run(kj.scale_by_shampoo(**common), params, grads)[0]
    ramp = run(kj.scale_by_shampoo(**common, timing=kj.Timing(ramp=3)), params, grads)[0]
    for t, (g, u, r) in enumerate(zip(grads, full, ramp, strict=True), 1):
        share = min(1.0, t / 4)
        np.testing.assert_allclose(r["w"], share * u["w"] + (1 - share) * g["w"], rtol=2e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"root": "newton"}, {"root": "tracked"}, {"statistics": "square_root"},
     {"statistics": kj.SquareRoot(3)}, {"graft": kj.Graft("adam", per="block")}],
    ids=str,
)  # fmt: skip
def test_a_parameter_whose_first_gradients_are_zero_moves_when_they_come(options):
    """As behind a zero-initialised head: 0 * inf = NaN once, for a default Shampoo."""
    params = {"w": jnp.zeros((20, 20))}
    draws = [jax.random.normal(jax.random.key(t), (20, 20)) for t in range(6)]
    grads = [params, params, *({"w": g} for g in draws)]
    out, state = run(kj.scale_by_shampoo(**options), params, grads)
    norms = [float(jnp.linalg.norm(u["w"])) for u in out]
    assert norms[:2] == [0.0, 0.0]
    assert all(np.isfinite(n) and n > 1 for n in norms[2:])
    assert int(state.rejected) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_bad_gradient_changes_nothing_but_counts(bad):
    params, grads = params_and_grads(5)
    tx = kj.scale_by_shampoo(refresh_every=1)
    broken = {"w": grads[1]["w"].at[0, 0].set(bad), "b": grads[1]["b"]}
    _, before = run(tx, params, grads[:1])
    updates, after = tx.update(broken, before)
    assert all(np.all(u == 0) for u in jax.tree.leaves(updates))
    assert int(after.count) == 2 and int(after.skipped) == 1 and int(before.skipped) == 0
    same = before._replace(count=after.count, skipped=after.skipped)
    jax.tree.map(np.testing.assert_array_equal, after, same)
    nxt, _ = tx.update(grads[2], after)
    expected, _ = tx.update(grads[2], before)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), nxt, expected)


def test_a_block_that_fails_keeps_its_factor_and_the_others_go_on():
    def fail_on_large(factor, statistic, step):
        return factor + jnp.where(statistic[0, 0] > 5, jnp.nan, 1.0)

    method = kj.BlockMethod(
        init=lambda shape, dtype: jnp.zeros(shape, dtype),
        accumulate=fail_on_large,
        refresh=lambda factor, step: factor,
        precondition=lambda factor, g, step: g * factor,
    )
    tx = kj.scale_by_blocks(method)
    params = {"good": jnp.ones((2, 2)), "bad": jnp.full((2, 2), 9.0)}
    updates, state = tx.update(params, tx.init(params))
    np.testing.assert_array_equal(updates["good"], jnp.ones((2, 2)))
    np.testing.assert_array_equal(updates["bad"], jnp.zeros((2, 2)))
    assert int(state.rejected) == 1


@pytest.mark.parametrize("fallback", ["identity", "sgd", "adam", optax.scale_by_adam(b1=0.0)])
def test_fallback_of_uncovered_parameters(fallback):
    params, grads = params_and_grads(4)
    tx = kj.scale_by_shampoo(beta1="none", graft="none", fallback=fallback)
    ours = run(tx, params, grads)[0]
    reference = optax.identity() if fallback in ("identity", "sgd") else optax.scale_by_adam(b1=0.0)
    theirs = run(reference, params, grads)[0]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["b"], b["b"], rtol=1e-4)


def test_stacked_layers_equal_separate_layers():
    layers = [params_and_grads(4, seed)[1] for seed in range(3)]
    separate = {f"l{i}": layers[i][0]["w"] for i in range(3)}
    grads = [{f"l{i}": layers[i][t]["w"] for i in range(3)} for t in range(4)]
    stacked = [{"l": jnp.stack([g[f"l{i}"] for i in range(3)])} for g in grads]
    a = run(kj.scale_by_shampoo(), separate, grads)[0]
    tx = kj.scale_by_shampoo(layout=kj.Layout(stacked="l"))
    b = run(tx, {"l": jnp.stack(list(separate.values()))}, stacked)[0]
    for x, y in zip(a, b, strict=True):
        for i in range(3):
            np.testing.assert_allclose(x[f"l{i}"], y["l"][i], rtol=2e-5, atol=1e-6)


def test_staggering_refreshes_every_block_once_per_period():
    params = {f"p{i}": jnp.zeros((4, 4)) for i in range(7)} | {"q": jnp.zeros((3, 4))}
    keys = iter(jax.random.split(jax.random.key(1), 200))
    tx = kj.scale_by_shampoo(refresh_every=4, timing=kj.Timing(stagger=True))
    state, update = tx.init(params), jax.jit(tx.update)
    changes = []
    for _ in range(9):
        g = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
        _, new = update(g, state)
        changes.append(
            np.concatenate(
                [
                    np.any(
                        new.factors[k].preconditioners[0] != state.factors[k].preconditioners[0],
                        axis=(1, 2),
                    )
                    for k in sorted(new.factors)
                ]
            )
        )
        state = new
    assert changes[0].all()
    for start in (1, 5):
        np.testing.assert_array_equal(np.sum(changes[start : start + 4], axis=0), np.ones(8))
    assert max(c.sum() for c in changes[1:]) <= 3


def test_stagger_needs_a_fixed_interval():
    with pytest.raises(ValueError, match="static_args"):
        kj.scale_by_shampoo(timing=kj.Timing(stagger=True), refresh_every=lambda t: 3)


def test_errors_name_the_parameter_and_the_remedy():
    tx = kj.shampoo(1e-3)
    with pytest.raises(ValueError, match=r"a/w.*split_real_and_imaginary"):
        tx.init({"a": {"w": jnp.zeros((2, 2), jnp.complex64)}})
    with pytest.raises(ValueError, match=r"'ids'.*optax.masked"):
        tx.init({"ids": jnp.zeros((2, 2), jnp.int32)})
    state = tx.init({"w": jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"'w'.*init again"):
        tx.update({"w": jnp.zeros((3, 2))}, state)
    with pytest.raises(ValueError, match="init again"):
        tx.update({"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}, state)
    with pytest.raises(ValueError, match="preset"):
        kj.shampoo(1e-3, preset="best")
    with pytest.raises(TypeError, match="dampening"):
        kj.shampoo(1e-3, dampening=1)


def test_factors_of_half_precision_parameters_are_float32():
    params = {"w": jnp.ones((4, 3), jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}
    tx = kj.shampoo(1e-2)
    updates, state = tx.update(params, tx.init(params), params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("shape", [(8, 8), (20, 12), (3, 3, 4, 8)])
def test_state_bytes_follow_the_documented_formula(shape):
    params = {"w": jnp.zeros(shape)}
    layout = kj.Layout(block_size=8)
    for make in (kj.shampoo, kj.kradagrad_star, kj.kradagrad):
        state = make(1e-3, layout=layout, graft="none", beta1="none").init(params)
        blocks = state[0].factors
        expected = sum(
            f.statistics[0].shape[0] * 2 * sum(int(n) ** 2 for n in key.split("x")) * 4
            for key, f in blocks.items()
        )
        clocks = sum(8 * f.statistics[0].shape[0] for f in blocks.values())
        counts = 4 * 3 + 4 + clocks  # of updates, skipped, rejected; the meaning; per block
        assert sum(x.nbytes for x in jax.tree.leaves(state)) == expected + counts
