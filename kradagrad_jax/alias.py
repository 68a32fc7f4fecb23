"""Complete optimizers: a ``scale_by_*`` transformation with momentum, decay and learning rate."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kradagrad_jax.engine.layers import LayerTransformation
from kradagrad_jax.transforms.ginger import scale_by_ginger
from kradagrad_jax.transforms.kfac import scale_by_kfac
from kradagrad_jax.transforms.kl_shampoo import scale_by_kl_shampoo, scale_by_kl_soap
from kradagrad_jax.transforms.kradagrad import scale_by_kradagrad, scale_by_kradagrad_star
from kradagrad_jax.transforms.lowrank import (
    scale_by_b_kfac,
    scale_by_bc_kfac,
    scale_by_br_kfac,
    scale_by_brc_kfac,
    scale_by_rs_kfac,
    scale_by_sre_kfac,
)
from kradagrad_jax.transforms.shampoo import scale_by_shampoo
from kradagrad_jax.transforms.singd import scale_by_ikfac, scale_by_ingd, scale_by_singd
from kradagrad_jax.transforms.sirfshampoo import scale_by_sirfshampoo
from kradagrad_jax.transforms.soap import scale_by_soap
from kradagrad_jax.transforms.tnt import scale_by_tnt

Mask = Any | Callable[[optax.Params], Any] | None


def _complete(
    scale_by: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any,
    nesterov: bool,
    weight_decay: Any,
    mask: Mask,
    coupled: bool,
) -> optax.GradientTransformationExtraArgs:
    """The chain; parts that are statically off are left out (``params=None`` then works).

    Like ``scale_by`` by itself it gives zero, and keeps its momentum, where the gradient is not
    finite.
    """
    average = [] if momentum is None else [optax.trace(momentum, nesterov)]
    if average and isinstance(scale_by, LayerTransformation):
        # the fallback of layer methods (Adam) brings momentum of its own
        average = [optax.masked(average[0], scale_by.covered)]
    decay = []
    if weight_decay is not None and not (
        isinstance(weight_decay, (int, float)) and not weight_decay
    ):
        decay = [optax.add_decayed_weights(weight_decay, mask)]
    middle = decay + average if coupled else average + decay
    chain = optax.chain(scale_by, *middle, optax.scale_by_learning_rate(learning_rate))
    return optax.with_extra_args_support(_held(chain) if middle else chain)


def _held(chain: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The chain, without the moves of its other parts where the first one skips a step."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        out, new = chain.update(updates, state, params, **extra)
        moves = new[0].skipped == state[0].skipped

        def hold(now: jax.Array, before: jax.Array) -> jax.Array:
            floats = jnp.issubdtype(now.dtype, jnp.floating)  # counts run on, as the first part's
            return jnp.where(moves, now, before) if floats else now

        rest = jax.tree.map(hold, new[1:], tuple(state)[1:])
        return jax.tree.map(lambda u: jnp.where(moves, u, 0), out), (new[0], *rest)

    return optax.GradientTransformationExtraArgs(chain.init, update)


def _alias(
    scale_by: Callable[..., optax.GradientTransformation],
    summary: str,
    example: str,
    momentum: Any = None,
    coupled: bool = False,
) -> Callable[..., Any]:
    """The complete optimizer of a transformation.

    Its signature (which ``optax.inject_hyperparams`` reads) is spelled out from that of
    ``scale_by``, so that every argument is stated once.

    Args:
      scale_by: the transformation; if it has an argument ``learning_rate``, it is passed on.
      summary: first line of the docstring.
      example: the last lines.
      momentum: default of ``momentum``.
      coupled: weight decay goes through the momentum, as the method's authors have it.
    """
    name = scale_by.__name__.removeprefix("scale_by_")
    inherited = dict(inspect.signature(scale_by).parameters)
    wants_rate = inherited.pop("learning_rate", None) is not None
    default = momentum

    def optimizer(
        learning_rate: optax.ScalarOrSchedule,
        *args: Any,
        momentum: Any = default,
        nesterov: bool = False,
        weight_decay: Any = None,
        weight_decay_mask: Mask = None,
        **options: Any,
    ) -> optax.GradientTransformationExtraArgs:
        if wants_rate:
            options["learning_rate"] = learning_rate
        parts = (learning_rate, momentum, nesterov, weight_decay, weight_decay_mask)
        return _complete(scale_by(*args, **options), *parts, coupled)

    own = [
        p
        for p in inspect.signature(optimizer).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    optimizer.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [own[0], *inherited.values(), *own[1:]],
        return_annotation=optax.GradientTransformationExtraArgs,
    )
    optimizer.__name__ = optimizer.__qualname__ = name
    decay = "after" if not coupled else "before"
    optimizer.__doc__ = (
        summary
        + _DOC.format(name=name, scale_by=scale_by.__name__, momentum=momentum, decay=decay)
        + example.format(name=name)
    )
    return optimizer


_DOC = """

    Args:
      learning_rate: a float, a scalar array or an optax schedule. With Adam grafting (the
        recommended preset where there is one) the learning rates of AdamW are the right ones to
        start from.
      **options: every argument of :func:`{scale_by}`.
      momentum: heavy-ball momentum AFTER preconditioning, as in the papers; None: none. Default:
        {momentum}.
      nesterov: Nesterov's form of ``momentum``.
      weight_decay: decoupled weight decay, multiplied by the learning rate as in AdamW, added
        {decay} momentum.
      weight_decay_mask: tree of bools or function of the parameters: where decay applies.

    Returns:
      A chain of {scale_by}, trace, add_decayed_weights and scale_by_learning_rate, without the
      parts that are off.

    Raises:
      ValueError: as :func:`{scale_by}`.

    Examples:
