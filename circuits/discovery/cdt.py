"""CD-T: every part's relevance to the output, and to every other part, by contextual decomposition.

Hsu et al. 2024/2025 (arXiv:2407.00886): what a part did, minus what the ablation puts there, is called relevant and carried
through the model by rules (``mechinterp.decomposition``); its score is what arrives at the logits. The rules are a setting:

* ``"tail"``, the default, is the part's ablation with norm scales held, and ranks parts as ablation does;
* ``"paper"`` is the published method, which ranks heads by what they write to the logits *directly*. See
  ``benchmarks/results/decomposition.md`` for how all of them compare.

A score is ``m(logits) - m(logits - β)``. For a difference of logits that is the metric of β, as in the paper; for a
probability it is still a part of what the model does, where the published code takes a softmax of β alone.

``cdt_edges`` reads the same passes at every port and MLP on the way: how much of the metric flows from a writer, *by any
path*, into this reader. What arrives there is by the rules; what it is worth is the metric's gradient at the reader, so
that the number has a sign and a unit (the paper's R(s, t), eq. 16, has neither: ``cdt_search.py``).
"""

from collections.abc import Iterator, Mapping
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation, Replacement, refuse_lonely_means
from circuits.discovery.backward import Backward
from circuits.discovery.suffix import first_that_differs
from circuits.discovery.walk import BatchScore, Walk, WalkSettings
from circuits.measure import columns_read, metric_of
from circuits.scores import Scores
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.decomposition import Rules, Source, Split, Totals, propagate, rules_name, rules_named
from mechinterp.decomposition.sources import INPUT, Reference
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

LOGITS = Site("logits")
_TOTALS = 256 * 2**20  # bytes of the activations of one clean pass


def cdt(
    model: Transformer,
    task: Task,
    *,
    rules: str | Rules = "tail",
    ablation: str | Ablation = "resample",
    **walk: Unpack[WalkSettings],
) -> Scores:
    """The relevance of every writer (input, head, MLP) to the output, in units of the metric; positive: losing it hurts.

    ``rules``: a name of ``RULE_SETS`` or ``Rules``. The paper's sources deviate from a mean: ``ablation="mean"``. Cost: one
    clean pass, and for each part the layers behind it, once: .5 forwards a head of GPT-2 small. ``TaskError`` for a mean
    over one prompt.
    """
    return _walked(model, task, "cdt", rules, ablation, walk, edges=False)


def cdt_edges(
    model: Transformer,
    task: Task,
    *,
    rules: str | Rules = "tail",
    ablation: str | Ablation = "resample",
    **walk: Unpack[WalkSettings],
) -> Scores:
    """What flows from every writer, by any path, into every reader, in units of the metric; positive: losing it hurts.

    A direct edge and a path that ends with it are not told apart. Cost: as ``cdt``, without its savings at END, and one
    backward pass. ``TaskError`` for a mean over one prompt and a metric without gradient.
    """
    return _walked(model, task, "cdt-edges", rules, ablation, walk, edges=True)


def _walked(
    model: Transformer, task: Task, method: str, rules: str | Rules, ablation, walk: WalkSettings, *, edges: bool
) -> Scores:
    chosen, wiring = rules_named(rules), Wiring.of(model.config)
    refuse_lonely_means(task, ablation)
    items = "edge" if edges else "node"
    way = Walk(model, task, method, ablation, settings={"rules": rules_name(rules)}, items=items, **walk)

    def score(replacement: Replacement) -> BatchScore:
        def of_batch(prompts: PromptBatch, replaced: Writes, bar: tqdm) -> Float[Tensor, "prompt item"]:
            found = []
            for rows in in_rows(model, prompts):
                run = Decomposed(model, prompts[rows], task, chosen, replaced[rows], keeps_prefix=replacement.keeps_prefix)
                found.append(run.edges(wiring, bar) if edges else run.to_logits(wiring, bar))
            return torch.cat(found)

        return of_batch

    return way.scores(score, unit="node", units_a_prompt=len(wiring.writers))


