"""Cost of one optimizer update, as a multiple of the bare matrix products it consists of.

    python benchmarks/step_time.py [--case mlp] [--method shampoo] [--json out.json]

Two floors are timed in the same process, both plain jitted products at full precision:
``whole``: statistics and application on the whole (matricised) parameters, which is what published
implementations and their tables refer to; ``blocks``: the same on this package's default blocks.
Every time is the minimum over periods of each step of the refresh period; mean and worst are taken
over the steps of the period. The machine's noise is thus mostly left out.
"""

import argparse
import functools
import itertools
import json
import math
import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import optax

import kradagrad_jax as kj
from kradagrad_jax.engine.static import plan_of

_HIGHEST = jax.lax.Precision.HIGHEST


def mlp() -> dict:
    sizes = [784, 512, 512, 10]
    return {
        f"layer{i}": {"kernel": (m, n), "bias": (n,)}
        for i, (m, n) in enumerate(itertools.pairwise(sizes))
    }


def transformer(blocks: int) -> dict:
    one = {f"attention{i}": {"kernel": (256, 256), "bias": (256,)} for i in range(4)}
    one["up"] = {"kernel": (256, 1024), "bias": (1024,)}
    one["down"] = {"kernel": (1024, 256), "bias": (256,)}
    return {f"block{i}": one for i in range(blocks)}


def convolutions() -> dict:
    return {f"conv{i}": {"kernel": (3, 3, 64, 64), "bias": (64,)} for i in range(4)}


CASES = {
    "mlp": mlp(),
    "blocks1": transformer(1),
    "blocks2": transformer(2),
    "blocks12": transformer(12),
    "conv": convolutions(),
}
METHODS = {
    "adam": lambda every, stats: optax.adam(1e-3),
    "shampoo": lambda every, stats: kj.shampoo(
        1e-3, graft="none", beta1="none", refresh_every=every, statistics_every=stats
    ),
    "shampoo tracked": lambda every, stats: kj.shampoo(
        1e-3, graft="none", beta1="none", root="tracked", refresh_every=every,
        statistics_every=stats,
    ),
    "shampoo newton": lambda every, stats: kj.shampoo(
        1e-3, graft="none", beta1="none", root="newton", refresh_every=every,
        statistics_every=stats,
    ),
    "shampoo adam graft": lambda every, stats: kj.shampoo(
        1e-3, beta1="none", refresh_every=every, statistics_every=stats
    ),
    "shampoo default": lambda every, stats: kj.shampoo(
        1e-3, refresh_every=every, statistics_every=stats
    ),
    "shampoo staggered": lambda every, stats: kj.shampoo(
        1e-3, graft="none", beta1="none", refresh_every=every, statistics_every=stats,
        timing=kj.Timing(stagger=every > 1),
    ),
    "square-root shampoo": lambda every, stats: kj.shampoo(
        1e-3, graft="none", beta1="none", statistics="square_root", refresh_every=every,
        statistics_every=stats,
    ),
    "kradagrad_star": lambda every, stats: kj.kradagrad_star(
        1e-3, graft="none", beta1="none", refresh_every=every, statistics_every=stats
    ),
    "kradagrad_star tracked": lambda every, stats: kj.kradagrad_star(
        1e-3, graft="none", beta1="none", root="tracked", refresh_every=every,
        statistics_every=stats,
    ),
    "kradagrad_star staggered": lambda every, stats: kj.kradagrad_star(
        1e-3, graft="none", beta1="none", refresh_every=every, statistics_every=stats,
        timing=kj.Timing(stagger=every > 1),
    ),
    "kradagrad": lambda every, stats: kj.kradagrad(
        1e-3, graft="none", beta1="none", refresh_every=every, statistics_every=stats
    ),
}  # fmt: skip


def arrays(shapes: dict, seed: int) -> dict:
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(
        [jax.random.normal(k, s) / math.sqrt(s[-1]) for k, s in zip(keys, leaves, strict=True)]
    )


def state_bytes(state) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def formula_bytes(params, layout: kj.Layout) -> int:
    """Documented size of the factors of Shampoo and KrADagrad*: 2 sum n_i^2 per block."""
    plan = plan_of(params, layout)
    numbers = [
        sum(n * n for n, f in zip(b.shape, b.factored, strict=True) if f) for b in plan.buckets
    ]
    return sum(
        2 * b.size * n * b.dtype.itemsize for b, n in zip(plan.buckets, numbers, strict=True)
    )


