"""Activations to train on: what stands at the places of a model on a corpus, in shuffled batches of bounded memory.

    store = ActivationStore("activations")
    activations = harvest(model, corpus, each_head(model.config), store)     # one forward pass, whatever is trained on it
    activations = stream(model, corpus, each_head(model.config))             # nothing on disk: run anew when needed

Batches come from windows: prompts in random order, as many as fit in ``window_bytes``, and their rows shuffled. Which rows
make which batch depends on the seed and on where windows end, so that training resumes at any step without reading what
came before. With half as many places twice as many prompts fit: for the same batches, give half the ``window_bytes``.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import SAEError
from mechinterp.models.transformer import Transformer
from mechinterp.store import ActivationStore
from saes.base import seeded
from saes.corpus import Corpus
from saes.places import Place, places_named
from saes.positions import KeptRows, rows_at

Batch = Float[Tensor, "group row d_in"]


@dataclass(frozen=True, eq=False)
class Activations:
    """What stands at ``places``, prompt by prompt. ``read`` gives the kept rows of some prompts, ``counts`` how many each has.

    ``about`` (plain JSON) says what they are of: the model, its fingerprint, the corpus.
    """

    places: tuple[Place, ...]
    d_in: int
    counts: Int[Tensor, "prompt"]
    read: Callable[[Int[Tensor, "some"]], Float[Tensor, "row group d_in"]]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        return int(self.counts.sum())

    def windows(self, window_bytes: int = 1 << 29, order: Int[Tensor, "prompt"] | None = None) -> Iterator[Batch]:
        """All rows once, in order (or prompts in this ``order``), ``window_bytes`` at a time."""
        for prompts in self._parts(torch.arange(len(self.counts)) if order is None else order, window_bytes):
            if int(self.counts[prompts].sum()):
                yield self._checked(self.read(prompts)).transpose(0, 1)

    def batches(self, batch_size: int, *, seed: int = 0, start: int = 0, window_bytes: int = 1 << 29) -> Iterator[Batch]:
        """Batch number ``start``, ``start + 1``, ... without end: epoch after epoch, each row once an epoch.

        Windows before ``start`` are counted and not read. Raises ``SAEError`` for activations that are not finite.
        """
        if self.n_rows == 0:
            raise SAEError("there are no activations to train on.")
        rest = None
        for rows, order in self._shuffled(seed, start * batch_size, window_bytes):
            first = 0 if rest is None else batch_size - len(rest)
            if rest is not None:
                rest = torch.cat([rest, rows[order[:first]]])
                if len(rest) < batch_size:
                    continue
                yield _by_group(rest)
            whole = first + (len(order) - first) // batch_size * batch_size
            for at in range(first, whole, batch_size):
                yield _by_group(rows[order[at : at + batch_size]])
            rest = rows[order[whole:]] if whole < len(order) else None

    def _shuffled(self, seed: int, skip: int, window_bytes: int) -> Iterator[tuple[Tensor, Int[Tensor, "row"]]]:
        """Window after window, and the order in which its rows are taken; the first ``skip`` rows of all are left out."""
        for epoch in itertools.count():
            prompts = torch.randperm(len(self.counts), generator=_generator(seed, "prompts", epoch))
            for number, some in enumerate(self._parts(prompts, window_bytes)):
                n_rows = int(self.counts[some].sum())
                if skip < n_rows:
                    order = torch.randperm(n_rows, generator=_generator(seed, "rows", epoch, number))
                    yield self._checked(self.read(some)), order[skip:]
                skip = max(0, skip - n_rows)

    def _parts(self, order: Int[Tensor, "prompt"], window_bytes: int) -> Iterable[Int[Tensor, "some"]]:
        """``order`` cut where a window is full."""
        row_bytes = 4 * len(self.places) * self.d_in
        filled = (self.counts[order].cumsum(0) * row_bytes - 1).clamp_min(0) // window_bytes
        return [part for part in order.split(torch.bincount(filled).tolist()) if len(part)]

    def _checked(self, rows: Float[Tensor, "row group d_in"]) -> Float[Tensor, "row group d_in"]:
        if not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
            bad = (~torch.isfinite(rows)).flatten(2).any(2).sum(0)
            group = int(bad.argmax())
            raise SAEError(
                f"the activations at {str(self.places[group])!r} are not finite in {int(bad[group])} of {len(rows)} rows. Look "
                "at the model's precision (float16 overflows), or leave out the prompts that bring it about."
            )
        return rows


def harvest(
    model: Transformer,
    corpus: Corpus,
    places: Iterable[Place | str],
    store: ActivationStore,
    *,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Activations:
    """The activations of ``model`` at ``places``, recorded once in ``store`` and read from disk ever after.

    Whatever is trained on the same corpus and sites shares the record: every head of a layer and their concatenation are
    one site. Costs one forward pass the first time, and ``4 * n_layers * n_heads * d_head`` bytes a token for ``z`` (half
    of it in bfloat16). Interrupted, it goes on where it stopped.
    """
    found = places_named(model.config, places)
    sites = sorted({place.site for place in found}, key=lambda site: site.order)
    cache = store.cached_run(model, corpus.tokens, sites, batch_size=batch_size, dtype=dtype)

    def read(prompts: Int[Tensor, "some"]) -> Float[Tensor, "row group d_in"]:
        return rows_at({site: cache[site][prompts] for site in sites}, found, corpus.keep[prompts]).float()

    return _activations(model, corpus, found, read)


def stream(model: Transformer, corpus: Corpus, places: Iterable[Place | str], *, batch_size: int = 32) -> Activations:
    """The same without a disk: the model runs on the prompts of each window when it is needed, in every epoch anew.

    Costs a forward pass of the corpus an epoch, ``batch_size`` prompts at a time. Raises ``SAEError`` for places that the
    model lacks.
    """
    found = places_named(model.config, places)

    def read(prompts: Int[Tensor, "some"]) -> Float[Tensor, "row group d_in"]:
        kept = KeptRows(model, found, corpus.tokens[prompts], corpus.keep[prompts], batch_size)
        return torch.cat([rows.transpose(0, 1) for rows in kept]).float()

    return _activations(model, corpus, found, read)


def of_rows(rows: Float[Tensor, "row group d_in"], places: Iterable[Place | str]) -> Activations:
    """Activations that are at hand already, one row for each position. ``SAEError`` unless each group has its own place."""
    found = tuple(Place.parse(place) if isinstance(place, str) else place for place in places)
    if len(found) != rows.shape[1]:
        raise SAEError(f"{len(found)} places are named for rows of {rows.shape[1]} groups. Name one place a group.")
    if twice := {str(place) for place in found if found.count(place) > 1}:
        raise SAEError(f"the place {min(twice)!r} is named twice. Name each once.")
    about = {"rows": len(rows), "fingerprint": _fingerprint(rows)}
    counts = torch.ones(len(rows), dtype=torch.int64)
    return Activations(found, rows.shape[2], counts, lambda some: rows[some].float(), about)


def _activations(model: Transformer, corpus: Corpus, places: tuple[Place, ...], read: Any) -> Activations:
    about = {"model": model.config.name, "fingerprint": model.weights.fingerprint, "corpus": corpus.name}
    about["corpus_fingerprint"] = corpus.fingerprint
    return Activations(places, places[0].width(model.config), corpus.keep.sum(1), read, about)


def _fingerprint(rows: Float[Tensor, "row group d_in"]) -> str:
    """Changes with any number, so that a training is not taken up on other rows. Takes a second a GB."""
    data = rows.detach().cpu().contiguous().view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()[:16]


def _by_group(rows: Float[Tensor, "row group d_in"]) -> Batch:
    return rows.transpose(0, 1).contiguous()


def _generator(seed: int, *names: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(seeded(seed, *names))
