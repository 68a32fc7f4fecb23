"""Files of SOAP (nikhilvyas) and of eigenvalue-corrected Shampoo (facebookresearch)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kradagrad_jax as kj
from kradagrad_jax.engine import block_factors
from kradagrad_jax.engine.plan import block_origins
from kradagrad_jax.transforms.soap import WHOLE
from tests import reading
from tests.golden.case import check_keys
from tests.golden.facebook import KEYS as FACEBOOK
from tests.golden.facebook import graft_of, other_filter
from tests.golden.kfac import relative
from tests.golden.recorded import UnknownFile
from tests.x64 import x64

METHODS = ("soap", "eigenvalue_corrected_shampoo")
KEYS = (
    "lr betas shampoo_beta eps weight_decay precondition_frequency max_precond_dim merge_dims "
    "precondition_1d normalize_grads data_format correct_bias"
)
Tree = dict[str, Any]
Step = Callable[[Tree, Tree, jax.Array], Tree]


def tolerance_of(raw: dict[str, Any]) -> float:
    return float(raw["tolerance"].split()[0])


def errors_of(raw: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of parameters over all steps, and of the state after the last."""
    build = {"soap": _soap, "eigenvalue_corrected_shampoo": _corrected}[raw["method"]]
    with x64():
        params = arrays(raw["inputs"]["params"])
        return trajectory(raw, params, *build(raw, params))


def arrays(tree: Any) -> Tree:
    return {n: jnp.asarray(v, jnp.float64) for n, v in tree.items()}


def late_decay(lr: float, decay: float) -> Step:
    """The step of both official codes: decay after it, and none at the first call."""

    def apply(params: Tree, updates: Tree, count: jax.Array) -> Tree:
        moved = jax.tree.map(lambda p, u: p - lr * u, params, updates)
        return jax.tree.map(lambda p: jnp.where(count > 1, p - lr * decay * p, p), moved)

    return apply


def trajectory(
    raw: dict[str, Any], params: Tree, tx: Any, layout: kj.Layout, apply: Step
) -> dict[str, float]:
    """Runs a transformation over a file; ``apply`` makes parameters of its updates."""
    inputs, outputs = raw["inputs"], raw["outputs"]
    state = tx.init(params)

    @jax.jit
    def step(params: Tree, state: Any, grads: Tree, count: jax.Array) -> tuple[Tree, Any]:
        updates, state = tx.update(grads, state, params)
        return apply(params, updates, count), state

    worst = {"params": 0.0}
    for t, grads in enumerate(inputs["grads"], 1):
        params, state = step(params, state, arrays(grads), jnp.asarray(t))
        if t == 1 and "first_basis" in inputs:
            state = with_bases(state, params, layout, inputs["first_basis"])
        for name, expected in outputs["params"][t - 1].items():
            worst["params"] = max(worst["params"], relative(params[name], expected))
    return worst | compared(block_state(state), params, layout, outputs)


def block_state(state: Any) -> kj.BlockState:
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kj.BlockState))
    return next(x for x in found if isinstance(x, kj.BlockState))


NAMES = {
    "factor_matrices": "statistics",
    "corrected_eigenvalues": "squares",
    "second_moments": "squares",
}


def compared(
    state: kj.BlockState, params: Tree, layout: kj.Layout, outputs: dict[str, Any]
) -> dict[str, float]:
    """Errors of everything that is recorded after the last step."""
    factors, worst = block_factors(state, params, layout), {}
    for kind, rows in outputs.items():
        if kind == "params":
            continue
        worst[kind], field = 0.0, NAMES.get(kind, kind)
        for name, expected in rows[-1].items():
            if name not in factors:  # nothing is rotated: Adam
                if field != "squares":
                    assert not any(len(m) for block in expected for m in block), name
                    continue
                held = state.rest.second if state.fallback is None else state.fallback.squares
                ours = [held[name]]
            else:
                ours = [getattr(f, field) for f in factors[name]]
            if field == "squares":
                one = kind == "second_moments"
                pairs = zip(ours, [expected] if one else expected, strict=True)
                errors = [relative(np.reshape(a, np.shape(b)), b) for a, b in pairs]
            else:
                errors = [_error(field, *p) for p in _matched(ours, expected)]
            worst[kind] = max([worst[kind], *errors])
    return worst


def _matched(ours: list[Any], expected: list[Any]) -> list[tuple[Any, Any]]:
    """Matrices of all blocks and modes side by side; modes without one may be left out."""
    pairs = []
    for own, theirs in zip(ours, expected, strict=True):
        recorded = [m for m in theirs if len(m)]
        pairs += zip([m for m in own if m is not None], recorded, strict=True)
    return pairs


def _error(field: str, ours: jax.Array, expected: Any) -> float:
    if field != "bases":
        return relative(ours, expected)
    product = np.abs(np.asarray(ours).T @ np.asarray(expected))  # signs are arbitrary
    return float(np.abs(product - np.eye(len(product))).max())


