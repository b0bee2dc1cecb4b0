"""LayerNorm and RMSNorm, forward and, for gradients that are rebuilt outside autograd, backward in closed form."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mechinterp.models.config import ModelConfig
from mechinterp.models.weights import Norm


def normalize(x: Float[Tensor, "*axes d_model"], norm: Norm | None, config: ModelConfig) -> Float[Tensor, "*axes d_model"]:
    """What ``norm`` makes of a stream; the stream itself where there is none."""
    if norm is None:
        return x
    if config.centred:
        return F.layer_norm(x, x.shape[-1:], norm.w, norm.b, config.norm_eps)
    return gained(F.rms_norm(x, x.shape[-1:], norm.w, config.norm_eps), None, norm.b)


def centre(x: Float[Tensor, "*axes d_model"], config: ModelConfig) -> Float[Tensor, "*axes d_model"]:
    """``x`` without its mean, where the model's normalisations take it off."""
    return x - x.mean(-1, keepdim=True) if config.centred else x


def scale_of(x: Float[Tensor, "*axes d_model"], config: ModelConfig) -> Float[Tensor, "*axes 1"]:
    """By what a normalisation divides: the root mean square of ``centre(x)``."""
    return (centre(x, config).square().mean(-1, keepdim=True) + config.norm_eps).sqrt()


def gained(x: Float[Tensor, "*axes d_model"], w: Tensor | None, b: Tensor | None) -> Float[Tensor, "*axes d_model"]:
    x = x if w is None else x * w
    return x if b is None else x + b


def pull_back(
    stream: Float[Tensor, "batch pos d_model"],
    gradient: Float[Tensor, "reader batch pos d_model"],
    norm: Norm | None,
    config: ModelConfig,
    *,
    hold_scale: bool = False,
) -> Float[Tensor, "reader batch pos d_model"]:
    """From gradients with respect to the normalised stream to gradients with respect to ``stream``. Overwrites ``gradient``.

    LayerNorm's Jacobian looks fearsome and is a projection: with ``y = (x - mean x) / s``, ``J = (1 - 11'/d - yy'/d) / s``.
    It takes off the gradient's components along the two directions that a normalisation does not let through, ``1`` and
    ``y`` (RMSNorm: ``y`` alone), and divides by the scale. All readers of a position share both. ``hold_scale`` takes ``s``
    for a constant (LRP's rule): what is left is linear, ``(1 - 11'/d) / s``.
    """
    if norm is None:
        return gradient
    if norm.w is not None:
        gradient.mul_(norm.w)
    centred, scale = centre(stream, config), scale_of(stream, config)
    if hold_scale:
        return (gradient.sub_(gradient.mean(-1, keepdim=True)) if config.centred else gradient).div_(scale)
    blocked = [torch.ones_like(centred)] if config.centred else []
    directions = torch.stack([*blocked, centred / scale], dim=-2).flatten(0, 1)
    at_token = gradient.flatten(1, 2).transpose(0, 1)
    along = at_token @ directions.transpose(1, 2)
    at_token = at_token.baddbmm_(along, directions, alpha=-1 / stream.shape[-1])
    return at_token.transpose(0, 1).unflatten(1, stream.shape[:2]).div_(scale)
