"""The synthetic problem of the KrADagrad paper (arXiv 2305.19416, section 5.1 and G.1)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kradagrad_jax.experiments.tasks import Metrics, Task


class _Momentum(NamedTuple):
    m: optax.Updates


def overwriting_nesterov(decay: float) -> optax.GradientTransformation:
    """The momentum of the paper's experiments: ``m <- decay m + u`` twice, step with m.

    It is Nesterov's form with the look-ahead written back to the buffer (effective decay
    ``decay^2``). Only this task has it, so that its curves compare with published ones;
    ``optax.trace`` is the momentum to use elsewhere.
    """

    def init(params: optax.Params) -> _Momentum:
        return _Momentum(jax.tree.map(jnp.zeros_like, params))

    def update(updates: optax.Updates, state: optax.OptState, params: Any = None) -> Any:
        del params
        once = jax.tree.map(lambda m, u: decay * m + u, state.m, updates)  # type: ignore[union-attr]
        twice = jax.tree.map(lambda m, u: decay * m + u, once, updates)
        return twice, _Momentum(twice)

    return optax.GradientTransformation(init, update)


def spectrum(n: int, q: float) -> np.ndarray:
    """Eigenvalues ``10 * 10^(-10 u^q)`` for u from 0 to 1: from 10 down to 1e-9."""
    return 10 * 10 ** (-10 * np.linspace(0, 1, n) ** q)


def problem(seed: int, n: int, q: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, B (float64, positive definite) and the start X (float32), drawn in this order."""
    rng = np.random.default_rng(seed)

    def positive() -> np.ndarray:
        basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
        return (basis * spectrum(n, q)) @ basis.T

    a, b = positive(), positive()
    return a, b, rng.standard_normal((n, n)).astype(np.float32)


def quadratic(n: int = 64, q: float = 8, momentum: float = 0.9) -> Task:
    """Minimise tr(X^T A X B) over X (n, n); the condition number of the Hessian is 1e20.

    X is float32. The products are taken in float64 and the gradient is cast back, so that all
    rounding is the optimizer's. All optimizers get the paper's ``momentum``; 0 turns it off.

    Args:
      n: size of X.
      q: shape of the spectrum: 8 leaves most eigenvalues near the largest, 2 spreads them.
      momentum: see :func:`overwriting_nesterov`.
    """

    def setup(seed: int) -> tuple[Any, Any]:
        a, b, x = problem(seed, n, q)
        return {"x": jnp.asarray(x)}, {"a": jnp.asarray(a), "b": jnp.asarray(b)}

    def loss(params: Any, data: Any, batch: jax.Array | None = None) -> jax.Array:
        del batch
        x = params["x"].astype(data["a"].dtype)
        return jnp.sum(x * (data["a"] @ x @ data["b"]))

    def evaluate(params: Any, data: Any) -> Metrics:
        return {"loss": loss(params, data)}

    def wrap(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(tx, overwriting_nesterov(momentum)) if momentum else tx

    def order(seed: int, steps: int) -> np.ndarray:
        del seed
        return np.zeros((steps, 0), np.int32)  # full batch: nothing to choose

    return Task(setup, loss, evaluate, order, wrap, x64=True)
