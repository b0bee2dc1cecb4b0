"""A circuit on one prompt, token by token: which part at which position helps which other, and by how much.

To first order the effect of an edge is ``-<Δ_u, g_v>`` (``discovery.eap``), a sum over positions: what u writes at a token is
read there. An MLP passes it on at that token and the logits at END. A head passes it on at every *query* that attends to the
token. So that a link can run from ``u`` at one token to the head at another, we part the gradient of what the head gathers by
query position, and send each part back through its attention alone. Nothing is assumed about where a part acts, and the parts
add up: all links of an edge sum to what ``eap`` scores that edge on this prompt (where heads share a key, over all of them).

Three steps. (1) One forward over the prompt and one backward to what every head gathers, every MLP and the logits read.
(2) For every query position, one backward through the attention of each layer, and its products with the differences.
(3) The strongest links, with labels that say where each head looks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from circuits.ablation import Ablation, replacement_for
from circuits.attribution_document import AttributionGraph
from circuits.attribution_links import Links, Term
from circuits.attribution_nodes import Columns, Sheet, plain
from circuits.discovery.contraction import by_prompt, contract
from circuits.discovery.gradients import ReaderGradients
from circuits.graph import Circuit
from circuits.measure import measure
from circuits.wiring import Wiring
from circuits.writes import Writes, sites
from mechinterp.cache import ActivationCache
from mechinterp.errors import CircuitError, TaskError
from mechinterp.models.transformer import ResidualStart, Transformer
from mechinterp.nodes import PORTS, Node
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

_LOOKS = 0.1  # of its attention rests on a token that a head's label names


def attribution_graph(
    model: Transformer,
    task: Task,
    circuit: Circuit,
    prompt: int = 0,
    *,
    ablation: str | Ablation = "resample",
    max_links: int = 2000,
    slug: str | None = None,
) -> AttributionGraph:
    """The edges of ``circuit`` on prompt number ``prompt``, to be opened in circuit-tracer's or Neuronpedia's page.

    A link's weight is, to first order and in the task's metric, what falls if the edge is cut between these two tokens
    (positive: it helps). It is the whole model's gradient, not the circuit's, and not the score in ``circuit``: that is a mean
    over prompts. The strongest ``max_links`` are kept, and the document says how many were not and how much they weigh.

    Cost: a forward and a backward, and a backward through attention for every token. ``CircuitError`` for a prompt that the
    task lacks, a circuit of another model, or prompts of one token; ``TaskError`` for a metric without a gradient.

    >>> from mechinterp.models.compiled import induction
    >>> planted = induction()
    >>> full = Wiring.of(planted.model.config)
    >>> attribution_graph(planted.model, planted.task, full.circuit(np.ones(full.n_edges, bool)), max_links=20)
    AttributionGraph('induction-0-planted-induction': 15 nodes, 20 links)
    """
    if not 0 <= prompt < len(task):
        raise CircuitError(f"prompt {prompt} is not among the {len(task)} of {task.name!r}, which are 0 to {len(task) - 1}.")
    if max_links < 1:
        raise CircuitError(f"max_links={max_links} shows nothing. Ask for at least 1.")
    Wiring.of(model.config).mask(circuit)  # refuses a circuit of another model
    run = _Run.of(model, task, prompt, ablation)
    if run.n_tokens < 2:
        raise CircuitError("this prompt has one token, and pages show nothing on so few. Take a prompt of two or more.")
    links = _strongest(run.terms(circuit, 4 * max_links), max_links, room=run.n_tokens * 2 // 3)
    facts = {**circuit.graph, "task": task.name, "model": model.config.name, "method": "eap", "unit": task.metric_name}
    for about_scores in ("settings", "positive"):  # of the circuit's scores, which are not shown
        facts.pop(about_scores, None)
    columns = run.columns(task)
    description = (
        f"The circuit of {task.name} on one prompt. A link's weight is how much {task.metric_name} falls, to first order, if "
        f"the edge is cut between these tokens (ablation: {run.ablation}; positive: it helps). Shown is the answer."
    )
    sheet = Sheet(
        columns,
        links,
        facts | {"prompt": columns.text, "ablation": run.ablation},
        slug or f"{plain(task.name)}-{prompt}-{plain(model.config.name)}",
        description,
        labels={place: run.look(*place, columns.tokens) for place in links.places if place[0].kind == "head"},
    )
    return AttributionGraph(sheet.document())


@dataclass(frozen=True)
class _Run:
    """One prompt: the clean pass with its graph, the gradients of the metric, and what the ablation changes."""

    model: Transformer
    wiring: Wiring
    prompts: PromptBatch
    cache: ActivationCache
    metric: Tensor
    gradients: dict[Site, Tensor]
    changes: Tensor
    ablation: str

    @classmethod
    @torch.enable_grad()
    def of(cls, model: Transformer, task: Task, prompt: int, ablation: str | Ablation) -> "_Run":
        rows = slice(prompt, prompt + 1)
        replacement, prompts = replacement_for(model, task, ablation), task.prompts[rows].to(model.device)
        wiring = Wiring.of(model.config)
        ends = [Site("z", layer) for layer in range(wiring.n_layers)]
        ends += [Site("mlp_in", layer) for layer in range(wiring.n_layers) if wiring.has_mlp]
        ends.append(Site("resid_post", wiring.n_layers - 1))
        embedded = model.embed(prompts.clean).detach()
        start = ResidualStart(Site("resid_pre", 0), embedded.clone().requires_grad_())
        wanted = [*ends, *PORTS, "resid_pre", "pattern", *(site for site in sites(model) if "embed" not in site)]
        values, cache = measure(model, prompts, task.metric, start=start, record=wanted)
        if not values.requires_grad:
            raise TaskError("the metric has no gradient (it counts right answers, say). Use one of the logits' values.")
        found = torch.autograd.grad(values.sum(), [cache[site] for site in ends], retain_graph=True)
        delta = (replacement.writes[rows] - Writes.of(cache, model.weights, embedded)).map(torch.detach)
        changes, gradients = by_prompt(delta), dict(zip(ends, found, strict=True))
        if replacement.keeps_prefix and model.config.causal:
            changes[:, :, : prompts.shared_prefix] = 0  # but for rounding it is: the two passes were batched differently
        return cls(model, wiring, prompts, cache, values.detach(), gradients, changes, replacement.name)

    @property
    def n_tokens(self) -> int:
        """Up to END, or all of them where what comes after END is read too."""
        return int(self.prompts.end[0]) + 1 if self.model.config.causal else self.prompts.clean.shape[1]

    def terms(self, circuit: Circuit, most: int) -> Iterator[Links]:
        """Every edge between every two tokens where it has an effect, in portions, each at most its ``most`` strongest."""
        ends = [(writer, reader) for writer, reader in circuit.edges_kept if reader.port is None]
        ports = [(writer, reader) for writer, reader in circuit.edges_kept if reader.port is not None]
        yield self._portion(self._contracted(self._ends()), [(w, r, r) for w, r in ends], None, most)
        for query in range(self.n_tokens):
            for member in range(self.wiring.heads_a_group):
                owners = [self.wiring.owners(reader)[member if reader.kind == "group" else 0] for _, reader in ports]
                led = [(*edge, owner) for edge, owner in zip(ports, owners, strict=True) if circuit.has_edge(edge[1], owner)]
                yield self._portion(self._contracted(self._through(query, member)), led, query, most)

    def _ends(self) -> dict[Site, Tensor]:
        """Gradients at what MLPs and the logits read."""
        return {site: gradient for site, gradient in self.gradients.items() if site.name != "z"}

    def _through(self, query: int, member: int) -> dict[Site, Tensor]:
        """Gradients at q, k and v, through what one head of each group gathers at one position."""
        wiring, found = self.wiring, {}
        for layer in range(wiring.n_layers):
            whole = self.gradients[Site("z", layer)]
            part = torch.zeros_like(whole)
            part[:, query, member :: wiring.heads_a_group] = whole[:, query, member :: wiring.heads_a_group]
            ports = [Site(port, layer) for port in PORTS]
            back = torch.autograd.grad(self.cache["z", layer], [self.cache[site] for site in ports], part, retain_graph=True)
            found |= dict(zip(ports, back, strict=True))
        last = Site("resid_post", wiring.n_layers - 1)
        return found | {last: torch.zeros_like(self.gradients[last])}

    def _contracted(self, by_site: dict[Site, Tensor]) -> np.ndarray:
        """``-<Δ_u, g_v>`` at each position: ``[pos writer reader]``."""
        gradients = ReaderGradients(self.model, self.cache, by_site, self.metric)
        each = torch.eye(self.prompts.clean.shape[1], dtype=torch.long, device=self.model.device)[None]
        return contract(self.changes, gradients, spans=each)[0].double().cpu().numpy()

    def _portion(self, effects: np.ndarray, edges: list[tuple[Node, Node, Node]], query: int | None, most: int) -> Links:
        """The terms of these (writer, reader, whole part), which act at the query, or (None) where they are read."""
        indices = np.array([self.wiring.index(writer, reader) for writer, reader, _ in edges], dtype=int)
        values = effects[:, self.wiring.edge_writer[indices], self.wiring.edge_reader[indices]]
        strongest = np.argsort(-np.abs(values), axis=None, kind="stable")[: min(most, np.count_nonzero(values))]
        terms = []
        for at, which in zip(*np.unravel_index(strongest, values.shape), strict=True):
            writer, reader, whole = edges[which]
            column = int(at) if query is None else query
            terms.append(Term((writer, int(at)), (whole, column), reader, float(values[at, which])))
        n_hidden = int(np.count_nonzero(values)) - len(terms)
        shown = sum(abs(term.weight or 0.0) for term in terms)
        return Links.of(terms, n_hidden, float(np.abs(values).sum()) - shown if n_hidden else 0.0)

    def columns(self, task: Task) -> Columns:
        """The prompt's tokens, and the answer that the model holds likeliest."""
        ids = self.prompts.clean[0, : self.n_tokens].tolist()
        with torch.no_grad():
            logits, _ = self.model.run(self.prompts.clean, logits_at=self.prompts.end)
        probabilities = logits[0].float().softmax(-1)
        answers = self.prompts.candidates[0][self.prompts.roles[0] > 0]
        answer = int(answers[probabilities[answers].argmax()])
        tokens, answer_text = task.tokenizer.strings(ids), task.tokenizer.strings([answer])[0]
        text = task.tokenizer.decode(ids)
        return Columns(tuple(tokens), tuple(ids), text, answer_text, answer, float(probabilities[answer]))

    def look(self, head: Node, query: int, tokens: tuple[str, ...]) -> str:
        """Where a head attends to from a position: its two favourite tokens, and how much of its attention rests there."""
        row = self.cache["pattern", head.layer or 0][0, head.index or 0, query, : self.n_tokens]
        best = row.detach().topk(min(2, len(row)))
        seen = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        told = [f"“{tokens[key]}” {share:.2f}" for key, share in seen if share >= _LOOKS]
        return "looks at " + (", ".join(told) or "many tokens")


def _strongest(portions: Iterator[Links], most: int, room: int) -> Links:
    """The strongest links of many terms, without holding more than a few times as many at once."""
    links = Links.of([])
    for portion in portions:
        links = links.joined(portion)
        if len(links.terms) > 4 * most:
            links = links.strongest(2 * most)
    return links.at_most(room).strongest(most)
