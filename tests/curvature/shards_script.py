"""Run by test_samples.py in a process with eight simulated devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kradagrad_jax.curvature import losses
from kradagrad_jax.curvature.samples import Samples, curvature_vectors, sampled_gradients

RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32),
    "v": jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32),
}
X = jnp.asarray(RNG.normal(size=(32, 6)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, 3, 32))
WEIGHTS = jnp.asarray(RNG.integers(0, 2, 32), jnp.float32).at[:4].set(0)  # one shard is all masked
LOSS = losses.softmax_cross_entropy()
KEY = jax.random.key(7)


def model(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def omegas(samples: Samples):
    return {k: (x[0] @ x[0].T, x[0].T @ x[0]) for k, x in samples.values.items()}


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6 * float(jnp.abs(y).max()))


def check_jit_with_sharded_arrays(mesh):
    """The same key gives the same labels, however the batch lies."""
    step = jax.jit(functools.partial(sampled_gradients(model, LOSS), rng=KEY))
    one = step(PARAMS, X, LABELS)
    rows, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    many = step(
        jax.device_put(PARAMS, whole), jax.device_put(X, rows), jax.device_put(LABELS, rows)
    )
    close(many, one)
    close(omegas(many[2]), omegas(one[2]))


def by_hand(weights, shards):
    """One device, the labels that the shards draw."""
    (value, grads), z = (
        jax.value_and_grad(lambda p: LOSS.value(model(p, X), LABELS, weights))(PARAMS),
        model(PARAMS, X),
    )
    keys = [jax.random.fold_in(KEY, r) for r in range(shards)]
    parts = [LOSS.pseudo_gradient(k, x) for k, x in zip(keys, jnp.split(z, shards), strict=True)]
    s = jnp.concatenate(parts)
    if weights is not None:
        s = s * jnp.sqrt(weights)[:, None]
    pullback = jax.vjp(lambda p: model(p, X), PARAMS)[1]
    terms = LOSS.terms(z, weights)
    return value, grads, Samples.from_gradients(pullback(s / terms)[0], terms=terms)


def check_shard_map(mesh, weights, check_vma):
    step = sampled_gradients(model, LOSS, axis_name="d")

    def sharded(params, x, labels, w, update):
        (value, _), grads, samples = step(
            params, x, labels, rng=KEY, weights=w if weights is not None else None,
            update_stats=update,
        )  # fmt: skip
        return value, grads, samples

    run = jax.jit(
        jax.shard_map(
            sharded,
            mesh=mesh,
            in_specs=(P(), P("d"), P("d"), P("d"), P()),
            out_specs=P(),
            check_vma=check_vma,
        )
    )
    w = jnp.ones(32) if weights is None else weights
    many = run(PARAMS, X, LABELS, w, True)
    one = by_hand(weights, 8)
    close(many, one)
    close(omegas(many[2]), omegas(one[2]))
    off = run(PARAMS, X, LABELS, w, False)
    close(off[:2], one[:2])
    assert not off[2].fresh
    assert not any(x.any() for x in off[2].values.values())


def check_contracting_first_would_be_wrong():
    """Averages of the shards' own contractions are about eight times as large."""
    z, pullback = jax.vjp(lambda p: model(p, X), PARAMS)

    def trace(key, shards):
        parts = [
            curvature_vectors(lambda s, r=r: pullback(jnp.zeros_like(z).at[r::shards].set(s)),
                              z[r::shards], LOSS, jax.random.fold_in(key, r))
            for r in range(shards)
        ]  # fmt: skip
        return sum(jnp.sum(p.values["w"] ** 2) for p in parts) / shards

    keys = jax.random.split(jax.random.key(0), 200)
    one, many = (float(jnp.mean(jax.vmap(lambda k, n=n: trace(k, n))(keys))) for n in (1, 8))
    assert 5 < many / one < 12, many / one


def main():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    assert len(jax.devices()) == 8
    check_jit_with_sharded_arrays(mesh)
    for weights in (None, WEIGHTS):
        check_shard_map(mesh, weights, True)
    check_shard_map(mesh, None, False)
    check_contracting_first_would_be_wrong()


if __name__ == "__main__":
    main()
