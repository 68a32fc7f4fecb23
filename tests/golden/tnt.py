"""Files of TNT: the authors' functions, with given or drawn targets, and kfac-jax's blocks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kradagrad_jax as kj
from kradagrad_jax.curvature import CaptureSpec, Curvature, Layer, losses
from kradagrad_jax.curvature.samples import Samples, sampled_gradients
from kradagrad_jax.engine import block_factors
from kradagrad_jax.factors.tnt import TntFactor
from kradagrad_jax.transforms.tnt import scale_by_tnt
from kradagrad_jax.transforms.tnt_tools import tnt_warm_start
from tests.golden.case import check_keys
from tests.golden.kfac import relative
from tests.golden.recorded import UnknownFile
from tests.reading import averages
from tests.x64 import x64

METHODS = ("tnt", "tnt_ef")
WHOLE = kj.Layout(block_size=None, merge="none", vectors="block")
KEYS = (
    "official_algorithm lr damping beta momentum weight_decay T1 T2 early_refresh "
    "warm_start_batches statistics inverse grouping mode_groups loss layer_sizes activation "
    "batch_size"
)
STATISTICS = {"sampled_gradient": "model", "gradient": "empirical"}


def tolerance_of(raw: dict[str, Any]) -> float:
    return float(raw.get("tolerance", 1e-10))


def errors_of(raw: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of everything that the file records."""
    with x64():
        if "block" in raw["config"]:
            return _kfac_jax(raw)
        check_keys(raw["config"], KEYS, raw["source"])
        return _networks(raw) if "steps" in raw["inputs"] else _trajectory(raw)


def _arrays(tree: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, jnp.float64) for name, value in tree.items()}


def coupled_newton(a: jax.Array) -> jax.Array:
    """The authors' inverse: iterated until max |M - I| <= 1e-6, it grows, or 100 times."""
    eye = jnp.eye(len(a), dtype=a.dtype)
    z = 1 / jnp.sqrt(jnp.sum(a * a))

    def go_on(state: Any) -> jax.Array:
        _, _, _, error, last, count = state
        return (error > 1e-6) & (error < 1.2 * last) & (count < 100)

    def step(state: Any) -> Any:
        m, h, _, error, _, count = state
        k = 2 * eye - m
        m = k @ m
        return m, h @ k, h, jnp.max(jnp.abs(m - eye)), error, count + 1

    start = jnp.max(jnp.abs(z * a - eye))
    state = (z * a, z * eye, z * eye, start, jnp.full_like(start, jnp.inf), 0)
    _, h, before, error, last, _ = jax.lax.while_loop(go_on, step, state)
    return jnp.where(error > 1.2 * last, before, h)


def _options(c: dict[str, Any], params: dict[str, jax.Array]) -> dict[str, Any]:
    groups = {
        params[name].shape: [tuple(g) for g in found]
        for name, found in c.get("mode_groups", {}).items()
    }
    inverses = {"exact": "cholesky", "coupled_newton": coupled_newton}
    return {
        "preset": "paper",
        "fisher": STATISTICS[c["statistics"]],
        "damping": c["damping"],
        "beta1": c["momentum"],
        "beta2": c["beta"],
        "averaging": "first" if c["warm_start_batches"] else _cold(c),
        "inverse": inverses[c["inverse"]],
        "grouping": groups.__getitem__ if groups else c["grouping"],
        "early_refresh": c["early_refresh"],
        "refresh_every": c["T2"],
        "statistics_every": c["T1"],
    }


def _cold(c: dict[str, Any]) -> str:
    return "official" if "official_algorithm" in c else "first"


def _optimizer(c: dict[str, Any], options: dict[str, Any]) -> Any:
    rates = jnp.asarray(c["lr"], jnp.float64)
    return optax.chain(
        scale_by_tnt(**options),
        optax.add_decayed_weights(c["weight_decay"]),
        optax.scale_by_learning_rate(lambda t: rates[t] if rates.ndim else rates),
    )


def _factors(state: Any, params: dict[str, jax.Array]) -> dict[str, TntFactor]:
    found = block_factors(state[0], params, WHOLE)
    return {name: blocks[0] for name, blocks in found.items()}


