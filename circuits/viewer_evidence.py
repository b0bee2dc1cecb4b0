"""What a model does on a few prompts of a task, for the viewer's cards: where heads look and what they write to the answer.

evidence = record_evidence(model, task, circuit)   # plain JSON, or None without heads and MLPs
"""

import base64
from typing import Any

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.repairs.effects import answer_direction
from circuits.roles import attention_roles
from circuits.writes import sites
from mechinterp.errors import CircuitError
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import Task

LONGEST = 48  # tokens of a prompt whose attention is shown: the last ones


@torch.no_grad()
def record_evidence(model: Transformer, task: Task, circuit: nx.DiGraph, n_prompts: int = 4) -> dict[str, Any]:
    """Prompts, patterns, direct effects on the logits, and where heads look; one forward pass over ``n_prompts`` prompts.

    ``patterns``: for each head of the circuit, a prompt's attention as ``n * n`` bytes in base64, 255 for all of it, rows
    queries. ``logits``: what a part writes directly towards answers and away from foils at the prompt's end, in logits
    (means of answers less means of foils), with the final normalisation's scale held. ``looks``: its most telling gazes over
    all prompts of the task. ``CircuitError`` for parts the model lacks.
    """
    parts = sorted({node.with_port(None).at(None) for node in circuit.nodes})
    heads = [part for part in parts if part.kind == "head"]
    writers = [part for part in parts if part.kind in ("input", "head", "mlp")]
    _check_parts(model, writers)
    prompts = task.prompts[:n_prompts].to(model.device)
    scale = ["ln_final_scale"] * (model.weights.ln_final is not None)
    _, cache = model.run(prompts.clean, record=["pattern", *sites(model), *scale], logits_at=prompts.end)
    ends = prompts.end.tolist()
    directions = answer_direction(model, prompts)
    if scale:
        directions = directions / cache["ln_final_scale"].reshape(len(ends), 1)
    written = {str(part): cache.output(part)[range(len(ends)), ends] for part in writers}
    looks = attention_roles(model, task, heads, n=2) if task.prompts.positions and heads else {}
    return {
        "prompts": [_prompt(task, prompts, row) for row in range(len(prompts))],
        "patterns": {
            str(head): [_packed(cache["pattern", head.layer or 0][row, head.index], end) for row, end in enumerate(ends)]
            for head in heads
        },
        "logits": {
            name: [round(effect, 4) for effect in (value * directions).sum(-1).tolist()] for name, value in written.items()
        },
        "looks": {str(head): [str(gaze) for gaze in gazes] for head, gazes in looks.items()},
    }


def _check_parts(model: Transformer, writers: list[Node]) -> None:
    config = model.config
    fits = {
        "input": lambda part: True,
        "head": lambda part: part.layer < config.n_layers and part.index < config.n_heads,
        "mlp": lambda part: part.layer < config.n_layers and config.has_mlp,
    }
    for part in writers:
        if not fits[part.kind](part):
            mlps = "MLPs" if config.has_mlp else "no MLPs"
            raise CircuitError(
                f"{str(part)!r} is not in {config.name}, which has {config.n_layers} layers of {config.n_heads} heads and "
                f"{mlps}. Give the model that the circuit is of, or none."
            )


def _prompt(task: Task, prompts: PromptBatch, row: int) -> dict[str, Any]:
    """The tokens shown, how many are left out before them, the named positions among them, answers and foils."""
    end = int(prompts.end[row])
    first = max(0, end + 1 - LONGEST)
    candidates = task.tokenizer.strings(prompts.candidates[row].tolist())
    roles = prompts.roles[row].tolist()
    named = {name: int(at[row]) - first for name, at in prompts.positions.items()}
    return {
        "tokens": task.tokenizer.strings(prompts.clean[row, first : end + 1].tolist()),
        "n_before": first,
        "named": {name: at for name, at in named.items() if 0 <= at <= end - first},
        "answers": [text for text, role in zip(candidates, roles, strict=True) if role > 0][:3],
        "foils": [text for text, role in zip(candidates, roles, strict=True) if role < 0][:3],
    }


def _packed(pattern: Float[Tensor, "query_pos key_pos"], end: int) -> str:
    first = max(0, end + 1 - LONGEST)
    shown = pattern[first : end + 1, first : end + 1]
    return base64.b64encode((255 * shown).round().to(torch.uint8).cpu().numpy().tobytes()).decode("ascii")
