"""Which positions of a text count, and the activations that stand there.

BOS is left out by default: its activations are many times as large as any other's and alike in every text, so that an
autoencoder measured on it looks better than it is. Padding is left out because it is no text.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import SAEError
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.transformer import Transformer
from mechinterp.sites import Site
from mechinterp.store import ActivationStore
from saes.places import Place


def text_positions(tokens: Int[Tensor, "batch pos"], tokenizer: Tokenizer | None) -> Bool[Tensor, "batch pos"]:
    """All but the padding that ends a prompt: its last tokens, as far as they are the tokenizer's ``pad_id``.

    Where a tokenizer pads with its end-of-text token, an end of text that a prompt really ends with is taken for padding.
    Without a tokenizer every position is text.
    """
    if tokenizer is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    return (tokens != tokenizer.pad_id).flip(1).cummax(1).values.flip(1)


def default_keep(tokens: Int[Tensor, "batch pos"], tokenizer: Tokenizer | None) -> Bool[Tensor, "batch pos"]:
    """Where autoencoders act and are measured: text without BOS, in front or between documents (as in ``Corpus``)."""
    keep = text_positions(tokens, tokenizer)
    return keep if tokenizer is None or tokenizer.bos_id is None else keep & (tokens != tokenizer.bos_id)


def tokenizer_of(model: Any) -> Tokenizer | None:
    """Our tokenizer of a model that has one; a stand-in's tokenizer of another make is not asked."""
    found = getattr(model, "tokenizer", None)
    return found if isinstance(found, Tokenizer) else None


@dataclass(frozen=True, eq=False)
class KeptRows:
    """The activations at ``places`` on the kept positions, a window ``[group, row, d_in]`` a batch of prompts.

    Every pass over it runs the model again, or reads ``store``, which runs it once. ``model`` is a ``Transformer``, or
    anything with ``run(tokens, record=[Site, ...]) -> (logits, mapping of Site to tensor)``.
    """

    model: Any
    places: tuple[Place, ...]
    tokens: Int[Tensor, "batch pos"]
    keep: Bool[Tensor, "batch pos"]
    batch_size: int = 8
    store: ActivationStore | None = None

    def __post_init__(self):
        if self.keep.shape != self.tokens.shape or not self.keep.any():
            given = f"marks {int(self.keep.sum())} positions in shape {list(self.keep.shape)}"
            raise SAEError(f"keep {given}; it must mark at least one position in the tokens' shape {list(self.tokens.shape)}.")
        if self.batch_size < 1:
            raise SAEError(f"batch_size={self.batch_size} must be at least 1.")

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        sites = list(dict.fromkeys(place.site for place in self.places))
        # The logits are not wanted, and our own model need not make them at every position.
        spare: dict[str, Any] = {"logits_at": "last"} if _own(self.model) and all(s.layer is not None for s in sites) else {}
        stored = self.store and self.store.cached_run(self.model, self.tokens, sites, batch_size=self.batch_size)
        for first in range(0, len(self.tokens), self.batch_size):
            batch = slice(first, first + self.batch_size)
            if stored is not None:
                at_sites = {site: stored[site][batch] for site in sites}
            else:
                at_sites = self.model.run(on_device(self.model, self.tokens[batch]), record=sites, **spare)[1]
            yield rows_at(at_sites, self.places, self.keep[batch]).transpose(0, 1)


def rows_at(
    at_sites: Mapping[Site, Tensor], places: tuple[Place, ...], keep: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "row group d_in"]:
    """What stands at the places on the kept positions, prompt after prompt."""
    parts = [place.part(at_sites[place.site]) for place in places]
    return torch.stack([part[keep.to(part.device)] for part in parts], 1)


def on_device(model: Any, tensor: Tensor) -> Tensor:
    """``tensor`` where the model computes; a stand-in that does not say where is given it as it is."""
    return tensor.to(getattr(model, "device", tensor.device))


def _own(model: Any) -> bool:
    return isinstance(model, Transformer)
