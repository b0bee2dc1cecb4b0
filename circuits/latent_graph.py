"""Circuits whose parts are an autoencoder's latents and errors: what feeds what, and how much they do by themselves.

Sparse feature circuits (Marks et al. 2024, arXiv:2403.19647). ``latent_circuit`` takes the strongest of ``latents``' scores
and draws the edges between them; ``evaluate_latents`` replaces all other latents and errors and measures what is left.

An edge from u to a later d is, to first order, what of losing u reaches the metric by way of d and of no latent or error
between them,

    (u - u') . d(d)/du . dm/dd,       summed over positions of both,

where ``z`` of the layers between is held fixed. MLPs, and layers without an autoencoder, are no parts here: edges run
through them. So a part's edges to all others, and to the logits, add up to its score. (As the paper's, that is so for
plain gradients; integrated ones enter as ``dm/dd`` alone.)
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation, replacement_for
from circuits.discovery.backward import in_parts
from circuits.discovery.latents import Attribution, Segments, runs_of
from circuits.edges import Edge
from circuits.graph import Circuit
from circuits.latent_layers import (
    LayerLatents,
    Mask,
    Z,
    check_scores,
    facts_of,
    layers_of,
    nodes_among,
    strongest_of,
)
from circuits.latent_replacement import Replaced, replacer
from circuits.scores import Scores
from circuits.statistics import bootstrap_interval, may_be_zero, ratio_of_means
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.errors import CircuitError, TaskError
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import Task
from saes.base import SparseAutoencoder

ERRORS = ("chosen", "keep", "remove")


def latent_circuit(
    model: Transformer,
    task: Task,
    autoencoder: SparseAutoencoder,
    scores: Scores,
    n: int | None = None,
    *,
    threshold: float | None = None,
    n_edges: int | None = None,
    progress: bool = False,
) -> Circuit:
    """The ``n`` latents and errors of largest ``|score|`` (or all of at least ``threshold``), with input and logits.

    Nodes carry ``score``, edges ``weight`` (both: how much the metric falls, in its units, if they are cut); of the edges
    the ``n_edges`` largest are kept, or all that are not zero. Ablation, ``steps`` and ``through`` are those of the scores;
    with ``through="latents"`` errors are leaves and no edge enters them. Cost: what ``latents`` cost, one more forward,
    and for each chosen part one backward through its encoder and the layers before it.
    """
    layers = layers_of(model, autoencoder)
    check_scores(scores, model, facts_of(layers, autoencoder))
    names = strongest_of(scores, n, threshold)
    edges = _Edges(model, task, autoencoder, layers, nodes_among(layers, list(names)), scores.settings).measure(progress)
    strongest = sorted((edge for edge in edges if edges[edge]), key=lambda edge: -abs(edges[edge]))[:n_edges]
    circuit, facts = Circuit(), {name: getattr(scores, name) for name in ("model", "task", "method", "unit")}
    circuit.graph.update(Wiring.of(model.config).facts | facts | {"settings": json.dumps(scores.settings, sort_keys=True)})
    circuit.add_nodes_from([Node.input(), *((Node.parse(name), {"score": names[name]}) for name in names), Node.logits()])
    for writer, reader in sorted(strongest):
        circuit.keep(writer, reader, edges[writer, reader])
    return circuit


@dataclass(frozen=True)
class _Chosen:
    """The chosen parts of one layer: some latents, and perhaps the error."""

    at: LayerLatents
    nodes: tuple[Node, ...]

    @cached_property
    def indices(self) -> list[int]:
        return [node.index for node in self.nodes if node.index is not None]

    @cached_property
    def rows(self) -> Float[Tensor, "some_latent d_z"]:
        return self.at.rows(self.indices)

    def weigh(self, gradient: Z, latents: Tensor, error: Tensor) -> Float[Tensor, "chosen"]:
        """``gradient`` at ``z``, times what each part writes there, summed over positions and prompts."""
        flat = gradient.flatten(2).to(self.rows.dtype)
        of_latents = (latents[..., self.indices] * (flat @ self.rows.T)).sum((0, 1))
        has_error = len(self.nodes) > len(self.indices)  # it sorts after the latents
        return torch.cat([of_latents, (error * flat).sum()[None]]) if has_error else of_latents


class _Edges:
    """The edges among chosen latents and errors, from the input and to the logits."""

    def __init__(
        self,
        model: Transformer,
        task: Task,
        autoencoder: SparseAutoencoder,
        layers: tuple[LayerLatents, ...],
        nodes: list[Node],
        settings: Mapping[str, Any],
    ):
        self.model, self.task, self.layers = model, task, layers
        chosen = [_Chosen(at, tuple(node for node in nodes if node.layer == at.layer)) for at in layers]
        self.chosen = [here for here in chosen if here.nodes]
        steps, through = settings["steps"], settings["through"]
        self.runs, self.errors_are_leaves = runs_of(model, layers, steps), through == "latents"
        self.attribute = Attribution(model, task.metric, layers, autoencoder, through, steps)
        self.replacement = replacement_for(model, task, settings["ablation"])
        self.replace = replacer(model, task, self.replacement, layers)

    @torch.enable_grad()
    def measure(self, progress: bool) -> dict[Edge, float]:
        """The mean over all prompts. Each batch's activations are kept for as many backwards as there are parts."""
        weights: dict[Edge, float] = {}
        with tqdm(total=len(self.task), desc="edges", unit="prompt", disable=not progress) as bar:
            prompts = self.task.prompts.to(self.model.device)
            batches = in_parts(prompts, self.replacement.writes, self.runs, bar)
            for edge, fall in (found for batch in batches for found in self._of(*batch)):
                weights[edge] = weights.get(edge, 0.0) + fall / len(self.task)
        return weights

    def _of(self, prompts: PromptBatch, replaced: Writes) -> Iterator[tuple[Edge, float]]:
        """The edges' sums over some prompts."""
        with torch.no_grad():
            parts = {at.layer: self.replace(at, prompts, replaced) for at in self.layers}
        cache, gradients = self.attribute(prompts, parts)
        segments = Segments(self.model, self.task.metric, self.layers, prompts)
        clean = {here.at.layer: here.at.split(cache[here.at.site]) for here in self.chosen}
        lost = {layer: [old - new for old, new in zip(clean[layer], parts[layer], strict=True)] for layer in clean}
        lost_input = segments.embedded.detach() - replaced.input
        for reader, output in self._readers(segments, gradients):
            before = [here for here in self.chosen if reader.kind == "logits" or here.at.layer < (reader.layer or 0)]
            leaves = [segments.embedded, *(segments.written[here.at.layer] for here in before)]
            at_input, *at_layers = torch.autograd.grad(output, leaves, retain_graph=True, materialize_grads=True)
            yield (Node.input(), reader), float((lost_input * at_input).sum())
            for here, gradient in zip(before, at_layers, strict=True):
                falls = here.weigh(gradient, *lost[here.at.layer]).tolist()
                yield from (((writer, reader), fall) for writer, fall in zip(here.nodes, falls, strict=True))

    def _readers(self, segments: Segments, gradients: Mapping[int, Z]) -> Iterator[tuple[Node, Float[Tensor, ""]]]:
        """Each part as a number whose gradient is wanted: its activations, weighed by what they do to the metric."""
        for here in self.chosen:
            outputs = here.weigh(gradients[here.at.layer], *here.at.split(segments.read[here.at.layer]))
            readers = zip(here.nodes, outputs, strict=True)
            yield from ((node, output) for node, output in readers if node.kind == "latent" or not self.errors_are_leaves)
        yield Node.logits(), segments.metric