class _Worst(dict):
    """Largest error by quantity."""

    def note(self, kind: str, ours: Any, expected: Any) -> None:
        self[kind] = max(self.get(kind, 0.0), relative(ours, np.asarray(expected, np.float64)))

    def factors(self, kind: str, ours: Any, expected: Any) -> None:
        for a, b in zip(ours, expected, strict=True):
            self.note(kind, a, b)


def _trajectory(raw: dict[str, Any]) -> dict[str, float]:
    """Given gradients and sampled gradients."""
    c, inputs, outputs = raw["config"], raw["inputs"], raw["outputs"]
    params, worst = _arrays(inputs["params"]), _Worst()
    options = _options(c, params)
    plain, tx = scale_by_tnt(**options), _optimizer(c, options)
    state = tx.init(params)
    for grads in inputs["warm_start_sampled_grads"]:
        samples = Samples.from_gradients(_arrays(grads))
        state = tnt_warm_start(state, samples, params, **options)
    for name, expected in outputs.get("omega_after_warm_start", {}).items():
        worst.factors("omega", _factors(state, params)[name].statistics, expected)
    update, direct = jax.jit(tx.update), jax.jit(plain.update)
    factors_of = jax.jit(_factors)
    for t, grads in enumerate(inputs["grads"]):
        grads = _arrays(grads)
        sampled = inputs["sampled_grads"][t] if options["fisher"] == "model" else None
        samples = None if sampled is None else Samples.from_gradients(_arrays(sampled))
        direction, _ = direct(grads, state[0], params, curvature=samples)
        updates, state = update(grads, state, params, curvature=samples)
        params = optax.apply_updates(params, updates)
        factors = factors_of(state, params)
        for name in params:
            worst.note("params", params[name], outputs["params"][t][name])
            worst.note("direction", direction[name], outputs["direction"][t][name])
            worst.factors("omega", factors[name].statistics, outputs["omega"][t][name])
            if "inverse" in outputs:
                inverses = outputs["inverse"][t][name]
                worst.factors("inverse", factors[name].preconditioners, inverses)
            if "momentum" in outputs:
                momentum = averages(state[0], params, WHOLE)[name]
                worst.note("momentum", momentum, outputs["momentum"][t][name])
    return worst


def _loss(text: str) -> type[losses.Loss]:
    if text.startswith("softmax cross-entropy"):
        return losses.SoftmaxCrossEntropy
    if text.startswith("0.5*sum of squares"):
        return losses.SquaredError
    if "ernoulli" in text or "sigmoid" in text:
        return losses.SigmoidBinaryCrossEntropy
    raise UnknownFile(f"unknown loss {text!r}")


def _drawn(text: str, targets: jax.Array) -> losses.Loss:
    """The loss, whose draws are the recorded ones."""
    base = _loss(text)

    @dataclasses.dataclass(frozen=True)
    class Recorded(base):
        def sample(self, key: jax.Array, z: jax.Array) -> jax.Array:
            return targets

        pseudo_gradient = losses.Loss.pseudo_gradient

    return Recorded()


def _targets(raw: Any) -> jax.Array:
    x = np.asarray(raw)
    return jnp.asarray(x if x.ndim == 1 else x.astype(np.float64))


