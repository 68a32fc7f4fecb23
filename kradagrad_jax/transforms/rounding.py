"""Stochastic rounding: parameters in bfloat16 without a float32 copy of them."""

from typing import Any

import jax
import jax.numpy as jnp

from kradagrad_jax.engine import trees


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """One of the two bfloat16 neighbours of every entry, such that the mean is the entry.

    Args:
      x: float32 array. What is not finite stays so.
      key: random key.

    Returns:
      bfloat16 array.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = (bits + noise) >> 16  # the upper half of a float32 is a bfloat16
    chosen = jax.lax.bitcast_convert_type(kept.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), chosen, x.astype(jnp.bfloat16))


def apply_updates_stochastically(params: Any, updates: Any, key: jax.Array) -> Any:
    """``optax.apply_updates`` with stochastic rounding of bfloat16 parameters.

    Rounded to nearest, updates below 1/512 of a parameter are lost, step after step; here they
    arrive in the mean, at the price of one random number per entry and step.

    Args:
      params: tree of parameters; those of other dtypes than bfloat16 are treated as by optax.
      updates: tree of the same structure, of any floating dtypes; None and masked leaves: no
        update.
      key: a random key of this step, such as ``jax.random.fold_in(key, step)``.

    Returns:
      New parameters, in their own dtypes.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from kradagrad_jax import apply_updates_stochastically
      >>> params = {"w": jnp.ones(1000, jnp.bfloat16)}
      >>> updates = {"w": jnp.full(1000, 1e-3)}
      >>> new = apply_updates_stochastically(params, updates, jax.random.key(0))
      >>> bool(jnp.abs(jnp.mean(new["w"].astype(jnp.float32)) - 1.001) < 3e-4)
      True
    """
    leaves, treedef = jax.tree.flatten(params, is_leaf=_absent)
    given = jax.tree.flatten(updates, is_leaf=_absent)[0]
    out = []
    for i, (p, u) in enumerate(zip(leaves, given, strict=True)):
        if _absent(p) or _absent(u):
            out.append(p)
        elif p.dtype == jnp.bfloat16:
            moved = p.astype(jnp.float32) + u.astype(jnp.float32)
            out.append(stochastic_round(moved, jax.random.fold_in(key, i)))
        else:
            out.append((p + u).astype(p.dtype))
    return treedef.unflatten(out)


def _absent(x: Any) -> bool:
    return x is None or trees.is_masked(x)