@dataclass(frozen=True)
class LatentReport:
    """How much of a model's metric its latent circuit keeps when all other latents and errors are replaced.

    ``clean``, ``empty`` and ``circuit`` are mean metrics of the model, with every latent and error replaced and with those
    outside the circuit; ``faithfulness`` is ``(circuit - empty) / (clean - empty)``, ``interval`` its 95 % bootstrap
    interval over prompts, ``complement`` the faithfulness of all the others (the paper's completeness; small is good).
    ``errors``: see ``evaluate_latents``. The embedding, MLPs and layers without an autoencoder always run.
    """

    model: str
    task: str
    corruption: str
    metric: str
    ablation: str
    errors: str
    n_prompts: int
    n_latents: int
    n_errors: int
    clean: float
    empty: float
    circuit: float
    faithfulness: float
    interval: tuple[float, float]
    complement: float


def evaluate_latents(
    model: Transformer,
    task: Task,
    autoencoder: SparseAutoencoder,
    kept: nx.DiGraph | Iterable[Node | str],
    *,
    ablation: str | Ablation = "resample",
    errors: str = "chosen",
    allow_undefined: bool = False,
    seed: int = 0,
) -> LatentReport:
    """Faithfulness of the latents and errors ``kept`` (a circuit, nodes, or their names); 1 for all, 0 for none.

    Every layer encodes the ``z`` of the run in hand, writes the ablation's values over what is not kept, and decodes. By
    ``errors`` those of the circuit's errors are kept that it names ("chosen"), or all and in the empty circuit too ("keep"),
    or none ("remove"; then all latents need not make 1). Raises ``TaskError`` where replacing everything may not move the
    metric, unless ``allow_undefined``. Cost: four forwards with the autoencoders in, and the ablation's.
    """
    run = Replaced(model, task, autoencoder, ablation)
    named = kept.nodes if isinstance(kept, nx.DiGraph) else kept
    nodes = nodes_among(run.layers, [name for name in named if str(name) not in ("input", "logits")])
    return next(_evaluate(run, [run.mask(nodes)], errors, allow_undefined, seed))


