"""How far the low-rank K-FACs are from exact K-FAC along a training run, and what they cost.

    python -m kradagrad_jax.experiments.error_study [--task digits] [--steps 200] [--out runs/study]

A net is trained by SGD; every variant follows the statistics of one layer, and is compared with
the dense factors (arXiv 2210.08494 measures the same four errors): relative Frobenius errors of the
damped inverses of A and G and of the layer's step, and one minus the cosine between the steps.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kradagrad_jax import curvature
from kradagrad_jax.engine import trees
from kradagrad_jax.experiments.tasks import make_task
from kradagrad_jax.factors.lowrank import LowRankFactor, low_rank_method, solve_side
from kradagrad_jax.factors.lowrank_options import LowRankOptions, Online, Sketch
from kradagrad_jax.factors.method import Rows, Step
from kradagrad_jax.linalg import eigh, matmul

ERRORS = ("inverse of A", "inverse of G", "step", "1 - cosine")


class Variant(NamedTuple):
    """A method and its period."""

    options: LowRankOptions
    refresh_every: int


def variants(rank: int, oversampling: int, batch: int) -> dict[str, Variant]:
    """The methods that are compared, by name."""
    base = LowRankOptions(Sketch(rank, oversampling, power=2))
    online = Online(batch_size=batch, overwrite_every=1, corrected_share=0.5)
    follow = base._replace(online=online)
    correct = follow._replace(correct=True)
    return {
        "RS, every step": Variant(base, 1),
        "RS, every 10": Variant(base, 10),
        "RS, every 50": Variant(base, 50),
        "RS, every 10, no continuation": Variant(base._replace(continuation=False), 10),
        "B": Variant(follow, 10),
        "B, every 5": Variant(base._replace(online=dataclasses.replace(online, every=5)), 10),
        "B-R, overwritten every 10": Variant(follow._replace(overwrite=True), 10),
        "B-R, overwritten every 50": Variant(follow._replace(overwrite=True), 50),
        "B-C, corrected every 5": Variant(correct, 10),
        "B-C, corrected every step": Variant(
            correct._replace(online=dataclasses.replace(online, correct_every=1)), 10
        ),
    }


def _dense_inverse(m: jax.Array, damping: float) -> jax.Array:
    w, v = eigh(m)
    return matmul(v / (jnp.maximum(w, 0) + damping * w[-1])[None, :], v.T)


def _compare(exact: tuple[jax.Array, jax.Array, jax.Array], ours: tuple[Any, ...]) -> jax.Array:
    """The four errors."""
    relative = [
        jnp.linalg.norm(a - b) / jnp.linalg.norm(a) for a, b in zip(exact, ours, strict=True)
    ]
    u, v = exact[2], ours[2]
    cosine = jnp.sum(u * v) / (jnp.linalg.norm(u) * jnp.linalg.norm(v))
    return jnp.stack([*relative, 1 - cosine])


def _step(variant: Variant, k: jax.Array) -> Step:
    """Step k from 0, with a statistic at every step and all refreshes before it."""
    every = variant.refresh_every
    return Step(k + 1, every, k + 1, (k + every - 1) // every)


def _advance(variant: Variant, factor: LowRankFactor, rows: Rows, k: jax.Array) -> LowRankFactor:
    method = low_rank_method(variant.options)
    refresh, step = method.refresh, _step(variant, k)
    assert refresh is not None
    factor = method.accumulate(factor, rows, step)
    due = k % variant.refresh_every == 0
    return jax.lax.cond(due, lambda: refresh(factor, step), lambda: factor)


def _errors(
    variant: Variant, factor: LowRankFactor, exact: Any, gradient: jax.Array, k: jax.Array
) -> jax.Array:
    step = _step(variant, k)
    eye = [jnp.eye(n, dtype=gradient.dtype) for n in gradient.shape]
    a, g = (solve_side(variant.options, side, e, step) for side, e in zip(factor, eye, strict=True))
    return _compare(exact, (a, g, matmul(matmul(a, gradient), g)))


def study(
    task_name: str,
    task_options: dict[str, Any],
    layer: str,
    steps: int,
    chosen: dict[str, Variant],
    learning_rate: float = 0.1,
) -> tuple[dict[str, jax.Array], float]:
    """Errors by variant, ``(steps, 4)``, and the training loss at the end."""
    task = make_task(task_name, task_options)
    if task.parts is None:
        raise ValueError(f"task '{task_name}' has no likelihood")
    params, data = task.setup(0)
    order = jnp.asarray(task.order(0, steps))
    parts, likelihood = task.parts, task.parts.likelihood
    take = curvature.model_value_grad_and_curvature(
        parts.model, likelihood, fisher="empirical", reducer="raw"
    )
    spec = curvature.inspect(parts.model, params, parts.examples(data, order[0])[0])
    found = spec.layer(layer)
    shape = (found.d_in + (found.bias is not None), found.d_out)
    methods = {name: low_rank_method(v.options) for name, v in chosen.items()}
    factors = {name: m.init(shape, jnp.float32) for name, m in methods.items()}
    ema = 0.95

    def one(carry: Any, x: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        params, factors, dense = carry
        batch, k = x
        inputs, targets = parts.examples(data, batch)
        loss, grads, curv = take(params, inputs, targets)
        stack = curv.rows(layer)
        rows = Rows(stack.a[0], stack.g[0])
        new = (1 - ema) / (1 - ema ** (k + 1).astype(jnp.float32))
        dense = tuple(
            (1 - new) * m + new * matmul(r.T, r) for m, r in zip(dense, rows, strict=True)
        )
        factors = {name: _advance(chosen[name], f, rows, k) for name, f in factors.items()}
        leaves = dict(zip(trees.paths_of(grads), jax.tree.leaves(grads), strict=True))
        gradient = found.pack(leaves[layer], leaves[found.bias] if found.bias else None)[0]
        a, g = (_dense_inverse(m, 0.1) for m in dense)
        exact = (a, g, matmul(matmul(a, gradient), g))
        errors = {n: _errors(chosen[n], f, exact, gradient, k) for n, f in factors.items()}
        params = jax.tree.map(lambda p, u: p - learning_rate * u, params, grads)
        return (params, factors, dense), (errors, loss)

    dense = tuple(jnp.zeros((n, n)) for n in shape)
    run = jax.jit(lambda c: jax.lax.scan(one, c, (order, jnp.arange(steps))))
    _, (errors, losses) = run((params, factors, dense))
    return errors, float(losses[-1])


def cost(variant: Variant, shape: tuple[int, int], batch: int, steps: int = 100) -> float:
    """Milliseconds per step, statistics and refreshes over whole periods."""
    method = low_rank_method(variant.options)
    rows = Rows(*(jax.random.normal(jax.random.key(i), (batch, n)) for i, n in enumerate(shape)))
    run = jax.jit(
        lambda f: jax.lax.fori_loop(0, steps, lambda k, f: _advance(variant, f, rows, k), f)
    )
    factor = method.init(shape, jnp.float32)
    jax.block_until_ready(run(factor))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(run(factor))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times) / steps


def table(errors: dict[str, Any], costs: dict[str, float], skip: int) -> str:
    """Mean errors after the first ``skip`` steps, and the cost."""
    lines = [f"{'':32}" + "".join(f"{e:>14}" for e in (*ERRORS, "ms per step"))]
    for name, values in errors.items():
        means = jnp.mean(values[skip:], axis=0)
        cells = "".join(f"{float(m):14.4f}" for m in means) + f"{costs[name]:14.2f}"
        lines.append(f"{name:32}{cells}")
    return "\n".join(lines)


def plot(errors: dict[str, Any], costs: dict[str, float], skip: int, path: Path) -> None:
    """Errors along the run, and the mean error of the step against the cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5))
    for name, values in errors.items():
        axes[0].plot(values[:, 2], label=name, linewidth=1)
        axes[1].plot(values[:, 3], linewidth=1)
        axes[2].scatter(costs[name], float(jnp.mean(values[skip:, 2])))
        axes[2].annotate(name, (costs[name], float(jnp.mean(values[skip:, 2]))), fontsize=7)
    for axis, title in zip(axes, ("relative error of the step", "1 - cosine", ""), strict=True):
        axis.set(title=title, yscale="log", xlabel="step")
    axes[2].set(xscale="log", xlabel="ms per step", ylabel="mean relative error of the step")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", default="digits", choices=("digits", "fashion"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("runs/error_study"))
    args = parser.parse_args(arguments)
    options = {"widths": (256, 256), "batch_size": args.batch}
    chosen = variants(args.rank, 8, args.batch)
    errors, loss = study(args.task, options, "Dense_1/kernel", args.steps, chosen)
    costs = {name: cost(v, (257, 256), args.batch) for name, v in chosen.items()}
    skip = args.steps // 4
    args.out.mkdir(parents=True, exist_ok=True)
    text = table(errors, costs, skip)
    print(f"MLP 256-256 on {args.task}, middle layer, training loss at the end {loss:.4f}; means "
          f"over steps {skip} to {args.steps}\n\n{text}\n")  # fmt: skip
    means = {n: [float(x) for x in jnp.mean(v[skip:], axis=0)] for n, v in errors.items()}
    (args.out / "errors.json").write_text(json.dumps({"means": means, "ms": costs}, indent=1))
    plot(errors, costs, skip, args.out / "errors.png")
    print(f"plot: {args.out / 'errors.png'}")


if __name__ == "__main__":
    main()
