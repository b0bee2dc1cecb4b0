"""What an edit does to later heads: where they look from END, and what they add to the logits themselves.

Direct logit attribution: the logits are ``W_U`` times the normalised final stream, and the stream is a sum, so with the
scale of the final normalisation ``s`` held each head adds ``z W_O (1/s) diag(w) (W_U[answer] - W_U[foil])``, its output
centred where LayerNorm does so, and with its share of a normalisation after attention. Where logits are soft-capped
(Gemma-2), that is what it adds before the cap. (Merullo et al. 2024, section 5: the movers look away from wrong colors, and
speak up.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.repairs.report import Downstream, Mean
from circuits.repairs.runs import Edit, Run, first_layer
from mechinterp.cache import ActivationCache
from mechinterp.models.normalization import centre
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

TARGETS = "the edited to"


@dataclass(frozen=True)
class Effects:
    """What is summed up of the unedited pass and of the one with all edits, batch by batch."""

    model: Transformer
    edits: Sequence[Edit]
    heads: tuple[Node, ...]
    names: tuple[str, ...]
    n_prompts: int
    looks: dict[bool, list[Float[np.ndarray, "name head"]]] = field(default_factory=lambda: {False: [], True: []})
    direct: dict[bool, list[Float[np.ndarray, "prompt head"]]] = field(default_factory=lambda: {False: [], True: []})

    @classmethod
    def of(cls, model: Transformer, task: Task, edits: Sequence[Edit]) -> "Effects":
        """Effects of ``edits`` on heads in layers after the first edited one; positions that END can see."""
        edited = {head for edit in edits for head in edit.heads}
        later = range(first_layer(edits) + 1, model.config.n_layers)
        heads = (Node.head(layer, index) for layer in later for index in range(model.config.n_heads))
        names = (name for name, places in task.prompts.positions.items() if bool((places <= task.prompts.end).all()))
        return cls(model, edits, tuple(head for head in heads if head not in edited), tuple(names), len(task))

    def sites(self, edits: Sequence[Edit]) -> list[Site]:
        """What a pass must record to be watched."""
        if not self._is_watched(edits):
            return []
        layers = sorted({head.layer for head in self.heads if head.layer is not None})
        scale = [Site("ln_final_scale")] if self.model.weights.ln_final is not None else []
        return [Site(name, layer) for layer in layers for name in ("pattern", self.model.config.write_site)] + scale

    def watch(self, edits: Sequence[Edit], run: Run, cache: ActivationCache) -> None:
        """Add up a batch."""
        if self._is_watched(edits):
            self.looks[bool(edits)].append(self._looks(run, cache))
            self.direct[bool(edits)].append(self._direct(run, cache))

    def found(self) -> tuple[Downstream, ...]:
        """One later head after the other, the strongest change of direct logit attribution first."""
        if not self.heads:
            return ()
        before, after = (np.concatenate(self.direct[is_edited]) for is_edited in (False, True))
        changes = Mean.each((after - before).T)
        looks = [np.sum(self.looks[is_edited], 0) / self.n_prompts for is_edited in (False, True)]
        found = [
            Downstream(
                head=str(head),
                looks={name: (float(looks[0][n, at]), float(looks[1][n, at])) for n, name in enumerate((*self.names, TARGETS))},
                before=float(before[:, at].mean()),
                after=float(after[:, at].mean()),
                change=changes[at],
            )
            for at, head in enumerate(self.heads)
        ]
        return tuple(sorted(found, key=lambda effect: -abs(effect.change.value)))

    def _is_watched(self, edits: Sequence[Edit]) -> bool:
        return bool(self.heads) and (not edits or edits is self.edits)

    def _looks(self, run: Run, cache: ActivationCache) -> Float[np.ndarray, "name head"]:
        """The attention from END to each named position, and to all that the edited heads look at, summed over prompts."""
        prompts = run.prompts
        rows = torch.arange(len(prompts), device=prompts.clean.device)
        from_end = torch.stack(
            [cache["pattern", head.layer or 0][rows, head.index, prompts.end - run.offset] for head in self.heads], 1
        )
        to = [prompts.positions[name].to(rows.device) for name in self.names]
        looks = [from_end[rows, :, places] for places in to]
        wanted = torch.zeros_like(from_end[:, 0])
        for edit in self.edits:
            wanted.scatter_(1, edit.to[run.rows].to(rows.device), 1.0)
        looks.append(torch.einsum("bhk,bk->bh", from_end, wanted))
        return torch.stack(looks).double().sum(1).cpu().numpy()

    def _direct(self, run: Run, cache: ActivationCache) -> Float[np.ndarray, "prompt head"]:
        """Each head's own part of ``logit(answers) - logit(foils)``, means over answers and over foils, before a soft cap."""
        prompts, weights = run.prompts, self.model.weights
        rows = torch.arange(len(prompts), device=prompts.clean.device)
        direction = answer_direction(self.model, prompts)
        if weights.ln_final is not None:
            direction = direction / cache["ln_final_scale"].reshape(len(prompts), 1)
        parts = []
        for head in self.heads:
            z = cache[self.model.config.write_site, head.layer or 0][rows, prompts.end - run.offset, head.index]
            reads = torch.einsum("dm,bm->bd", weights.W_O(head.layer or 0)[head.index], direction)
            parts.append((z * reads).sum(-1))
        return torch.stack(parts, 1).double().cpu().numpy()


def answer_direction(model: Transformer, prompts: PromptBatch) -> Float[Tensor, "batch d_model"]:
    """What a write to the final stream is multiplied with to give the answers' logit less the foils', but for the scale."""
    answers, foils = ((prompts.roles == role).to(model.dtype) for role in (1, -1))
    signs = answers / answers.sum(1, keepdim=True) - foils / foils.sum(1, keepdim=True).clamp(min=1)
    direction = torch.einsum("mbc,bc->bm", model.weights.W_U[:, prompts.candidates], signs)
    norm = model.weights.ln_final
    if norm is None:
        return direction
    gained = direction if norm.w is None else direction * norm.w
    return centre(gained, model.config)  # LayerNorm centres what is written; centring is its own transpose
