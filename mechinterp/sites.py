"""The places in a forward pass where an activation is read or written. The names are TransformerLens'."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

from mechinterp.errors import UnknownSite, nearest


@runtime_checkable
class Shape(Protocol):
    """What decides which sites a model has."""

    @property
    def n_layers(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def has_mlp(self) -> bool: ...
    @property
    def parallel(self) -> bool: ...
    @property
    def learned_positions(self) -> bool: ...
    @property
    def normalization(self) -> str: ...
    @property
    def has_norms_before(self) -> bool: ...
    @property
    def has_norms_after(self) -> bool: ...
    @property
    def rotary(self) -> object: ...
    @property
    def qk_norm(self) -> str: ...
    @property
    def gated(self) -> bool: ...


# name -> (axes, TransformerLens' hook, None where it has none). In the order in which a block computes them.
_STREAM = "batch pos d_model"
_HEADS = "batch pos head_index d_head"
_GROUPS = "batch pos group d_head"  # a group is a head, unless heads share keys and values
_GRID = "batch head_index query_pos key_pos"
GLOBAL_SITES: dict[str, tuple[str, str | None]] = {
    "embed": (_STREAM, "hook_embed"),
    "pos_embed": (_STREAM, "hook_pos_embed"),
    "ln_final_scale": ("batch pos 1", "ln_final.hook_scale"),
    "ln_final_normalized": (_STREAM, "ln_final.hook_normalized"),
    "logits": ("batch pos d_vocab", "unembed.hook_out"),
}
LAYER_SITES: dict[str, tuple[str, str | None]] = {
    "resid_pre": (_STREAM, "hook_resid_pre"),
    "ln1_scale": ("batch pos 1", "ln1.hook_scale"),
    "ln1_normalized": (_STREAM, "ln1.hook_normalized"),
    "q_input": ("batch pos head_index d_model", "hook_q_input"),
    "k_input": ("batch pos group d_model", "hook_k_input"),
    "v_input": ("batch pos group d_model", "hook_v_input"),
    "q": (_HEADS, "attn.hook_q"),
    "k": (_GROUPS, "attn.hook_k"),
    "v": (_GROUPS, "attn.hook_v"),
    "rot_q": (_HEADS, "attn.hook_rot_q"),
    "rot_k": (_GROUPS, "attn.hook_rot_k"),
    "attn_scores": (_GRID, "attn.hook_attn_scores"),
    "pattern": (_GRID, "attn.hook_pattern"),
    "z": (_HEADS, "attn.hook_z"),
    "result": ("batch pos head_index d_model", "attn.hook_result"),
    "ln1_post_scale": ("batch pos 1", "ln1_post.hook_scale"),
    "z_written": (_HEADS, None),
    "ln1_post_normalized": (_STREAM, "ln1_post.hook_normalized"),
    "attn_out": (_STREAM, "hook_attn_out"),
    "resid_mid": (_STREAM, "hook_resid_mid"),
    "mlp_in": (_STREAM, "hook_mlp_in"),
    "ln2_scale": ("batch pos 1", "ln2.hook_scale"),
    "ln2_normalized": (_STREAM, "ln2.hook_normalized"),
    "mlp_pre": ("batch pos d_mlp", "mlp.hook_pre"),
    "mlp_pre_linear": ("batch pos d_mlp", "mlp.hook_pre_linear"),
    "mlp_post": ("batch pos d_mlp", "mlp.hook_post"),
    "ln2_post_scale": ("batch pos 1", "ln2_post.hook_scale"),
    "ln2_post_normalized": (_STREAM, "ln2_post.hook_normalized"),
    "mlp_out": (_STREAM, "hook_mlp_out"),
    "resid_post": (_STREAM, "hook_resid_post"),
}
_ORDER = {name: i for i, name in enumerate([*LAYER_SITES, *GLOBAL_SITES])}
_MLP = {"mlp_in", "mlp_pre", "mlp_post", "mlp_out"}
_BEFORE_MLP = {"ln2_scale", "ln2_normalized"}
_AFTER_MLP = {"ln2_post_scale", "ln2_post_normalized"}
_BEFORE = {"ln1_scale", "ln1_normalized", *_BEFORE_MLP}
_AFTER = {"ln1_post_scale", "ln1_post_normalized", "z_written", *_AFTER_MLP}
_HOOKS = {hook: name for name, (_, hook) in (GLOBAL_SITES | LAYER_SITES).items() if hook}


@dataclass(frozen=True)
class Site:
    """A place where an activation is read or written, e.g. ``Site("z", 9)``.

    ``q_input``, ``k_input``, ``v_input`` are what each head's port reads from the residual stream and ``mlp_in`` what
    an MLP reads, all *before* their normalisation; writing there reaches that reader alone. ``*_normalized`` is after
    centring and scaling, before gain and bias. ``q`` and ``k`` are as the projection makes them, ``rot_q`` and ``rot_k``
    as they meet (normalised and turned). In a gated MLP ``mlp_pre`` is the gate before its activation and
    ``mlp_pre_linear`` the other factor. ``ln1_post_*`` and ``ln2_post_*`` are the normalisations of what heads and MLP
    write, where a model has them; ``attn_out`` and ``mlp_out`` are after them, ``result`` before. ``z_written`` is ``z``
    divided by the scale of ``ln1_post``: what heads write is linear in it. Keys, values and what they read have one head a
    *group* of query heads, where heads share them.

    >>> Site.parse("blocks.9.attn.hook_z")
    Site(name='z', layer=9)
    """

    name: str
    layer: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read one of our names (``"z.9"``, ``"embed"``) or TransformerLens' hook name."""
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", text):
            if match[2] in _HOOKS:
                return cls(_HOOKS[match[2]], int(match[1]))
        elif text in _HOOKS:
            return cls(_HOOKS[text])
        name, _, layer = text.partition(".")
        if name in LAYER_SITES and layer.isdecimal():
            return cls(name, int(layer))
        if text in GLOBAL_SITES:
            return cls(text)
        known = [f"{name}.0" for name in LAYER_SITES] + [*GLOBAL_SITES, *_HOOKS]
        raise UnknownSite(
            f"{text!r} names no site. Sites look like 'z.9', 'embed' or 'blocks.9.attn.hook_z'.{nearest(text, known)}"
        )

    @property
    def axes(self) -> str:
        """The names of the axes, e.g. ``"batch pos head_index d_head"``."""
        return (LAYER_SITES | GLOBAL_SITES)[self.name][0]

    @property
    def hook_name(self) -> str | None:
        """TransformerLens' name for this place; None for ``z_written``, which it does not have."""
        hook = (LAYER_SITES | GLOBAL_SITES)[self.name][1]
        return hook if hook is None or self.layer is None else f"blocks.{self.layer}.{hook}"

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name}.{self.layer}"

    @property
    def order(self) -> tuple[int, int]:
        """Sorts sites as a forward pass meets them."""
        if self.layer is not None:
            return (self.layer, _ORDER[self.name])
        return (-1 if self.name in ("embed", "pos_embed") else 1 << 30, _ORDER[self.name])


