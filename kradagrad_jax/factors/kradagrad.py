"""Block methods of KrADagrad* (all modes at every step) and KrADagrad (one mode per step)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax.factors import krad, kron
from kradagrad_jax.factors.exponents import exponents, shared_out, with_factor
from kradagrad_jax.factors.method import BlockMethod, Step
from kradagrad_jax.factors.numbers import is_number
from kradagrad_jax.factors.roots import Root, make_root
from kradagrad_jax.linalg import left_power, mode_gram, multiply_modes, unfold, when


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


class KradFactor(NamedTuple):
    """Factors of one block of shape ``(n_1, ..., n_k)``; None for a mode without factor."""

    # per mode ``(n_i, n_i)``: L, or S / K with ``L = S S^T`` in the factored and exact forms
    statistics: tuple[Any, ...]
    preconditioners: tuple[Any, ...]  # per mode ``(n_i, n_i)``: what multiplies the gradient
    # per mode l with ``L_0 = l I``, scalars; None where nothing refers to it later
    starts: tuple[Any, ...] | None = None
    # per mode the Gram matrices since the last refresh (delayed form); else None
    pending: tuple[Any, ...] | None = None


def star_method(o: KradOptions) -> BlockMethod:
    """KrADagrad* (arXiv 2305.19416, Algorithms 1 and 3): ``P_i = L_i^(1/(2k))``.

    The delayed form sums Gram matrices and takes one KrAD step per refresh (supplement C.2).
    """
    how, delayed = _root_of(o), o.form == "delayed"

    def init(shape: tuple[int, ...], dtype: Any, factored: kron.Factored = None) -> KradFactor:
        factor = _init(o, how, shape, dtype, factored)
        if not delayed:
            return factor
        return factor._replace(pending=kron.per_mode(lambda i, x: 0 * x, factor.statistics))

    def accumulate(factor: KradFactor, g: jax.Array, step: Step) -> KradFactor:
        if delayed:
            b = jnp.asarray(o.beta2, g.dtype)
            assert factor.pending is not None
            sums = kron.per_mode(lambda i, a: b * a + mode_gram(g, i), factor.pending)
            return factor._replace(pending=sums)
        first = step.statistics == 1
        return _updated(o, factor, [unfold(g, i) for i in range(g.ndim)], first)

    def refresh(factor: KradFactor, step: Step) -> KradFactor:
        first = step.refreshes == 0
        if delayed:
            factor = _updated(o, factor, factor.pending, first)
            factor = factor._replace(pending=kron.per_mode(lambda i, x: 0 * x, factor.statistics))
        e = shared_out(factor.statistics, o.exponent)
        return factor._replace(
            preconditioners=kron.roots_of(
                lambda e, x, p: how.compute(x, p, e, first),
                e,
                factor.statistics,
                factor.preconditioners,
            )
        )

    return BlockMethod(
        init=init,
        accumulate=accumulate,
        refresh=refresh,
        precondition=lambda factor, g, step: how.apply(g, factor.preconditioners),
        name=f"kradagrad_star({o.form}, {o.root})",
        partial=True,
    )


def alternating_method(o: KradOptions) -> BlockMethod:
    """KrADagrad (arXiv 2305.19416, Algorithm 2): one mode per step, square roots at any order.

    The statistic of the scheduled mode is taken from the gradient preconditioned in all others.
    The schedule counts statistics, and modes with a factor only.
    """
    if o.form == "delayed":
        raise ValueError("kradagrad has no delayed form; use kradagrad_star(form='delayed')")
    how = _root_of(o)

    def scheduled(factor: KradFactor, step: Step) -> jax.Array:
        """Position of the mode of this statistic among the modes with a factor."""
        sizes = tuple(len(x) for x in factor.statistics if x is not None)
        return krad.scheduled_mode(step.statistics, sizes)

    def accumulate(factor: KradFactor, g: jax.Array, step: Step) -> KradFactor:
        mode = scheduled(factor, step)

        def turn(place: int, i: int) -> tuple[Any, Any]:
            old = _of_mode(factor, i)

            def update(old: tuple[Any, Any]) -> tuple[Any, Any]:
                u = unfold(how.apply(g, factor.preconditioners, skip=(i,)), i)
                return _update_one(o, *old, u, step.statistics == place + 1)

            return when(mode == place, update, old)

        return _with_modes(factor, _each(factor.statistics, turn))

    def refresh(factor: KradFactor, step: Step) -> KradFactor:
        # with a refresh at every step only the mode of the newest statistic has changed
        mode = scheduled(factor, step)
        every = jnp.asarray(step.interval != 1) | (step.refreshes == 0)
        e = exponents([x is not None for x in factor.statistics], o.exponent, 0.5)
        # whichever is earlier: every mode has had its turn, or a refresh after that
        early = jnp.minimum(step.statistics, step.refreshes) <= len(factor.statistics)

        def turn(place: int, i: int) -> Any:
            due = (step.statistics > place) & (every | (mode == place))
            return when(
                due,
                lambda old: how.compute(factor.statistics[i], old, e[i], early),
                factor.preconditioners[i],
            )

        return factor._replace(preconditioners=_each(factor.statistics, turn))

    return BlockMethod(
        init=lambda shape, dtype, factored=None: _init(o, how, shape, dtype, factored),
        accumulate=accumulate,
        refresh=refresh,
        precondition=lambda factor, g, step: how.apply(g, factor.preconditioners),
        name=f"kradagrad({o.form}, {o.root})",
        partial=True,
    )


def _each(statistics: Sequence[Any], function: Any) -> tuple[Any, ...]:
    """``function(place among the modes with a factor, mode)``; None for the others."""
    places = iter(range(len(statistics)))
    return kron.per_mode(lambda i, _: function(next(places), i), statistics)


def _init(
    o: KradOptions, how: Root, shape: tuple[int, ...], dtype: Any, factored: kron.Factored
) -> KradFactor:
    scale = jnp.asarray(o.initial, dtype)
    kept = with_factor(shape, factored, o.exponent)
    start = jnp.sqrt(scale) if o.form in ("factored", "exact") else scale
    remembered = o.initial_scale == "gradient" and not (
        is_number(o.beta2, 1) and is_number(o.damping, 0)
    )
    return KradFactor(
        *kron.init_kron(shape, start, dtype, kept, how.init),
        kron.on_modes(lambda n: scale, shape, kept) if remembered else None,
    )


def _of_mode(factor: KradFactor, mode: int) -> tuple[Any, Any]:
    """Statistic and start of a mode."""
    return factor.statistics[mode], None if factor.starts is None else factor.starts[mode]


def _with_modes(factor: KradFactor, pairs: tuple[Any, ...]) -> KradFactor:
    """The factor with these statistics and starts."""
    starts = None if factor.starts is None else kron.per_mode(lambda i, pair: pair[1], pairs)
    return factor._replace(statistics=kron.per_mode(lambda i, pair: pair[0], pairs), starts=starts)


def _updated(o: KradOptions, factor: KradFactor, parts: Any, first: jax.Array) -> KradFactor:
    """All modes with their unfolded gradients (delayed: Gram matrices) in."""
    return _with_modes(
        factor,
        kron.per_mode(
            lambda i, x: _update_one(o, *_of_mode(factor, i), parts[i], first), factor.statistics
        ),
    )


def _update_one(
    o: KradOptions, x: jax.Array, start: jax.Array | None, u: jax.Array, first: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """New statistic and start of one mode from its unfolded gradient (delayed: Gram matrix).

    A start in the unit of the gradients is ``initial / mean eigenvalue`` of the mode's first
    statistic, which makes the method independent of their scale (spec section 6.1.8).
    """
    rooted, scaled = o.form in ("factored", "exact"), o.initial_scale == "gradient"
    if scaled:
        mean = jnp.trace(u) / len(u) if o.form == "delayed" else jnp.sum(u * u) / len(u)
        unit = jnp.where(first & (mean > 0), mean, 1)
        x = x / (jnp.sqrt(unit) if rooted else unit)
        start = None if start is None else start / unit
    # L_0 = origin * I, what a decaying L returns to
    origin = jnp.asarray(o.initial, x.dtype) if start is None else start
    if o.form == "exact":
        return krad.exact_step(x, u, o.beta2, origin), start
    if o.form == "factored":
        return krad.krad_factored(krad.forgotten_root(x, o.beta2, origin), u), start
    x = krad.forgotten(x, o.beta2, origin)
    damping = o.damping
    if scaled and not is_number(damping, 0):
        damping = damping / origin
    if o.form == "delayed":
        return krad.krad_step_gram(x, u, damping), start
    return krad.krad_step(x, u, bound=o.bound, damping=damping), start


def _root_of(o: KradOptions) -> Root:
    """How statistics become preconditioners; checks what does not go together."""
    if o.form != "exact" and isinstance(o.beta2, (int, float)) and o.beta2 < 0.5:
        raise ValueError(
            f"beta2={o.beta2} is below 1/2, where form={o.form!r} no longer keeps L between 0 and "
            "its start: use form='exact'"
        )
    if o.form in ("factored", "exact"):
        if o.root != "eigh":
            raise ValueError(
                f"form={o.form!r} takes its root from a singular value decomposition; "
                f"leave root='eigh', got {o.root!r}"
            )
        return Root(kron.eye, lambda x, p, e, exact: left_power(x, e), multiply_modes)
    return make_root(o.root, o.root_damping, "absolute")
