"""The weights of a transformer as plain tensors, stored the way that the forward pass multiplies by them.

Queries, keys and values of all heads are one matrix, so that a layer's projection is one product; the papers' per-head
matrices are views of it (``weights.W_Q(layer)``) and cost nothing. On disk and in ``named()`` the tensors bear
TransformerLens' state-dict names and shapes (heads of keys and values that are shared: ``_W_K``, once for each group).
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import ModelError
from mechinterp.models.config import ModelConfig


@dataclass(frozen=True)
class Norm:
    """Gain and bias of a normalisation; ``None`` where there are none, or they are folded into the weights that follow."""

    w: Float[Tensor, "d"] | None
    b: Float[Tensor, "d"] | None


@dataclass(frozen=True)
class Block:
    """One layer. ``qkv`` is all heads' queries, all groups' keys, all groups' values; ``z`` is head × d_head.

    ``ln1`` and ``ln2`` normalise what heads and MLP read, ``ln1_post`` and ``ln2_post`` what they write.
    """

    ln1: Norm | None
    W_QKV: Float[Tensor, "d_model qkv"]
    b_QKV: Float[Tensor, "qkv"]
    W_O: Float[Tensor, "z d_model"]
    b_O: Float[Tensor, "d_model"]
    ln2: Norm | None
    W_in: Float[Tensor, "d_model d_mlp"] | None
    b_in: Float[Tensor, "d_mlp"] | None
    W_out: Float[Tensor, "d_mlp d_model"] | None
    b_out: Float[Tensor, "d_model"] | None
    W_gate: Float[Tensor, "d_model d_mlp"] | None = None
    b_gate: Float[Tensor, "d_mlp"] | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    ln1_post: Norm | None = None
    ln2_post: Norm | None = None


@dataclass(frozen=True)
class Weights:
    """``W_pos`` is None without learned positions. A tied ``W_U`` is a view of ``W_E``, and stays one through ``to``."""

    config: ModelConfig
    W_E: Float[Tensor, "d_vocab d_model"]
    W_pos: Float[Tensor, "n_ctx d_model"] | None
    blocks: tuple[Block, ...]
    ln_final: Norm | None
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, "d_vocab"] | None

    def W_Q(self, layer: int) -> Float[Tensor, "head_index d_model d_head"]:
        return self.ports(layer)[: self.config.n_heads]

    def W_K(self, layer: int) -> Float[Tensor, "group d_model d_head"]:
        return self.ports(layer)[self.config.n_heads : -self.config.n_groups]

    def W_V(self, layer: int) -> Float[Tensor, "group d_model d_head"]:
        return self.ports(layer)[-self.config.n_groups :]

    def W_O(self, layer: int) -> Float[Tensor, "head_index d_head d_model"]:
        """What each head writes for its ``z``; under a normalisation after attention, for ``z_written``: with its gain."""
        block = self.blocks[layer]
        gain = None if block.ln1_post is None else block.ln1_post.w
        W_O = block.W_O if gain is None else block.W_O * gain
        return W_O.unflatten(0, (self.config.n_heads, self.config.d_head))

    def ports(self, layer: int) -> Float[Tensor, "port d_model d_head"]:
        """W_Q of every head, then W_K and W_V of every group, as one view."""
        return self.blocks[layer].W_QKV.unflatten(1, (-1, self.config.d_head)).transpose(0, 1)

    def port_biases(self, layer: int) -> Float[Tensor, "port d_head"]:
        return self.blocks[layer].b_QKV.unflatten(0, (-1, self.config.d_head))

    def port(self, layer: int, head: int, name: str) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, "d_head"]]:
        """Matrix and bias by which a query head makes its query, or the key or value that it shares with its group."""
        config = self.config
        first = {"q": 0, "k": config.n_heads, "v": config.n_heads + config.n_groups}[name]
        index = first + (head if name == "q" else config.group_of(head))
        return self.ports(layer)[index], self.port_biases(layer)[index]

    @property
    def is_tied(self) -> bool:
        """Whether embedding and unembedding are one tensor."""
        return self.W_U.data_ptr() == self.W_E.data_ptr() and self.W_U.T.stride() == self.W_E.stride()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Weights":
        moved = _map(self, lambda tensor: tensor.to(device=device, dtype=dtype))
        return replace(moved, W_U=moved.W_E.T) if self.is_tied else moved

    def parameters(self) -> list[Tensor]:
        """The stored tensors, for an optimizer or a count."""
        found: list[Tensor] = []
        _map(self, lambda tensor: found.append(tensor) or tensor)
        return [tensor for tensor in found if not (self.is_tied and tensor is self.W_U)]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of configuration and weights, equal for equal models. Costs 0.7 s per GB, once."""
        digest = hashlib.sha256(self.config.to_json().encode())
        for name, tensor in sorted(self.named().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def named(self) -> dict[str, Tensor]:
        """TransformerLens' state-dict names and shapes; views where the layout allows. Without ``unembed.W_U`` if tied."""
        named = {"embed.W_E": self.W_E, "pos_embed.W_pos": self.W_pos, "unembed.b_U": self.b_U}
        named |= {"unembed.W_U": None if self.is_tied else self.W_U} | _named_norm("ln_final", self.ln_final)
        heads, mark = [self.config.n_heads, self.config.n_groups, self.config.n_groups], "_" if self.config.is_grouped else ""
        for layer, block in enumerate(self.blocks):
            prefix = f"blocks.{layer}."
            parts = zip(self.ports(layer).split(heads), self.port_biases(layer).split(heads), strict=True)
            for (W, b), (shared, port) in zip(parts, (("", "Q"), (mark, "K"), (mark, "V")), strict=True):
                named |= {f"{prefix}attn.{shared}W_{port}": W, f"{prefix}attn.{shared}b_{port}": b}
            W_O = block.W_O.unflatten(0, (self.config.n_heads, self.config.d_head))
            named |= {f"{prefix}attn.W_O": W_O, f"{prefix}attn.b_O": block.b_O}
            named |= {f"{prefix}mlp.{name}": getattr(block, name) for name in _MLP}
            for name in _NORMS:
                named |= _named_norm(f"{prefix}{_within(name)}", getattr(block, name))
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_named(
        cls,
        config: ModelConfig,
        named: Mapping[str, Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Weights":
        """Build from TransformerLens' names, checking every shape. Missing biases are zeros; other gaps are errors.

        Tensors are asked for one at a time, moved and converted as they come, so that ``named`` may read them from disk
        then and no checkpoint is held twice. No ``unembed.W_U`` means that it is the embedding. Without ``dtype`` all
        are what the embedding is: some checkpoints keep their norms in another.
        """
        W_E = _Reader(config, named, device, dtype)("embed.W_E", (config.d_vocab, config.d_model))
        read = _Reader(config, named, device, W_E.dtype)
        W_U = read("unembed.W_U", (config.d_model, config.d_vocab)) if "unembed.W_U" in named else W_E.T
        return cls(
            config,
            W_E=W_E,
            W_pos=read("pos_embed.W_pos", (config.n_ctx, config.d_model)) if config.learned_positions else None,
            blocks=tuple(read.block(layer, like=W_E) for layer in range(config.n_layers)),
            ln_final=read.norm("ln_final") if config.normalization != "none" else None,
            W_U=W_U,
            b_U=read("unembed.b_U", (config.d_vocab,)) if "unembed.b_U" in named else None,
        )


_MLP = ("W_in", "b_in", "W_gate", "b_gate", "W_out", "b_out")
_NORMS = ("ln1", "ln2", "ln1_post", "ln2_post", "q_norm", "k_norm")


def _within(norm: str) -> str:
    """Where in a block's names a normalisation stands."""
    return f"attn.{norm}" if norm in ("q_norm", "k_norm") else norm


class _Reader:
    """Takes tensors out of a state dict by name, one at a time, and says what is missing or misshapen."""

    def __init__(self, config: ModelConfig, named: Mapping[str, Tensor], device, dtype: torch.dtype | None):
        self.config, self.named, self.device, self.dtype = config, named, device, dtype

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._as_stored(name, shape).to(device=self.device, dtype=self.dtype)

    def _as_stored(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.named:
            raise ModelError(f"{self.config.name}: the checkpoint lacks {name!r} of shape {shape}.")
        tensor = self.named[name].detach()
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{self.config.name}: {name!r} has shape {tuple(tensor.shape)} and should have {shape} by its configuration. "
                "The two contradict each other; get both from one place."
            )
        return tensor

    def block(self, layer: int, like: Tensor) -> Block:
        config, at = self.config, f"blocks.{layer}."
        H, G, D, M, F = config.n_heads, config.n_groups, config.d_head, config.d_model, config.d_mlp
        mark = "_" if config.is_grouped else ""
        ports = [("W_Q", "b_Q", H), (f"{mark}W_K", f"{mark}b_K", G), (f"{mark}W_V", f"{mark}b_V", G)]
        # Each port is written into its place as it is read, so that queries, keys and values are never held twice.
        W = like.new_empty(M, sum(n for _, _, n in ports) * D)
        for part, (name, _, n) in zip(W.split([n * D for _, _, n in ports], dim=1), ports, strict=True):
            part.unflatten(1, (n, D)).copy_(self._as_stored(f"{at}attn.{name}", (n, M, D)).transpose(0, 1))
        b = torch.cat([self._bias(f"{at}attn.{b}", (n, D), like).flatten() for _, b, n in ports])
        self._refuse_biases_under_norms(at)
        before, after = config.has_norms_before, config.has_norms_after
        gate = bool(F and config.gated)
        q_width, k_width = (H * D, G * D) if config.qk_norm == "all" else (D, D)
        return Block(
            ln1=self._norm_if(before, f"{at}ln1"),
            W_QKV=W,
            b_QKV=b,
            W_O=self(f"{at}attn.W_O", (H, D, M)).reshape(H * D, M),
            b_O=self._bias(f"{at}attn.b_O", (M,), like),
            ln2=self._norm_if(before and bool(F), f"{at}ln2"),
            W_in=self(f"{at}mlp.W_in", (M, F)) if F else None,
            b_in=self._bias(f"{at}mlp.b_in", (F,), like) if F else None,
            W_out=self(f"{at}mlp.W_out", (F, M)) if F else None,
            b_out=self._bias(f"{at}mlp.b_out", (M,), like) if F else None,
            W_gate=self(f"{at}mlp.W_gate", (M, F or 0)) if gate else None,
            b_gate=self._bias(f"{at}mlp.b_gate", (F or 0,), like) if gate else None,
            q_norm=self._norm_if(config.qk_norm != "none", f"{at}attn.q_norm", q_width),
            k_norm=self._norm_if(config.qk_norm != "none", f"{at}attn.k_norm", k_width),
            ln1_post=self._norm_if(after, f"{at}ln1_post"),
            ln2_post=self._norm_if(after and bool(F), f"{at}ln2_post"),
        )

    def _refuse_biases_under_norms(self, at: str) -> None:
        """Biases that would break what the engine promises: heads whose writes sum, and RMSNorms without a bias."""
        config = self.config
        if config.has_norms_after and (name := f"{at}attn.b_O") in self.named and bool(self.named[name].any()):
            raise ModelError(
                f"{config.name}: {name!r} is not zero, and what heads write is normalised together with it: then the heads' "
                "writes do not sum to what the layer writes. The engine does not run such a model."
            )
        for name in (f"{at}ln1_post.b", f"{at}attn.q_norm.b", f"{at}attn.k_norm.b"):
            if name in self.named and bool(self.named[name].any()):
                raise ModelError(
                    f"{config.name}: {name!r} is not zero. What heads write, their queries and their keys are normalised by "
                    "RMSNorm here, which has no bias. The engine does not run such a model."
                )

    def norm(self, name: str, width: int | None = None) -> Norm:
        """A checkpoint without gain has it folded away (TransformerLens' "LNPre"), or never had one."""
        shape = (width or self.config.d_model,)
        w, b = (self(f"{name}.{part}", shape) if f"{name}.{part}" in self.named else None for part in "wb")
        return Norm(w, b)

    def _norm_if(self, has: bool, name: str, width: int | None = None) -> Norm | None:
        return self.norm(name, width) if has else None

    def _bias(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return self(name, shape) if name in self.named else like.new_zeros(shape)


def _named_norm(name: str, norm: Norm | None) -> dict[str, Tensor | None]:
    return {} if norm is None else {f"{name}.w": norm.w, f"{name}.b": norm.b}


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type | ModelConfig):
        return replace(value, **{f.name: _map(getattr(value, f.name), change) for f in fields(value)})
    return value
