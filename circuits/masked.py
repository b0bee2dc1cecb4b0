"""One pass of a model whose edges, or whose writers, are kept by any share between all and nothing.

Each reader takes the residual stream as it is in this pass, minus, for every edge that is not wholly kept, its cut share
of the difference between what its writer writes now and what it writes under the ablation: ``x_v - sum_u (1 - kept_uv)
(a_u - a'_u)``. Shares of 1 are the model, shares of 0 what the ablation makes of it. Methods that learn masks, or
integrate along them, ask for gradients, which reach the masks and the replacement alike. A circuit is a mask of zeros and
ones, for which ``kept.py`` does the same in less time; the tests hold it to this.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.wiring import Wiring
from circuits.writes import Writes, expand, sites
from mechinterp.cache import ActivationCache
from mechinterp.models.trace import Patch
from mechinterp.models.transformer import ResidualStart, Transformer
from mechinterp.nodes import PORTS
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site


def run_edge_mask(
    model: Transformer, prompts: PromptBatch, kept: Float[Tensor, "mask edge"], replacement: Writes
) -> Float[Tensor, "batch d_vocab"]:
    """Logits at END with each edge kept by its share. ``kept``: one mask for all prompts, or one a prompt.

    Differentiable in ``kept`` and in ``replacement``. A backward pass keeps every reader's stream: about ``4 * readers *
    batch * pos * d_model`` numbers.
    """
    wiring = Wiring.of(model.config)
    cut = kept.new_zeros((len(kept), len(wiring.writers), len(wiring.readers)))
    cut[:, wiring.edge_writer, wiring.edge_reader] = 1 - kept
    cut = cut.to(model.device, model.dtype)
    excess = _Excess(model, cut, replacement, len(prompts))
    patch: dict[Site | str, Patch] = {}
    for layer in range(model.config.n_layers):
        for port in PORTS:
            readers = wiring.port_slice(layer, port)
            patch[Site(f"{port}_input", layer)] = _subtract(excess, readers, wiring, per_head=True)
        if wiring.has_mlp:
            mlp = wiring.mlp_reader(layer)
            patch[Site("mlp_in", layer)] = _subtract(excess, slice(mlp, mlp + 1), wiring, per_head=False)
    logits = slice(len(wiring.readers) - 1, len(wiring.readers))
    patch[Site("resid_post", model.config.n_layers - 1)] = _subtract(excess, logits, wiring, per_head=False)
    tokens, ends = prompts.clean.to(model.device), prompts.end.to(model.device)
    logits, _ = model.run(tokens, record=sites(model), patch=patch, logits_at=ends)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def run_node_mask(
    model: Transformer, prompts: PromptBatch, kept: Float[Tensor, "mask writer"], replacement: Writes
) -> Float[Tensor, "batch d_vocab"]:
    """Logits at END with each writer kept by its share, for all its readers alike: one plain pass, masks as above."""
    wiring, kept, patch = Wiring.of(model.config), kept.to(model.device, model.dtype), {}

    def towards(replaced: Tensor, shares: Tensor) -> Patch:
        return lambda written, _: torch.lerp(replaced, written, shares)

    for layer in range(wiring.n_layers):
        heads = wiring.head_slice(layer)
        patch[Site(model.config.write_site, layer)] = towards(replacement.z[layer], kept[:, None, heads, None])
        if wiring.has_mlp:
            patch[Site("mlp_out", layer)] = towards(replacement.mlp_out[layer], kept[:, None, heads.stop, None])
    embedded = torch.lerp(replacement.input, model.embed(prompts.clean.to(model.device)), kept[:, 0, None, None])
    start = ResidualStart(Site("resid_pre", 0), embedded)
    logits, _ = model.run(None, start=start, patch=patch, logits_at=prompts.end.to(model.device))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _subtract(excess: "_Excess", readers: slice, wiring: Wiring, *, per_head: bool) -> Patch:
    """A patch that takes from each reader's stream what its cut edges would have brought."""
    n_writers = int(wiring.writers_before[readers.start])

    def patch(stream: Tensor, cache: ActivationCache) -> Tensor:
        brought = excess.through(readers, n_writers, cache)
        if brought is None:
            return stream
        return stream - (brought.movedim(0, 2) if per_head else brought[0])

    return patch


