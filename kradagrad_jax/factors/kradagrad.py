"""Block methods of KrADagrad* (all modes at every step) and KrADagrad (one mode per step)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.factors import krad
from kradagrad_jax.factors.kron import KronFactor, apply_dense, init_kron
from kradagrad_jax.factors.method import BlockMethod, Step
from kradagrad_jax.factors.roots import default_exponent, make_root
from kradagrad_jax.linalg import (
    inverse_update,
    left_power,
    mode_gram,
    multiply_modes,
    unfold,
)


class KradOptions(NamedTuple):
    """Arguments of both methods; see :func:`kradagrad_jax.scale_by_kradagrad_star`."""

    form: str
    bound: str
    initial: Any
    initial_scale: str
    damping: Any
    beta2: Any
    exponent: Any
    root: str
    root_damping: Any


class DelayedFactor(NamedTuple):
    """Direct form whose statistics are folded in at a refresh only.

    Attributes:
      statistics: per mode L ``(n_i, n_i)``.
      preconditioners: per mode ``(n_i, n_i)``.
      pending: per mode the Gram matrices since the last refresh ``(n_i, n_i)``.
    """

    statistics: tuple[jax.Array, ...]
    preconditioners: tuple[jax.Array, ...]
    pending: tuple[jax.Array, ...]


def _decayed(x: jax.Array, beta2: Any) -> jax.Array:
    """``x / beta2``, skipped while tracing where beta2 is the Python number 1."""
    return x if isinstance(beta2, (int, float)) and beta2 == 1 else x / jnp.asarray(beta2, x.dtype)


def _update_one(o: KradOptions, x: jax.Array, u: jax.Array) -> jax.Array:
    """New statistic of one mode: L, or S / K with L = S S^T in the factored and exact forms."""
    if o.form in ("factored", "exact"):
        start = jnp.sqrt(jnp.asarray(o.initial, x.dtype))
        if o.initial_scale == "gradient":
            x = _root_first_scale(x, u, start)
        x = _decayed(x, _sqrt(o.beta2))
        return krad.krad_factored(x, u) if o.form == "factored" else inverse_update(x, u)
    if o.initial_scale == "gradient":
        x = krad.first_scale(x, u, o.initial)
    return krad.krad_step(_decayed(x, o.beta2), u, bound=o.bound, damping=o.damping)


def _sqrt(x: Any) -> Any:
    return x**0.5 if isinstance(x, (int, float)) else jnp.sqrt(x)


def _root_first_scale(s: jax.Array, u: jax.Array, start: jax.Array) -> jax.Array:
    """:func:`krad.first_scale` for a square root of L."""
    untouched = jnp.all(jnp.diagonal(s) == start)
    mean = jnp.sum(u * u) / u.shape[0]
    usable = untouched & (mean > 0)
    return jnp.where(usable, s / jnp.sqrt(jnp.where(usable, mean, 1.0)), s)


def _root_of(o: KradOptions):
    """``(statistic, old preconditioner, exponent, step) -> preconditioner`` and its application."""
    if o.form == "factored" or o.form == "exact":
        if o.root != "eigh":
            raise ValueError(
                f"form={o.form!r} takes its root from a singular value decomposition; "
                f"leave root='eigh', got {o.root!r}"
            )
        return (lambda x, p, e, step: left_power(x, e)), apply_dense
    how = make_root(o.root, o.root_damping, "absolute")
    return how.compute, how.apply


def _init(o: KradOptions, shape: tuple[int, ...], dtype: Any) -> KronFactor:
    scale = jnp.asarray(o.initial, dtype)
    return init_kron(shape, jnp.sqrt(scale) if o.form in ("factored", "exact") else scale, dtype)


def star_method(o: KradOptions) -> BlockMethod:
    """KrADagrad* (arXiv 2305.19416, Algorithms 1 and 3): ``P_i = L_i^(1/(2k))``."""
    if o.form == "delayed":
        return _delayed_method(o)
    compute, apply = _root_of(o)

    def accumulate(factor: KronFactor, g: jax.Array, step: Step) -> KronFactor:
        return factor._replace(
            statistics=tuple(
                _update_one(o, x, unfold(g, i)) for i, x in enumerate(factor.statistics)
            )
        )

    def refresh(factor: KronFactor, step: Step) -> KronFactor:
        shape = tuple(x.shape[0] for x in factor.statistics)
        e = default_exponent(shape, o.exponent, 0.5)
        return factor._replace(
            preconditioners=tuple(
                compute(x, p, e, step)
                for x, p in zip(factor.statistics, factor.preconditioners, strict=True)
            )
        )

    return BlockMethod(
        init=lambda shape, dtype: _init(o, shape, dtype),
        accumulate=accumulate,
        refresh=refresh,
        precondition=lambda factor, g, step: apply(factor, g),
    )


def _delayed_method(o: KradOptions) -> BlockMethod:
    """KrADagrad* with one KrAD step per refresh on the summed Gram matrices (supplement C.2)."""
    compute, apply = _root_of(o._replace(form="direct"))

    def init(shape: tuple[int, ...], dtype: Any) -> DelayedFactor:
        plain = _init(o, shape, dtype)
        return DelayedFactor(*plain, tuple(jnp.zeros_like(x) for x in plain.statistics))

    def accumulate(factor: DelayedFactor, g: jax.Array, step: Step) -> DelayedFactor:
        b = jnp.asarray(o.beta2, g.dtype)
        return factor._replace(
            pending=tuple(b * a + mode_gram(g, i) for i, a in enumerate(factor.pending))
        )

    def refresh(factor: DelayedFactor, step: Step) -> DelayedFactor:
        shape = tuple(x.shape[0] for x in factor.statistics)
        e = default_exponent(shape, o.exponent, 0.5)
        statistics = []
        for x, a in zip(factor.statistics, factor.pending, strict=True):
            if o.initial_scale == "gradient":
                x = krad.first_scale(x, jnp.sqrt(jnp.diagonal(a))[:, None], o.initial)
            statistics.append(krad.krad_step_gram(_decayed(x, o.beta2), a, o.damping))
        return DelayedFactor(
            tuple(statistics),
            tuple(
                compute(x, p, e, step)
                for x, p in zip(statistics, factor.preconditioners, strict=True)
            ),
            tuple(jnp.zeros_like(a) for a in factor.pending),
        )

    def precondition(factor: DelayedFactor, g: jax.Array, step: Step) -> jax.Array:
        return apply(KronFactor(factor.statistics, factor.preconditioners), g)

    return BlockMethod(init, accumulate, refresh, precondition)


def alternating_method(o: KradOptions) -> BlockMethod:
    """KrADagrad (arXiv 2305.19416, Algorithm 2): one mode per step, square roots at any order.

    The statistic of the scheduled mode is taken from the gradient preconditioned in all others.
    """
    if o.form == "delayed":
        raise ValueError("kradagrad has no delayed form; use kradagrad_star(form='delayed')")
    compute, apply = _root_of(o)
    square_root_kept = o.root == "tracked"

    def others(factor: KronFactor, g: jax.Array, mode: int) -> jax.Array:
        """``g`` preconditioned in all modes but one."""
        ps = factor.preconditioners
        if square_root_kept:
            g = multiply_modes(g, [k.T for k in ps], skip=(mode,))
        return multiply_modes(g, ps, skip=(mode,))

    def accumulate(factor: KronFactor, g: jax.Array, step: Step) -> KronFactor:
        def at(mode: int):
            def branch() -> tuple[jax.Array, ...]:
                u = unfold(others(factor, g, mode), mode)
                new = list(factor.statistics)
                new[mode] = _update_one(o, new[mode], u)
                return tuple(new)

            return branch

        mode = scheduled(factor, step)
        branches = [at(i) for i in range(len(factor.statistics))]
        return factor._replace(statistics=jax.lax.switch(mode, branches))

    def scheduled(factor: KronFactor, step: Step) -> jax.Array:
        return krad.scheduled_mode(step.count, tuple(x.shape[0] for x in factor.statistics))

    def refresh(factor: KronFactor, step: Step) -> KronFactor:
        e = 0.5 if o.exponent is None else o.exponent
        # every mode has its first turn within the first k steps
        early = step._replace(
            first_refresh=step.first_refresh | (step.count <= len(factor.statistics))
        )

        def one(mode: int):
            x, old = factor.statistics[mode], factor.preconditioners[mode]
            start = jnp.asarray(o.initial, x.dtype)
            start = jnp.sqrt(start) if o.form in ("factored", "exact") else start
            # a mode that was never updated keeps P = I
            touched = jnp.any(jnp.diagonal(x) != start)
            return lambda: jnp.where(touched, compute(x, old, e, early), old)

        # with a refresh at every step only the mode of this step has changed
        mode = scheduled(factor, step)
        every_mode = jnp.asarray(step.interval != 1) | step.first_refresh
        return factor._replace(
            preconditioners=tuple(
                jax.lax.cond(every_mode | (mode == i), one(i), lambda p=p: p)
                for i, p in enumerate(factor.preconditioners)
            )
        )

    return BlockMethod(
        init=lambda shape, dtype: _init(o, shape, dtype),
        accumulate=accumulate,
        refresh=refresh,
        precondition=lambda factor, g, step: apply(factor, g),
    )
