"""What SAELens computes at run time and our equation has not, folded into the weights. Every fold is an identity.

    a factor for each latent    W_dec[i] factor[i]
    b_dec is not subtracted     x W_enc + b_enc = (x - b_dec) W_enc + (b_enc + b_dec W_enc)
    inputs were scaled by s     W_enc s, W_dec / s, b_dec / s
    ranked by pre ||W_dec||     W_enc ||W_dec||, b_enc ||W_dec||, W_dec / ||W_dec||
    batch top-k                 a jump-ReLU whose thresholds are all its one threshold

The tensors have SAELens' names and no group axis. A matching pursuit has no encoder: its is ``W_dec`` transposed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Named = dict[str, Tensor]

RANKING = ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")


def folded(named: Named, architecture: str, cfg: Mapping[str, Any], scale: float) -> Named:
    """The module's table, line by line. ``cfg`` is SAELens' configuration, ``scale`` the s of inputs."""
    ranks_by_norm = architecture in RANKING and bool(cfg.get("rescale_acts_by_decoder_norm", False))
    if "scaling_factor" in named:
        factor = named["scaling_factor"]
        named = _without(named, "scaling_factor") | {"W_dec": named["W_dec"] * factor.unsqueeze(1)}
    if not cfg.get("apply_b_dec_to_input", True):
        named = _centred(named)
    if scale != 1.0:
        named = _unscaled(named, scale, ranks_by_norm)
    if ranks_by_norm:
        named = _of_unit_rows(named)
    if "topk_threshold" in named:
        threshold = named["topk_threshold"].expand_as(named["b_enc"]).clone()
        named = _without(named, "topk_threshold") | {"threshold": threshold}
    return named


def _centred(named: Named) -> Named:
    """A matching pursuit that does not subtract ``b_dec`` does not add it either."""
    if "W_enc" not in named:
        return named | {"b_dec": torch.zeros_like(named["b_dec"])}
    shift = named["b_dec"] @ named["W_enc"]
    if "r_mag" in named:
        return named | {"b_gate": named["b_gate"] + shift, "b_mag": named["b_mag"] + shift * named["r_mag"].exp()}
    return named | {"b_enc": named["b_enc"] + shift}


def _unscaled(named: Named, scale: float, ranks_by_norm: bool) -> Named:
    """Latents of those that rank by ``pre ||W_dec||`` shrink with ``W_dec``, and the threshold with them."""
    named = named | {"b_dec": named["b_dec"] / scale}
    if "W_enc" in named:
        named |= {"W_enc": named["W_enc"] * scale, "W_dec": named["W_dec"] / scale}
    if ranks_by_norm and "topk_threshold" in named:
        named |= {"topk_threshold": named["topk_threshold"] / scale}
    return named


def _of_unit_rows(named: Named) -> Named:
    norm = named["W_dec"].norm(dim=-1).clamp(min=1e-8)
    return named | {
        "W_enc": named["W_enc"] * norm,
        "b_enc": named["b_enc"] * norm,
        "W_dec": named["W_dec"] / norm.unsqueeze(1),
    }


def _without(named: Named, name: str) -> Named:
    return {other: tensor for other, tensor in named.items() if other != name}
