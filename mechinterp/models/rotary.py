"""Rotary positions: which angles a checkpoint's settings mean, and the turning itself.

Frequencies are computed as Hugging Face transformers does, in float32 and in the same order, so that a position far out
turns by the same angle there and here.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import ModelError, nearest
from mechinterp.models.config import Rotary

_KINDS = ("default", "linear", "llama3", "yarn")


def rotary_from(dim: int, settings: Mapping[str, Any], n_ctx: int, name: str, *, adjacent: bool = False) -> Rotary:
    """The angles of ``dim`` numbers, from a Hugging Face config's ``rope_parameters``.

    ``rope_type``: "default" (Su et al. 2021), "linear" (positions divided by ``factor``), "llama3" (slow pairs divided, fast
    ones kept, those between interpolated) and "yarn" (Peng et al. 2023, arXiv:2309.00071). ``ModelError`` for those whose
    angles depend on a prompt's length ("dynamic", "longrope"), and for any other.
    """
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in _KINDS:
        raise ModelError(
            f"{name}: the engine has no rotary scaling {kind!r}; it has {', '.join(_KINDS)}.{nearest(str(kind), _KINDS)} "
            "Scalings whose angles change with a prompt's length would make a part mean something else on each prompt."
        )
    base, magnitude = float(settings["rope_theta"]), 1.0
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if kind == "linear":
        frequencies = frequencies / settings["factor"]
    elif kind == "llama3":
        frequencies = _llama3(frequencies, settings)
    elif kind == "yarn":
        frequencies, magnitude = _yarn(frequencies, dim, base, n_ctx, settings)
    return Rotary(tuple(frequencies.tolist()), adjacent, magnitude)


def _llama3(frequencies: Float[Tensor, "pair"], settings: Mapping[str, Any]) -> Float[Tensor, "pair"]:
    """Llama 3.1: by how many turns a pair makes within the context that the model was first trained on."""
    factor, low, high = settings["factor"], settings["low_freq_factor"], settings["high_freq_factor"]
    context = settings["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    slow, fast = wavelength > context / low, wavelength < context / high
    return torch.where(slow, frequencies / factor, torch.where(fast, frequencies, between))


def _yarn(
    frequencies: Float[Tensor, "pair"], dim: int, base: float, n_ctx: int, settings: Mapping[str, Any]
) -> tuple[Float[Tensor, "pair"], float]:
    """Pairs that turn more than ``beta_fast`` times within the first context are kept, those below ``beta_slow`` divided by
    ``factor``, with a ramp between them; what was turned is multiplied by ``0.1 ln(factor) + 1``."""
    context = settings.get("original_max_position_embeddings") or n_ctx
    factor = float(settings["factor"])

    def log_growth(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    magnitude = settings.get("attention_factor")
    if magnitude is None:
        all_dims, some = settings.get("mscale_all_dim"), settings.get("mscale")
        magnitude = log_growth(factor, some) / log_growth(factor, all_dims) if some and all_dims else log_growth(factor)

    def turning(times: float) -> float:
        """Which pair makes that many turns within the context."""
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = turning(float(settings.get("beta_fast") or 32)), turning(float(settings.get("beta_slow") or 1))
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return frequencies / factor * (1 - kept) + frequencies * kept, float(magnitude)


def rotate(
    x: Float[Tensor, "*batch pos head_index d_head"], positions: Int[Tensor, "#rows pos"], rotary: Rotary
) -> Float[Tensor, "*batch pos head_index d_head"]:
    """``x`` turned by the angles of its positions. Linear in ``x``, and orthogonal but for the magnitude."""
    cos, sin = angles(positions, rotary, x.device)
    turning = 2 * len(rotary.frequencies)
    first = x if turning == x.shape[-1] else x[..., :turning]
    turned = first * cos.to(x.dtype) + _quarter(first, rotary.adjacent) * sin.to(x.dtype)
    return turned if turning == x.shape[-1] else torch.cat([turned, x[..., turning:]], dim=-1)


def angles(positions: Int[Tensor, "#rows pos"], rotary: Rotary, device) -> tuple[Tensor, Tensor]:
    """Cosine and sine for every turning number, ``rows pos 1 turning``, in float32 whatever the model's dtype."""
    frequencies = torch.tensor(rotary.frequencies, dtype=torch.float32, device=device)
    angle = positions.to(device).float().unsqueeze(-1) * frequencies
    angle = angle.repeat_interleave(2, -1) if rotary.adjacent else torch.cat([angle, angle], dim=-1)
    return (angle.cos() * rotary.magnitude).unsqueeze(2), (angle.sin() * rotary.magnitude).unsqueeze(2)


def _quarter(x: Tensor, adjacent: bool) -> Tensor:
    """Each pair (a, b) as (-b, a): turned by a quarter."""
    if adjacent:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)
