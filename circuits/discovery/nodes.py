"""Node activation patching: replace what one part writes, everywhere it is read.

Vig et al. 2020; Meng et al. 2022; for practice Zhang and Nanda 2023. ``m(clean) - m(a_u <- a'_u)``: noising, so it finds
what is necessary. A head's change enters right after its layer's attention, so each head costs the layers after it.
"""

import numpy as np
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from circuits.ablation import Ablation
from circuits.discovery.suffix import CleanRun, at_end
from circuits.discovery.walk import over_batches
from circuits.scores import Scores
from circuits.wiring import Wiring
from circuits.writes import expand
from mechinterp.models.transformer import Transformer
from mechinterp.tasks.base import Task


def patching(
    model: Transformer,
    task: Task,
    *,
    ablation: str | Ablation = "resample",
    batch_size: int | None = None,
    keep_prompts: bool = False,
    progress: bool = False,
) -> Scores:
    """The measured effect of every writer (input, head, MLP) in units of the metric; positive: losing it hurts.

    Cost: one pass through the layers after each writer, the heads of a layer stacked. Items are nodes.
    """
    wiring = Wiring.of(model.config)
    with tqdm(total=len(wiring.writers) * len(task), desc="patching", unit="node", disable=not progress) as bar:
        return over_batches(
            model, task, "patching", lambda run: _nodes(run, wiring, bar), ablation, batch_size, keep_prompts, {}, "node"
        )


@torch.no_grad()
def _nodes(run: CleanRun, wiring: Wiring, bar: tqdm) -> Float[np.ndarray, "prompt writer"]:
    falls = [run.falls("resid_pre", 0, run.delta.input[None])]
    for layer in range(wiring.n_layers):
        last = layer == wiring.n_layers - 1
        z = at_end(run, run.delta.z[layer]) if last else run.delta.z[layer]
        falls.append(run.falls(run.after_attention(layer), layer, expand(run.model.weights, layer, z)))
        if wiring.has_mlp:
            change = at_end(run, run.delta.mlp_out[layer]) if last else run.delta.mlp_out[layer]
            falls.append(run.falls("resid_post", layer, change[None]))
        bar.update((wiring.n_heads + wiring.has_mlp) * len(run.prompts))
    bar.update(len(run.prompts))
    return torch.cat(falls).T.cpu().numpy()
