"""The weights of a transformer as plain tensors, stored the way that the forward pass multiplies by them.

Queries, keys and values of all heads are one matrix, so that a layer's projection is one product; the papers' per-head
matrices are views of it (``weights.W_Q(layer)``) and cost nothing. On disk and in ``named()`` the tensors bear
TransformerLens' state-dict names and shapes.
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
    """Gain and bias of a normalisation; ``None`` where they are folded into the weights that follow."""

    w: Float[Tensor, "d_model"] | None
    b: Float[Tensor, "d_model"] | None


@dataclass(frozen=True)
class Block:
    """One layer. ``qkv`` is the axis port × head × d_head, in this order; ``z`` is head × d_head."""

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


@dataclass(frozen=True)
class Weights:
    config: ModelConfig
    W_E: Float[Tensor, "d_vocab d_model"]
    W_pos: Float[Tensor, "n_ctx d_model"]
    blocks: tuple[Block, ...]
    ln_final: Norm | None
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, "d_vocab"] | None

    def W_Q(self, layer: int) -> Float[Tensor, "head_index d_model d_head"]:
        return self.projection(layer)[0]

    def W_K(self, layer: int) -> Float[Tensor, "head_index d_model d_head"]:
        return self.projection(layer)[1]

    def W_V(self, layer: int) -> Float[Tensor, "head_index d_model d_head"]:
        return self.projection(layer)[2]

    def W_O(self, layer: int) -> Float[Tensor, "head_index d_head d_model"]:
        return self.blocks[layer].W_O.unflatten(0, (self.config.n_heads, self.config.d_head))

    def projection(self, layer: int) -> Float[Tensor, "port head_index d_model d_head"]:
        """W_Q, W_K and W_V of a layer as one view."""
        shape = (3, self.config.n_heads, self.config.d_head)
        return self.blocks[layer].W_QKV.unflatten(1, shape).permute(1, 2, 0, 3)

    def projection_bias(self, layer: int) -> Float[Tensor, "port head_index d_head"]:
        return self.blocks[layer].b_QKV.unflatten(0, (3, self.config.n_heads, self.config.d_head))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Weights":
        return _map(self, lambda tensor: tensor.to(device=device, dtype=dtype))

    def parameters(self) -> list[Tensor]:
        """The stored tensors, for an optimizer or a count."""
        found: list[Tensor] = []
        _map(self, lambda tensor: found.append(tensor) or tensor)
        return found

    @cached_property
    def fingerprint(self) -> str:
        """A hash of configuration and weights, equal for equal models. Costs 0.7 s per GB, once."""
        digest = hashlib.sha256(self.config.to_json().encode())
        for name, tensor in sorted(self.named().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def named(self) -> dict[str, Tensor]:
        """TransformerLens' state-dict names and shapes; views where the layout allows."""
        named = {"embed.W_E": self.W_E, "pos_embed.W_pos": self.W_pos, "unembed.W_U": self.W_U, "unembed.b_U": self.b_U}
        named |= _named_norm("ln_final", self.ln_final)
        for layer, block in enumerate(self.blocks):
            prefix = f"blocks.{layer}."
            for port, W, b in zip("QKV", self.projection(layer), self.projection_bias(layer), strict=True):
                named |= {f"{prefix}attn.W_{port}": W, f"{prefix}attn.b_{port}": b}
            named |= {f"{prefix}attn.W_O": self.W_O(layer), f"{prefix}attn.b_O": block.b_O}
            named |= {f"{prefix}mlp.{name}": getattr(block, name) for name in ("W_in", "b_in", "W_out", "b_out")}
            named |= _named_norm(f"{prefix}ln1", block.ln1) | _named_norm(f"{prefix}ln2", block.ln2)
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_named(cls, config: ModelConfig, named: Mapping[str, Tensor]) -> "Weights":
        """Build from TransformerLens' names, checking every shape. Missing biases are zeros; other gaps are errors."""
        read = _Reader(config, named)
        H, D, M, F = config.n_heads, config.d_head, config.d_model, config.d_mlp
        blocks = []
        for layer in range(config.n_layers):
            prefix = f"blocks.{layer}."
            W = [read(f"{prefix}attn.W_{port}", (H, M, D)) for port in "QKV"]
            b = [read(f"{prefix}attn.b_{port}", (H, D), optional=True) for port in "QKV"]
            has_norm = config.normalization != "none"
            blocks.append(
                Block(
                    ln1=read.norm(f"{prefix}ln1") if has_norm else None,
                    W_QKV=torch.cat([w.permute(1, 0, 2).reshape(M, H * D) for w in W], dim=1),
                    b_QKV=torch.cat([bias.flatten() for bias in b]),
                    W_O=read(f"{prefix}attn.W_O", (H, D, M)).reshape(H * D, M),
                    b_O=read(f"{prefix}attn.b_O", (M,), optional=True),
                    ln2=read.norm(f"{prefix}ln2") if has_norm and F else None,
                    W_in=read(f"{prefix}mlp.W_in", (M, F)) if F else None,
                    b_in=read(f"{prefix}mlp.b_in", (F,), optional=True) if F else None,
                    W_out=read(f"{prefix}mlp.W_out", (F, M)) if F else None,
                    b_out=read(f"{prefix}mlp.b_out", (M,), optional=True) if F else None,
                )
            )
        return cls(
            config,
            W_E=read("embed.W_E", (config.d_vocab, M)),
            W_pos=read("pos_embed.W_pos", (config.n_ctx, M)),
            blocks=tuple(blocks),
            ln_final=read.norm("ln_final") if config.normalization != "none" else None,
            W_U=read("unembed.W_U", (M, config.d_vocab)),
            b_U=read("unembed.b_U", (config.d_vocab,)) if "unembed.b_U" in named else None,
        )


class _Reader:
    """Takes tensors out of a state dict by name, and says what is missing or misshapen."""

    def __init__(self, config: ModelConfig, named: Mapping[str, Tensor]):
        self.config, self.named = config, named

    def __call__(self, name: str, shape: tuple[int, ...], optional: bool = False) -> Tensor:
        if name not in self.named:
            if optional:
                like = self.named["embed.W_E"]
                return torch.zeros(shape, dtype=like.dtype, device=like.device)
            raise ModelError(f"{self.config.name}: the checkpoint lacks {name!r} of shape {shape}.")
        if tuple(self.named[name].shape) != shape:
            raise ModelError(f"{self.config.name}: {name!r} has shape {tuple(self.named[name].shape)} and should have {shape}.")
        return self.named[name].detach()

    def norm(self, name: str) -> Norm:
        """A checkpoint without gain has it folded away (TransformerLens' "LNPre")."""
        if f"{name}.w" not in self.named:
            return Norm(None, None)
        shape = (self.config.d_model,)
        return Norm(self(f"{name}.w", shape), self(f"{name}.b", shape, optional=True))


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
