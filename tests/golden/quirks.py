"""What the official classes do around their preconditioner, as test-only transformations.

Source: section 3.7 of the KrADagrad specification and the code it was taken from. In-place
operations on aliased buffers are spelled out as values here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def overwriting_trace(momentum: float, nesterov: bool) -> optax.GradientTransformation:
    """`m <- mu m + u`; with Nesterov the buffer itself becomes `mu m + u` again."""

    def update(u: Any, m: Any, params: Any = None) -> tuple[Any, Any]:
        for _ in range(1 + nesterov):
            m = jax.tree.map(lambda a, b: momentum * a + b, m, u)
        return m, m

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def rounded_to_float32() -> optax.GradientTransformation:
    """Rounds float64 gradients to float32 values."""

    def update(g: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda x: x.astype(jnp.float32).astype(x.dtype), g), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class _Tracks(NamedTuple):
    count: jax.Array
    inner: Any
    grafted: Any
    momentum: Any
    graft_momentum: Any


def two_tracks(
    inner: optax.GradientTransformation,
    grafted: optax.GradientTransformation | None,
    kind: str,
    c: dict[str, Any],
    orders: dict[str, int],
) -> optax.GradientTransformation:
    """Decay and momentum of the official Shampoo step, before and after its `start`.

    Args:
      inner: preconditioned, grafted gradient.
      grafted: direction of an adaptive graft; None: the gradient itself.
      kind: graft that the class really uses; "none" keeps no momentum of its own.
      c: configuration.
      orders: modes per parameter; where there are none, "preconditioned" is the gradient itself.
    """

    def init(params: Any) -> _Tracks:
        def zeros() -> Any:
            return jax.tree.map(jnp.zeros_like, params)

        mine = None if grafted is None else grafted.init(params)
        return _Tracks(jnp.zeros((), jnp.int32), inner.init(params), mine, zeros(), zeros())

    def update(g: Any, state: _Tracks, params: Any = None) -> tuple[Any, _Tracks]:
        u, new_inner = inner.update(g, state.inner, params)
        d, new_grafted = g, None
        if grafted is not None:
            d, new_grafted = grafted.update(g, state.grafted, params)
        on = state.count + 1 >= c["start"]
        step, m, gm = {}, {}, {}
        for name in g:
            step[name], m[name], gm[name] = _leaf(
                u[name], d[name], g[name], params[name], state.momentum[name],
                state.graft_momentum[name], on, orders[name] == 0, grafted is not None, kind, c,
            )  # fmt: skip
        return step, _Tracks(state.count + 1, new_inner, new_grafted, m, gm)

    return optax.GradientTransformation(init, update)


def _leaf(u, d, g, p, m, gm, on, bare, adaptive, kind, c):
    """Step and both momenta of one parameter."""
    mu, decay, nesterov = c["momentum"], c["weight_decay"] * p, c["nesterov"]
    # Before `start`, and without modes, the "preconditioned" gradient is the gradient's own buffer,
    # rescaled in place to the norm of the graft.
    alias = ~on | bare
    scaled = g * (jnp.linalg.norm(jnp.ravel(d)) / (jnp.linalg.norm(jnp.ravel(g)) + 1e-16))
    raw = jnp.where(alias, scaled, g)  # what is in the gradient's buffer by now
    if adaptive:
        u = jnp.where(alias, raw + decay, u + decay)
        raw = jnp.where(alias, raw + decay, raw)
        d = d + decay
    else:  # the graft's direction is that buffer too: decay is added twice where both alias
        u = jnp.where(alias, raw + 2 * decay, u + decay)
        raw = jnp.where(alias, raw + 2 * decay, raw + decay)
        d = raw
    m = mu * m + u
    late = mu * m + u if nesterov else m
    if kind == "none":
        early = 2 * mu * raw if nesterov else raw
        new_gm = gm
    else:
        new_gm = mu * gm + raw
        early = mu * new_gm + d if nesterov else new_gm
        new_gm = jnp.where(on, new_gm, early)
    return jnp.where(on, late, early), jnp.where(on, late, m), new_gm
