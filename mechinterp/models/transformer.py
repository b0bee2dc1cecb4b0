"""The engine: one lean forward pass in which every activation can be read and written.

The pass is the one you know. Tokens become the residual stream; each layer's heads and MLP read it through a
normalisation and add to it; the last state is unembedded. Around each activation stands ``trace(name, layer, value)``,
which hands the value to a patch if there is one, keeps it if it is to be recorded, and otherwise costs a dictionary
lookup. What nobody asks for (attention patterns, per-head inputs, per-head results) is never made.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import ModelError
from mechinterp.models.attention import Prefix, attend
from mechinterp.models.config import ModelConfig
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.trace import Patch, Trace
from mechinterp.models.weights import Norm, Weights
from mechinterp.sites import Site, resolve

LogitsAt = Literal["all", "last"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}
_ENTRANCES = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True)
class ResidualStart:
    """Begin a pass at ``site`` (``resid_pre``, ``resid_mid`` or ``resid_post`` of a layer) with this residual stream.

    With a ``prefix``, ``value`` holds only the positions after it, and attention reads the prefix's keys and values:
    what clean and corrupted prompts share is then never computed again.
    """

    site: Site
    value: Float[Tensor, "batch pos d_model"]
    prefix: Prefix | None = None

    def __post_init__(self):
        if self.site.name not in _ENTRANCES or self.site.layer is None:
            raise ModelError(f"a pass can start at {', '.join(_ENTRANCES)} of a layer, not at {str(self.site)!r}.")


@dataclass(frozen=True)
class Transformer:
    """A transformer: its weights, the tokenizer it was trained with, and ``run``."""

    weights: Weights
    tokenizer: Tokenizer | None = None

    @property
    def config(self) -> ModelConfig:
        return self.weights.config

    @property
    def device(self) -> torch.device:
        return self.weights.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.W_E.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Transformer":
        return replace(self, weights=self.weights.to(device, dtype))

    def run(
        self,
        tokens: Int[Tensor, "batch pos"] | None,
        *,
        record: Iterable[Site | str] = (),
        patch: Mapping[Site | str, Patch] | None = None,
        start: ResidualStart | None = None,
        logits_at: LogitsAt | Int[Tensor, "batch"] = "all",
        logits_of: Int[Tensor, "batch candidate"] | None = None,
    ) -> tuple[Float[Tensor, "*batch_pos d_vocab"], ActivationCache]:
        """One forward pass: the logits, and the activations at the sites in ``record``.

        ``record`` takes sites, their names (``"pattern.3"``), TransformerLens' hook names, or a bare name such as
        ``"z"`` for all layers. ``patch`` maps sites to ``(value, cache so far) -> new value``. ``start`` resumes at a
        layer (``tokens`` may be None). ``logits_at``: ``"all"`` gives ``[batch, pos, d_vocab]``; ``"last"``, or one
        position a prompt (counted from the prompt's beginning, prefix included), gives ``[batch, d_vocab]`` and spares
        the other positions' unembedding and, where nobody is looking, their last layer; the sites ``ln_final_*`` and
        ``logits`` then have this one position. ``logits_of`` unembeds these tokens alone: ``[batch, candidate]``.

        Raises ``UnknownSite`` for a site that the model lacks and ``ModelError`` for one that this pass never reaches.
        Differentiable in everything that requires grad. Cost: one forward of the layers from ``start`` on.
        """
        prefix = start.prefix if start else None
        trace = Trace(self.weights, record, patch, first=prefix.length if prefix else 0)
        if start is not None:
            resolve(self.config, [start.site])
            trace.refuse_before(start.site)
        resid = self._embed(tokens, trace) if start is None else start.value.to(self.dtype)
        ends = _ends(logits_at, resid, prefix)
        first, entrance = (0, "resid_pre") if start is None else (start.site.layer or 0, start.site.name)
        last = self.config.n_layers - 1
        narrow = ends is not None and not trace.looks_past_keys(last)
        for layer in range(first, self.config.n_layers):
            only = ends if narrow and layer == last else None
            resid = self._layer(layer, resid, entrance, trace, prefix, only)
            entrance = "resid_pre"
        if narrow:
            ends = None
        resid = resid if ends is None else _at(resid, ends)
        everywhere = isinstance(logits_at, str) and logits_at == "all"
        if logits_of is not None:
            return self._unembed_some(resid, logits_of, everywhere, trace), trace.cache
        logits = self._unembed(resid, trace)
        return (logits if everywhere else logits.squeeze(1)), trace.cache

    def _embed(self, tokens: Tensor | None, trace: Trace) -> Float[Tensor, "batch pos d_model"]:
        if tokens is None:
            raise ModelError("a pass needs tokens, or a `start` to resume from.")
        if tokens.shape[1] > self.config.n_ctx:
            raise ModelError(
                f"{self.config.name} reads at most {self.config.n_ctx} positions; these prompts have {tokens.shape[1]}. "
                "Shorten them, or use a model with a longer context."
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < (known := self.config.d_vocab):
            raise ModelError(
                f"{self.config.name} knows {known} tokens, 0 to {known - 1}; these run from {int(tokens.min())} to "
                f"{int(tokens.max())}. Were they made with another model's tokenizer?"
            )
        embed = trace("embed", None, F.embedding(tokens, self.weights.W_E))
        positions = self.weights.W_pos[: tokens.shape[1]].expand(tokens.shape[0], -1, -1)
        return embed + trace("pos_embed", None, positions)

    def _layer(self, layer, resid, entrance, trace: Trace, prefix: Prefix | None, only: Tensor | None):
        """One block, entered at ``entrance``; with ``only``, what follows keys and values is done at one position a prompt."""
        if only is not None and entrance != "resid_pre":
            resid = _at(resid, only)
        stream = resid
        if entrance == "resid_pre":
            resid = trace("resid_pre", layer, resid)
            attn_out = self._attention(layer, resid, trace, prefix, only)
            stream = resid if only is None else _at(resid, only)
            resid = stream + attn_out
            if self.config.has_mlp and not self.config.parallel:
                entrance = "resid_mid"
        if entrance == "resid_mid":
            stream = resid = trace("resid_mid", layer, resid)
        if entrance != "resid_post" and self.config.has_mlp:
            resid = resid + self._mlp(layer, stream, trace)
        return trace("resid_post", layer, resid)

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that the first layer reads: token and position embedding, the writer ``input``."""
        return self._embed(tokens, Trace(self.weights))

    def project(self, layer: int, stream: Float[Tensor, "batch pos d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values that a layer's heads make of a residual stream, each ``[batch pos head d_head]``."""
        q, k, v = self._ports(layer, stream, Trace(self.weights), None)
        return q, k, v

    def project_some(
        self, layer: int, ports: Int[Tensor, "pair"], streams: Float[Tensor, "pair row d_model"]
    ) -> Float[Tensor, "pair row d_head"]:
        """What single ports make of streams of their own: head ``port % n_heads``'s query, key or value, by thirds."""
        read = self._normalize(streams, self.weights.blocks[layer].ln1, None, layer, Trace(self.weights))
        W, b = (x.flatten(0, 1)[ports] for x in (self.weights.projection(layer), self.weights.projection_bias(layer)))
        return torch.baddbmm(b.unsqueeze(1), read, W)

    def mix(
        self,
        layer: int,
        q: Float[Tensor, "batch query_pos head_index d_head"],
        k: Float[Tensor, "batch key_pos head_index d_head"],
        v: Float[Tensor, "batch key_pos head_index d_head"],
        prefix: Prefix | None = None,
    ) -> Float[Tensor, "batch query_pos head_index d_head"]:
        """What a layer's heads gather, ``z``, from given queries, keys and values. Heads do not see each other here."""
        return self._mix(layer, q, k, v, Trace(self.weights), prefix, None)

    def feed_forward(self, layer: int, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What a layer's MLP writes on reading ``stream``."""
        return self._mlp(layer, stream, Trace(self.weights))

    def _attention(self, layer, resid, trace: Trace, prefix, only) -> Float[Tensor, "batch pos d_model"]:
        block = self.weights.blocks[layer]
        q, k, v = (trace(p, layer, x) for p, x in zip("qkv", self._ports(layer, resid, trace, only), strict=True))
        z = trace("z", layer, self._mix(layer, q, k, v, trace, prefix, only))
        if trace.touches("result", layer):
            result = torch.einsum("bphd,hdm->bphm", z, self.weights.W_O(layer))
            attn_out = trace("result", layer, result).sum(2) + block.b_O
        else:
            attn_out = _affine(z.flatten(2), block.W_O, block.b_O)
        return trace("attn_out", layer, attn_out)

    def _mix(self, layer, q, k, v, trace: Trace, prefix, only):
        if prefix is not None:
            if not self.config.causal:
                raise ModelError(
                    f"{self.config.name} is not causal, so what stands before a change is changed by it too: a pass cannot "
                    "take keys and values of a prefix from another pass. Start without a prefix."
                )
            k, v = prefix.extend(layer, k, v)
        return attend(q, k, v, self.config.scale, self.config.causal, only, prefix, trace, layer)

    def _ports(self, layer, resid, trace: Trace, only):
        """Queries, keys and values. A port whose ``*_input`` is touched reads a residual stream of its own per head."""
        block, (H, D) = self.weights.blocks[layer], (self.config.n_heads, self.config.d_head)
        split = [trace.touches(f"{port}_input", layer) for port in "qkv"]
        if not all(split) or trace.touches("ln1_scale", layer) or trace.touches("ln1_normalized", layer):
            x = self._normalize(resid, block.ln1, "ln1", layer, trace)
        if not any(split) and only is None:
            return _affine(x, block.W_QKV, block.b_QKV).unflatten(-1, (3, H, D)).unbind(2)
        ports = []
        for i, port in enumerate("qkv"):
            if split[i]:
                streams = trace(f"{port}_input", layer, resid.unsqueeze(2).expand(-1, -1, H, -1))
                own = self._normalize(streams, block.ln1, None, layer, trace)
                W, b = self.weights.projection(layer)[i], self.weights.projection_bias(layer)[i]
                ports.append(torch.einsum("bphm,hmd->bphd", own, W) + b)
            else:
                read = _at(x, only) if only is not None and port == "q" else x
                columns = slice(i * H * D, (i + 1) * H * D)
                ports.append(_affine(read, block.W_QKV[:, columns], block.b_QKV[columns]).unflatten(-1, (H, D)))
        return ports

    def _mlp(self, layer, stream, trace: Trace) -> Float[Tensor, "batch pos d_model"]:
        block = self.weights.blocks[layer]
        if trace.touches("mlp_in", layer):
            # A view of its own, so that its gradient is this reader's alone and not the whole stream's.
            stream = trace("mlp_in", layer, stream.view_as(stream))
        x = self._normalize(stream, block.ln2, "ln2", layer, trace)
        pre = trace("mlp_pre", layer, _affine(x, block.W_in, block.b_in))
        post = trace("mlp_post", layer, ACTIVATIONS[self.config.activation](pre))
        return trace("mlp_out", layer, _affine(post, block.W_out, block.b_out))

    def _unembed(self, resid, trace: Trace) -> Float[Tensor, "batch pos d_vocab"]:
        x = self._normalize(resid, self.weights.ln_final, "ln_final", None, trace)
        return trace("logits", None, _affine(x, self.weights.W_U, self.weights.b_U))

    def _unembed_some(self, resid, tokens, everywhere: bool, trace: Trace) -> Float[Tensor, "batch candidate"]:
        if everywhere or trace.touches("logits", None):
            raise ModelError(
                "logits_of needs one position a prompt (logits_at='last' or a tensor) and no use of the site 'logits'."
            )
        x = self._normalize(resid, self.weights.ln_final, "ln_final", None, trace)
        columns, where = tokens.unique(return_inverse=True)  # stacked variants ask for the same few tokens again and again
        logits = _affine(x, self.weights.W_U[:, columns], None if self.weights.b_U is None else self.weights.b_U[columns])
        return logits.squeeze(1).gather(1, where)

    def _normalize(self, x, norm: Norm | None, name: str | None, layer, trace: Trace):
        """LayerNorm. ``name`` is None for a port's own stream, which shares no site with the others."""
        if norm is None:
            return x
        if name is None or not (trace.touches(f"{name}_scale", layer) or trace.touches(f"{name}_normalized", layer)):
            return F.layer_norm(x, x.shape[-1:], norm.w, norm.b, self.config.norm_eps)
        centred = x - x.mean(-1, keepdim=True)
        scale = trace(f"{name}_scale", layer, (centred.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt())
        normalized = trace(f"{name}_normalized", layer, centred / scale)
        gained = normalized if norm.w is None else normalized * norm.w
        return gained if norm.b is None else gained + norm.b


def _affine(x: Float[Tensor, "batch pos d_in"], W: Float[Tensor, "d_in d_out"], b: Tensor | None):
    flat = x.flatten(0, 1)
    return (flat @ W if b is None else torch.addmm(b, flat, W)).unflatten(0, x.shape[:2])


def _ends(logits_at, resid: Tensor, prefix: Prefix | None) -> Int[Tensor, "batch"] | None:
    """The position of each prompt at which logits are wanted, as an index into ``resid``; None for all."""
    if isinstance(logits_at, Tensor):
        offset = prefix.length if prefix else 0
        if not offset <= int(logits_at.min()) <= int(logits_at.max()) < offset + resid.shape[1]:
            raise ModelError(
                f"logits are wanted at positions {int(logits_at.min())}..{int(logits_at.max())}; "
                f"this pass computes {offset} to {offset + resid.shape[1] - 1}."
            )
        return logits_at.to(resid.device) - offset
    if logits_at == "last":
        return torch.full((resid.shape[0],), resid.shape[1] - 1, device=resid.device)
    if logits_at == "all":
        return None
    raise ModelError(f"logits_at takes 'all', 'last' or one position a prompt, not {logits_at!r}.")


def _at(x: Float[Tensor, "batch pos d"], ends: Int[Tensor, "batch"]) -> Float[Tensor, "batch 1 d"]:
    return x[torch.arange(len(x), device=x.device), ends].unsqueeze(1)