class _Excess:
    """For each writer: what it writes in this pass minus what it writes under the ablation, filled as the pass goes.

    ``parts`` are the same differences as autograd knows them; kept only where gradients are wanted.
    """

    def __init__(self, model: Transformer, cut: Float[Tensor, "mask writer reader"], replacement: Writes, n_rows: int):
        self.model, self.cut, self.replacement = model, cut, replacement
        self.rows_a_mask = n_rows // len(cut)
        shape = (cut.shape[0], cut.shape[1], self.rows_a_mask, *replacement.input.shape[1:])
        self.values = cut.new_empty(shape)
        self.parts: list[Tensor] = []
        self.filled = 0

    def through(self, readers: slice, n_writers: int, cache: ActivationCache) -> Float[Tensor, "reader row pos d_model"] | None:
        """What the cut edges into ``readers`` bring too much; None where no edge is cut, nor could a gradient want it."""
        cut = self.cut[:, :n_writers, readers]
        if not cut.requires_grad and not bool(cut.any()):
            return None
        self._fill(n_writers, cache)
        brought = _Brought.apply(cut, self.values[:, :n_writers], *self.parts)
        return brought.movedim(1, 0).flatten(1, 2)

    def _fill(self, n_writers: int, cache: ActivationCache) -> None:
        """Writers ``filled`` to ``n_writers``: all of them ran before the reader that asks."""
        then, config = self.replacement, self.model.config
        while self.filled < n_writers:
            if self.filled == 0:
                self._put(cache.embedded[None], then.input)
                continue
            layer, part = divmod(self.filled - 1, config.n_heads + config.has_mlp)
            if part == 0:
                now = cache[config.write_site, layer]
                z = now - then.z[layer].repeat(len(now) // len(then.z[layer]), 1, 1, 1)
                self._put(expand(self.model.weights, layer, z), None)
            else:
                self._put(cache["mlp_out", layer][None], then.mlp_out[layer])

    def _put(self, written: Float[Tensor, "writer row pos d_model"], replaced: Tensor | None) -> None:
        excess = written.unflatten(1, (-1, self.rows_a_mask)).transpose(0, 1)
        if replaced is not None:
            excess = excess - replaced.unflatten(0, (-1, 1, self.rows_a_mask))
        self.values[:, self.filled : self.filled + len(written)].copy_(excess.detach())
        if torch.is_grad_enabled():
            self.parts.append(excess)
        self.filled += len(written)


class _Brought(torch.autograd.Function):
    """``sum_writer cut * excess`` for a group of readers, out of a buffer that the pass goes on filling.

    Autograd would refuse that buffer, whose later slots are written after this product, or have it copied for every
    group of readers. So the product reads the buffer and its gradient goes to ``parts``, of which the buffer is the copy.
    """

    @staticmethod
    def forward(ctx, cut, excess, *parts):
        ctx.save_for_backward(cut)
        ctx.excess, ctx.sizes = excess, [part.shape[1] for part in parts]
        return torch.bmm(cut.transpose(1, 2), excess.flatten(2)).unflatten(2, excess.shape[2:])

    @staticmethod
    def backward(ctx, *grads):
        (cut,), brought, excess = ctx.saved_tensors, grads[0].flatten(2), ctx.excess
        wants_cut, _, *wants_parts = ctx.needs_input_grad
        d_cut = torch.bmm(excess.flatten(2), brought.transpose(1, 2)) if wants_cut else None
        if not any(wants_parts):
            return d_cut, None, *(None for _ in ctx.sizes)
        d_parts = torch.bmm(cut, brought).unflatten(2, excess.shape[2:]).split(ctx.sizes, dim=1)
        return d_cut, None, *(part if wanted else None for part, wanted in zip(d_parts, wants_parts, strict=True))
