"""Official roots that no public option gives, as block methods with a refresh of their own."""

from typing import Any

import jax
import jax.numpy as jnp

import kradagrad_jax as kj
from kradagrad_jax.factors import KradOptions, gram_method, star_method
from kradagrad_jax.linalg import checked_positive_root, inverse_root

STAR_RIDGE = 1e-6  # of the official iterative roots of KrADagrad*, relative


def own_method(method: str, c: dict[str, Any], ridge: float) -> kj.BlockMethod:
    """Our statistics and application, the official root in between."""
    if method == "shampoo":
        base = gram_method(
            beta2=c["beta2"],
            damping=ridge,
            damping_rule="absolute",
            initial=c["eps"],
            exponent=None,
            root="eigh",
            bias_correction=False,
        )
        if not c["iterative_roots"]:
            return base._replace(refresh=lambda factor, step: _clamped(factor, c, ridge))
        relative = c["eps"]
    else:
        base = star_method(
            KradOptions(
                form="direct",
                bound="official",
                initial=1 / c["eps"],
                initial_scale="absolute",
                damping=0.0,
                beta2=c["beta2"],
                exponent=None,
                root="eigh",
                root_damping=0.0,
            )
        )
        relative = STAR_RIDGE
    inverse = method == "shampoo"
    return base._replace(refresh=lambda factor, step: _iterative(factor, c, relative, inverse))


def _order(factor: kj.KronFactor, c: dict[str, Any], inverse: bool) -> int:
    """p of the root S^(-1/p) or L^(1/p)."""
    k = len(factor.statistics)
    if c["override"] > 0:
        return c["override"] if inverse else k
    return 2 * k


def _clamped(factor: kj.KronFactor, c: dict[str, Any], ridge: float) -> kj.KronFactor:
    """Eigenvalues `max(w + ridge, eps)`; a decaying statistic falls below its eps."""
    p = _order(factor, c, True)

    def root(s: jax.Array) -> jax.Array:
        w, v = jnp.linalg.eigh(s)
        return (v * jnp.maximum(w + ridge, c["eps"]) ** (-1 / p)) @ v.T

    return factor._replace(preconditioners=tuple(root(s) for s in factor.statistics))


def _iterative(
    factor: kj.KronFactor, c: dict[str, Any], relative: float, inverse: bool
) -> kj.KronFactor:
    """Coupled Newton roots; the ridge is added to the stored statistic itself.

    A 1 x 1 statistic gets no ridge and the inverse root 1, whatever its value.
    """
    p = _order(factor, c, inverse)
    statistics, roots = [], []
    for s in factor.statistics:
        eye = jnp.eye(len(s), dtype=s.dtype)
        if len(s) == 1:
            statistics.append(s)
            roots.append(eye if inverse else s)
            continue
        ridged = s + relative * jnp.max(jnp.linalg.eigvalsh(s)) * eye
        statistics.append(ridged)
        root = (inverse_root if inverse else checked_positive_root)(ridged, p, 0.0)[0]
        roots.append(root)
    return factor._replace(statistics=tuple(statistics), preconditioners=tuple(roots))
