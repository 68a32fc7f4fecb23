"""What is known about every parameter of a captured function: a static, printable table."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

from kradagrad_jax.curvature.layout import Layer

Status = Literal["full", "inexact", "partial", "none"]


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """How one parameter leaf is covered.

    Attributes:
      path: '/'-joined names; the trailing box entry of flax's variables is dropped.
      shape: shape of the leaf.
      dtype: name of its dtype.
      status: ``"full"``: every use was found and covers the whole leaf; ``"inexact"``: there is
        some other use as well, such as a penalty in the loss; ``"partial"``: the uses see only
        parts of the leaf; ``"none"``: no use was found.
      kinds: kinds of the uses: dense, conv, embed, scale, bias.
      uses: number of uses.
      stack: number of matrices (lengths of scans times groups).
      d_in: inputs per matrix (1 for elementwise uses, 0 without use).
      d_out: outputs per matrix.
      bias: path of the bias paired with this weight, or None.
      bias_of: path of the weight this bias is paired with, or None.
      input_group: leaves with the same number read the same inputs (query, key, value).
      reasons: what limits the status, with source locations.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    status: Status = "none"
    kinds: tuple[str, ...] = ()
    uses: int = 0
    stack: int = 1
    d_in: int = 0
    d_out: int = 0
    bias: str | None = None
    bias_of: str | None = None
    input_group: int | None = None
    reasons: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CaptureSpec:
    """Static, hashable description of all parameters; ``str()`` of it is a table.

    Attributes:
      leaves: one entry per parameter leaf, in the order of the parameter tree.
      layers: the leaves with statistics that a Kronecker-factored method can use.
      examples: number of examples of the batch that was traced, 0 for a hand-made one.
      terms: where the number of loss terms comes from, for the table.

    Examples:
      >>> from kradagrad_jax.curvature import CaptureSpec, Layer
      >>> spec = CaptureSpec.from_layers([Layer.dense("w", (3, 2), bias="b")])
      >>> spec.layer("w").d_out
      2
    """

    leaves: tuple[LeafSpec, ...]
    layers: tuple[Layer, ...]
    examples: int = 0
    terms: str = ""

    @classmethod
    def from_layers(cls, layers: Sequence[Layer]) -> "CaptureSpec":
        """Specification of hand-made layers, for users with hooks of their own."""
        leaves = []
        for layer in layers:
            leaves.append(
                LeafSpec(
                    layer.path, layer.shape, status="full", kinds=(layer.kind,), uses=1,
                    stack=layer.stack, d_in=layer.d_in, d_out=layer.d_out, bias=layer.bias,
                )
            )  # fmt: skip
            if layer.bias is not None and layer.bias_shape is not None:
                leaves.append(
                    LeafSpec(
                        layer.bias, layer.bias_shape, status="full", kinds=("bias",), uses=1,
                        stack=layer.stack, d_in=1, d_out=layer.d_out, bias_of=layer.path,
                    )
                )  # fmt: skip
        return cls(tuple(leaves), tuple(layers))

    @functools.cached_property
    def _layers_by_path(self) -> dict[str, Layer]:
        return {layer.path: layer for layer in self.layers}

    @functools.cached_property
    def _leaves_by_path(self) -> dict[str, LeafSpec]:
        return {leaf.path: leaf for leaf in self.leaves}

    def layer(self, path: str) -> Layer:
        """The layer of a weight path.

        Raises:
          KeyError: if the path has no usable statistics; the message says why.
        """
        if path in self._layers_by_path:
            return self._layers_by_path[path]
        leaf = self._leaves_by_path.get(path)
        if leaf is None:
            known = ", ".join(self._layers_by_path) or "none"
            raise KeyError(f"no parameter '{path}' in the capture specification; layers: {known}")
        if leaf.bias_of is not None:
            raise KeyError(f"'{path}' is the bias of layer '{leaf.bias_of}': ask for that one")
        why = "; ".join(leaf.reasons) or f"used as {', '.join(leaf.kinds) or 'nothing'}"
        raise KeyError(f"parameter '{path}' has no layer statistics (status {leaf.status}: {why})")

    def leaf(self, path: str) -> LeafSpec:
        """The entry of one leaf; KeyError if there is none."""
        if path not in self._leaves_by_path:
            raise KeyError(f"no parameter '{path}' in the capture specification")
        return self._leaves_by_path[path]

    def __str__(self) -> str:
        rows = [("parameter", "shape", "status", "kind", "matrices", "note")]
        rows += [_table_row(leaf) for leaf in self.leaves]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                [*(c.ljust(w) for c, w in zip(row[:5], widths, strict=True)), row[5]]
            ).rstrip()
            for row in rows
        ]
        used = sum(leaf.status in ("full", "inexact") for leaf in self.leaves)
        covered = len(self.layers) + sum(layer.bias is not None for layer in self.layers)
        tail = f"{used} of {len(self.leaves)} parameters matched, {covered} in {len(self.layers)}"
        lines.append(
            tail + " Kronecker-factored layers" + (f"; {self.terms}" if self.terms else "")
        )
        return "\n".join(lines)


def _table_row(leaf: LeafSpec) -> tuple[str, ...]:
    kind = "+".join(leaf.kinds) if leaf.kinds else "-"
    if leaf.uses > 1:
        kind += f" x{leaf.uses}"
    matrices = "-"
    if leaf.d_out:
        matrices = f"{leaf.d_in}x{leaf.d_out}"
        if leaf.stack > 1:
            matrices = f"{leaf.stack} of {matrices}"
    notes = list(leaf.reasons)
    if leaf.bias_of:
        notes.insert(0, f"bias of {leaf.bias_of}")
    if leaf.bias:
        notes.insert(0, f"with bias {leaf.bias}")
    shape = "(" + ", ".join(map(str, leaf.shape)) + ")"
    return leaf.path, shape, leaf.status, kind, matrices, "; ".join(notes)