def latent_curve(
    model: Transformer,
    task: Task,
    autoencoder: SparseAutoencoder,
    scores: Scores,
    counts: Sequence[int],
    *,
    ablation: str | Ablation = "resample",
    errors: str = "chosen",
    allow_undefined: bool = False,
    seed: int = 0,
) -> tuple[LatentReport, ...]:
    """One report for the circuit of the ``n`` strongest latents and errors, by magnitude, for each count."""
    run = Replaced(model, task, autoencoder, ablation)
    check_scores(scores, model, facts_of(run.layers, autoencoder))
    kept = [run.mask([Node.parse(name) for name in strongest_of(scores, n)]) for n in counts]
    return tuple(_evaluate(run, kept, errors, allow_undefined, seed))


def _evaluate(run: Replaced, circuits: Sequence[Mask], errors: str, allow_undefined: bool, seed: int):
    if errors not in ERRORS:
        raise CircuitError(f"errors are one of {', '.join(map(repr, ERRORS))}, not {errors!r}.")

    def metric(kept: Mask) -> Float[np.ndarray, "prompt"]:
        return run.metric(kept if errors == "chosen" else np.where(run.is_error, errors == "keep", kept))

    clean, empty = run.metric(np.ones_like(run.is_error)), metric(np.zeros_like(run.is_error))
    if not allow_undefined:
        _refuse_undefined(run, clean, empty, seed)
    n_errors, task = {"chosen": None, "keep": int(run.is_error.sum()), "remove": 0}[errors], run.task
    for kept in circuits:
        gained, others = metric(kept) - empty, metric(~kept) - empty
        low, high = bootstrap_interval(gained[None], clean - empty, seed=seed)
        yield LatentReport(
            model=run.model.config.name,
            task=task.name,
            corruption=task.corruption,
            metric=task.metric_name,
            ablation=run.replacement.name,
            errors=errors,
            n_prompts=len(task),
            n_latents=int(kept[~run.is_error].sum()),
            n_errors=int(kept[run.is_error].sum()) if n_errors is None else n_errors,
            clean=float(clean.mean()),
            empty=float(empty.mean()),
            circuit=float((gained + empty).mean()),
            faithfulness=float(ratio_of_means(gained, clean - empty)),
            interval=(float(low[0]), float(high[0])),
            complement=float(ratio_of_means(others, clean - empty)),
        )


def _refuse_undefined(run: Replaced, clean: np.ndarray, empty: np.ndarray, seed: int) -> None:
    if may_be_zero(clean - empty, seed):
        task = run.task
        raise TaskError(
            f"on {task.name!r} the model scores {clean.mean():.4g} {task.metric_name} and {empty.mean():.4g} with every latent "
            f"and error replaced, a gap that {len(task)} prompts cannot tell from zero, so faithfulness is undefined. Use "
            f"another corruption than {task.corruption!r}, another ablation than {run.replacement.name!r}, or more prompts."
        )
