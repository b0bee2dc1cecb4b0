"""Running a circuit: the whole model, in which every edge outside the circuit carries its ablated value.

Nothing else changes (``kept.py`` tells how), so a circuit with all edges is the clean run and one with none, under
resampling, the corrupted run: two identities that the tests hold us to.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation, replacement_for
from circuits.alive import Alive
from circuits.graph import Circuit
from circuits.kept import AllCut, run_kept
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
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

    Cost: for each circuit at most about two forwards, and less the fewer edges it keeps; one more for all together.
    """
    wiring = Wiring.of(model.config)
    alive = Alive.of(wiring, kept, dead_carry_nothing=replacement.one_pass, joint=model.config.has_joint_heads)
    a_prompt = replacement.input[0].numel() * replacement.input.element_size()
    rows = max(1, _MEMORY // (a_prompt * len(wiring.writers)))
    living = np.cumsum(alive.writes.sum(1)) * a_prompt * min(rows, len(prompts)) // _MEMORY
    groups = [slice(some[0], some[-1] + 1) for some in np.split(np.arange(len(kept)), np.flatnonzero(np.diff(living)) + 1)]
    parts: list[list[list[Tensor]]] = [[[] for _ in groups] for _ in metrics]
    for first in range(0, len(prompts), rows):
        here = slice(first, first + rows)
        batch = prompts[here].to(model.device)
        base = AllCut.of(model, batch, replacement[here])
        for index, group in enumerate(groups):
            logits = run_kept(base, alive[group])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            for values, metric in zip(parts, metrics, strict=True):
                values[index].append(torch.stack([metric(one, batch) for one in logits]))
            if progress is not None and here.stop >= len(prompts):
                progress.update(group.stop - group.start)
    return [torch.cat([torch.cat(group, dim=1) for group in values]) for values in parts]
