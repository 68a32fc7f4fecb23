"""Cost of SINGD's structures against the size d: ratios to dense factors in the same process.

    python benchmarks/structures.py [--sizes 128 256 512 1024] [--rows 128] [--json out.json]

A layer (d, d) with two factors of the same structure, no momentum. `update`: moving both by the
rows of one batch; `apply`: preconditioning one gradient. Times are minima over interleaved calls.
Bytes are those of the state, checked against the formulas of the documentation.
"""

import argparse
import json
import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp

from kradagrad_jax.factors.method import Rows, Step
from kradagrad_jax.factors.singd import SingdOptions, singd_method
from kradagrad_jax.linalg.structures import structure

FORMULAS = {
    "dense": lambda d: d * d,
    "tril": lambda d: d * (d + 1) // 2,
    "triu": lambda d: d * (d + 1) // 2,
    "block_diagonal:30": lambda d: d // 30 * 900 + (d % 30) ** 2,
    "hierarchical:15,15": lambda d: 31 * d - 225 - 30,
    "tril_top_left_diag:15": lambda d: 16 * d - 15,
    "triu_top_left_diag:15": lambda d: 16 * d - 15,
    "tril_bottom_right_diag:15": lambda d: 16 * d - 15,
    "triu_bottom_right_diag:15": lambda d: 16 * d - 15,
    "tril_toeplitz": lambda d: d,
    "triu_toeplitz": lambda d: d,
    "diagonal": lambda d: d,
}


def programs(name: str, d: int, n: int) -> tuple[dict, int]:
    """Compiled calls by name, and the bytes of the state."""
    kind = structure(name)
    method = singd_method(
        SingdOptions(
            structures=(kind, kind),
            lr_cov=0.1,
            riemannian_momentum=0.0,
            normalize_lr_cov="frobenius",
        )
    )
    step = Step(jnp.int32(1), 1, jnp.int32(1), jnp.int32(0))
    keys = jax.random.split(jax.random.key(d), 3)
    rows = Rows(*(jax.random.normal(k, (n, d)) / n**0.5 for k in keys[:2]))
    gradient = jax.random.normal(keys[2], (d, d))
    factor = method.init((d, d), jnp.float32)
    size = sum(x.nbytes for x in jax.tree.leaves(factor))
    update = jax.jit(lambda f, a, g: method.accumulate(f, Rows(a, g), step))
    apply = jax.jit(lambda f, m: method.precondition(f, m, step))
    moved = jax.block_until_ready(update(factor, *rows))
    return {
        "update": lambda: update(moved, *rows),
        "apply": lambda: apply(moved, gradient),
    }, size


def measure(names: list[str], d: int, n: int, repeats: int) -> list[dict]:
    """Rows of the table of one size, dense first."""
    built = {name: programs(name, d, n) for name in names}
    best = {(name, what): float("inf") for name in names for what in ("update", "apply")}
    for _ in range(repeats + 1):
        for name, what in best:
            start = time.perf_counter()
            jax.block_until_ready(built[name][0][what]())
            best[name, what] = min(best[name, what], time.perf_counter() - start)
    out = []
    for name in names:
        expected = 2 * 4 * FORMULAS[name](d)
        if built[name][1] != expected:
            raise SystemExit(f"{name}, d = {d}: {built[name][1]} bytes, formula {expected}")
        row = {"structure": name, "d": d, "bytes": expected}
        for what in ("update", "apply"):
            row[f"{what}_ms"] = 1e3 * best[name, what]
            row[f"{what}_ratio"] = best[name, what] / best["dense", what]
        out.append(row | {"bytes_ratio": expected / (8 * d * d)})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--structure", action="append", choices=list(FORMULAS))
    parser.add_argument("--json", help="write all rows to this file")
    args = parser.parse_args()
    names = ["dense", *(x for x in args.structure or FORMULAS if x != "dense")]
    print(f"jax {jax.__version__}, {os.cpu_count()} cores; {args.rows} rows; x: ratio to dense")
    rows = []
    for d in args.sizes:
        for row in measure(names, d, args.rows, args.repeats):
            rows.append(row)
            times = "  ".join(
                f"{what} {row[what + '_ms']:8.3f} ms x{row[what + '_ratio']:6.3f}"
                for what in ("update", "apply")
            )
            name = f"{row['structure']:26} d {d:5}"
            print(f"{name} {times}  {row['bytes']:9} bytes x{row['bytes_ratio']:.4f}", flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
