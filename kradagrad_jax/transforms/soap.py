"""SOAP: Adam in the slowly changing eigenbasis of Shampoo's statistics."""

import dataclasses
from typing import Any

import optax

from kradagrad_jax.engine import Graft, Layout
from kradagrad_jax.factors.soap import SoapOptions, soap_method
from kradagrad_jax.transforms.arguments import transformation
from kradagrad_jax.transforms.common import BLOCK_DEFAULTS, build
from kradagrad_jax.transforms.rest_adam import rest_adam

WHOLE = Layout(
    block_size=None, merge="none", max_dim=10000, state_limit=None, biases=None
)  # parameters as they are, vectors by Adam
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": BLOCK_DEFAULTS
    | {
        "beta1": 0.95,
        "beta2": 0.95,
        "shampoo_beta": None,
        "eps": 1e-5,
        "eps_rule": "relative",
        "exponent": 0.5,
        "basis": "qr",
        "order": "last",
        "mask": True,
        "bias_correction": True,
        "normalize_grads": False,
        "iterations": 1,
        "tolerance": 0.0,
        "graft": Graft("none"),
        "fallback": None,
        "late": False,
    }
}
PRESETS["official"] = PRESETS["recommended"] | {
    "eps": 1e-8,
    "eps_rule": "absolute",
    "mask": False,
    "late": True,
    "layout": WHOLE,
}
PRESETS["basis_first"] = PRESETS["recommended"] | {
    "beta1": 0.9,
    "beta2": 0.99,
    "basis": "eigh",
    "order": "first",
}


@transformation(
    PRESETS,
    off="beta1",
    without="late statistics_every mu_dtype",
    basis=("qr", "eigh", "tracked"),
    order=("last", "first"),
    eps_rule=("relative", "absolute"),
)
def scale_by_soap(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    r"""SOAP (arXiv 2409.11321): Adam in the eigenbasis of the Gram matrices of every mode.

    For a matrix block :math:`G` with bases :math:`Q_1, Q_2`

    .. math::
      m \leftarrow \beta_1 m + (1-\beta_1) G, \quad
      v \leftarrow \beta_2 v + (1-\beta_2) (Q_1^T G\, Q_2)^{\circ 2}, \quad
      u = c\, Q_1 \frac{Q_1^T m\, Q_2}{\sqrt{v} + \epsilon} Q_2^T

    with :math:`c = \sqrt{1-\beta_2^t} / (1-\beta_1^t)`. The statistics
    :math:`S_1 \leftarrow b S_1 + (1-b) G G^T`, :math:`S_2 \leftarrow b S_2 + (1-b) G^T G` follow;
    every ``refresh_every`` steps one power step with QR moves the bases towards their
    eigenvectors, and v is permuted with the columns. The first gradient makes the first basis
    alone: its step is zero, and t counts from the second.

    Args:
      preset: ``"recommended"``: blocks, relative epsilon, null directions masked. ``"official"``:
        as nikhilvyas/SOAP: parameters as they are, absolute epsilon, no mask; vectors and
        parameters whose modes are all longer than 10000 get Adam without its first gradient.
        ``"basis_first"``: eigenvalue-corrected Shampoo, as facebookresearch/optimizers with
        ``eps=1e-12, eps_rule="absolute", mask=False``.
      beta1: decay of the average of gradients; ``"none"``: the gradient itself, without the
        memory for it.
      beta2: decay of the squares. Below ``beta1**2`` steps grow once gradients stop.
      shampoo_beta: decay b of the statistics; exactly 1 sums them. None: ``beta2``.
      eps: see ``eps_rule``.
      eps_rule: ``"relative"``: times the largest root of v in the block; ``"absolute"``.
      exponent: of v, 1/2, or a mapping from the number of modes to it; for ``order="first"``.
      basis: ``"qr"``; ``"eigh"``: eigenvectors at every refresh; ``"tracked"``: matmuls alone but
        for the first refresh.
      order: ``"last"``: the step is made in the basis of the steps before, as SOAP does;
        ``"first"``: the basis is renewed before squares are taken and the step is made, averages
        are those of Adam, and the first gradient makes a step; bases are sorted by ascending
        eigenvalue, and ``"qr"`` starts from the identity.
      mask: no step along directions of the basis that hold nothing but rounding errors of the
        statistic (at most ``n`` rounding units of the largest eigenvalue): without it, float32
        and dead inputs give steps of order one of noise.
      bias_correction: of both averages (and of the statistics in ``order="first"``).
      normalize_grads: divides by the root mean square, block by block, before the bias correction.
      iterations: ``order="first"`` alone: most steps of the QR algorithm.
      tolerance: likewise: share of the statistic that may lie off the diagonal before the basis is
        touched.
      layout: how parameters are cut into blocks, see :class:`Layout`. A mode without a factor is
        not rotated: one-sided SOAP. ``merge="greedy"`` with a ``merge_cap`` is ``merge_dims``.
      refresh_every: steps between new bases; 1 for large batches.
      fallback: for parameters without factors: ``"identity"``, any graft kind, or a
        GradientTransformation. None: Adam with these decays.

    Returns:
      A GradientTransformationExtraArgs whose state is a :class:`BlockState` with a ``SoapFactor``
      per block shape: ``2 (m^2 + n^2) + 2 m n`` numbers per ``m x n`` block (and ``m + n`` for the
      mask); statistics are taken at every step, which moves the momentum.

    References:
      Vyas et al., `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024; eigenvalue corrections:
      `George et al. <https://arxiv.org/abs/1806.03884>`_, 2018.
    """
    last = c["order"] == "last"
    c["shampoo_beta"] = c["beta2"] if c["shampoo_beta"] is None else c["shampoo_beta"]
    if c["fallback"] is None:
        c["fallback"] = rest_adam(
            c["beta1"],
            c["beta2"],
            1e-8 if c["eps_rule"] == "relative" else c["eps"],
            late=c["late"] and last,
            bias_correction=c["bias_correction"],
            normalize=c["normalize_grads"],
        )
    names = [f.name for f in dataclasses.fields(SoapOptions)]
    method = soap_method(SoapOptions(**{name: c[name] for name in names}))
    return build(method, c | {"refresh": c["order"], "beta1": None if last else c["beta1"]})
