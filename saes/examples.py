"""Where in a text each latent is most active, and samples of where it is less so: the raw material for reading it.

The dashboards of Kissane et al. 2024 (arXiv:2406.17759) show twenty top positions and five from each of ten groups. Their
"quantile groups" are equal intervals between 0 and the latent's maximum, and so are ours; the samples are drawn here by
a fixed priority of every position, so that they depend on the seed and not on how the text is cut into batches.

Two walks over the active latents: the first finds maxima and tops, the second, when maxima are known, fills histogram and
intervals. It reads what the first remembered, or runs the model again where that was too much.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.errors import SAEError
from mechinterp.models.transformer import Transformer
from saes.base import SparseAutoencoder, seeded
from saes.places import Place
from saes.positions import default_keep, tokenizer_of

BINS_AN_INTERVAL = 5
_DENSE = 1 << 22  # latents encoded at once, active or not: 16 MB
_REMEMBERED = 1 << 24  # active latents remembered for the second walk: 340 MB


@dataclass(frozen=True, eq=False)
class LatentExamples:
    """How one latent is distributed over a text, and examples of where it is active.

    ``interval`` is 0 for the top examples and 1, 2, ... for samples, counted from the interval of the largest activations
    down. ``histogram`` counts active positions in equal bins from 0 to ``maximum``, rising. All sizes
    are ``|activation|``, which is the activation in every kind of autoencoder but ``abstopk``; ``activation`` has its sign.
    """

    place: Place
    latent: int
    n_tokens: int
    n_active: int
    maximum: float
    histogram: Int[np.ndarray, "bin"]
    prompt: Int[np.ndarray, "example"]
    pos: Int[np.ndarray, "example"]
    activation: Float[np.ndarray, "example"]
    interval: Int[np.ndarray, "example"]

    @property
    def density(self) -> float:
        """The share of positions at which the latent is active."""
        return self.n_active / self.n_tokens if self.n_tokens else 0.0

    @property
    def n_intervals(self) -> int:
        return len(self.histogram) // BINS_AN_INTERVAL

    def bounds(self, interval: int) -> tuple[float, float]:
        """Between which sizes an interval's activations lie: interval 1 ends at the maximum."""
        step = self.maximum / self.n_intervals
        return (self.n_intervals - interval) * step, (self.n_intervals - interval + 1) * step

    def share(self, interval: int) -> float:
        """The share of active positions that lie in an interval."""
        counts = self.histogram.reshape(self.n_intervals, BINS_AN_INTERVAL).sum(1)
        return float(counts[self.n_intervals - interval] / max(1, self.n_active))

    def __str__(self) -> str:
        shown = ", ".join(
            f"{p}:{q} {a:.2f}" for p, q, a in zip(self.prompt[:5], self.pos[:5], self.activation[:5], strict=True)
        )
        return f"{self.place} latent {self.latent}: active at {self.density:.3%} of {self.n_tokens} tokens; top {shown}"


@dataclass(frozen=True, eq=False)
class Active:
    """Active latents, one an entry: which group's, which latent, at which position, how much."""

    group: Int[Tensor, "entry"]
    latent: Int[Tensor, "entry"]
    prompt: Int[Tensor, "entry"]
    pos: Int[Tensor, "entry"]
    value: Float[Tensor, "entry"]


