"""What stands in for latents and errors that are cut, and the model with all but some of them replaced."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.ablation import Ablation, Replacement, refuse_lonely_means, replacement_for
from circuits.latent_layers import LayerLatents, Mask, Parts, Z, layers_of
from circuits.measure import measure
from circuits.writes import Writes
from mechinterp.cache import ActivationCache
from mechinterp.errors import CircuitError
from mechinterp.models.trace import Patch
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task
from saes.base import SparseAutoencoder

_TOKENS_AT_ONCE = 1024  # of a pass without gradients

Replacer = Callable[[LayerLatents, PromptBatch, Writes], Parts]
Gathered = Callable[[LayerLatents, PromptBatch, Writes], Z]


def replacer(model: Transformer, task: Task, replacement: Replacement, layers: tuple[LayerLatents, ...]) -> Replacer:
    """What stands in for a layer's latents and error on some prompts, whose replaced writes are given besides.

    "resample" is what they are on the corrupted prompt. "mean" is the mean of each latent, and of the error, over the
    corrupted prompts of one template and length, position by position (``templates * pos * latents`` numbers). "zero" is
    zero; ``b_dec`` stays, it belongs to no latent.
    """
    if replacement.name == "resample":
        gathered = _on_corrupted(model, layers)
        return lambda at, some, writes: at.split(gathered(at, some, writes))
    if replacement.name == "mean":
        return _by_template(model, task, layers)
    if replacement.name == "zero":
        return lambda at, _, writes: _zeros(*at.split(writes.z[at.layer]))
    raise CircuitError(
        f"latents cannot be replaced by {replacement.name!r}: it says what a whole head writes, not what its latents do. Use "
        "'resample', 'mean' or 'zero', or score whole heads with attribution()."
    )


class Replaced:
    """A model on a task, all of whose latents and errors are replaced but those that are kept.

    A mask has one entry an item, in the order of latent scores: each layer's latents, then its error.
    """

    def __init__(self, model: Transformer, task: Task, autoencoder: SparseAutoencoder, ablation: str | Ablation):
        refuse_lonely_means(task, ablation)
        self.model, self.task, self.layers = model, task, layers_of(model, autoencoder)
        self.replacement = replacement_for(model, task, ablation)
        self._replace = replacer(model, task, self.replacement, self.layers)
        self._ends = np.cumsum([at.width + 1 for at in self.layers])
        self.is_error: Mask = np.isin(np.arange(self._ends[-1]), self._ends - 1)

    def mask(self, nodes: Iterable[Node]) -> Mask:
        items = {at.layer: range(end - at.width - 1, end) for at, end in zip(self.layers, self._ends, strict=True)}
        mask = np.zeros_like(self.is_error)
        mask[[items[node.layer or 0][-1 if node.index is None else node.index] for node in nodes]] = True
        return mask

    @torch.no_grad()
    def metric(self, kept: Mask) -> Float[np.ndarray, "prompt"]:
        """Each prompt's metric. A layer that is kept whole is not touched, so that everything kept is the model itself."""
        masks, values = dict(zip(self.layers, np.split(kept, self._ends[:-1]), strict=True)), []
        for rows in rows_of(self.task):
            prompts, writes = self.task.prompts[rows].to(self.model.device), self.replacement.writes[rows]
            patch: dict[Site | str, Patch] = {
                at.site: self._patch(at, mask, prompts, writes) for at, mask in masks.items() if not mask.all()
            }
            values.append(measure(self.model, prompts, self.task.metric, tokens=prompts.clean, patch=patch)[0][0])
        return torch.cat(values).cpu().double().numpy()

    def _patch(self, at: LayerLatents, mask: Mask, prompts: PromptBatch, writes: Writes) -> Patch:
        """The latents of the run in hand, with the others' replacements written over them, decoded."""
        keep = torch.as_tensor(mask[:-1], device=self.model.device)

        def patch(z: Tensor, _: ActivationCache) -> Tensor:
            (latents, error), (new, new_error) = at.split(z), self._replace(at, prompts, writes)
            return at.join(torch.where(keep, latents, new), error if mask[-1] else new_error).to(z.dtype)

        return patch


def rows_of(task: Task) -> list[slice]:
    """A task's prompts in as many as a pass without gradients takes."""
    at_once = max(1, _TOKENS_AT_ONCE // task.prompts.clean.shape[1])
    return [slice(first, first + at_once) for first in range(0, len(task), at_once)]


def _on_corrupted(model: Transformer, layers: tuple[LayerLatents, ...]) -> Gathered:
    """What heads gathered in the corrupted run: the writes' own ``z``, or where those are normalised that of a pass a batch."""
    if not model.config.has_norms_after:
        return lambda at, _, writes: writes.z[at.layer]
    last: list[tuple[PromptBatch, ActivationCache]] = []  # all layers of some prompts are asked for one after the other

    @torch.no_grad()
    def gathered(at: LayerLatents, some: PromptBatch, _: Writes) -> Z:
        if not (last and last[0][0] is some):
            last[:] = [(some, _gathered(model, some.corrupted, layers))]
        return last[0][1][at.site]

    return gathered


def _gathered(model: Transformer, tokens: Int[Tensor, "batch pos"], layers: tuple[LayerLatents, ...]) -> ActivationCache:
    return model.run(tokens, record=[at.site for at in layers], logits_at="last", logits_of=tokens[:, :0])[1]


@torch.no_grad()
def _by_template(model: Transformer, task: Task, layers: tuple[LayerLatents, ...]) -> Replacer:
    prompts = task.prompts.to(model.device)
    layouts = _layouts(prompts).unique(dim=0)

    def index(some: PromptBatch) -> Int[Tensor, "batch"]:
        return (_layouts(some).unsqueeze(1) == layouts).all(-1).int().argmax(1)

    sizes = torch.bincount(index(prompts), minlength=len(layouts)).view(-1, 1, 1)
    means: dict[tuple[str, int], Tensor] = {}
    for some in (prompts[rows] for rows in rows_of(task)):
        cache = _gathered(model, some.corrupted, layers)
        for at in layers:
            z = cache[at.site]
            for name, values in (("z", z.flatten(2)), ("latents", at.split(z)[0])):
                mean = means.setdefault((name, at.layer), values.new_zeros((len(layouts), *values.shape[1:])))
                mean.index_add_(0, index(some), values / sizes[index(some)])

    def replaced(at: LayerLatents, some: PromptBatch, _: Writes) -> Parts:
        z, latents = (means[name, at.layer][index(some)] for name in ("z", "latents"))
        return latents, at.error(z.unflatten(-1, (at.n_heads, -1)), latents)  # of the mean z: this is the mean error

    return replaced


def _layouts(prompts: PromptBatch) -> Int[Tensor, "batch 2"]:
    return torch.stack([prompts.groups, prompts.end], dim=1)


def _zeros(latents: Tensor, error: Tensor) -> Parts:
    return torch.zeros_like(latents), torch.zeros_like(error)
