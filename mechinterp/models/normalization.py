"""The backward pass of a normalisation, in closed form, for gradients that are rebuilt outside autograd."""

from jaxtyping import Float
from torch import Tensor

from mechinterp.models.weights import Norm


def pull_back(
    stream: Float[Tensor, "batch pos d_model"],
    gradient: Float[Tensor, "reader batch pos d_model"],
    norm: Norm | None,
    eps: float,
) -> Float[Tensor, "reader batch pos d_model"]:
    """From gradients with respect to ``LN(stream)`` to gradients with respect to ``stream``. Overwrites ``gradient``.

    LayerNorm's Jacobian looks fearsome and is a scale and two rank-one terms: with ``y = (x - mean x) / s``,
    ``J = (1 - 11'/d - yy'/d) / s``, symmetric. Applied to a gradient: take off its mean and its component along y.
    """
    if norm is None:
        return gradient
    if norm.w is not None:
        gradient.mul_(norm.w)
    centred = stream - stream.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    normalized = centred / scale
    along = (gradient.unsqueeze(-2) @ normalized.unsqueeze(-1)).squeeze(-1) / stream.shape[-1]
    gradient.sub_(gradient.mean(-1, keepdim=True))
    return gradient.addcmul_(normalized, along, value=-1).div_(scale)