def floor_ms(params, layout: kj.Layout, repeats: int) -> float:
    """Statistics and application as bare products on the blocks of a layout."""
    plan = plan_of(params, layout)
    shapes = [(b.size, *b.shape) for b in plan.buckets if len(b.shape) == 2]
    gs = [jax.random.normal(jax.random.key(1), s) for s in shapes]
    ps = [(jnp.zeros((b, m, m)), jnp.zeros((b, n, n))) for b, m, n in shapes]

    @jax.jit
    def products(gs, ps):
        mm = functools.partial(jnp.matmul, precision=_HIGHEST)
        out = []
        for g, (p, q) in zip(gs, ps, strict=True):
            t = g.swapaxes(1, 2)
            out.append((mm(g, t), mm(t, g), mm(mm(p, g), q)))
        return out

    jax.block_until_ready(products(gs, ps))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(products(gs, ps))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def measure(tx, shapes: dict, period: int, periods: int) -> dict:
    params, grads = arrays(shapes, 0), [arrays(shapes, s) for s in (1, 2, 3)]
    state = jax.jit(tx.init)(params)
    size = state_bytes(state)
    update = jax.jit(tx.update, donate_argnums=1)
    start = time.perf_counter()
    compiled = update.lower(grads[0], state, params).compile()
    compile_s = time.perf_counter() - start
    best = [math.inf] * period
    for step in range(1 + period * (periods + 1)):
        start = time.perf_counter()
        out, state = compiled(grads[step % 3], state, params)
        jax.block_until_ready((out, state))
        if step > period:
            best[step % period] = min(best[step % period], time.perf_counter() - start)
    return {
        "mean_ms": 1e3 * sum(best) / period,
        "worst_ms": 1e3 * max(best),
        "compile_s": compile_s,
        "state_bytes": size,
    }


def run(case: str, methods: list[str], settings: list[tuple[int, int]], periods: int) -> list[dict]:
    shapes = CASES[case]
    params = arrays(shapes, 0)
    parameter_bytes = state_bytes(params)
    whole = kj.Layout(block_size=None)
    rows = []
    for name in methods:
        for every, stats in [(1, 1)] if name == "adam" else settings:
            floors = {
                "floor_whole_ms": floor_ms(params, whole, 8),
                "floor_blocks_ms": floor_ms(params, kj.Layout(), 8),
            }
            row = measure(METHODS[name](every, stats), shapes, max(every, stats), periods)
            floors = {k: min(v, floor_ms(params, whole if "whole" in k else kj.Layout(), 8))
                      for k, v in floors.items()}  # fmt: skip
            row |= floors | {
                "case": case,
                "method": name,
                "refresh_every": every,
                "statistics_every": stats,
                "ratio_whole": row["mean_ms"] / floors["floor_whole_ms"],
                "ratio_blocks": row["mean_ms"] / floors["floor_blocks_ms"],
                "worst_over_mean": row["worst_ms"] / row["mean_ms"],
                "state_over_parameters": row["state_bytes"] / parameter_bytes,
                "formula_bytes": formula_bytes(params, kj.Layout()),
            }
            rows.append(row)
            print(
                f"{case:9} {name:25} {every:3}/{stats:<3} mean {row['mean_ms']:8.2f} ms"
                f"  worst {row['worst_ms']:8.2f}  x whole floor {row['ratio_whole']:6.2f}"
                f"  x block floor {row['ratio_blocks']:6.2f}  compile {row['compile_s']:5.2f} s"
                f"  state/params {row['state_over_parameters']:5.2f}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--setting", action="append", help="refresh/statistics, e.g. 10/1")
    parser.add_argument("--periods", type=int, default=4)
    parser.add_argument("--json", help="write all rows to this file")
    args = parser.parse_args()
    chosen = args.setting or ["1/1", "10/1", "10/10"]
    settings = [tuple(map(int, s.split("/"))) for s in chosen]
    print(f"jax {jax.__version__}, optax {optax.__version__}, {os.cpu_count()} cores; "
          "columns: refresh/statistics interval")  # fmt: skip
    rows = []
    for case in args.case or list(CASES):
        rows += run(case, args.method or list(METHODS), settings, args.periods)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
