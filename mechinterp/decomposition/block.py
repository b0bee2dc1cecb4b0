"""A stack of sources on its way through the blocks of a transformer, each module by its rule.

In a block (Hsu et al. 2024/2025, algorithm 1 and their code): normalise; queries, keys and values; attention; then what
is relevant at this layer's heads is *set*, and heads are read; out of attention, through the MLP, and on. ``None`` stands
for "nothing relevant", which every rule leaves so: nothing in, nothing out.

Where a model normalises what its heads write, a source is set behind that (``z_written``): it *is* what the head writes,
and what its siblings write is not its doing. Set before it, at ``z``, a head would change their common scale, so that
under ``"own"`` norms a part of every sibling's write would be relevant to it. Read is what a head gathers, ``z``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mechinterp.decomposition import rules as by
from mechinterp.decomposition.rule_sets import Rules
from mechinterp.decomposition.sources import INPUT, Reference, Stack
from mechinterp.decomposition.split import Split
from mechinterp.decomposition.totals import Totals
from mechinterp.models.attention import Heads
from mechinterp.models.transformer import ACTIVATIONS, Transformer
from mechinterp.models.weights import Norm
from mechinterp.sites import Site

LOGITS = Site("logits")
AFTER_KEYS = ("q", "z", "z_written")
AFTER_HEADS = ("attn_out", "resid_mid", "mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out", "resid_post")


@dataclass(frozen=True)
class Way:
    """The way of one ``stack``. ``totals`` is the clean pass, or None where both parts are carried; ``found`` fills up."""

    model: Transformer
    rules: Rules
    stack: Stack
    reference: Reference
    totals: Totals | None
    targets: frozenset[Site]
    found: dict[Site, Split] = field(default_factory=dict)

    def walk(self, x: Split | None = None) -> Mapping[Site, Split]:
        """From the first layer in which a source acts to the last target. ``x``: the split embedding, if there is one."""
        layers = self.model.config.n_layers
        begins = 0 if self.totals is None else max(0, min(source.start[0] for source in self.stack.sources))
        ends = max(layers - 1 if site == LOGITS else site.layer or 0 for site in self.targets)
        x, view = self._set(INPUT, x, self.totals), self.totals
        for layer in range(begins, ends + 1):
            x, view = self._block(layer, x)
        if LOGITS in self.targets and (logits := self._unembed(x, view)) is not None:
            self.found[LOGITS] = logits
        for site in self.targets - self.found.keys():  # what no source of this stack reaches
            assert self.totals is not None
            self.found[site] = _nothing(self.totals.target(site), len(self.stack.sources))
        return self.found

    def _block(self, layer: int, x: Split | None) -> tuple[Split | None, Totals | None]:
        """What a layer hands on, and where: at all positions, or at END where nothing else is wanted."""
        config, rules, block = self.model.config, self.rules, self.model.weights.blocks[layer]
        of_queries, behind = self._views(layer)
        self._read("resid_pre", layer, x)
        z = None if x is None else self._attention(layer, x, of_queries)
        if config.has_norms_after:
            self._read("z", layer, z)
            z = None if z is None else by.written(z, block.W_O, config.norm_eps, rules.norm)  # type: ignore[arg-type]
        z = self._read(config.write_site, layer, self._set(Site(config.write_site, layer), z, of_queries))
        z, x, W_O = _narrow(z, of_queries, behind), _narrow(x, self.totals, behind), self.model.weights.W_O(layer)
        attn_out = None if z is None else self._linear(z.map(_joined), W_O.flatten(0, 1), block.b_O, "attn_out", layer, behind)
        self._read("attn_out", layer, attn_out)
        after = _add(x, attn_out)
        if config.has_mlp:
            if not config.parallel:
                after = self._read("resid_mid", layer, _known(after, "resid_mid", layer, behind))
            stream = x if config.parallel else after
            mlp_out = None if stream is None else self._mlp(layer, stream, behind)
            mlp_out = self._read("mlp_out", layer, self._set(Site("mlp_out", layer), mlp_out, behind))
            after = _add(after, mlp_out)
        after = _known(after, "resid_post", layer, behind)
        after = by.by_sign(after) if after is not None and rules.sign and config.has_mlp else after
        return self._read("resid_post", layer, after), behind

    def _views(self, layer: int) -> tuple[Totals | None, Totals | None]:
        """Where a layer's queries are needed, and where what follows its heads."""
        if self.totals is None or layer < self.model.config.n_layers - 1:
            return self.totals, self.totals
        read = {site.name for site in self.targets if site.layer == layer}
        behind = self.totals if read & set(AFTER_HEADS) else self.totals.narrowed()
        return (self.totals if read & set(AFTER_KEYS) else behind), behind

    def _attention(self, layer: int, x: Split, view: Totals | None) -> Split:
        weights, rules = self.model.weights, self.rules
        queries = torch.arange(self.stack.n_pos, device=self.model.device)[None] if view is None else view.queries
        heads = Heads.of(weights, layer, queries)
        normed = self._normalize(x, weights.blocks[layer].ln1)
        if view is not None and rules.attention == "held":
            for name in {"q", "k"} & {site.name for site in self.targets if site.layer == layer}:
                self._port(name, layer, normed, view)
            v = self._port("v", layer, normed, view).map(heads.for_every_head)
            return by.gather(view.pattern(layer), v, view("z", layer))
        q, k, v = (self._port(name, layer, normed, view) for name in "qkv")
        if view is not None:
            k, v = (_with_prefix(of, view.before(name, layer)) for of, name in ((k, "k"), (v, "v")))
        total = None if view is None else view("z", layer)
        return by.attend(q, k, v, heads, rules.attention, rules.norm, total)  # type: ignore[arg-type]

    def _port(self, name: str, layer: int, normed: Split, view: Totals | None) -> Split:
        """Queries where they are needed; keys and values, once for all heads that share them, everywhere."""
        config, block = self.model.config, self.model.weights.blocks[layer]
        H, G, D = config.n_heads, config.n_groups, config.d_head
        here, first, n = {"q": (view, 0, H), "k": (self.totals, H, G), "v": (self.totals, H + G, G)}[name]
        read = _narrow(normed, self.totals, here)
        assert read is not None
        W, b = (of[..., first * D : (first + n) * D] for of in (block.W_QKV, block.b_QKV))
        made = self._linear(read, W, b, name, layer, here).map(lambda part: part.unflatten(-1, (n, D)))
        self._read(name, layer, made)
        return made

    def _mlp(self, layer: int, stream: Split, view: Totals | None) -> Split:
        config, block, rules = self.model.config, self.model.weights.blocks[layer], self.rules
        f, slope = ACTIVATIONS[config.activation], by.SLOPE_AT_ZERO.get(config.activation, 0.0)  # see `check_rules`
        read = self._normalize(stream, block.ln2)
        if config.gated:
            pre = self._hidden(read, block.W_gate, block.b_gate, "mlp_pre", layer, view)
            total = None if view is None else f(view("mlp_pre", layer))
            a = by.activate(pre, f, rules.activation, slope, total)  # type: ignore[arg-type]
            u = self._hidden(read, block.W_in, block.b_in, "mlp_pre_linear", layer, view)
            post = by.gate(a, u, rules.gate, None if view is None else view("mlp_post", layer))  # type: ignore[arg-type]
        else:
            pre = self._hidden(read, block.W_in, block.b_in, "mlp_pre", layer, view)
            total = None if view is None else view("mlp_post", layer)
            post = by.activate(pre, f, rules.activation, slope, total)  # type: ignore[arg-type]
        self._read("mlp_post", layer, post)
        assert block.W_out is not None
        total = None if view is None else view.mlp_out_before_its_norm(layer)
        out = by.linear(post, block.W_out, block.b_out, rules.linear, total)  # type: ignore[arg-type]
        return self._normalize(by.by_sign(out) if rules.sign else out, block.ln2_post)

    def _hidden(self, read: Split, W: Tensor | None, b: Tensor | None, name: str, layer: int, view: Totals | None) -> Split:
        """What enters the MLP's nonlinearity."""
        assert W is not None
        pre = self._linear(read, W, b, name, layer, view)
        pre = by.by_sign(pre) if self.rules.sign else pre
        self._read(name, layer, pre)
        return pre

    def _unembed(self, x: Split | None, view: Totals | None) -> Split | None:
        """The logits, where and of the tokens that are wanted."""
        weights, of_wanted = self.model.weights, None if view is None else view.narrowed()
        x = _narrow(x, view, of_wanted)
        if x is None:
            return None
        columns, chosen = (slice(None), None) if of_wanted is None else of_wanted.columns
        b_U, total = (
            None if weights.b_U is None else weights.b_U[columns],
            None if of_wanted is None else of_wanted.uncapped_logits(columns),
        )
        read = self._normalize(x, weights.ln_final)
        logits = by.linear(read, weights.W_U[:, columns], b_U, self.rules.linear, total)  # type: ignore[arg-type]
        if (cap := self.model.config.logit_soft_cap) is not None:
            capped = None if total is None else self.model.capped(total)
            logits = by.soft_cap(logits, cap, self.rules.activation, capped)  # type: ignore[arg-type]
        return logits if of_wanted is None else logits.map(partial(of_wanted.as_wanted, chosen=chosen))

    def _linear(self, x: Split, W: Tensor, b: Tensor | None, name: str, layer: int, view: Totals | None) -> Split:
        total = None if view is None else view(name, layer)
        total = total.flatten(2) if total is not None and total.dim() == 4 else total  # heads side by side, as W has them
        return by.linear(x, W, b, self.rules.linear, total)  # type: ignore[arg-type]

    def _normalize(self, x: Split, norm: Norm | None) -> Split:
        if norm is None:
            return x
        config, rules = self.model.config, self.rules
        return by.normalize(x, norm.w, norm.b, config.norm_eps, rules.norm, rules.linear, centred=config.centred)  # type: ignore[arg-type]

    def _set(self, site: Site, x: Split | None, view: Totals | None) -> Split | None:
        """Where a source acts, its whole deviation from the reference is relevant, also what an earlier source did to it."""
        if site not in self.stack.masks:
            return x
        mask = self.stack.masks[site]
        standard = self.reference.get(site)
        standard = None if standard is None else standard[:, self.stack.first :].to(mask.device)
        if view is None:
            assert x is not None
            mask, irrelevant = mask.unsqueeze(-1), torch.zeros_like(x.relevant) if standard is None else standard
            return Split(torch.where(mask, x.total - irrelevant, x.relevant), torch.where(mask, irrelevant, x.irrelevant))
        total = view(site.name, site.layer or 0)
        deviation = total if standard is None else total - view.here(standard.expand(len(total), *standard.shape[1:]))
        mask = view.stacked_here(mask).unsqueeze(-1)
        return Split.within(total, torch.where(mask, deviation, 0.0 if x is None else x.relevant))

    def _read(self, name: str, layer: int, x: Split | None) -> Split | None:
        """Keep it if it is a target."""
        if x is not None and (site := Site(name, layer)) in self.targets:
            self.found[site] = x
        return x


def _nothing(total: Tensor, n_sources: int) -> Split:
    return Split.within(total, total.new_zeros(()).expand(n_sources, *total.shape))


def _narrow(x: Split | None, given: Totals | None, wanted: Totals | None) -> Split | None:
    """From all positions to END, where only that is wanted."""
    if x is None or wanted is None or given is None or wanted.at_end == given.at_end:
        return x
    return Split.within(wanted.here(x.total), wanted.stacked_here(x.relevant))


def _add(x: Split | None, y: Split | None) -> Split | None:
    return x if y is None else y if x is None else x + y


def _known(x: Split | None, name: str, layer: int, view: Totals | None) -> Split | None:
    """A sum within the stream's known total, which also holds what was never split."""
    return x if x is None or view is None else Split.within(view(name, layer), x.relevant)


def _with_prefix(x: Split, before: Float[Tensor, "batch prefix group d_head"]) -> Split:
    """Keys or values joined by those in front of all sources, where nothing is relevant."""
    if before.shape[1] == 0:
        return x
    return Split.within(torch.cat([before, x.total], 1), F.pad(x.relevant, (0, 0, 0, 0, before.shape[1], 0)))


def _joined(heads: Tensor) -> Tensor:
    return heads.flatten(-2)
