"""What is called relevant: a source is a set of parts of the model, each at all positions or at one a prompt.

A part's relevant activation is its deviation from a *reference*: what it did minus what it would do without the prompt's
information (a mean over other prompts, another prompt's value, zero). For a head that is ``z - μ``, as in the paper (or,
where a model normalises what heads write, the same of ``z_written``); for an MLP it is at its output, for a token at its
embedding.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import ModelError, TaskError, UnknownNode, nearest
from mechinterp.models.config import ModelConfig
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.sites import Site, resolve

INPUT = Site("resid_pre", 0)  # what token and position embedding write
Reference = Mapping[Site, Float[Tensor, "_ _ ..."]]  # one prompt for all, or one each; all positions


@dataclass(frozen=True)
class Source:
    """Parts that are relevant together. ``at``: the position of each prompt where those are that name none themselves."""

    nodes: tuple[Node, ...]
    at: Int[Tensor, "batch"] | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or "+".join(map(str, self.nodes))

    @property
    def start(self) -> tuple[int, int]:
        """Where it begins to act: a layer, and within it heads before the MLP. The input comes before layer 0."""
        return min(_stage(node) for node in self.nodes)

    @property
    def first(self) -> int:
        """The first position at which it can act."""
        anywhere = 0 if self.at is None else int(self.at.min())
        return min(anywhere if node.pos is None else node.pos for node in self.nodes)

    def where(self, node: Node, n_batch: int, n_pos: int) -> Bool[Tensor, "batch pos"]:
        """The positions of each prompt at which one of the nodes is relevant."""
        places = torch.arange(n_pos)
        if node.pos is not None:
            return (places == node.pos).expand(n_batch, -1)
        if self.at is not None:
            return places == self.at.cpu()[:, None]
        return torch.ones(n_batch, n_pos, dtype=torch.bool)


Named = Source | Node | str | Iterable[Node | str]


def parse_sources(config: ModelConfig, sources: Iterable[Named], n_batch: int, n_pos: int) -> list[Source]:
    """Sources by name: ``"a9.h6"``, ``"a9.h6@14"``, ``"m4"``, ``"input@3"``, or several of them as one set.

    ``UnknownNode`` for a part that the model lacks or that cannot be a source.
    """
    if isinstance(sources, str | Node | Source) or not (named := list(sources)):
        raise UnknownNode(f"sources must be a list of parts, such as ['a9.h6', 'm4@3'], not {sources!r}.")
    found = [_parse(source) for source in named]
    for source in found:
        if not source.nodes:
            raise UnknownNode("a source without parts has nothing relevant. Name at least one, such as 'a9.h6'.")
        for node in source.nodes:
            _check(config, node, n_pos)
        if source.at is not None and source.at.shape != (n_batch,):
            raise UnknownNode(
                f"{source.name!r} needs one position for each of {n_batch} prompts, not {tuple(source.at.shape)}."
            )
        if source.at is not None and not 0 <= int(source.at.min()) <= int(source.at.max()) < n_pos:
            raise UnknownNode(
                f"{source.name!r} acts at positions {source.at.tolist()}; the prompts have {n_pos}, 0..{n_pos - 1}."
            )
    return found


def resolve_reference(
    model: Transformer,
    reference: Mapping[Site, Tensor] | Mapping[Site | str, Tensor],
    sources: Sequence[Source],
    n_batch: int,
    n_pos: int,
) -> Reference:
    """A reference by sites, in the model's precision.

    ``UnknownSite`` for a site that the model lacks; ``ModelError`` for one where no source is set, for a source without a
    value, and for another shape.
    """
    config, found = model.config, {}
    wide = {config.write_site: (config.n_heads, config.d_head)}
    for key, value in reference.items():
        (site,) = resolve(config, [key])
        if site != INPUT and site.name not in (config.write_site, "mlp_out"):
            known = f"{INPUT}, {config.write_site} and mlp_out, by layer"
            raise ModelError(f"no source is set at {str(site)!r}. References for {config.name} are of {known}.")
        shape = (n_pos, *wide.get(site.name, (config.d_model,)))
        if tuple(value.shape[1:]) != shape or value.shape[0] not in (1, n_batch):
            raise ModelError(
                f"the reference at {str(site)!r} has shape {tuple(value.shape)}; it must be {(n_batch, *shape)}, or 1 for all "
                "prompts. Means go position by position: take them over prompts of the same length."
            )
        found[site] = value.to(model.device, model.dtype)
    for source in sources:
        if missing := [site for node in source.nodes if (site := site_of(config, node)) not in found]:
            raise ModelError(
                f"the reference has no value at {str(missing[0])!r} for the source {source.name!r}. Add it (zeros, if "
                "nothing of it is irrelevant), or give no reference at all."
            )
    return found


@dataclass(frozen=True)
class Stack:
    """Some sources side by side, on the axis ``source``: where each of them sets what is relevant."""

    sources: tuple[Source, ...]
    config: ModelConfig
    n_batch: int
    n_pos: int
    first: int
    device: torch.device

    @cached_property
    def masks(self) -> dict[Site, Bool[Tensor, "source batch pos *head_index"]]:
        """By the site at which it is set."""
        found: dict[Site, Tensor] = {}
        for row, source in enumerate(self.sources):
            for node in source.nodes:
                site = site_of(self.config, node)
                heads = (self.config.n_heads,) if node.kind == "head" else ()
                shape = (len(self.sources), self.n_batch, self.n_pos, *heads)
                mask = found.setdefault(site, torch.zeros(shape, dtype=torch.bool))
                mask = mask[row] if node.kind != "head" else mask[row, :, :, node.index]
                mask |= source.where(node, self.n_batch, self.n_pos)
        return {site: mask[:, :, self.first :].to(self.device) for site, mask in found.items()}


def site_of(config: ModelConfig, node: Node) -> Site:
    """Where a source is set."""
    if node.kind == "input":
        return INPUT
    return Site(config.write_site if node.kind == "head" else "mlp_out", node.layer)


def mean_reference(
    model: Transformer, tokens: Int[Tensor, "batch pos"], ends: Int[Tensor, "batch"] | None = None
) -> dict[Site, Float[Tensor, "1 pos *axes"]]:
    """Every part's mean over reference prompts, position by position (the paper's μ). One forward.

    The prompts must be of one template, so that a position means the same in all of them. ``TaskError`` for a single
    prompt, whose mean is itself, and where they end at different positions (``ends``).
    """
    if len(tokens) < 2:
        raise TaskError(
            f"a mean over {len(tokens)} prompt is that prompt, and only what differs from it would be relevant. Give at least "
            "two reference prompts."
        )
    if ends is not None and not bool((ends == ends[0]).all()):
        raise TaskError(
            f"the reference prompts end at positions {int(ends.min())} to {int(ends.max())}, so a position does not mean the "
            "same in all of them. Take means over prompts of one length, template by template."
        )
    names = ["resid_pre.0", model.config.write_site, *(["mlp_out"] if model.config.has_mlp else [])]
    with torch.no_grad():
        _, cache = model.run(tokens.to(model.device), record=names, logits_at="last", logits_of=tokens[:, :0].to(model.device))
    return {site: value.mean(0, keepdim=True) for site, value in cache.items()}


def _parse(source: Named) -> Source:
    if isinstance(source, Source):
        return source
    members = [source] if isinstance(source, Node | str) else list(source)
    return Source(tuple(sorted(Node.parse(node) if isinstance(node, str) else node for node in members)))


def _check(config: ModelConfig, node: Node, n_pos: int) -> None:
    if node.kind not in ("input", "head", "mlp") or node.port:
        raise UnknownNode(f"{str(node)!r} cannot be a source. Sources are the input, heads and MLPs, each also at a position.")
    there = [Node.head(layer, head) for layer in range(config.n_layers) for head in range(config.n_heads)]
    there += [Node.mlp(layer) for layer in range(config.n_layers) if config.has_mlp]
    if node.kind != "input" and node.at(None) not in there:
        layers, heads = f"layers 0..{config.n_layers - 1}", f"heads 0..{config.n_heads - 1}"
        mlps = "an MLP each" if config.has_mlp else "no MLPs"
        hint = nearest(str(node.at(None)), map(str, there))
        raise UnknownNode(f"{str(node)!r} is not in {config.name}, which has {layers} of {heads} and {mlps}.{hint}")
    if node.pos is not None and node.pos >= n_pos:
        raise UnknownNode(f"{str(node)!r} stands at position {node.pos}; the prompts have {n_pos}, 0..{n_pos - 1}.")


def _stage(node: Node) -> tuple[int, int]:
    layer = -1 if node.layer is None else node.layer
    return layer, int(node.kind == "mlp")
