"""What every writer adds to the residual stream, kept compactly: heads as ``z``, expanded a layer at a time."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights


@dataclass(frozen=True)
class Writes:
    """The outputs of all writers in one pass, or the difference of two passes.

    Heads are stored before ``W_O`` (``d_head`` numbers a position instead of ``d_model``): a head's output is linear in
    its ``z``, so sums, differences and means may be taken here. ``b_O`` belongs to no writer and cancels in differences.
    Where a model normalises what its heads write, ``z`` is here the site ``z_written``: a head's write is its share of the
    normalised sum, by the scale of the run that it is taken from, so that the writes of every run sum to its stream.
    ``one_pass``: these are the writes of a run, each a function of those before it, and not numbers put together.
    """

    weights: Weights
    input: Float[Tensor, "batch pos d_model"]
    z: tuple[Float[Tensor, "batch pos head_index d_head"], ...]
    mlp_out: tuple[Float[Tensor, "batch pos d_model"], ...]
    one_pass: bool = False

    @classmethod
    def of(cls, cache: ActivationCache, weights: Weights, embedded: Tensor | None = None) -> "Writes":
        """From a pass that recorded ``sites``; ``embedded`` is what the input wrote, if the pass started behind it."""
        layers = range(weights.config.n_layers)
        return cls(
            weights,
            cache.embedded if embedded is None else embedded,
            tuple(cache[weights.config.write_site, layer] for layer in layers),
            tuple(cache["mlp_out", layer] for layer in layers) if weights.config.has_mlp else (),
            one_pass=True,
        )

    @classmethod
    def during(cls, model: Transformer, tokens: Tensor) -> "Writes":
        """The writes of a plain forward pass over ``tokens``."""
        with torch.no_grad():
            _, cache = model.run(tokens, record=sites(model), logits_at="last", logits_of=tokens[:, :0])
        return cls.of(cache, model.weights)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Writes":
        """The same writers with every tensor changed."""
        return Writes(
            self.weights, change(self.input), tuple(change(z) for z in self.z), tuple(change(m) for m in self.mlp_out)
        )

    def __getitem__(self, rows) -> "Writes":
        return replace(self.map(lambda tensor: tensor[rows]), one_pass=self.one_pass)

    def __sub__(self, other: "Writes") -> "Writes":
        return Writes(
            self.weights,
            self.input - other.input,
            tuple(mine - theirs for mine, theirs in zip(self.z, other.z, strict=True)),
            tuple(mine - theirs for mine, theirs in zip(self.mlp_out, other.mlp_out, strict=True)),
        )

    def heads(self, layer: int) -> Float[Tensor, "head_index batch pos d_model"]:
        """What each head of a layer wrote (without ``b_O``)."""
        return expand(self.weights, layer, self.z[layer])

    def first(self, n: int) -> Float[Tensor, "writer batch pos d_model"]:
        """The first ``n`` writers in the wiring's order. ``n * batch * pos * d_model`` numbers: ask for what you need."""
        stacked = self.input.new_empty((n, *self.input.shape))
        stacked[0] = self.input
        for layer in range(len(self.z)):
            start = 1 + layer * (self.weights.config.n_heads + bool(self.mlp_out))
            if start >= n:
                break
            heads = min(self.weights.config.n_heads, n - start)
            per_head = self.z[layer][:, :, :heads].flatten(0, 1).transpose(0, 1)
            torch.bmm(per_head, self.weights.W_O(layer)[:heads], out=stacked[start : start + heads].flatten(1, 2))
            if self.mlp_out and start + heads < n:
                stacked[start + heads] = self.mlp_out[layer]
        return stacked

    def total(self) -> Float[Tensor, "batch pos d_model"]:
        """All writes and the biases ``b_O``: the residual stream that the logits read, for the writes of one pass."""
        heads = (heads_sum(self.weights, layer, z) + self.weights.blocks[layer].b_O for layer, z in enumerate(self.z))
        return sum(self.mlp_out, start=sum(heads, start=self.input))


def heads_sum(
    weights: Weights, layer: int, z: Float[Tensor, "*batch pos head_index d_head"]
) -> Float[Tensor, "*batch pos d_model"]:
    """What all heads of a layer write together, or by how much that changes: linear in ``z``, ``b_O`` left out."""
    return z.flatten(-2) @ weights.W_O(layer).flatten(0, 1)


def expand(weights: Weights, layer: int, z: Tensor) -> Float[Tensor, "head_index batch pos d_model"]:
    """Per-head outputs of a layer from its ``z`` (as ``Writes`` holds it), as one batched product."""
    per_head = z.flatten(0, 1).transpose(0, 1)
    return torch.bmm(per_head, weights.W_O(layer)).unflatten(1, z.shape[:2])


def sites(model: Transformer) -> list[str]:
    """What a pass must record for ``Writes.of``."""
    config = model.config
    return ["embed", *["pos_embed"] * config.learned_positions, config.write_site, *["mlp_out"] * config.has_mlp]
