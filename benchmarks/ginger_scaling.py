"""Ginger's time and memory per step against the number of parameters, and its float32 error.

    python benchmarks/ginger_scaling.py [--ranks 4 16 64] [--sizes 1e5 1e6 1e7] [--json out.json]

One step = one curvature vector folded in, one direction applied, on a single parameter of d
entries in float32 (``fisher="empirical"``: no second gradient is timed). Times are the minimum of a
few steps with a donated state: wall time, and processor time of all threads, which other programs
on the machine disturb less and which is fitted. Bytes are those of the state and the peak that the
compiled step reports. The fit is ``time = a + b d`` by least squares of relative errors; "order" is
the slope of ``log time`` against ``log d``.
"""

import argparse
import functools
import json
import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np

from kradagrad_jax.linalg.spans import Span, fold, solve
from kradagrad_jax.transforms.ginger import scale_by_ginger


def measure(rank: int, size: int, seconds: float) -> dict[str, float]:
    """Time and bytes of one step."""
    tx = scale_by_ginger(rank=rank, fisher="empirical")
    params = {"w": jnp.zeros(size, jnp.float32)}
    grads = {"w": jnp.asarray(np.random.default_rng(0).normal(size=size), jnp.float32)}
    state = jax.jit(tx.init)(params)
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    step = jax.jit(tx.update, donate_argnums=1).lower(grads, state).compile()
    memory = step.memory_analysis()
    walls: list[float] = []
    processor: list[float] = []
    while len(walls) < 5 or (sum(walls) < seconds and len(walls) < 200):
        start, used = time.perf_counter(), time.process_time()
        updates, state = step(grads, state)
        jax.block_until_ready((updates, state))
        walls.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return {
        "rank": rank,
        "size": size,
        "seconds": min(walls[1:]),
        "cpu_seconds": min(processor[1:]),
        "state_bytes": held,
        "temporary_bytes": memory.temp_size_in_bytes if memory else float("nan"),
        "flops_model": (2 * rank**2 + 18 * rank) * size,
    }


def fit(rows: list[dict[str, float]]) -> str:
    """Linear fits of time and bytes in words."""
    d, t = (np.array([row[key] for row in rows]) for key in ("size", "cpu_seconds"))
    weighted = np.stack([1 / t, d / t], 1)
    (a, b), *_ = np.linalg.lstsq(weighted, np.ones_like(t), rcond=None)
    worst = np.max(np.abs((a + b * d) / t - 1))
    order = np.polyfit(np.log(d), np.log(t), 1)[0]
    per = rows[-1]["state_bytes"] / d[-1]
    return (
        f"rank {rows[0]['rank']}: processor time = {a * 1e3:.3g} ms + {b * 1e9:.3g} ns * d "
        f"(worst deviation {worst:.0%}, order {order:.2f}); state {per:.1f} bytes per parameter"
    )


def direction_error(ratio: float, size: int = 2000, rank: int = 8, steps: int = 60) -> float:
    """Error of a float32 direction against float64 for ``sigma_1 / gamma = ratio``."""
    rng = np.random.default_rng(1)
    hs = rng.normal(size=(steps, size)) * np.logspace(0, -1.5, size)
    u = rng.normal(size=size)
    out = []
    gamma = None
    for dtype in (jnp.float64, jnp.float32):
        run = jax.jit(functools.partial(_scanned, dtype=dtype, rank=rank))
        span = run(jnp.asarray(hs, dtype))
        gamma = float(span.values[0]) / ratio if gamma is None else gamma
        v = jax.jit(solve)(span, jnp.asarray(gamma, dtype), jnp.asarray(u, dtype))
        out.append(np.asarray(v, np.float64))
    return float(np.abs(out[1] - out[0]).max() / np.abs(out[0]).max())


def _scanned(hs: jax.Array, dtype: jnp.dtype, rank: int) -> Span:
    start = Span(jnp.zeros((rank, hs.shape[1]), dtype), jnp.zeros(rank, dtype))
    decay = jnp.asarray(0.95, dtype)
    return jax.lax.scan(lambda s, h: (fold(s, h[None], decay, 1 - decay), None), start, hs)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--sizes", type=float, nargs="+", default=[3e5, 1e6, 3e6, 1e7])
    parser.add_argument("--seconds", type=float, default=3.0, help="time per measurement")
    parser.add_argument("--json", help="file for the numbers")
    args = parser.parse_args()
    rows, fits, errors = [], [], {}
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores, float32")
    print("rank         d   wall ms    cpu ms  cpu ns/d  GFlop/s  state MB  temporary MB")
    for rank in args.ranks:
        for size in map(int, args.sizes):
            row = measure(rank, size, args.seconds)
            rows.append(row)
            t, wall = row["cpu_seconds"], row["seconds"]
            print(
                f"{rank:4d} {size:9d} {wall * 1e3:9.1f} {t * 1e3:9.1f} {t / size * 1e9:9.2f} "
                f"{row['flops_model'] / t / 1e9:8.1f} {row['state_bytes'] / 1e6:9.1f} "
                f"{row['temporary_bytes'] / 1e6:13.1f}",
                flush=True,
            )
        fits.append(fit([row for row in rows if row["rank"] == rank]))
        print(fits[-1])
    jax.config.update("jax_enable_x64", True)
    print("float32 against float64, largest error of the direction:")
    for ratio in (1e2, 1e4, 1e6, 1e8):
        errors[f"{ratio:.0e}"] = direction_error(ratio)
        print(f"  sigma/gamma {ratio:.0e}: {errors[f'{ratio:.0e}']:.1e}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"rows": rows, "fits": fits, "direction_errors": errors}, file, indent=1)


if __name__ == "__main__":
    main()
