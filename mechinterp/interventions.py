"""Interventions: what to do to a model while it runs, as patches that can be put together.

    edit = combine(attend_to(["a9.h9"], at=prompts.end, to=prompts.positions["IO"][:, None]), scale_heads({"a10.h7": 0.0}))
    logits, _ = model.run(prompts.clean, patch=edit)
    words = generate(model, prompts.clean, 5, ends=prompts.end, patch=edit)

An intervention is a mapping from sites to patches, as ``Transformer.run`` takes it: everything that runs a model can run one
that is edited. Positions are one a prompt, counted from the beginning, so that they stay where they are while a text grows;
they are checked in the pass, where prompts are known. A pass that stacks variants of a batch takes ``positions.repeat(n)``.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import ModelError, UnknownNode, UnknownSite
from mechinterp.models.trace import Patch
from mechinterp.nodes import Node, nodes_of
from mechinterp.positions import (
    Keys,
    Positions,
    Rows,
    checked,
    only_here,
    only_rows,
    query_positions,
    refuse_absent,
    refuse_misshapen,
    refuse_the_future,
)
from mechinterp.sites import LAYER_SITES, Site

Intervention = Mapping[Site | str, Patch]
Rewrite = Callable[[Rows], Rows]


def combine(*interventions: Intervention) -> dict[Site | str, Patch]:
    """All of them in one pass. Where two write to the same site, the second is given what the first has made of it.

    A site is the same under all of its names. ``UnknownSite`` where one patch is for every layer (``"z"``) and another for one.
    """
    stacked: dict[Site | str, list[Patch]] = defaultdict(list)
    for intervention in interventions:
        for name, patch in intervention.items():
            stacked[Site.parse(name) if isinstance(name, str) and name not in LAYER_SITES else name].append(patch)
    for site in stacked:
        if isinstance(site, Site) and site.name in stacked:
            raise UnknownSite(
                f"{site.name!r} is patched in every layer, and {str(site)!r} is one of them: only one of the two would run. "
                "Write the layers out."
            )
    return {site: patches[0] if len(patches) == 1 else _in_turn(patches) for site, patches in stacked.items()}


def attend_to(
    heads: Node | str | Iterable[Node | str], *, at: Positions | None, to: Keys, share: float = 1.0
) -> dict[Site | str, Patch]:
    """From ``at`` the heads attend evenly to the positions ``to`` of each prompt, with ``share`` of their attention.

    The row of ``at`` (None: every row that is at or after all of ``to``) becomes ``(1 - share) pattern + share / n`` on the n
    positions; the default share of 1 is Merullo et al.'s repair (2024, arXiv:2310.08744, sec. 5): the row is set to 0 and
    1/n written where the head shall look. A position given twice counts twice.

    Raises ``ModelError`` for shares outside 0..1 and, in the pass, for positions that the prompts lack and for ``to`` after
    ``at``, where a causal model has nothing to attend to.
    """
    refuse_misshapen(to, 2)
    if at is not None:
        refuse_misshapen(at, 1)
    if not (0 <= share <= 1 and to.shape[1]) or (at is not None and len(at) != len(to)):
        rows = "" if at is None else f" from {len(at)} rows"
        raise ModelError(
            f"share={share} on {tuple(to.shape)} positions{rows} is no attention. Give a share of 0..1, and for each prompt "
            "one position to attend from and one or more to attend to."
        )

    def rewrite(rows: Rows) -> Rows:
        keys = checked(to, len(rows), rows.shape[-1]).to(rows.device)
        refuse_the_future(at, keys, rows)
        wanted = torch.zeros(len(keys), rows.shape[-1], dtype=rows.dtype, device=rows.device)
        wanted.scatter_add_(1, keys, torch.full_like(keys, 1, dtype=rows.dtype) / keys.shape[1])
        changed = (1 - share) * rows + share * wanted[:, None, None]
        if at is not None:
            return changed
        after = query_positions(rows) >= keys.max(1).values[:, None]
        return torch.where(after[:, None, :, None], changed, rows)

    return rewrite_attention(heads, rewrite, at=at)


def look_away(
    heads: Node | str | Iterable[Node | str], *, at: Positions | None, from_: Keys, renormalize: bool = True
) -> dict[Site | str, Patch]:
    """From ``at`` (None: everywhere) the heads attend no more to the positions ``from_`` of each prompt.

    What they had there is shared out over the other positions in proportion (``renormalize``), or lost. A row that had all of
    its attention there keeps none.
    """

    def rewrite(rows: Rows) -> Rows:
        blocked = torch.zeros(len(rows), rows.shape[-1], dtype=torch.bool, device=rows.device)
        blocked.scatter_(1, checked(from_, len(rows), rows.shape[-1]).to(rows.device), True)
        left = rows.masked_fill(blocked[:, None, None], 0.0)
        total = left.sum(-1, keepdim=True)
        return left / torch.where(total > 0, total, 1) if renormalize else left

    return rewrite_attention(heads, rewrite, at=at)


def rewrite_attention(
    heads: Node | str | Iterable[Node | str], rewrite: Rewrite, *, at: Positions | None = None
) -> dict[Site | str, Patch]:
    """The heads' rows of attention, ``[batch head query_pos key_pos]``, as ``rewrite`` makes them: one query a prompt, or all.

    ``rewrite`` sees every row of the heads of one layer, in their order, and must not write into them. ``UnknownNode``, in the
    pass, for a head that the layer lacks.
    """
    by_layer: dict[int, list[int]] = defaultdict(list)
    for head in nodes_of(heads):
        layer, index = whole_head(head)
        by_layer[layer].append(index)

    def editing(layer: int, indices: list[int]) -> Patch:
        def patch(pattern: Float[Tensor, "batch head_index query_pos key_pos"], _: ActivationCache) -> Tensor:
            refuse_absent(layer, indices, pattern.shape[1])
            edited, rows = pattern.clone(), pattern[:, indices]
            edited[:, indices] = only_rows(at, rewrite(rows), rows)
            return edited

        return patch

    return {Site("pattern", layer): editing(layer, sorted(set(indices))) for layer, indices in by_layer.items()}


def scale_heads(factors: Mapping[Node | str, float], *, at: Positions | None = None) -> dict[Site | str, Patch]:
    """What a head gathers, times a factor: 0 silences it, 2 makes it twice as loud. ``at`` one position a prompt, or all.

    Where a model normalises what the heads of a layer write together (Gemma-2, OLMo-2), the others' writes change with it.
    """
    by_layer: dict[int, dict[int, float]] = defaultdict(dict)
    for name, factor in factors.items():
        layer, index = whole_head(name)
        by_layer[layer][index] = float(factor)

    def scaling(layer: int, of_heads: Mapping[int, float]) -> Patch:
        def patch(z: Float[Tensor, "batch pos head_index d_head"], cache: ActivationCache) -> Tensor:
            refuse_absent(layer, list(of_heads), z.shape[2])
            loud = torch.ones(z.shape[2], dtype=z.dtype, device=z.device)
            loud[list(of_heads)] = torch.tensor(list(of_heads.values()), dtype=z.dtype, device=z.device)
            return only_here(at, z * loud[:, None], z, cache.first)

        return patch

    return {Site("z", layer): scaling(layer, of_heads) for layer, of_heads in by_layer.items()}


def swap_heads(
    one: Node | str, other: Node | str, *, what: str = "pattern", at: Positions | None = None
) -> dict[Site | str, Patch]:
    """Two heads of a layer exchange where they look (``"pattern"``) or what they have gathered (``"z"``).

    ``UnknownNode`` for heads of two layers: the earlier one cannot have what is computed later.
    """
    (layer, first), (other_layer, second) = whole_head(one), whole_head(other)
    if layer != other_layer or what not in ("pattern", "z"):
        raise UnknownNode(
            f"{str(one)!r} and {str(other)!r} cannot exchange their {what}: give two heads of one layer, and what='pattern' or "
            "'z'."
        )
    axis = 1 if what == "pattern" else 2

    def patch(value: Tensor, cache: ActivationCache) -> Tensor:
        refuse_absent(layer, [first, second], value.shape[axis])
        order = list(range(value.shape[axis]))
        order[first], order[second] = second, first
        swapped = value.index_select(axis, torch.tensor(order, device=value.device))
        return only_rows(at, swapped, value) if what == "pattern" else only_here(at, swapped, value, cache.first)

    return {Site(what, layer): patch}


def steer(site: Site | str, direction: Float[Tensor, "*axes"], *, at: Positions | None = None) -> dict[Site | str, Patch]:
    """``direction`` is added to what stands at ``site`` (``resid_pre.5``, ``mlp_out.3``), at one position a prompt or at all.

    It has the axes of one position: ``[d_model]``, or ``[head_index, d_head]`` at ``z``; ``ModelError`` in the pass if not.
    A latent of an autoencoder is steered by its row of ``W_dec``, times how much: ``saes.steering`` does it.
    """
    place = _stream(site)

    def patch(value: Float[Tensor, "batch pos *axes"], cache: ActivationCache) -> Tensor:
        if value.shape[2:] != direction.shape:
            raise ModelError(
                f"the direction has shape {tuple(direction.shape)}, and a position of {str(place)!r} {tuple(value.shape[2:])}."
            )
        return only_here(at, value + direction.to(value), value, cache.first)

    return {place: patch}


def patch_from(
    cache: ActivationCache, parts: Node | Site | str | Iterable[Node | Site | str], *, at: Positions | None = None
) -> dict[Site | str, Patch]:
    """Activation patching: what another pass recorded stands in for what this one computes, at one position a prompt or at all.

    ``parts``: heads (their ``z``), or sites of one vector a position; ``cache`` must have recorded them (``UnknownSite``).
    ``ModelError`` in the pass where the recorded shape does not fit.
    """
    places = [_part(part) for part in ([parts] if isinstance(parts, (Node, Site, str)) else parts)]
    edits: list[Intervention] = [{place: _replacing(place, index, cache[place], at, cache.first)} for place, index in places]
    return combine(*edits)


def only_at(intervention: Intervention, at: Positions) -> dict[Site | str, Patch]:
    """The same intervention at one position a prompt: what it would change elsewhere stays. Not for ``pattern``."""

    def narrowed(patch: Patch) -> Patch:
        return lambda value, cache: only_here(at, patch(value, cache), value, cache.first)

    return {_stream(site): narrowed(patch) for site, patch in intervention.items()}


def _replacing(place: Site, index: int | None, written: Tensor, at: Positions | None, first: int) -> Patch:
    def patch(value: Float[Tensor, "batch pos *axes"], cache: ActivationCache) -> Tensor:
        if index is not None:
            refuse_absent(place.layer or 0, [index], value.shape[2])
        new = written.to(value)
        if at is not None:
            refuse_misshapen(at, 1)
        if at is not None and len(new) == len(at) == len(value) and new.shape[2:] == value.shape[2:]:
            # A text that grows is longer than what was recorded, so the one vector is sought there and not here.
            there = (checked(at[:, None], len(new), first + new.shape[1], first)[:, 0] - first).to(new.device)
            new = new[torch.arange(len(new), device=new.device), there].unsqueeze(1).expand_as(value)
        if new.shape != value.shape:
            raise ModelError(f"{str(place)!r} was recorded as {tuple(written.shape)} and is {tuple(value.shape)} in this pass.")
        if index is not None:
            is_head = torch.arange(value.shape[2], device=value.device) == index
            new = torch.where(is_head[:, None], new, value)
        return only_here(at, new, value, cache.first)

    return patch


def _part(part: Node | Site | str) -> tuple[Site, int | None]:
    """A site, and which head of it (None: all that stands there)."""
    if isinstance(part, str):
        try:
            part = Site.parse(part)
        except UnknownSite:
            part = Node.parse(part)
    if isinstance(part, Site):
        return _stream(part), None
    layer, index = whole_head(part)
    return Site("z", layer), index


def whole_head(name: Node | str) -> tuple[int, int]:
    """Layer and index of a head; ``UnknownNode`` for any other part."""
    head = Node.parse(name) if isinstance(name, str) else name
    if head.kind != "head" or head.port or head.layer is None or head.index is None or head.pos is not None:
        raise UnknownNode(f"{str(name)!r} is not a whole head. Name heads such as 'a9.h6'; {_site_of(head)}.")
    return head.layer, head.index


def _site_of(part: Node) -> str:
    """Under which name a part that is no head can be read and written."""
    if part.kind == "group":
        return f"what the heads of a group share is the site '{part.port or 'v'}.{part.layer}'"
    return "an MLP is the site 'mlp_out.9'"


def _stream(site: Site | str) -> Site:
    """A site that has positions: everything but grids of queries and keys."""
    place = Site.parse(site) if isinstance(site, str) else site
    if "query_pos" in place.axes:
        raise UnknownSite(f"{str(place)!r} holds no vector a position. Name 'z.5' or 'resid_pre.5'; attention has attend_to.")
    return place


def _in_turn(patches: list[Patch]) -> Patch:
    def patch(value: Tensor, cache: ActivationCache) -> Tensor:
        for one in patches:
            value = one(value, cache)
        return value

    return patch
