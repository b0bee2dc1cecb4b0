"""One row a prompt for every part: what it wrote at a position, or on average. These are what discrete codes are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import SAEError, nearest
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.store import ActivationStore

MEANS = ("mean", "mean-with-bos")


@dataclass(frozen=True)
class Written:
    """``heads``: each head's ``z``, layer by layer; ``mlps``: each MLP's output (None where they were not asked for)."""

    heads: Float[Tensor, "place example part d_head"]
    mlps: Float[Tensor, "place example layer d_model"] | None


def weights_of(prompts: PromptBatch, places: Sequence[str], bos_id: int | None) -> Float[Tensor, "place batch pos"]:
    """How much each position counts at each place: 1 at a named position, or evenly up to END.

    "mean" leaves out BOS where prompts have one (its activations are as large as they are empty), "mean-with-bos" does not.
    Padding never counts. ``SAEError`` for a place that the prompts do not name.
    """
    known = list(dict.fromkeys([*prompts.positions, "END", *MEANS]))
    if unknown := [place for place in places if place not in known]:
        raise SAEError(f"there is no position {unknown[0]!r}; there are {', '.join(known)}.{nearest(unknown[0], known)}")
    if not places:
        raise SAEError(f"no position is named to read codes at. Name some of {', '.join(known)}.")
    at = torch.arange(prompts.clean.shape[1])
    until_end = at <= prompts.end.cpu().unsqueeze(1)
    without_bos = until_end & ((prompts.clean != bos_id).cpu() if bos_id is not None else True)
    found = []
    for place in places:
        if place in MEANS:
            counted = (without_bos if place == "mean" else until_end).float()
            found.append(counted / counted.sum(1, keepdim=True).clamp_min(1))
        else:
            found.append((at == prompts.positions.get(place, prompts.end).cpu().unsqueeze(1)).float())
    return torch.stack(found)


@torch.no_grad()
def read_parts(
    model: Transformer,
    tokens: Int[Tensor, "example pos"],
    weights: Float[Tensor, "place example pos"],
    *,
    mlps: bool = True,
    store: ActivationStore | None = None,
    batch_size: int = 32,
) -> Written:
    """What each head and MLP wrote on each prompt, summed over positions by ``weights``.

    Cost: one forward pass, ``batch_size`` prompts at a time, or none where ``store`` has the activations.
    """
    layers = range(model.config.n_layers)
    sites = [Site("z", layer) for layer in layers]
    sites += [Site("mlp_out", layer) for layer in layers] if mlps and model.config.has_mlp else []
    stored = store.cached_run(model, tokens, sites, batch_size=batch_size) if store else None
    found: dict[str, list[Tensor]] = {"z": [], "mlp_out": []}
    for first in range(0, len(tokens), batch_size):
        rows = slice(first, first + batch_size)
        cache = stored or model.run(tokens[rows].to(model.device), record=sites, logits_at="last")[1]
        for name, kept in found.items():
            values = [cache[site][rows] if stored else cache[site] for site in sites if site.name == name]
            here = [_summed(value, weights[:, rows]) for value in values]
            kept.extend([torch.stack(here, 2)] if here else [])
    heads = torch.cat(found["z"], 1).flatten(2, 3)
    return Written(heads, torch.cat(found["mlp_out"], 1) if found["mlp_out"] else None)


def _summed(
    value: Float[Tensor, "batch pos *axes"], weights: Float[Tensor, "place batch pos"]
) -> Float[Tensor, "place batch *axes"]:
    return torch.einsum("bp...,wbp->wb...", value.float().cpu(), weights)