def with_bases(state: Any, params: Tree, layout: kj.Layout, bases: Tree) -> Any:
    """The state with other bases: ``{parameter: [mode]}``, parameters of one block each."""
    plan = reading.plan(params, layout)
    named = {i: p for e in plan.covered for i, p in zip(e.indices, e.paths, strict=True)}
    factors = dict(state.factors)
    for bucket in plan.buckets:
        for slot in bucket.slots:
            for row, origin in enumerate(block_origins(plan, slot), slot.offset):
                own, given = factors[bucket.key], bases.get(named[origin.index])
                if given is None:
                    continue
                new = tuple(
                    None if q is None else q.at[row].set(jnp.asarray(b))
                    for q, b in zip(own.bases, given, strict=True)
                )
                factors[bucket.key] = own._replace(bases=new)
    return state._replace(factors=factors)


def _soap(raw: dict[str, Any], params: Tree) -> tuple[Any, kj.Layout, Step]:
    c = raw["config"]
    check_keys(c, KEYS, raw["source"])
    if c["merge_dims"] and c["data_format"] != "channels_first":
        raise UnknownFile(f"{raw['source']}: merging of data_format {c['data_format']}")
    whole = c["precondition_1d"]
    layout = dataclasses.replace(
        WHOLE,
        max_dim=c["max_precond_dim"],
        merge="greedy" if c["merge_dims"] else "none",
        merge_cap=c["max_precond_dim"],
        vectors="block",
        include=lambda path, shape: len(shape) > 1 or whole,
    )
    tx = kj.scale_by_soap(
        preset="official",
        beta1=c["betas"][0],
        beta2=c["betas"][1],
        shampoo_beta=c["shampoo_beta"] if c["shampoo_beta"] >= 0 else c["betas"][1],
        eps=c["eps"],
        bias_correction=c["correct_bias"],
        normalize_grads=c["normalize_grads"],
        refresh_every=c["precondition_frequency"],
        layout=layout,
    )
    return tx, layout, late_decay(c["lr"], c["weight_decay"])


def _corrected(raw: dict[str, Any], params: Tree) -> tuple[Any, kj.Layout, Step]:
    c = raw["config"]
    check_keys(c, f"{FACEBOOK} ignored_basis_change_dims eigendecomposition", raw["source"])
    beta1, beta2 = c["betas"]
    beta3 = beta1 if c["beta3"] == -1 else c["beta3"]
    every, start = c["precondition_frequency"], c["start_preconditioning_step"]
    start = every if start == -1 else start
    how = c["eigendecomposition"]
    check_keys(how, "method max_iterations tolerance", raw["source"])
    ignored = {int(k): v for k, v in (c["ignored_basis_change_dims"] or {}).items()}

    def modes(path: str, shape: tuple[int, ...]) -> tuple[bool, ...]:
        return tuple(i not in ignored.get(len(shape), ()) for i in range(len(shape)))

    layout = kj.Layout(
        block_size=c["max_preconditioner_dim"], merge="none", pieces="tail", vectors="block",
        scalars="block", max_dim=None, state_limit=None, biases=None,
        modes=modes,
    )  # fmt: skip
    graft = graft_of(c["grafting"], raw["source"])
    if graft.kind != "none" and reading.plan(params, layout).uncovered:
        raise UnknownFile(f"{raw['source']}: grafting where nothing is rotated")
    unrotated = "adam" if c["use_bias_correction"] else "rmsprop"
    unrotated = "adagrad" if beta2 == 1 else unrotated
    exponents = {int(k): v for k, v in (c["inverse_exponent_override"] or {}).items()}
    tx = kj.scale_by_soap(
        preset="basis_first",
        basis=how["method"],
        iterations=how["max_iterations"],
        tolerance=how["tolerance"],
        beta1=beta3,
        beta2=beta2,
        eps=c["epsilon"],
        eps_rule="absolute",
        mask=False,
        exponent=exponents,
        bias_correction=c["use_bias_correction"],
        graft=graft,
        fallback=kj.Graft(unrotated, beta2=beta2, eps=c["epsilon"]),
        layout=layout,
        refresh_every=every,
        # without a graft the coordinates are the basis before the first refresh
        timing=kj.Timing(start if graft.kind != "none" else 1, first_refresh=start, phase=0),
    )
    if beta3 != beta1 or not c["use_bias_correction"]:
        tx = other_filter(tx, beta1, beta3, c["use_bias_correction"], layout)
    lr, decay = c["lr"], c["weight_decay"]

    def apply(params: Tree, updates: Tree, count: jax.Array) -> Tree:
        del count
        return jax.tree.map(lambda p, u: p - lr * (u + decay * p), params, updates)

    return optax.with_extra_args_support(tx), layout, apply
