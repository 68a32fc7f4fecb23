"""TNT: the inverse of a Kronecker-factored Fisher matrix that is seen through sampled gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine import Interval, scale_by_blocks
from kradagrad_jax.engine.layers import scale_by_layers
from kradagrad_jax.engine.timing import interval_at
from kradagrad_jax.factors.tnt import TntOptions, tnt_method
from kradagrad_jax.transforms import examples, sampled
from kradagrad_jax.transforms.arguments import transformation
from kradagrad_jax.transforms.common import BLOCK_DEFAULTS, engine_arguments
from kradagrad_jax.transforms.ranges import check

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": BLOCK_DEFAULTS
    | {
        "fisher": "model",
        "spec": None,
        "damping": 0.1,
        "damping_rule": "per_mode",
        "relative_damping": 0.0,
        "beta1": 0.9,
        "beta2": 0.9,
        "averaging": "corrected",
        "inverse": "cholesky",
        "statistics": "gram",
        "grouping": "filter_flattening",
        "max_dim": "none",
        "fisher_scale": 1.0,
        "max_rate": 1.0,
        "learning_rate": None,
        "early_refresh": True,
        "refresh_every": 20,
        "layout": sampled.CUT,
        "fallback": None,
    }
}
PRESETS["paper"] = PRESETS["recommended"] | {
    "averaging": "first",
    "layout": sampled.WHOLE,
    "max_rate": "none",
}
PRESETS["official_cnn"] = PRESETS["paper"] | {
    "damping": 0.01,
    "refresh_every": 100,
    "statistics_every": 10,
}


@transformation(
    PRESETS,
    off="beta1 max_dim max_rate",
    example=examples.SAMPLES,
    damping_rule=("per_mode", "factored", "joint"),
    averaging=("first", "corrected", "official"),
    statistics=("gram", "square_root"),
)
def scale_by_tnt(c: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    r"""TNT (arXiv 2106.02925): momentum times the damped inverse of a sampled Fisher block.

    For a matrix G, sampled gradients S and :math:`k = 2` modes

    .. math::
      \Omega_1 = E[S S^T], \quad \Omega_2 = E[S^T S], \quad
      c = (tr(\Omega)/mn)^{1/k}, \quad U_i = \Omega_i\, c\, d_i / tr(\Omega), \quad
      v \leftarrow \beta_1 v + G, \quad u = (U_1 + \epsilon)^{-1}\, v\, (U_2 + \epsilon)^{-1}

    A sampled gradient is that of the mean loss at labels drawn from the model;
    ``update(grads, state, params, curvature=samples)`` receives it from
    :func:`kradagrad_jax.curvature.sampled_gradients`. ``curvature=None`` means "none at this step".

    The step is not bounded by the gradient: a confident model draws its own predictions, sampled
    gradients vanish, and u tends to :math:`\epsilon^{-k} v`. Keep :math:`lr\, \epsilon^{-k}` (see
    :func:`tnt_rates`) near a sane learning rate of SGD, or set ``max_rate``.

    Args:
      preset: ``"recommended"``: modes above 2048 are cut into pieces of at most this length (and
        have no factor above 8192); ``"paper"`` (the autoencoder setting of arXiv 2106.02925: no
        bound on the rate, no cut; the average starts at the first statistic); ``"official_cnn"``
        (damping 0.01, statistics every 10, inverses every 100 steps). The paper's warm start is
        :func:`tnt_warm_start`.
      fisher: ``"model"``: sampled gradients; ``"empirical"`` (TNT-EF): the gradient itself, nothing
        else is needed; wants a damping up to ten times as large.
      spec: what :func:`kradagrad_jax.curvature.inspect` says of the model. If it is given, dense
        layers (bias joint) take their statistics per example from layer inputs and output
        gradients (``curvature=`` of :mod:`kradagrad_jax.curvature` with ``reducer="raw"``): less
        noise by about the batch size. ``fisher``, ``grouping`` and ``layout`` do not apply, and
        other leaves get ``fallback``. At shared weights every position counts as an example.
      damping: epsilon, 0.01 to 1, tuned with the learning rate: number or schedule.
      damping_rule: ``"per_mode"``: epsilon is added to every U; ``"factored"``:
        ``damping**(1/k)`` is (kfac-jax); ``"joint"``: ``(U_1 x .. x U_k + damping)^-1`` by
        eigendecompositions.
      relative_damping: rho: ``rho * c`` is added to epsilon, which keeps its value as a floor. Runs
        that relied on rho alone diverged: not recommended.
      beta1: heavy-ball momentum BEFORE the preconditioner; ``"none"``: none.
      beta2: decay of the averages of the statistics.
      averaging: ``"first"``: starts at the first statistic; ``"corrected"``: weighted mean of all
        statistics so far; ``"official"``: the authors' cold start, whose weights exceed one.
      inverse: ``"cholesky"``, ``"eigh"``, ``"newton"`` (matmuls only; the authors' iteration stops
        elsewhere, parameters differ by 4e-8 from theirs), or a function of one symmetric positive
        definite matrix.
      statistics: ``"gram"``, or ``"square_root"``: R with R^T R = Omega is kept and updated by QR,
        for float32 with a damping below 1e-4 c.
      grouping: which axes form one mode: ``"filter_flattening"`` (kernels ``(h, w, in, out)`` have
        the modes ``h*w``, in, out), ``"kfac_reshaping"`` (``h*w*in``, out), ``"none"``, or a
        function ``block shape -> groups of axes``.
      max_dim: modes longer than this keep the diagonal of Omega only; ``"none"``: none does.
      fisher_scale: multiplies every statistic; the batch size gives the Fisher matrix.
      max_rate: the direction of a block is shortened to ``max_rate / learning_rate`` times the
        length of its momentum: no block ever moves further than SGD with this learning rate would.
        Unless it is given, it acts where ``learning_rate`` is known. ``"none"``: no bound.
      learning_rate: what updates will be multiplied by, for ``max_rate``: a number or a schedule.
      early_refresh: inverses at every statistic until ``refresh_every`` steps are done.
      layout: how parameters are cut into blocks (``block_size``, ``stacked``, ``include``; its
        ``merge`` is always ``"none"``).
      refresh_every: T2, steps between inverses.
      statistics_every: T1, steps between statistics.
      timing: start, ramp, phases, staggering (without early refresh), see :class:`Timing`.
      fallback: for parameters without factors: ``"identity"`` (the momentum; the default but with
        ``spec``), a graft kind (``"adam"``: the default with ``spec``), or a GradientTransformation
        with positive sign.
      mu_dtype: dtype of the momentum. None: as ``factor_dtype``.

    Returns:
      A GradientTransformationExtraArgs whose state is a :class:`BlockState` with a ``TntFactor``
      per block shape: ``2 sum d_i^2`` numbers per block, and one copy of the parameters for the
      momentum, ``mu``.

    Raises:
      ValueError: combinations that do not exist; ``max_rate`` without
        ``learning_rate``; an update without ``curvature``.

    References:
      Ren and Goldfarb, `Tensor Normal Training <https://arxiv.org/abs/2106.02925>`_, 2021.
    """
    spec = c["spec"]
    method = tnt_method(tnt_options(c))
    c["fallback"] = c["fallback"] or ("identity" if spec is None else "adam")
    c["refresh_every"] = _refresh_interval(c)
    engine = engine_arguments(c | {"average": "sum"})
    if spec is not None:
        del engine["layout"]
        return scale_by_layers(method, spec, form="rows", **engine)
    engine["layout"] = sampled.unmerged(c["layout"])
    return scale_by_blocks(method, source=sampled.source("tnt", c["fisher"]), **engine)


def tnt_options(c: dict[str, Any]) -> TntOptions:
    """Checked options of the method."""
    if not callable(c["inverse"]):
        check("inverse", c["inverse"], ("cholesky", "eigh", "newton"))
    if not callable(c["grouping"]):
        names = ("filter_flattening", "kfac_reshaping", "none")
        check("grouping", c["grouping"], names)
    if c["statistics"] == "square_root" and c["damping_rule"] == "joint":
        raise ValueError("statistics='square_root' does not go with damping_rule='joint'")
    rate = c["learning_rate"]
    if c["max_rate"] is not None and "max_rate" in c["given"] and rate is None:
        raise ValueError("max_rate needs learning_rate: the bound is on lr |u| / |momentum|")
    options = {name: c[name] for name in TntOptions._fields if name in c}
    if c["spec"] is not None:
        options["grouping"] = "none"
    return TntOptions(**options, max_gain=_gain(c["max_rate"], rate))


def _gain(max_rate: Any, learning_rate: Any) -> Any:
    """Largest allowed ratio of direction and momentum, as a function of the count; or None."""
    if max_rate is None or learning_rate is None:
        return None

    def gain(count: jax.Array) -> jax.Array:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        return jnp.asarray(max_rate) / jnp.asarray(rate)

    return gain


def _refresh_interval(c: dict[str, Any]) -> Interval:
    """``refresh_every``, but that of the statistics in the first period, for an early start."""
    every, often = c["refresh_every"], c["statistics_every"]
    if not c["early_refresh"] or c["timing"].stagger:
        return every

    def interval(count: jax.Array) -> jax.Array:
        later, early = (jnp.asarray(interval_at(x, count)) for x in (every, often))
        return jnp.where(count - 1 < later, early, later)

    return interval
