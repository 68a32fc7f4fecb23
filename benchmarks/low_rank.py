"""Cost of renewing one factor of size d: dense inverse, randomised SVD, online update.

    python benchmarks/low_rank.py [--sizes 256 512 1024 2048] [--rank 110] [--batch 128] [--json F]

Times are minima over repetitions in one process; the last lines fit the exponent of d, and give
the ratios at the largest size.
"""

import argparse
import functools
import json
import math
import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.kfac import KfacOptions, kfac_method
from kradagrad_jax.factors.lowrank import low_rank_method
from kradagrad_jax.factors.lowrank_options import LowRankOptions, Online, Sketch
from kradagrad_jax.factors.method import Rows, Step


def best(function, *arguments, repeats: int) -> float:
    """Seconds of the fastest of several calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def measure(d: int, rank: int, batch: int, power: int, repeats: int) -> dict[str, float]:
    """Milliseconds by method, for the two factors of a layer (d, d)."""
    step = Step(jnp.int32(1), 1, jnp.int32(1), jnp.int32(0))
    key = jax.random.key(d)
    a, g = (jax.random.normal(jax.random.fold_in(key, i), (batch, d)) for i in (0, 1))
    rows = Rows(a / math.sqrt(batch), g / math.sqrt(batch))
    sketch = Sketch(rank=min(rank, d), power=power)
    methods = {
        "K-FAC, Cholesky": kfac_method(KfacOptions(damping=1e-1)),
        "K-FAC, eigh": kfac_method(KfacOptions(damping=1e-1, inverse="eigh")),
        "RS-KFAC": low_rank_method(LowRankOptions(sketch)),
        "SRE-KFAC": low_rank_method(LowRankOptions(sketch, decomposition="sre")),
    }
    out = {}
    for name, method in methods.items():
        factor = jax.jit(method.accumulate)(method.init((d, d), jnp.float32), rows, step)
        out[name] = best(jax.jit(method.refresh), factor, step, repeats=repeats)
    if rank + batch < d:
        method = low_rank_method(LowRankOptions(sketch, online=Online(batch_size=batch)))
        factor = method.init((d, d), jnp.float32)
        update = jax.jit(method.accumulate)
        out["B-KFAC"] = best(update, factor, rows, step, repeats=repeats)
        factor = update(factor, rows, step)
        weight = jax.random.normal(key, (d, d))
        apply = jax.jit(functools.partial(method.precondition))
        out["(applying the pairs)"] = best(apply, factor, weight, step, repeats=repeats)
    return {name: 1e3 * seconds for name, seconds in out.items()}


def slope(sizes: list[int], times: list[float]) -> float:
    """Exponent of the size, least squares on the logarithms."""
    x = [math.log(s) for s in sizes]
    y = [math.log(t) for t in times]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return top / sum((a - mx) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--rank", type=int, default=110)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--power", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write all rows to this file")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {os.cpu_count()} cores; ms per layer (d, d): both factors")
    rows: dict[int, dict[str, float]] = {}
    for d in args.sizes:
        rows[d] = measure(d, args.rank, args.batch, args.power, args.repeats)
        text = "  ".join(f"{name} {ms:9.2f}" for name, ms in rows[d].items())
        print(f"d {d:5}  {text}", flush=True)
    for name in rows[args.sizes[-1]]:
        sizes = [d for d in args.sizes if name in rows[d]]
        if len(sizes) > 1:
            exponent = slope(sizes, [rows[d][name] for d in sizes])
            print(f"{name:22} grows as d^{exponent:.2f} from {sizes[0]} to {sizes[-1]}")
    last = rows[args.sizes[-1]]
    for name in ("RS-KFAC", "SRE-KFAC", "B-KFAC"):
        if name in last:
            ratios = ", ".join(
                f"{last[dense] / last[name]:.1f}x cheaper than {dense}"
                for dense in ("K-FAC, eigh", "K-FAC, Cholesky")
            )
            print(f"{name} at d = {args.sizes[-1]}: {ratios}")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