def find_examples(
    model: Transformer,
    autoencoder: SparseAutoencoder,
    tokens: Int[Tensor, "prompt pos"],
    *,
    latents: Sequence[int] | None = None,
    keep: Bool[Tensor, "prompt pos"] | None = None,
    n_top: int = 20,
    n_sampled: int = 5,
    n_intervals: int = 10,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> tuple[LatentExamples, ...]:
    """Examples of ``latents`` (None: all) of every group, group by group: ``n_top`` of the most active positions, and
    ``n_sampled`` drawn from each of ``n_intervals`` equal intervals between 0 and the latent's maximum.

    Positions outside ``keep`` are passed over; None passes over BOS and padding (``default_keep``). Ties go to the earlier
    position; a sample may also be among the tops. Latents that are never active have no examples.

    Cost: one forward pass of the text and one encoding, two where more than 16 million latents are active. Memory: a batch's
    activations, and ``n_top + n_intervals * n_sampled`` entries of 24 bytes a latent, whatever the length of the text.
    ``SAEError`` for latents that the autoencoder lacks, a mask of another shape, or counts below 1 (0 samples are fine).

    >>> from mechinterp.models.load import load
    >>> model, autoencoder = load("builtin"), SparseAutoencoder.random([Place.parse("z.1")], d_in=128, d_sae=8)
    >>> found = find_examples(model, autoencoder, torch.arange(40).view(2, 20), latents=[3], n_top=4)
    >>> found[0].latent, found[0].activation[0] == found[0].maximum
    (3, np.True_)
    """
    keep = default_keep(tokens, tokenizer_of(model)) if keep is None else keep
    _check(model, autoencoder, tokens, keep, (n_top, n_intervals, batch_size), n_sampled)
    chosen = _chosen(autoencoder, latents)
    row_of = torch.full((autoencoder.n_groups, autoencoder.d_sae), -1)
    row_of[:, chosen] = torch.arange(autoencoder.n_groups * len(chosen)).view(autoencoder.n_groups, len(chosen))
    walk = _Walk(model, autoencoder, tokens, keep, row_of, batch_size, progress)
    n_active, top, remembered = _tops(walk, autoencoder.n_groups * len(chosen), n_top)
    maximum = top.key[:, 0].clamp(min=0)
    seeds = [seeded(seed, str(place), latent) for place in autoencoder.places for latent in chosen.tolist()]
    entries = walk.entries("examples, again") if remembered is None else remembered
    histogram, samples = _spread(entries, maximum, torch.tensor(seeds), n_intervals, n_sampled)
    where = [(place, latent) for place in autoencoder.places for latent in chosen.tolist()]
    counted = (n_active.numpy(), maximum.numpy(), histogram.numpy())
    return _gathered(where, int(keep.sum()), tokens.shape[1], counted, top, samples)


def active_latents(
    autoencoder: SparseAutoencoder, x: Float[Tensor, "group batch pos d_in"], keep: Bool[Tensor, "batch pos"]
) -> Iterator[Active]:
    """The latents that are not 0 at kept positions, in pieces of bounded size; by group, then by position."""
    prompt, pos = keep.nonzero(as_tuple=True)
    for number in range(autoencoder.n_groups):
        one = autoencoder.group(number)
        for rows in torch.arange(len(prompt), device=prompt.device).split(max(1, _DENSE // autoencoder.d_sae)):
            latents = one.encode(x[number, prompt[rows], pos[rows]].to(one.W_enc.dtype)[None])[0]
            row, latent = latents.nonzero(as_tuple=True)
            group = torch.full_like(row, number)
            yield Active(group, latent, prompt[rows][row], pos[rows][row], latents[row, latent])


Entries = tuple[Tensor, Tensor, Tensor]  # each [entry]: the latent's row, prompt * n_pos + pos, the activation


@dataclass(frozen=True)
class _Walk:
    """One pass of the model over the text, as entries of the wanted latents, in order of position for each of them."""

    model: Transformer
    autoencoder: SparseAutoencoder
    tokens: Int[Tensor, "prompt pos"]
    keep: Bool[Tensor, "prompt pos"]
    row_of: Int[Tensor, "group d_sae"]
    batch_size: int
    progress: bool

    def entries(self, title: str) -> Iterator[Entries]:
        sites = {place.site for place in self.autoencoder.places}
        shown = {"desc": title, "unit": "batch", "delay": 2, "disable": None if self.progress else True}
        for start in tqdm(range(0, len(self.tokens), self.batch_size), **shown):
            batch = slice(start, start + self.batch_size)
            with torch.no_grad():
                _, cache = self.model.run(self.tokens[batch].to(self.model.device), record=sites, logits_at="last")
                x = self.autoencoder.read(cache)
                for found in active_latents(self.autoencoder, x, self.keep[batch].to(x.device)):
                    row = self.row_of[found.group.cpu(), found.latent.cpu()]
                    where = (start + found.prompt.cpu()) * self.tokens.shape[1] + found.pos.cpu()
                    wanted = row >= 0
                    yield row[wanted], where[wanted], found.value.cpu().double()[wanted]


@dataclass(frozen=True, eq=False)
class _Best:
    """For each row the n entries of largest key, falling; an empty slot has key -inf and ``where`` -1."""

    key: Float[Tensor, "row slot"]
    value: Float[Tensor, "row slot"]
    where: Int[Tensor, "row slot"]

    @classmethod
    def empty(cls, n_rows: int, n: int) -> "_Best":
        value = torch.zeros(n_rows, n, dtype=torch.float64)
        return cls(torch.full_like(value, -torch.inf), value, torch.full((n_rows, n), -1))

    def take(self, row: Tensor, key: Tensor, value: Tensor, where: Tensor) -> None:
        """Let entries in where they beat what is there; of equals the earlier stays."""
        n = self.key.shape[1]
        beats = key > self.key[row, -1] if n else torch.zeros_like(row, dtype=torch.bool)
        touched, at = row[beats].unique(return_inverse=True)
        rows = torch.cat([torch.arange(len(touched)).repeat_interleave(n), at])
        keys = torch.cat([self.key[touched].flatten(), key[beats]])
        order = keys.argsort(descending=True, stable=True)
        order = order[rows[order].argsort(stable=True)]
        rank = _rank(rows[order])
        first, rank = order[rank < n], rank[rank < n]
        to = touched[rows[first]]
        for table, new in ((self.value, value), (self.where, where)):
            table[to, rank] = torch.cat([table[touched].flatten(), new[beats]])[first]
        self.key[to, rank] = keys[first]


def _rank(rows: Int[Tensor, "entry"]) -> Int[Tensor, "entry"]:
    """How many of the same row stand before each entry of a list sorted by row."""
    counts = torch.bincount(rows)
    return torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]


def _tops(walk: _Walk, n_rows: int, n_top: int) -> tuple[Int[Tensor, "row"], _Best, list[Entries] | None]:
    """The first walk: counts, the most active positions, and the entries themselves if they are few enough."""
    n_active, top = torch.zeros(n_rows, dtype=torch.long), _Best.empty(n_rows, n_top)
    remembered: list[Entries] | None = []
    n_seen = 0
    for entries in walk.entries("examples"):
        row, where, value = entries
        n_active += torch.bincount(row, minlength=n_rows)
        top.take(row, value.abs(), value, where)
        n_seen += len(row)
        if n_seen > _REMEMBERED:
            remembered = None
        if remembered is not None:
            remembered.append(entries)
    return n_active, top, remembered


def _spread(
    entries: Iterable[Entries], maximum: Float[Tensor, "row"], seeds: Int[Tensor, "row"], n_intervals: int, n_sampled: int
) -> tuple[Int[Tensor, "row bin"], _Best]:
    """The second walk: histograms, and of every interval the entries of highest priority, a uniform sample."""
    n_bins = n_intervals * BINS_AN_INTERVAL
    histogram = torch.zeros(len(maximum) * n_bins, dtype=torch.long)
    samples = _Best.empty(len(maximum) * n_intervals, n_sampled)
    for row, where, value in entries:
        bins = (value.abs() / maximum[row] * n_bins).long().clamp(max=n_bins - 1)
        histogram += torch.bincount(row * n_bins + bins, minlength=len(histogram))
        interval = n_intervals - 1 - bins // BINS_AN_INTERVAL
        samples.take(row * n_intervals + interval, _priority(seeds[row] + where), value, where)
    return histogram.view(-1, n_bins), samples


def _priority(x: Int[Tensor, "entry"]) -> Float[Tensor, "entry"]:
    """A number from 0 to 1 that is a function of x alone, and as good as random (the finaliser of SplitMix64)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << 64 - shift) - 1))) * factor
    return (x & ((1 << 53) - 1)).double() / (1 << 53)


def _gathered(
    where: Sequence[tuple[Place, int]],
    n_tokens: int,
    n_pos: int,
    counted: tuple[Int[np.ndarray, "row"], Float[np.ndarray, "row"], Int[np.ndarray, "row bin"]],
    top: _Best,
    samples: _Best,
) -> tuple[LatentExamples, ...]:
    n_rows, n_intervals = len(where), len(samples.key) // max(1, len(where))
    n_sampled = samples.key.shape[1]
    by_size = samples.value.abs().masked_fill(samples.where < 0, -1).argsort(dim=1, descending=True, stable=True)
    at, value = (
        torch.cat([first, second.gather(1, by_size).view(n_rows, n_intervals * n_sampled)], 1).numpy()
        for first, second in ((top.where, samples.where), (top.value, samples.value))
    )
    interval = np.concatenate([np.zeros(top.key.shape[1], int), np.repeat(1 + np.arange(n_intervals), n_sampled)])
    found = []
    for row, (place, latent) in enumerate(where):
        real = at[row] >= 0
        prompt, pos = np.divmod(at[row][real], n_pos)
        n_active, maximum, histogram = (of[row] for of in counted)
        facts = (n_tokens, int(n_active), float(maximum), histogram)
        found.append(LatentExamples(place, latent, *facts, prompt, pos, value[row][real], interval[real]))
    return tuple(found)


def _chosen(autoencoder: SparseAutoencoder, latents: Sequence[int] | None) -> Int[Tensor, "latent"]:
    if latents is None:
        return torch.arange(autoencoder.d_sae)
    wrong = [latent for latent in latents if not 0 <= latent < autoencoder.d_sae]
    if wrong or not latents or len(set(latents)) < len(latents):
        why = f"{wrong[0]} is none" if wrong else "none is named" if not latents else "one is named twice"
        raise SAEError(f"the latents run from 0 to {autoencoder.d_sae - 1}, and {why}. Name each once, or give None for all.")
    return torch.tensor(list(latents))


def _check(model, autoencoder, tokens, keep, counts: tuple[int, ...], n_sampled: int) -> None:
    autoencoder.check_fits(model.config)
    if keep.shape != tokens.shape:
        raise SAEError(f"keep has shape {tuple(keep.shape)} and tokens {tuple(tokens.shape)}. Give one truth value a token.")
    if min(counts) < 1 or n_sampled < 0:
        raise SAEError(
            f"n_top={counts[0]}, n_intervals={counts[1]}, batch_size={counts[2]} must be at least 1, "
            f"and n_sampled={n_sampled} at least 0."
        )
