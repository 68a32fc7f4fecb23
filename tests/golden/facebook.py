"""Files of facebookresearch/optimizers, DistributedShampoo."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import kradagrad_jax as kj
from kradagrad_jax.transforms.common import per_mode
from tests.golden.case import Case, check_keys, schedule
from tests.golden.recorded import Recorded
from tests.reading import with_averages

KEYS = (
    "lr betas beta3 epsilon weight_decay max_preconditioner_dim precondition_frequency "
    "start_preconditioning_step use_bias_correction grafting inverse_exponent_override"
)


def build(file: Recorded, params: dict[str, jax.Array]) -> Case:
    """Moments before preconditioning, eigenvalues shifted, grafting per block."""
    c = file.config
    check_keys(c, KEYS, file.name)
    beta1, beta2 = c["betas"]
    beta3 = beta1 if c["beta3"] == -1 else c["beta3"]
    every = c["precondition_frequency"]
    start = every if c["start_preconditioning_step"] == -1 else c["start_preconditioning_step"]
    layout = kj.Layout(
        block_size=c["max_preconditioner_dim"], merge="none", pieces="tail", vectors="block"
    )
    graft = graft_of(c["grafting"], file.name)
    timing = schedule(1, 0, every, 0, start)
    timing["timing"] = kj.Timing(start=start, first_refresh=start, phase=0)
    options: dict[str, Any] = {
        "preset": "paper",
        "beta1": beta3 if beta1 or beta3 else None,
        "beta2": beta2,
        "initial": 0.0,
        "damping": c["epsilon"],
        "damping_rule": "shift",
        "bias_correction": c["use_bias_correction"],
        "graft": graft,
        "fallback": "identity" if graft.kind in ("none", "sgd") else graft,
        "layout": layout,
        **timing,
    }
    given = c["inverse_exponent_override"] or {}
    options["exponent"] = {int(k): _exponents(int(k), v) for k, v in given.items()} or None
    layout = per_mode(options["exponent"], layout)[1]
    if beta3 == beta1 and c["use_bias_correction"]:
        return Case(kj.shampoo(c["lr"], weight_decay=c["weight_decay"], **options), layout)
    inner = kj.scale_by_shampoo(**options)
    if beta3 or beta1 or not c["use_bias_correction"]:
        inner = other_filter(inner, beta1, beta3, c["use_bias_correction"], layout)
    return Case(
        optax.chain(
            inner,
            optax.add_decayed_weights(c["weight_decay"]),
            optax.scale_by_learning_rate(c["lr"]),
        ),
        layout,
    )


def _exponents(order: int, given: Any) -> Any:
    """One number for all modes, or one per mode: modes that are not named keep 1/(2 order)."""
    if not isinstance(given, dict):
        return given
    return tuple(given.get(str(i), 1 / (2 * order)) for i in range(order))


def graft_of(given: dict[str, Any] | None, name: str) -> kj.Graft:
    if given is None:
        return kj.Graft("none", per="block")
    check_keys(given, "type beta2 epsilon", f"{name} grafting")
    names = {"beta2": "beta2", "epsilon": "eps"}
    return kj.Graft(
        given["type"], per="block", **{names[k]: v for k, v in given.items() if k in names}
    )


class _Filter(NamedTuple):
    count: jax.Array
    mean: Any
    inner: Any


def other_filter(
    inner: optax.GradientTransformation,
    beta1: float,
    beta3: float,
    corrected: bool,
    layout: kj.Layout,
) -> optax.GradientTransformation:
    """The filter `(beta3 m + (1 - beta3) g) / (1 - beta3 beta1^(t-1))` around our own.

    `inner` averages with beta3; its average is put back to the one of beta1 before every step, and
    the result, which is linear in the filtered gradient, is rescaled to the other bias correction.
    """

    def init(params: Any) -> _Filter:
        return _Filter(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), inner.init(params)
        )

    def update(g: Any, state: _Filter, params: Any = None) -> tuple[Any, _Filter]:
        t = state.count + 1
        placed = with_averages(state.inner, state.mean, layout) if beta3 or beta1 else state.inner
        u, new = inner.update(g, placed, params)
        ours = 1 - beta3 ** t.astype(jnp.float64)
        theirs = 1 - beta3 * beta1 ** (t - 1).astype(jnp.float64) if corrected else 1.0
        mean = jax.tree.map(lambda m, x: beta1 * m + (1 - beta1) * x, state.mean, g)
        return jax.tree.map(lambda x: x * ours / theirs, u), _Filter(t, mean, new)

    return optax.GradientTransformation(init, update)
