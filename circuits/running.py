"""Running a circuit: the whole model, in which every edge outside the circuit carries its ablated value.

Each reader takes the residual stream as it is in this run, minus, for every edge that is cut, the difference between
what its writer writes in this run and what it writes under the ablation. Nothing else changes, so a circuit with all
edges is the clean run and one with none, under resampling, the corrupted run: two identities that the tests hold us to.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation, replacement_for
from circuits.graph import Circuit
from circuits.wiring import Wiring
from circuits.writes import Writes, expand, sites
from mechinterp.cache import ActivationCache
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

_MEMORY = 64 * 2**20  # bytes for the per-writer differences of one pass: larger blocks are returned to the system each time


def run_circuit(
    model: Transformer, task: Task, circuit: Circuit, ablation: str | Ablation = "resample"
) -> Float[Tensor, "prompt d_vocab"]:
    """Logits at END of ``circuit`` alone on the task's prompts; its missing edges carry what ``ablation`` puts there."""
    kept = Wiring.of(model.config).mask(circuit)
    return run_circuits(model, task.prompts, kept[None], replacement_for(model, task, ablation).writes)[0]


def run_circuits(
    model: Transformer, prompts: PromptBatch, kept: Bool[np.ndarray, "variant edge"], replacement: Writes
) -> Float[Tensor, "variant batch d_vocab"]:
    """Logits at END of many circuits over the same prompts. See ``measure_circuits`` for what it costs.

    ``variants * batch * d_vocab`` numbers: for numbers instead of logits use ``measure_circuits``.
    """
    return measure_circuits(model, prompts, kept, replacement, [lambda logits, _: logits])[0]


def measure_circuits(
    model: Transformer,
    prompts: PromptBatch,
    kept: Bool[np.ndarray, "variant edge"],
    replacement: Writes,
    metrics: Sequence[Callable[[Tensor, PromptBatch], Tensor]],
    progress: tqdm | None = None,
) -> list[Float[Tensor, "variant batch *rest"]]:
    """Each metric of each circuit on each prompt. Circuits and prompts are stacked as far as memory allows.

    Cost: about two forwards a circuit, and ``writers * circuits * batch * pos * d_model`` numbers at a time.
    """
    wiring = Wiring.of(model.config)
    cut = np.stack([wiring.allowed & ~wiring.grid(row).astype(bool) for row in kept])
    cut = torch.as_tensor(cut, device=model.device).to(model.dtype)
    a_prompt = len(wiring.writers) * replacement.input[0].numel() * replacement.input.element_size()
    rows = max(1, _MEMORY // a_prompt)
    at_once = max(1, rows // len(prompts))
    parts: list[list[Tensor]] = [[] for _ in metrics]
    for some in cut.split(at_once):
        measured: list[list[Tensor]] = [[] for _ in metrics]
        for first in range(0, len(prompts), rows):
            here = slice(first, first + rows)
            batch = prompts[here].to(model.device)
            with torch.no_grad():
                logits = _run_stack(model, batch, some, replacement[here], wiring)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                for values, metric in zip(measured, metrics, strict=True):
                    values.append(torch.stack([metric(one, batch) for one in logits]))
        for part, values in zip(parts, measured, strict=True):
            part.append(torch.cat(values, dim=1))
        if progress is not None:
            progress.update(len(some))
    return [torch.cat(part) for part in parts]


def _run_stack(model: Transformer, prompts: PromptBatch, cut: Tensor, replacement: Writes, wiring: Wiring):
    """One pass for all variants of ``cut`` (``[variant writer reader]``), stacked along the batch."""
    excess = _Excess(model, cut, replacement)
    tokens = prompts.clean.to(model.device)
    heads, per_layer = model.config.n_heads, 3 * model.config.n_heads + model.config.has_mlp
    patch = {}
    for layer in range(model.config.n_layers):
        first = layer * per_layer
        for i, port in enumerate("qkv"):
            readers = slice(first + i * heads, first + (i + 1) * heads)
            patch[Site(f"{port}_input", layer)] = _subtract(excess, readers, wiring, per_head=True)
        if model.config.has_mlp:
            readers = slice(first + 3 * heads, first + 3 * heads + 1)
            patch[Site("mlp_in", layer)] = _subtract(excess, readers, wiring, per_head=False)
    logits = slice(len(wiring.readers) - 1, len(wiring.readers))
    patch[Site("resid_post", model.config.n_layers - 1)] = _subtract(excess, logits, wiring, per_head=False)
    ends = prompts.end.to(model.device).repeat(len(cut))
    logits, _ = model.run(tokens.repeat(len(cut), 1), record=sites(model), patch=patch, logits_at=ends)
    return logits.unflatten(0, (len(cut), len(prompts)))


def _subtract(excess: "_Excess", readers: slice, wiring: Wiring, *, per_head: bool):
    """A patch that takes from each reader's stream what its cut edges would have brought."""
    n_writers = int(wiring.writers_before[readers.start])

    def patch(stream: Tensor, cache: ActivationCache) -> Tensor:
        brought = excess.through(readers, n_writers, cache)
        if brought is None:
            return stream
        return stream - (brought.movedim(0, 2) if per_head else brought[0])

    return patch


class _Excess:
    """For each writer: what it writes in this pass minus what it writes under the ablation, filled as the pass goes."""

    def __init__(self, model: Transformer, cut: Float[Tensor, "variant writer reader"], replacement: Writes):
        self.model, self.cut, self.replacement = model, cut, replacement
        shape = (cut.shape[0], cut.shape[1], *replacement.input.shape)
        self.values = replacement.input.new_empty(shape)
        self.filled = 0

    def through(self, readers: slice, n_writers: int, cache: ActivationCache) -> Float[Tensor, "reader row pos d_model"] | None:
        """What the cut edges into ``readers`` bring too much; None where no edge is cut."""
        cut = self.cut[:, :n_writers, readers]
        if not bool(cut.any()):
            return None
        self._fill(n_writers, cache)
        brought = torch.bmm(cut.transpose(1, 2), self.values[:, :n_writers].flatten(2))
        per_variant = brought.unflatten(2, self.values.shape[2:])
        return per_variant.movedim(1, 0).flatten(1, 2)

    def _fill(self, n_writers: int, cache: ActivationCache) -> None:
        """Writers ``filled`` to ``n_writers``: all of them ran before the reader that asks."""
        then = self.replacement
        variants, per_layer = self.cut.shape[0], self.model.config.n_heads + self.model.config.has_mlp
        while self.filled < n_writers:
            if self.filled == 0:
                self._put((cache["embed"] + cache["pos_embed"])[None], then.input[None], variants)
                continue
            layer, part = divmod(self.filled - 1, per_layer)
            if part == 0:
                z = cache["z", layer] - then.z[layer].repeat(variants, 1, 1, 1)
                self._put(expand(self.model.weights, layer, z), None, variants)
            else:
                self._put(cache["mlp_out", layer][None], then.mlp_out[layer][None], variants)

    def _put(self, written: Float[Tensor, "writer row pos d_model"], replaced: Tensor | None, variants: int) -> None:
        excess = written.unflatten(1, (variants, -1)).transpose(0, 1)
        slot = self.values[:, self.filled : self.filled + len(written)]
        slot.copy_(excess if replaced is None else excess - replaced)
        self.filled += len(written)
