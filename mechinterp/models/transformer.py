"""The engine: one lean forward pass in which every activation can be read and written.

The pass is the one you know. Tokens become the residual stream; each layer's heads and MLP read it through a
normalisation and add to it; the last state is unembedded. Around each activation stands ``trace(name, layer, value)``,
which hands the value to a patch if there is one, keeps it if it is to be recorded, and otherwise costs a dictionary
lookup. What nobody asks for (attention patterns, per-head inputs, per-head results) is never made.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import ModelError
from mechinterp.models.attention import Heads, Prefix, attend, soft_cap
from mechinterp.models.config import ModelConfig
from mechinterp.models.ends import LogitsAt, ResidualStart, at_ends, ends_of
from mechinterp.models.normalization import centre, gained, normalize, scale_of
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.trace import Patch, Trace
from mechinterp.models.weights import Norm, Weights
from mechinterp.sites import Site, resolve

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


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
        ends = ends_of(logits_at, resid, prefix)
        first, entrance = (0, "resid_pre") if start is None else (start.site.layer or 0, start.site.name)
        last = self.config.n_layers - 1
        narrow = ends is not None and not trace.looks_past_keys(last)
        for layer in range(first, self.config.n_layers):
            only = ends if narrow and layer == last else None
            resid = self._layer(layer, resid, entrance, trace, prefix, only)
            entrance = "resid_pre"
        if narrow:
            ends = None
        resid = resid if ends is None else at_ends(resid, ends)
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
        embed = F.embedding(tokens, self.weights.W_E)
        if (scale := self.config.embed_scale) is not None:
            embed = embed * torch.tensor(scale, dtype=embed.dtype)  # rounded first in half precision, as it was trained
        embed = trace("embed", None, embed)
        if self.weights.W_pos is None:
            return embed
        positions = self.weights.W_pos[: tokens.shape[1]].expand(tokens.shape[0], -1, -1)
        return embed + trace("pos_embed", None, positions)

    def _layer(self, layer, resid, entrance, trace: Trace, prefix: Prefix | None, only: Tensor | None):
        """One block, entered at ``entrance``; with ``only``, what follows keys and values is done at one position a prompt."""
        if only is not None and entrance != "resid_pre":
            resid = at_ends(resid, only)
        stream = resid
        if entrance == "resid_pre":
            resid = trace("resid_pre", layer, resid)
            attn_out = self._attention(layer, resid, trace, prefix, only)
            stream = resid if only is None else at_ends(resid, only)
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
        """What single ports make of streams of their own; ports as in ``weights.ports``: queries, then keys, then values."""
        read = normalize(streams, self.weights.blocks[layer].ln1, self.config)
        return torch.baddbmm(self.weights.port_biases(layer)[ports].unsqueeze(1), read, self.weights.ports(layer)[ports])

    def mix(
        self,
        layer: int,
        q: Float[Tensor, "batch query_pos head_index d_head"],
        k: Float[Tensor, "batch key_pos group d_head"],
        v: Float[Tensor, "batch key_pos group d_head"],
        prefix: Prefix | None = None,
    ) -> Float[Tensor, "batch query_pos head_index d_head"]:
        """What a layer's heads gather, ``z``, from queries, keys and values as ``project`` gives them.

        Heads do not see each other here, but for a normalisation over all of a layer's queries (``qk_norm="all"``).
        """
        return self._mix(layer, q, k, v, Trace(self.weights), prefix, None)

    def written(
        self, layer: int, z: Float[Tensor, "*batch pos head_index d_head"]
    ) -> Float[Tensor, "*batch pos head_index d_head"]:
        """``z`` as it is written, so that ``written(z) W_O`` are the heads' writes (``weights.W_O``).

        It is ``z`` itself, or ``z`` divided by the scale of the layer's normalisation after attention: the scale of what
        *all* heads of ``z`` gathered together.
        """
        if not self.config.has_norms_after:
            return z
        block = self.weights.blocks[layer]
        return z / scale_of(z.flatten(-2) @ block.W_O, self.config).unsqueeze(-1)

    def feed_forward(self, layer: int, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What a layer's MLP writes on reading ``stream``."""
        return self._mlp(layer, stream, Trace(self.weights))

    def _attention(self, layer, resid, trace: Trace, prefix, only) -> Float[Tensor, "batch pos d_model"]:
        block = self.weights.blocks[layer]
        q, k, v = (trace(p, layer, x) for p, x in zip("qkv", self._ports(layer, resid, trace, only), strict=True))
        z = trace("z", layer, self._mix(layer, q, k, v, trace, prefix, only))
        if trace.touches("result", layer):
            raw = torch.einsum("bphd,hdm->bphm", z, block.W_O.unflatten(0, z.shape[2:]))
            out = trace("result", layer, raw).sum(2) + block.b_O
        else:
            out = _affine(z.flatten(2), block.W_O, block.b_O)
        if block.ln1_post is not None and trace.touches("z_written", layer):
            scale = trace("ln1_post_scale", layer, scale_of(out, self.config))
            out = _affine(trace("z_written", layer, z / scale.unsqueeze(-1)).flatten(2), block.W_O, None)
            out = gained(trace("ln1_post_normalized", layer, out), block.ln1_post.w, None)
        else:
            out = self._normalize(out, block.ln1_post, "ln1_post", layer, trace)
        return trace("attn_out", layer, out)

    def _mix(self, layer, q, k, v, trace: Trace, prefix, only):
        first = 0 if prefix is None else prefix.length
        queries = torch.arange(first, first + q.shape[1], device=q.device)[None] if only is None else only[:, None] + first
        if prefix is not None:
            if not self.config.causal:
                raise ModelError(
                    f"{self.config.name} is not causal, so what stands before a change is changed by it too: a pass cannot "
                    "take keys and values of a prefix from another pass. Start without a prefix."
                )
            k, v = prefix.extend(layer, k, v)
        heads = Heads.of(self.weights, layer, queries)
        return attend(q, k, v, heads, trace, is_triangle=only is None and prefix is None)

    def _ports(self, layer, resid, trace: Trace, only):
        """Queries, keys and values. A port whose ``*_input`` is touched reads a residual stream of its own per head."""
        block, config = self.weights.blocks[layer], self.config
        D, sizes = config.d_head, (config.n_heads, config.n_groups, config.n_groups)
        split = [trace.touches(f"{port}_input", layer) for port in "qkv"]
        if not all(split) or trace.touches("ln1_scale", layer) or trace.touches("ln1_normalized", layer):
            x = self._normalize(resid, block.ln1, "ln1", layer, trace)
        if not any(split) and only is None:
            return _affine(x, block.W_QKV, block.b_QKV).unflatten(-1, (-1, D)).split(sizes, dim=2)
        ports, first = [], 0
        for is_split, port, n in zip(split, "qkv", sizes, strict=True):
            if is_split:
                streams = trace(f"{port}_input", layer, resid.unsqueeze(2).expand(-1, -1, n, -1))
                W, b = (x[first : first + n] for x in (self.weights.ports(layer), self.weights.port_biases(layer)))
                ports.append(torch.einsum("bphm,hmd->bphd", normalize(streams, block.ln1, config), W) + b)
            else:
                read = at_ends(x, only) if only is not None and port == "q" else x
                columns = slice(first * D, (first + n) * D)
                ports.append(_affine(read, block.W_QKV[:, columns], block.b_QKV[columns]).unflatten(-1, (n, D)))
            first += n
        return ports

    def _mlp(self, layer, stream, trace: Trace) -> Float[Tensor, "batch pos d_model"]:
        block = self.weights.blocks[layer]
        if trace.touches("mlp_in", layer):
            # A view of its own, so that its gradient is this reader's alone and not the whole stream's.
            stream = trace("mlp_in", layer, stream.view_as(stream))
        x = self._normalize(stream, block.ln2, "ln2", layer, trace)
        activate = ACTIVATIONS[self.config.activation]
        if self.config.gated:
            pre = trace("mlp_pre", layer, _affine(x, block.W_gate, block.b_gate))
            post = activate(pre) * trace("mlp_pre_linear", layer, _affine(x, block.W_in, block.b_in))
        else:
            post = activate(trace("mlp_pre", layer, _affine(x, block.W_in, block.b_in)))
        out = _affine(trace("mlp_post", layer, post), block.W_out, block.b_out)
        return trace("mlp_out", layer, self._normalize(out, block.ln2_post, "ln2_post", layer, trace))

    def _unembed(self, resid, trace: Trace) -> Float[Tensor, "batch pos d_vocab"]:
        x = self._normalize(resid, self.weights.ln_final, "ln_final", None, trace)
        return trace("logits", None, self.capped(_affine(x, self.weights.W_U, self.weights.b_U)))

    def capped(self, logits: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Logits as the model gives them: soft-capped where it does so."""
        return logits if (cap := self.config.logit_soft_cap) is None else soft_cap(logits, cap)

    def _unembed_some(self, resid, tokens, everywhere: bool, trace: Trace) -> Float[Tensor, "batch candidate"]:
        if everywhere or trace.touches("logits", None):
            raise ModelError(
                "logits_of needs one position a prompt (logits_at='last' or a tensor) and no use of the site 'logits'."
            )
        x = self._normalize(resid, self.weights.ln_final, "ln_final", None, trace)
        columns, where = tokens.unique(return_inverse=True)  # stacked variants ask for the same few tokens again and again
        logits = _affine(x, self.weights.W_U[:, columns], None if self.weights.b_U is None else self.weights.b_U[columns])
        return self.capped(logits.squeeze(1).gather(1, where))

    def _normalize(self, x, norm: Norm | None, name: str, layer, trace: Trace):
        if norm is None or not (trace.touches(f"{name}_scale", layer) or trace.touches(f"{name}_normalized", layer)):
            return normalize(x, norm, self.config)
        scale = trace(f"{name}_scale", layer, scale_of(x, self.config))
        return gained(trace(f"{name}_normalized", layer, centre(x, self.config) / scale), norm.w, norm.b)


def _affine(x: Float[Tensor, "batch pos d_in"], W: Float[Tensor, "d_in d_out"], b: Tensor | None):
    flat = x.flatten(0, 1)
    return (flat @ W if b is None else torch.addmm(b, flat, W)).unflatten(0, x.shape[:2])