"""
_BLOCKS = """      >>> import jax, jax.numpy as jnp, optax
      >>> import kradagrad_jax as kj
      >>> params = {{"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}}
      >>> tx = kj.{name}(1e-2, weight_decay=1e-4)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: jnp.sum((p["w"] + p["b"]) ** 2))(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
"""
_LAYERS = """      >>> import jax, jax.numpy as jnp, optax
      >>> import kradagrad_jax as kj
      >>> from kradagrad_jax import curvature
      >>> params = {{"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}}
      >>> x = jax.random.normal(jax.random.key(0), (8, 4))
      >>> loss = lambda p, x: jnp.mean((x @ p["w"] + p["b"]) ** 2)
      >>> tx = kj.{name}(1e-2, curvature.inspect(loss, params, x))
      >>> state = tx.init(params)
      >>> step = curvature.value_grad_and_curvature(loss, reducer="raw")
      >>> value, grads, curv = step(params, x)
      >>> updates, state = tx.update(grads, state, params, curvature=curv)
      >>> params = optax.apply_updates(params, updates)
"""
_SAMPLES = """      >>> import jax, jax.numpy as jnp, optax
      >>> import kradagrad_jax as kj
      >>> from kradagrad_jax.curvature import losses, sampled_gradients
      >>> params, x, labels = {{"w": jnp.ones((4, 3))}}, jnp.ones((8, 4)), jnp.zeros(8, int)
      >>> step = sampled_gradients(lambda p, x: x @ p["w"], losses.softmax_cross_entropy())
      >>> tx = kj.{name}(1e-3)
      >>> state = tx.init(params)
      >>> (value, aux), grads, samples = step(params, x, labels, rng=jax.random.key(0))
      >>> updates, state = tx.update(grads, state, params, curvature=samples)
      >>> params = optax.apply_updates(params, updates)
"""

shampoo = _alias(
    scale_by_shampoo,
    "Shampoo (arXiv 1802.09568): Kronecker-factored full-matrix AdaGrad.",
    _BLOCKS,
)
kradagrad_star = _alias(
    scale_by_kradagrad_star,
    "KrADagrad* (arXiv 2305.19416): Shampoo's idea with inverse statistics and positive roots.",
    _BLOCKS,
)
kradagrad = _alias(
    scale_by_kradagrad,
    "KrADagrad (arXiv 2305.19416, Algorithm 2): one factor updated per step, square roots only.",
    _BLOCKS,
)
kfac = _alias(
    scale_by_kfac,
    "K-FAC (arXiv 1503.05671): natural gradient with one Kronecker product per layer.",
    _LAYERS,
)
rs_kfac = _alias(
    scale_by_rs_kfac,
    "RS-KFAC (arXiv 2206.15397): K-FAC with the strongest eigenpairs, by randomised SVD.",
    _LAYERS,
)
sre_kfac = _alias(
    scale_by_sre_kfac,
    "SRE-KFAC (arXiv 2206.15397): RS-KFAC with a cheaper symmetric sketch.",
    _LAYERS,
)
b_kfac = _alias(
    scale_by_b_kfac,
    "B-KFAC (arXiv 2210.08494): eigenpairs of wide dense layers that follow the factors online.",
    _LAYERS,
)
br_kfac = _alias(
    scale_by_br_kfac,
    "B-R-KFAC (arXiv 2210.08494): B-KFAC with a randomised SVD now and then.",
    _LAYERS,
)
bc_kfac = _alias(
    scale_by_bc_kfac,
    "B-KFAC-C (arXiv 2210.08494): B-KFAC with light corrections.",
    _LAYERS,
)
brc_kfac = _alias(
    scale_by_brc_kfac,
    "B-R-KFAC-C: B-KFAC with randomised SVDs and light corrections.",
    _LAYERS,
)
ikfac = _alias(
    scale_by_ikfac,
    "IKFAC (arXiv 2312.05705): K-FAC's damped inverses followed by matrix products alone.",
    _LAYERS,
    coupled=True,
)
ingd = _alias(
    scale_by_ingd,
    "INGD (arXiv 2302.09738): inverse-free natural gradient with Riemannian momentum.",
    _LAYERS,
    coupled=True,
)
singd = _alias(
    scale_by_singd,
    "SINGD (arXiv 2312.05705): INGD with structured factors.",
    _LAYERS,
    coupled=True,
)
sirfshampoo = _alias(
    scale_by_sirfshampoo,
    "SIRFShampoo (arXiv 2402.03496): Shampoo without root and inverse, structured factors.",
    _BLOCKS.replace("1e-2, ", "1e-2, batch_size=4, "),
    coupled=True,
)
soap = _alias(
    scale_by_soap,
    "SOAP (arXiv 2409.11321): Adam in the eigenbasis of Shampoo's statistics.",
    _BLOCKS,
)
kl_shampoo = _alias(
    scale_by_kl_shampoo,
    "KL-Shampoo (arXiv 2509.03378): Kronecker factors fitted in KL divergence, no grafting.",
    _BLOCKS,
)
kl_soap = _alias(
    scale_by_kl_soap,
    "KL-SOAP (arXiv 2509.03378): Adam in the eigenbasis of KL-Shampoo's factors.",
    _BLOCKS,
)
tnt = _alias(
    scale_by_tnt,
    "TNT (arXiv 2106.02925): damped inverse of a Kronecker-factored Fisher matrix, sampled.",
    _SAMPLES,
)
ginger = _alias(
    scale_by_ginger,
    "Ginger (arXiv 2402.03295): inverse of a low-rank Gauss-Newton matrix at linear cost.",
    _SAMPLES,
)