def _model(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    last = len(params) // 2 - 1
    for i in range(last + 1):
        x = x @ params[f"{i}/W"].T + params[f"{i}/b"]
        x = jnp.tanh(x) if i < last else x
    return x


def _networks(raw: dict[str, Any]) -> dict[str, float]:
    """Given batches, targets and drawn targets of a network: the sampling is replayed as well."""
    c, inputs, outputs = raw["config"], raw["inputs"], raw["outputs"]
    if not c["activation"].startswith("tanh on hidden layers"):
        raise UnknownFile(f"unknown activation {c['activation']!r}")
    params, worst, key = _arrays(inputs["params"]), _Worst(), jax.random.key(0)
    options = _options(c, params)
    tx = _optimizer(c, options)
    state = tx.init(params)
    update = jax.jit(tx.update)

    @jax.jit
    def run(params: Any, x: jax.Array, targets: jax.Array, drawn: jax.Array) -> Any:
        return sampled_gradients(_model, _drawn(c["loss"], drawn))(params, x, targets, rng=key)

    def sample(batch: dict[str, Any], targets: Any) -> Any:
        drawn = _targets(batch["sampled_targets"])
        return run(params, jnp.asarray(batch["x"]), _targets(targets), drawn)

    for batch, expected in zip(
        inputs["warm_start"], outputs["warm_start_sampled_grads"], strict=True
    ):
        samples = sample(batch, batch["sampled_targets"])[2]
        for name in params:
            worst.note("sampled_grads", samples.gradients(name)[0], expected[name])
        state = tnt_warm_start(state, samples, params, **options)
    for t, batch in enumerate(inputs["steps"]):
        (value, _), grads, samples = sample(batch, batch["targets"])
        worst.note("loss", value, outputs["loss"][t])
        worst.note("logits", _model(params, jnp.asarray(batch["x"])), outputs["logits"][t])
        for name in params:
            worst.note("grads", grads[name], outputs["grads"][t][name])
            recorded = outputs["sampled_grads"][t][name]
            worst.note("sampled_grads", samples.gradients(name)[0], recorded)
        updates, state = update(grads, state, params, curvature=samples)
        params = optax.apply_updates(params, updates)
        for name in params:
            worst.note("params", params[name], outputs["params"][t][name])
    return worst


def _softmax_rows(params: dict[str, jax.Array], x: np.ndarray, labels: np.ndarray) -> Any:
    """Layer inputs with the constant, and output gradients per example."""
    z = x @ np.asarray(params["w"]) + np.asarray(params["b"])
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return np.concatenate([x, np.ones((len(x), 1))], 1), p - np.eye(p.shape[1])[labels]


def _kfac_jax(raw: dict[str, Any]) -> dict[str, float]:
    """Contractions per example (DenseTNT) or of the batch mean (NaiveTNT), two kinds of damping."""
    c, inputs, outputs = raw["config"], raw["inputs"], raw["outputs"]
    keys = "block damping_lambda ema_old ema_new batch_size estimation_mode bias"
    check_keys(c, keys, raw["source"])
    if c["estimation_mode"] != "fisher_empirical":
        raise UnknownFile(f"scale of estimation mode {c['estimation_mode']!r}")
    params, worst = _arrays(inputs["params"]), _Worst()
    dense = {"DenseTNT": True, "NaiveTNT": False}[c["block"]]
    spec = CaptureSpec.from_layers([Layer.dense("w", params["w"].shape, bias="b")])
    options = {
        "preset": "paper",
        "damping": c["damping_lambda"],
        "averaging": "corrected",
        "beta1": "none",
        "beta2": c["ema_old"],
        "refresh_every": 1,
        "spec": spec if dense else None,
    }
    joined = {"wb": jnp.concatenate([params["w"], params["b"][None]])}
    kinds = {"factored": "factored_damping_direction", "joint": "joint_damping_direction"}
    runs = {kind: scale_by_tnt(damping_rule=kind, **options) for kind in kinds}
    states = {kind: tx.init(params if dense else joined) for kind, tx in runs.items()}
    updates = {kind: jax.jit(tx.update) for kind, tx in runs.items()}
    for t, vector in enumerate(_arrays(v) for v in inputs["vectors"]):
        a, g = _softmax_rows(params, np.asarray(inputs["x"][t]), np.asarray(inputs["targets"][t]))
        n = len(a)
        if dense:
            rows = jnp.asarray(a) / np.sqrt(n), jnp.asarray(g) / np.sqrt(n)
            curvature = Curvature.from_rows({"w": rows}, spec)
        else:
            curvature = Samples.from_gradients({"wb": jnp.asarray(a.T @ g) / n})
            vector = {"wb": jnp.concatenate([vector["w"], vector["b"][None]])}
        for kind, name in kinds.items():
            u, states[kind] = updates[kind](vector, states[kind], curvature=curvature)
            if not dense:
                u = {"w": u["wb"][:-1], "b": u["wb"][-1]}
            for leaf, expected in outputs[name][t].items():
                worst.note(name, u[leaf], expected)
            (factor,) = states[kind].factors.values()
            omegas = [s[0] for s in factor.statistics]
            worst.factors("factors", omegas, outputs["factors"][t])
            worst.note("scale", 1 / jnp.trace(omegas[0]), outputs["scale"][t])
    return worst
