"""What every head is to the output and to every other head, by contextual decomposition: all pairs from the same passes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation, refuse_lonely_means, replacement_for
from circuits.discovery.cdt import LOGITS, Decomposed, in_rows
from circuits.discovery.walk import digest
from mechinterp.decomposition import Rules, Source, rules_name, rules_named
from mechinterp.errors import CircuitError, TaskError, nearest
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

RELEVANCES = ("projection", "share", "ratio")


@dataclass(frozen=True)
class Part:
    """A head, at all positions or at one of the task's named positions."""

    head: Node
    position: str | None = None

    def __str__(self) -> str:
        return str(self.head) + (f"@{self.position}" if self.position else "")

    def at(self, prompts: PromptBatch) -> Int[Tensor, "batch"] | None:
        """Where it stands in each prompt; None for everywhere."""
        return None if self.position is None else prompts.positions[self.position]


@dataclass(frozen=True)
class RelevanceTable:
    """``output``: what each part is to the output, in units of the metric. Of ``[source, target]``, with ``z`` what the
    target did (``z_written`` where a model normalises what heads write) and ``μ`` what the ablation puts there:

    * ``relevant`` and ``irrelevant``: the sums of ``|β|`` and ``|γ|``;
    * ``projection``: ``β·(z - μ) / |z - μ|²``, the share of the target's deviation that is due to the source, with its sign.

    Sums run over prompts, positions up to END and ``d_head`` first. Zero where the target does not come after the source.
    ``key`` names what decides all of it: weights, prompts, metric, rules, positions and ablation.
    """

    parts: tuple[Part, ...]
    output: Float[np.ndarray, "source"]
    relevant: Float[np.ndarray, "source target"]
    irrelevant: Float[np.ndarray, "source target"]
    projection: Float[np.ndarray, "source target"]
    key: str

    def between(self, relevance: str) -> Float[np.ndarray, "source target"]:
        """``"projection"``; ``"share"``: ``|β| / (|β| + |γ|)`` in [0, 1]; ``"ratio"``: ``|β| / |γ|``, unbounded (eq. 16)."""
        if relevance not in RELEVANCES:
            hint = nearest(str(relevance), RELEVANCES)
            raise CircuitError(f"there is no relevance {relevance!r}; there are {', '.join(RELEVANCES)}.{hint}")
        if relevance == "projection":
            return self.projection
        below = self.irrelevant + (self.relevant if relevance == "share" else 0.0)
        return np.divide(self.relevant, below, out=np.zeros_like(below), where=below > 0)


def relevance_table(
    model: Transformer,
    task: Task,
    *,
    rules: str | Rules = "tail",
    positions: Sequence[str] | None = None,
    ablation: str | Ablation = "resample",
    progress: bool = False,
) -> RelevanceTable:
    """Every head, or every head at each of ``positions``, as a source, read at all heads behind it and at the output.

    Cost: one decomposition a part, of the layers behind it: half a forward on average for whole heads. ``TaskError`` for a
    position that the task does not name, and for a mean over one prompt.
    """
    check_positions(task, positions)
    refuse_lonely_means(task, ablation)
    config, chosen = model.config, rules_named(rules)
    heads = [Node.head(layer, head) for layer in range(config.n_layers) for head in range(config.n_heads)]
    parts = tuple(Part(head, position) for head in heads for position in (positions or [None]))
    replacement, n = replacement_for(model, task, ablation), len(parts)
    sites = [Site(config.write_site, layer) for layer in range(config.n_layers)]
    output, sums, deviation = np.zeros(n), np.zeros((3, n, n)), np.zeros(n)
    with tqdm(total=n * len(task), desc="cdt", unit="part", disable=not progress) as bar:
        for rows in in_rows(model, task.prompts):
            prompts = task.prompts[rows].to(model.device)
            run = Decomposed(model, prompts, task, chosen, replacement.writes[rows], keeps_prefix=replacement.keeps_prefix)
            deviation += _deviations(run, positions)
            sources = [Source((part.head,), part.at(prompts)) for part in parts]
            for some, begins, found in run.reach(sources, [*sites, LOGITS]):
                output[some] += run.falls(found[LOGITS]).sum(1).cpu().double().numpy()
                for layer, site in enumerate(sites):
                    split, width = found[site], n // config.n_layers
                    target = slice(layer * width, (layer + 1) * width)
                    sums[:, some, target] += _sums(run, layer, split.relevant, split.irrelevant, begins, positions)
                bar.update(len(some) * len(prompts))
    behind = np.array([[target.head.layer > source.head.layer for target in parts] for source in parts])  # type: ignore[operator]
    relevant, irrelevant, along = sums * behind
    projection = np.divide(along, deviation, out=np.zeros_like(along), where=deviation > 0)
    key = table_key(model, task, rules, positions, replacement.name)
    return RelevanceTable(parts, output / len(task), relevant, irrelevant, projection, key)


def table_key(model: Transformer, task: Task, rules: str | Rules, positions: Sequence[str] | None, ablation: str) -> str:
    """The ``key`` of the table that these make."""
    chosen = [rules_name(rules), None if positions is None else list(positions), ablation, task.metric_name]
    return digest(model, [task.prompts], chosen)


def check_positions(task: Task, positions: Sequence[str] | None) -> None:
    """``TaskError`` for what is no list of the task's positions, each once."""
    if positions is None:
        return
    known = task.prompts.positions
    if isinstance(positions, str) or not positions or len(set(positions)) < len(positions):
        raise TaskError(f"positions must be a list of {', '.join(known)}, each once, or None for all; not {positions!r}.")
    for position in positions:
        if position not in known:
            raise TaskError(f"{task.name!r} has no position {position!r}; it has {', '.join(known)}.{nearest(position, known)}")


def _deviations(run: Decomposed, positions: Sequence[str] | None) -> Float[np.ndarray, "part"]:
    """``|z - μ|²`` of every part, summed."""
    z = [_z(run, layer) - run.replaced.z[layer] for layer in range(run.model.config.n_layers)]
    return np.concatenate([_of_parts(of.square().sum(-1)[None], run.prompts, 0, positions)[0] for of in z])


def _sums(
    run: Decomposed, layer: int, relevant: Tensor, irrelevant: Tensor, begins: int, positions: Sequence[str] | None
) -> Float[np.ndarray, "kind source part"]:
    z = _z(run, layer)
    along = relevant * (z - run.replaced.z[layer])[:, begins:]
    found = [_of_parts(of.sum(-1), run.prompts, begins, positions) for of in (relevant.abs(), irrelevant.abs(), along)]
    found[1] += _of_parts(z[:, :begins].abs().sum(-1)[None], run.prompts, 0, positions)  # in front, all of it is irrelevant
    return np.stack(found)


def _z(run: Decomposed, layer: int) -> Float[Tensor, "batch pos head_index d_head"]:
    """What the heads of a layer did, where the ablation replaces it."""
    return run.totals(run.model.config.write_site, layer)


def _of_parts(
    x: Float[Tensor, "source batch pos head_index"], prompts: PromptBatch, begins: int, positions: Sequence[str] | None
) -> Float[np.ndarray, "source part"]:
    """Summed over prompts, and over positions up to END or taken at the named ones; positions vary fastest."""
    places = torch.arange(begins, begins + x.shape[2], device=x.device)
    if positions is None:
        here = (places <= prompts.end[:, None]).unsqueeze(-1)
    else:
        here = torch.stack([places == prompts.positions[name][:, None] for name in positions], -1)
    return torch.einsum("sbph,bpn->shn", x.double(), here.double()).flatten(1).cpu().numpy()