@lru_cache(maxsize=64)
def all_sites(shape: Shape) -> tuple[Site, ...]:
    """Every site of a model of this shape, in order of computation."""
    lacking: set[str] = set()
    if not shape.has_mlp:
        lacking |= _MLP | _BEFORE_MLP | _AFTER_MLP
    if not shape.has_mlp or shape.parallel:
        lacking |= {"resid_mid"}
    if not (shape.has_mlp and shape.gated):
        lacking |= {"mlp_pre_linear"}
    if not shape.has_norms_before:
        lacking |= _BEFORE
    if not shape.has_norms_after:
        lacking |= _AFTER
    if shape.normalization == "none":
        lacking |= {"ln_final_scale", "ln_final_normalized"}
    if shape.rotary is None and shape.qk_norm == "none":
        lacking |= {"rot_q", "rot_k"}
    if not shape.learned_positions:
        lacking |= {"pos_embed"}
    sites = [Site(name, layer) for layer in range(shape.n_layers) for name in LAYER_SITES if name not in lacking]
    sites += [Site(name) for name in GLOBAL_SITES if name not in lacking]
    return tuple(sorted(sites, key=lambda site: site.order))


def resolve(shape: Shape, wanted: Iterable[Site | str]) -> list[Site]:
    """The sites meant by ``wanted``: a ``Site``, its name, a hook name, or a bare name such as ``"z"`` for every layer.

    Raises ``UnknownSite`` for anything this model lacks.
    """
    present = all_sites(shape)
    known, resolved = set(present), []
    for item in wanted:
        if isinstance(item, str) and item in LAYER_SITES:
            sites = [site for site in present if site.name == item] or [Site(item, 0)]
        else:
            sites = [Site.parse(item) if isinstance(item, str) else item]
        for site in sites:
            if site not in known:
                raise UnknownSite(_absent(shape, site, present))
        resolved += sites
    return resolved


def _absent(shape: Shape, site: Site, present: tuple[Site, ...]) -> str:
    names = sorted({s.name for s in present})
    if site.name not in names:
        return f"{shape.name} has no site {site.name!r}. It has: {', '.join(names)}.{nearest(site.name, names)}"
    if site.name in GLOBAL_SITES:
        return f"the site {site.name!r} belongs to no layer; it was asked for at layer {site.layer}. Use Site({site.name!r})."
    last = shape.n_layers - 1
    return f"the site {site.name!r} was asked for at layer {site.layer}; the layers of {shape.name} run 0..{last}."
