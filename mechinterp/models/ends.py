"""Where a pass begins, and at which positions its logits are wanted."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import ModelError
from mechinterp.models.attention import Prefix
from mechinterp.sites import Site

LogitsAt = Literal["all", "last"]
_ENTRANCES = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True)
class ResidualStart:
    """Begin a pass at ``site`` (``resid_pre``, ``resid_mid`` or ``resid_post`` of a layer) with this residual stream.

    With a ``prefix``, ``value`` holds only the positions after it, and attention reads the prefix's keys and values:
    what clean and corrupted prompts share is then never computed again.
    """

    site: Site
    value: Float[Tensor, "batch pos d_model"]
    prefix: Prefix | None = None

    def __post_init__(self):
        if self.site.name not in _ENTRANCES or self.site.layer is None:
            raise ModelError(f"a pass can start at {', '.join(_ENTRANCES)} of a layer, not at {str(self.site)!r}.")


def ends_of(logits_at, resid: Tensor, prefix: Prefix | None) -> Int[Tensor, "batch"] | None:
    """The position of each prompt at which logits are wanted, as an index into ``resid``; None for all."""
    if isinstance(logits_at, Tensor):
        offset = prefix.length if prefix else 0
        if not offset <= int(logits_at.min()) <= int(logits_at.max()) < offset + resid.shape[1]:
            raise ModelError(
                f"logits are wanted at positions {int(logits_at.min())}..{int(logits_at.max())}; "
                f"this pass computes {offset} to {offset + resid.shape[1] - 1}."
            )
        return logits_at.to(resid.device) - offset
    if logits_at == "last":
        return torch.full((resid.shape[0],), resid.shape[1] - 1, device=resid.device)
    if logits_at == "all":
        return None
    raise ModelError(f"logits_at takes 'all', 'last' or one position a prompt, not {logits_at!r}.")


def at_ends(x: Float[Tensor, "batch pos d"], ends: Int[Tensor, "batch"]) -> Float[Tensor, "batch 1 d"]:
    """``x`` at one position a prompt."""
    return x[torch.arange(len(x), device=x.device), ends].unsqueeze(1)
