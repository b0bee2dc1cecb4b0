"""Some heads alone, at all positions or at one each: all other heads carry what the ablation puts there, MLPs stay.

This is how Wang et al. 2022 and Hsu et al. 2024/2025 measure a circuit of heads. Circuits of edges (``running.py``) cannot
say "this head, at END": what a head writes elsewhere would have to be cut, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.discovery.cdt_table import Part
from circuits.measure import measure
from circuits.writes import Writes
from mechinterp.cache import ActivationCache
from mechinterp.models.trace import Patch
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class HeadsAlone:
    """``replaced``: what every head outside writes."""

    model: Transformer
    task: Task
    replaced: Writes

    @torch.no_grad()
    def metrics(self, circuits: Sequence[Sequence[Part]]) -> Float[np.ndarray, "circuit"]:
        """The mean metric of each set of heads. One forward each, stacked."""
        n_pos, sums = self.task.prompts.clean.shape[1], np.zeros(len(circuits))
        a_batch = max(1, min(len(self.task), _TOKENS_AT_ONCE // n_pos))
        at_once = max(1, _TOKENS_AT_ONCE // (a_batch * n_pos))
        for first in range(0, len(self.task), a_batch):
            rows = slice(first, first + a_batch)
            prompts, replaced = self.task.prompts[rows].to(self.model.device), self.replaced[rows]
            for begin in range(0, len(circuits), at_once):
                some = circuits[begin : begin + at_once]
                masks = torch.stack([self._mask(circuit, prompts) for circuit in some])
                found = self._metric(prompts, masks, replaced)
                sums[begin : begin + len(some)] += found.sum(1).cpu().double().numpy()
        return sums / len(self.task)

    def _metric(
        self, prompts: PromptBatch, masks: Bool[Tensor, "circuit batch pos layer head_index"], replaced: Writes
    ) -> Float[Tensor, "circuit batch"]:
        flat, n = masks.flatten(0, 1).unsqueeze(-1), len(masks)
        site = self.model.config.write_site
        patch: dict[Site | str, Patch] = {Site(site, i): _keep(flat[:, :, i], z) for i, z in enumerate(replaced.z)}
        tokens = prompts.clean.repeat(n, 1)
        return measure(self.model, prompts, self.task.metric, tokens=tokens, variants=n, patch=patch)[0]

    def _mask(self, circuit: Sequence[Part], prompts: PromptBatch) -> Bool[Tensor, "batch pos layer head_index"]:
        """Where which head is kept."""
        config, places = self.model.config, torch.arange(prompts.clean.shape[1], device=prompts.clean.device)
        mask = torch.zeros(*prompts.clean.shape, config.n_layers, config.n_heads, dtype=torch.bool, device=places.device)
        for part in circuit:
            at = part.at(prompts)
            mask[:, :, part.head.layer, part.head.index] |= True if at is None else places == at[:, None]
        return mask


def _keep(mask: Bool[Tensor, "row pos head_index 1"], replaced: Float[Tensor, "batch pos head_index d_head"]) -> Patch:
    def patch(z: Tensor, _: ActivationCache) -> Tensor:
        return torch.where(mask, z, replaced.repeat(len(z) // len(replaced), 1, 1, 1))

    return patch