def in_rows(model: Transformer, prompts: PromptBatch) -> Iterator[slice]:
    """As many prompts at a time as a clean pass may hold all activations of."""
    at_once = max(1, _TOTALS // (Totals.size_of_a_token(model) * prompts.clean.shape[1]))
    yield from (slice(first, first + at_once) for first in range(0, len(prompts), at_once))


class Decomposed:
    """One batch's clean pass, what the ablation puts in the place of each part, and the metric."""

    def __init__(
        self, model: Transformer, prompts: PromptBatch, task: Task, rules: Rules, replaced: Writes, *, keeps_prefix: bool
    ):
        self.model, self.prompts, self.metric, self.rules, self.replaced = model, prompts, task.metric, rules, replaced
        self.totals = Totals.of(
            model,
            prompts.clean,
            ends=prompts.end,
            logits_of=columns_read(task.metric, prompts),
            patterns=rules.attention == "held",
        )
        self.first = first_that_differs(model, prompts, shares_prefix=keeps_prefix)

    @property
    def reference(self) -> Reference:
        """What the ablation writes, by the site at which a source is set."""
        by_site = {INPUT: self.replaced.input}
        by_site |= {Site(self.model.config.write_site, layer): z for layer, z in enumerate(self.replaced.z)}
        return by_site | {Site("mlp_out", layer): out for layer, out in enumerate(self.replaced.mlp_out)}

    def reach(self, sources: list[Source], targets: list[Site]) -> Iterator[tuple[list[int], int, Mapping[Site, Split]]]:
        """``propagate`` from this batch's parts."""
        return propagate(self.totals, sources, targets, self.rules, reference=self.reference, first=self.first)

    def falls(self, logits: Split) -> Float[Tensor, "source prompt"]:
        """By how much the metric falls without the relevant part of the logits."""
        whole = metric_of(self.metric, self.totals.target(LOGITS)[None], self.prompts)
        return whole - metric_of(self.metric, logits.irrelevant, self.prompts)

    def to_logits(self, wiring: Wiring, bar: tqdm) -> Float[Tensor, "prompt writer"]:
        falls = self._zeros(len(wiring.writers), len(self.prompts))
        for some, _, found in self.reach([Source((writer,)) for writer in wiring.writers], [LOGITS]):
            falls[some] = self.falls(found[LOGITS]).to(falls)
            bar.update(len(some) * len(self.prompts))
        return falls.T

    def edges(self, wiring: Wiring, bar: tqdm) -> Float[Tensor, "prompt edge"]:
        names = ("q", "k", "v", "mlp_out") if wiring.has_mlp else ("q", "k", "v")
        gradients = Backward.of(self.model, self.prompts, self.metric, self.replaced.input, names).gradients
        sites = [Site(name, layer) for layer in range(wiring.n_layers) for name in names]
        grid = self._zeros(len(wiring.writers), len(wiring.readers), len(self.prompts))
        for some, begins, found in self.reach([Source((writer,)) for writer in wiring.writers], [*sites, LOGITS]):
            reader = 0
            for site in sites:
                worth = found[site].relevant * gradients[site][0, :, begins:]
                of_heads = worth.sum((2, -1)).permute(0, 2, 1) if site.name != "mlp_out" else worth.sum((2, 3)).unsqueeze(1)
                grid[some, reader : reader + of_heads.shape[1]] = of_heads.to(grid)
                reader += of_heads.shape[1]
            grid[some, -1] = self.falls(found[LOGITS]).to(grid)
            bar.update(len(some) * len(self.prompts))
        return grid[wiring.edge_writer, wiring.edge_reader].T

    def _zeros(self, *shape: int) -> Tensor:
        """In at least single precision, as metrics come."""
        return torch.zeros(shape, dtype=torch.promote_types(self.model.dtype, torch.float32), device=self.model.device)
