"""Files of KL-Shampoo and KL-SOAP (yorkerlin/KL-Methods)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import kradagrad_jax as kj
from kradagrad_jax.factors import kl
from kradagrad_jax.factors.method import Step
from kradagrad_jax.transforms.kl_shampoo import PRESETS
from tests.golden import soap
from tests.golden.case import check_keys
from tests.golden.recorded import UnknownFile
from tests.x64 import x64

METHODS = ("kl_shampoo", "kl_soap")
KEYS = (
    "lr betas shampoo_beta eps weight_decay precondition_frequency using_klsoap normalize_grads "
    "init_factor using_damping using_clamping max_clamp_value order3"
)
tolerance_of = soap.tolerance_of


def errors_of(raw: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of parameters over all steps, and of the state after the last."""
    c = raw["config"]
    check_keys(c, KEYS, raw["source"])
    if c["using_klsoap"] != (raw["method"] == "kl_soap"):
        raise UnknownFile(f"{raw['source']}: method {raw['method']} with using_klsoap")
    if any(sum(d > 1 for d in _shape(p)) not in (2, 3) for p in raw["inputs"]["params"].values()):
        raise UnknownFile(f"{raw['source']}: the official code has two and three modes alone")
    with x64():
        squeezed = _squeezed(raw)
        params = soap.arrays(squeezed["inputs"]["params"])
        layout = PRESETS["official"]["layout"]
        apply = soap.late_decay(c["lr"], c["weight_decay"])
        return soap.trajectory(squeezed, params, _transformation(c, params), layout, apply)


def _shape(x: Any) -> tuple[int, ...]:
    return jnp.shape(jnp.asarray(x))


def _squeezed(raw: dict[str, Any]) -> dict[str, Any]:
    """The file without axes of length one, which the official code takes out."""

    def one(tree: dict[str, Any]) -> dict[str, Any]:
        return {n: jnp.squeeze(jnp.asarray(v, jnp.float64)) for n, v in tree.items()}

    inputs, outputs = raw["inputs"], raw["outputs"]
    changed = {"params": one(inputs["params"]), "grads": [one(g) for g in inputs["grads"]]}
    rows = {k: [one(p) for p in v] for k, v in outputs.items() if k in ("params", "second_moments")}
    return raw | {"inputs": inputs | changed, "outputs": outputs | rows}


def _transformation(c: dict[str, Any], params: dict[str, Any]) -> Any:
    beta1, beta2 = c["betas"]
    options = {
        "beta1": beta1,
        "beta2": beta2,
        "shampoo_beta": c["shampoo_beta"] if c["shampoo_beta"] >= 0 else beta2,
        "eps": c["eps"],
        "initial": c["init_factor"],
        "cap": c["max_clamp_value"],
        "cap_rule": "length" if c["using_clamping"] else "none",
        "damped": c["using_damping"],
        "normalize_grads": c["normalize_grads"],
    }
    every = c["precondition_frequency"]
    # a file that does not say comes from the official code
    if c.get("order3", "sequential") == "simultaneous" or all(p.ndim == 2 for p in params.values()):
        make = kj.scale_by_kl_soap if c["using_klsoap"] else kj.scale_by_kl_shampoo
        return make(preset="official", refresh_every=every, **options)
    own = kl.KlOptions(
        adam=c["using_klsoap"], eps_rule="absolute", mask=False, bias_correction=False, clip=None,
        **options,
    )  # fmt: skip
    method = kl.kl_method(own)
    method = method._replace(accumulate=functools.partial(_sequential, own, method.accumulate))
    return kj.scale_by_blocks(
        method, layout=PRESETS["official"]["layout"], refresh_every=every, refresh="last"
    )


def _sequential(o: kl.KlOptions, clean: Any, f: Any, g: jax.Array, step: Step) -> Any:
    """The official routine for three modes does not use the old scales everywhere.

    S_3 and S_2 from the old ones, then w_3, then w_2 with the new w_3, then S_1 from old w_3 and
    new w_2, then w_1 with old w_3 and new w_2.
    """
    new = clean(f, g, step)
    if g.ndim != 3:
        return new
    ws, b = f.scales, o.shampoo_beta
    rotated = kl.turned(g, f.bases)

    def scale(mode: int, white: tuple[Any, ...]) -> jax.Array:
        share = kl._share(o, rotated, white, mode)
        return kl._next_scale(o, jnp.asarray(b), ws[mode], share, f.start)

    third = scale(2, ws)
    second = scale(1, (ws[0], ws[1], third))
    mixed = (ws[0], second, ws[2])
    gram = kl._whitened_gram(g, f.bases, mixed, 0)
    quirky = new._replace(
        statistics=(b * f.statistics[0] + (1 - b) * gram, *new.statistics[1:]),
        scales=(scale(0, mixed), second, third),
    )
    return jax.tree.map(lambda q, n: jnp.where(step.statistics > 1, q, n), quirky, new)
