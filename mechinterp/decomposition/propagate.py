"""Relevance from any source to the logits, to any head, to all of them at once.

What makes it cheap, and changes nothing:

* **One clean pass** gives every total, so that the irrelevant part is never carried: it is the rest.
* Before a source acts, and at positions before it, nothing is relevant. So a source begins in its own layer and at its
  own first position.
* **Sources are stacked**, those that begin together side by side, and share all totals by broadcasting.
* Where only END's logits are wanted, the last layer is computed at END alone, but for keys and values.

``both_parts`` carries both parts from the embedding on, as the papers write it: four times the work, and what the tests
hold the fast way against.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.decomposition.block import AFTER_HEADS, AFTER_KEYS, LOGITS, Way
from mechinterp.decomposition.rule_sets import Rules, check_rules
from mechinterp.decomposition.sources import Reference, Source, Stack
from mechinterp.decomposition.split import Split
from mechinterp.decomposition.totals import Totals, width
from mechinterp.errors import ModelError, nearest
from mechinterp.models.config import ModelConfig
from mechinterp.models.transformer import Transformer
from mechinterp.sites import Site, resolve

TARGETS = ("resid_pre", "k", "v", *AFTER_KEYS, *AFTER_HEADS, "logits")
MEMORY = 64 * 2**20  # bytes that a stack of sources may take; more does not fit a CPU's cache, and is no faster


def propagate(
    totals: Totals,
    sources: Sequence[Source],
    targets: Iterable[Site],
    rules: Rules,
    *,
    reference: Reference | None = None,
    first: int = 0,
    memory: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[list[int], int, Mapping[Site, Split]]]:
    """Every target's split by every source, a stack of sources at a time.

    Yields which sources these are, the position from which on their splits are given, and a ``Split`` a target with axes
    ``source batch pos ...`` (``source batch token`` for logits wanted at one position). ``reference``: what is irrelevant
    of the sources' own activations, site by site; None is nothing. ``first``: no source deviates before this position.
    ``memory``: bytes for a stack, beside the clean pass; one source needs what it needs. None: 64 MiB on a CPU, half of
    what is free on a GPU.

    Cost a source: the layers and positions behind it, once. ``ModelError`` for what cannot be a target.
    """
    targets = frozenset(targets)
    check_rules(rules, totals.model.config)
    check_targets(totals.model.config, sources, targets)
    with tqdm(total=len(sources), desc="decompose", unit="source", disable=not progress) as bar:
        for some, begins in _stacks(totals, sources, targets, first, memory):
            members = tuple(sources[index] for index in some)
            stack = Stack(members, totals.model.config, *totals.shape, begins, totals.model.device)
            with torch.no_grad():
                found = Way(totals.model, rules, stack, reference or {}, replace(totals, first=begins), targets).walk()
            yield some, begins, found
            bar.update(len(some))


@torch.no_grad()
def both_parts(
    model: Transformer,
    tokens: Int[Tensor, "batch pos"],
    sources: Sequence[Source],
    targets: Iterable[Site],
    rules: Rules,
    *,
    reference: Reference | None = None,
) -> Mapping[Site, Split]:
    """The same with both parts carried from the embedding on and nothing known: all positions, all tokens.

    Cost a source: two forwards and more, whatever its layer; all sources are one stack.
    """
    targets = frozenset(targets)
    check_rules(rules, model.config)
    check_targets(model.config, sources, targets)
    n_batch, n_pos = tokens.shape
    stack = Stack(tuple(sources), model.config, n_batch, n_pos, 0, model.device)
    embedded = model.embed(tokens.to(model.device)).expand(len(sources), -1, -1, -1)
    return Way(model, rules, stack, reference or {}, None, targets).walk(Split(torch.zeros_like(embedded), embedded))


def check_targets(config: ModelConfig, sources: Sequence[Source], targets: Collection[Site]) -> None:
    """``ModelError`` for a site that is no target or that no source can reach; ``UnknownSite`` for one the model lacks."""
    if not targets or not sources:
        raise ModelError(f"{len(sources)} sources and {len(targets)} targets leave nothing to compute. Name some of both.")
    first = min(sources, key=lambda source: source.start)
    for site in resolve(config, targets):
        if site.name not in TARGETS:
            raise ModelError(
                f"{str(site)!r} cannot be a target. Targets are {', '.join(TARGETS)}.{nearest(site.name, TARGETS)}"
            )
        layer, stage = first.start
        before_heads = {"resid_pre", "q", "k", "v", "z"} - {config.write_site}
        out_of_reach = before_heads if stage == 0 else set(TARGETS) - {"mlp_out", "resid_post"}
        if site != LOGITS and ((site.layer or 0) < layer or ((site.layer or 0) == layer and site.name in out_of_reach)):
            raise ModelError(
                f"the target {str(site)!r} is computed before every source (the first is {first.name!r}), so nothing relevant "
                "reaches it. Name a later target, or an earlier source."
            )


def _stacks(
    totals: Totals, sources: Sequence[Source], targets: frozenset[Site], first: int, memory: int | None
) -> Iterator[tuple[list[int], int]]:
    """Sources that begin in the same layer, in order of position, as many at a time as memory allows."""
    config, causal = totals.model.config, totals.model.config.causal
    latest = totals.shape[1] if totals.ends is None else int(totals.ends.min())  # every prompt's END must be carried
    begins = [min(max(first, source.first), latest) if causal else 0 for source in sources]
    order = sorted(range(len(sources)), key=lambda index: (sources[index].start, begins[index]))
    budget = _budget(totals.model) if memory is None else memory
    while order:
        start, position = sources[order[0]].start, begins[order[0]]
        at_once = max(1, budget // _a_source(config, totals, targets, position))
        some = [index for index in order[:at_once] if sources[index].start == start]
        yield some, position
        order = order[len(some) :]


def _a_source(config: ModelConfig, totals: Totals, targets: frozenset[Site], first: int) -> int:
    """Bytes at the worst moment of a block (the MLP's hidden layer several times over, or queries, keys, values, scores),
    and what is kept of the targets."""
    n_batch, n_pos = totals.shape
    queries, keys = config.n_heads * config.d_head, config.n_groups * config.d_head
    turned = queries + keys if config.rotary or config.qk_norm != "none" else 0
    for_every_head = 2 * queries if config.is_grouped else 0
    scores = (1 if config.attention_soft_cap is None else 3) * config.n_heads * n_pos
    hidden = (6 if config.gated else 3) * (config.d_mlp or 0)
    widest = 4 * config.d_model + max(hidden, 4 * (queries + keys) + turned + for_every_head + scores)
    widest += sum(width(config, site) for site in targets - {LOGITS})
    unembedded = 3 * config.d_vocab if totals.logits_of is None else 0
    carried = (n_pos - first) * widest + (n_pos - first if totals.ends is None else 1) * unembedded
    return n_batch * carried * totals.cache["resid_pre", 0].element_size()


def _budget(model: Transformer) -> int:
    if model.device.type != "cuda":
        return MEMORY
    return torch.cuda.mem_get_info(model.device)[0] // 2
