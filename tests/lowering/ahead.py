"""Compilation for devices that are not there."""

import dataclasses
import re
import time
from typing import Any

import jax

import kradagrad_jax as kj
from tests.lowering import programs

NET = programs.Net(batch=16, side=4, channels=8, filters=64, hidden=96, classes=32)
DEEP = dataclasses.replace(NET, depth=4)  # stacks of four blocks, for four devices
BRAND = ("b_kfac", "br_kfac", "bc_kfac", "brc_kfac")
# rank + batch must be below the sizes of the layers, or nothing is followed online
_SKETCH = {"sketch": kj.Sketch(rank=12, oversampling=4)}
PROGRAMS = [
    programs.variant(name, name, NET, **_SKETCH if name in BRAND else {}) for name in programs.NAMES
]
VARIANTS = [
    program
    for program in programs.VARIANTS
    if program.name
    in ("shampoo-newton", "shampoo-square_root", "star-bf16", "kfac-bf16", "singd-bf16")
]


def on(sharding: Any, tree: Any) -> Any:
    """Abstract arrays with a sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compile_for(device: Any, program: programs.Program, record: Any, column: str) -> str:
    """Text of the update of a program compiled for one device; records the seconds."""
    update, arguments = program.build()
    arguments = on(jax.sharding.SingleDeviceSharding(device), arguments)
    return timed(jax.jit(update, donate_argnums=1).lower(*arguments), record, program.name, column)


def timed(lowered: Any, record: Any, name: str, column: str) -> str:
    """Compiles and records the seconds of all threads; the text of the compiled program."""
    start = time.process_time()
    text = lowered.compile().as_text()
    record("compile", (name, column, round(time.process_time() - start, 1)))
    return text


def precisions(text: str) -> list[str]:
    """The precision of every product in the text of a compiled program, lower case."""
    products = r"\bdim_labels=| dot\(|custom_call_target=\"__cublas\$(?:lt\$)?(?:matmul|gemm)"
    lines = [line for line in text.splitlines() if re.search(products, line)]
    found = [re.search(r"operand_precision\"?[=:][{\[]([\w\",]*)[}\]]", line) for line in lines]
    return [m[1].replace('"', "").lower() if m else "default" for m in found]


def calls(text: str) -> set[str]:
    """Names of the kernels that are called."""
    return set(re.findall(r'custom_call_target="([^"]+)"', text))
