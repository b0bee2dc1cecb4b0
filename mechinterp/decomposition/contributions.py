"""What sources contribute to targets, all of it at once: ``propagate`` for those who want the tensors."""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.decomposition.propagate import propagate
from mechinterp.decomposition.rule_sets import Rules, rules_named
from mechinterp.decomposition.sources import Named, Reference, Source, mean_reference, parse_sources, resolve_reference
from mechinterp.decomposition.split import Split
from mechinterp.decomposition.totals import Totals
from mechinterp.errors import TaskError, UnknownNode, UnknownSite
from mechinterp.models.config import ModelConfig
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.sites import LAYER_SITES, Site, resolve
from mechinterp.store import ActivationStore

Target = Site | Node | str
Values = Mapping[Site | str, Float[Tensor, "_ _ ..."]]


def contributions(
    model: Transformer,
    tokens: Int[Tensor, "batch pos"],
    sources: Iterable[Named],
    targets: Target | Sequence[Target] = ("logits",),
    *,
    rules: str | Rules = "tail",
    reference: Values | Int[Tensor, "reference pos"] | None = None,
    ends: Int[Tensor, "batch"] | None = None,
    logits_of: Int[Tensor, "batch candidate"] | None = None,
    store: ActivationStore | None = None,
    memory: int | None = None,
    progress: bool = False,
) -> dict[str, Split]:
    """Every target as relevant + irrelevant for every source, by the target's name.

    ``sources``: parts such as ``"a9.h6"``, ``"a9.h6@14"``, ``"m4"``, ``"input@3"``, or lists of them that are relevant
    together. ``targets``: sites (``"resid_post.5"``, or ``"z"`` for every layer), heads (``"a9.h6"``: its z), their ports
    (``"a9.h6.q"``; keys and values that heads share are those of a group, ``"a9.g1.k"``), MLPs (``"m4"``: what it writes) or
    ``"logits"``. A split's relevant part has the axes ``source batch pos ...``; of the logits, with ``ends``, ``source batch
    token``, for all tokens or those of ``logits_of``.

    ``reference``: what is irrelevant of a source's own activation. Tokens of other prompts of the same template: their mean,
    position by position (Hsu et al.). A mapping from sites to values. None: nothing, so that all of it is relevant.

    Positive means what it says in a sum: part of the logit is due to the source. By the default rules it is the fall of
    the logit when the source is replaced by the reference while norm scales stay. ``store``: where the clean pass is kept,
    or found. Cost: one forward, and for each source the layers and positions behind it, once. All results are kept, sources
    x batch x pos x width numbers a target: go over ``propagate`` where that is too much. Raises ``UnknownNode``,
    ``UnknownSite``, ``ModelError``, ``TaskError``.

    >>> from mechinterp.models.load import load
    >>> model = load("builtin")
    >>> tokens = torch.tensor([model.tokenizer.encode("Then, Mary and John met. John handed a ring to")])
    >>> found = contributions(model, tokens, ["a0.h1", ["a1.h0", "m1@5"]], ["a3.h2.q", "logits"])
    >>> found["a3.h2.q"].relevant.shape == (2, *tokens.shape, model.config.d_head)
    True
    """
    chosen = rules_named(rules)
    totals = Totals.of(model, tokens, ends=ends, logits_of=logits_of, patterns=chosen.attention == "held", store=store)
    named = parse_sources(model.config, sources, *tokens.shape)
    known = None if reference is None else _values(model, reference, ends, named, tokens.shape)
    targets = [targets] if isinstance(targets, Site | Node | str) else targets
    wanted = {name: part for target in targets for name, part in _parts(model, target).items()}
    rows: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * len(named) for site, _ in wanted.values()}
    settings = {"reference": known, "memory": memory, "progress": progress}
    for some, begins, found in propagate(totals, named, list(rows), chosen, **settings):
        for site, split in found.items():
            at_one = site.layer is None and ends is not None
            relevant = split.relevant if at_one else _from_the_start(split.relevant, begins)
            for index, row in zip(some, relevant, strict=True):
                rows[site][index] = row
    splits = {site: Split.within(totals.target(site), torch.stack(of_sources)) for site, of_sources in rows.items()}
    return {
        name: splits[s] if head is None else splits[s].map(lambda x, h=head: x[..., h, :]) for name, (s, head) in wanted.items()
    }


def _values(model: Transformer, reference: Values | Tensor, ends: Tensor | None, sources: list[Source], shape) -> Reference:
    if not isinstance(reference, Tensor):
        return resolve_reference(model, reference, sources, *shape)
    if ends is not None and not bool((ends == ends[0]).all()):
        raise TaskError(
            f"the prompts end at positions {int(ends.min())} to {int(ends.max())}, so a mean over other prompts, position by "
            "position, fits none but those of its own length. Go over them length by length."
        )
    return resolve_reference(model, mean_reference(model, reference), sources, *shape)


def _parts(model: Transformer, target: Target) -> dict[str, tuple[Site, int | None]]:
    """The sites that a target means, by name, and the head if it is one."""
    if isinstance(target, str) and not _is_site(target):
        target = Node.parse(target)
    if not isinstance(target, Node):
        return {str(site): (site, None) for site in resolve(model.config, [target])}
    config, is_port = model.config, target.kind == "head" or (target.kind == "group" and target.port is not None)
    if target.pos is not None or not (is_port or target.kind in ("mlp", "logits")):
        raise UnknownNode(
            f"{str(target)!r} cannot be a target. Targets are heads, their ports, MLPs and logits, at all positions."
        )
    name = target.port or {"head": "z", "mlp": "mlp_out", "logits": "logits"}[target.kind]
    (site,) = resolve(config, [Site(name, target.layer)])
    if is_port:
        _check_owner(config, target)
    return {str(target): (site, target.index)}


def _check_owner(config: ModelConfig, target: Node) -> None:
    """``UnknownNode`` for a head or group that there is not; keys and values are those of groups where heads share them."""
    shared = config.is_grouped and target.port in ("k", "v")
    number, layer, is_group = target.index or 0, target.layer or 0, target.kind == "group"
    there, kind = (config.n_groups, "groups") if shared and is_group else (config.n_heads, "heads")
    if number >= there:
        raise UnknownNode(f"{str(target)!r} is not in {config.name}, whose {kind} run 0..{there - 1}.")
    if shared != is_group:
        owner = Node.group(layer, config.group_of(number), target.port) if shared else Node.head(layer, number, target.port)
        why = "share keys and values" if shared else "have keys and values of their own"
        raise UnknownNode(f"{str(target)!r} is not in {config.name}, whose heads {why}. Ask for {str(owner)!r}.")


def _is_site(text: str) -> bool:
    try:
        Site.parse(text)
    except UnknownSite:
        return text in LAYER_SITES
    return True


def _from_the_start(x: Float[Tensor, "source batch pos *axes"], begins: int) -> Float[Tensor, "source batch all_pos *axes"]:
    """With zeros at the positions before the source."""
    return F.pad(x, (*[0, 0] * (x.dim() - 3), begins, 0))
