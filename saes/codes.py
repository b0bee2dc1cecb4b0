"""Discrete codes: what a part of the model wrote on a prompt, as one integer (O'Neill & Bui 2024, arXiv:2405.12522, sec. 3).

    rows -> standardised, part by part -> an autoencoder a part, trained on a few of them -> the strongest latent's number

A few examples are enough, because a code need not reconstruct: it need only tell the kinds of things apart that a part
writes. ``paper_codes.py`` is the published recipe, one autoencoder for all heads; here each part has its own, on inputs of
its own scale, so that ``sparsity`` and the number of latents mean the same everywhere.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import SAEError
from saes.activations import of_rows
from saes.base import SparseAutoencoder
from saes.places import Place
from saes.settings import TrainSettings
from saes.trainer import train

_CONSTANT = 1e-5  # deviations of so small a part of the mean are rounding


@dataclass(frozen=True)
class CodeSettings:
    """How codes are made. ``n_train``: examples to train on, half of them positive. ``d_sae``: latents a part.

    ``k``: how many latents make a code; 1 is "the strongest", more make k-hot codes (the set of the k strongest). ``steps``
    are whole batches of the ``n_train`` rows. ``architecture`` and ``sparsity`` as in ``TrainSettings``. ``trained=False``
    leaves the autoencoder at its random directions: the control that codes of a trained one must beat.
    """

    n_train: int = 10
    d_sae: int = 16
    k: int = 1
    steps: int = 300
    lr: float = 1e-2
    architecture: str = "topk"
    sparsity: float = 1.0
    trained: bool = True
    seed: int = 0

    def __post_init__(self):
        _check_n_train(self.n_train)
        if not 1 <= self.k <= self.d_sae:
            raise SAEError(f"a code of k={self.k} latents cannot be made of d_sae={self.d_sae}. Give 1 <= k <= d_sae.")
        if self.steps < 1:
            raise SAEError(f"steps={self.steps} trains nothing. Give at least 1, or trained=False for the untrained control.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Codes:
    """The latents that make each example's code, in order; ``d_sae`` fills up where fewer are active.

    ``autoencoder`` reads the parts as they are: standardisation is folded into its weights.
    """

    latents: Int[np.ndarray, "example part k"]
    autoencoder: SparseAutoencoder
    l0: Float[np.ndarray, "part"]

    @property
    def values(self) -> Int[np.ndarray, "example part"]:
        """One integer a code, counted from 0 part by part; equal for equal sets of latents."""
        parts = (np.unique(self.latents[:, part], axis=0, return_inverse=True)[1] for part in range(self.latents.shape[1]))
        return np.stack([numbers.reshape(-1) for numbers in parts], 1)

    @property
    def silent(self) -> Float[np.ndarray, "part"]:
        """The share of examples on which no latent of a part is active: they share one code."""
        return (self.latents == self.autoencoder.d_sae).all(-1).mean(0)


def assign_codes(
    rows: Float[Tensor, "example part d_in"],
    places: Sequence[Place],
    training: Int[Tensor, "some"],
    settings: CodeSettings | None = None,
    *,
    progress: bool = False,
) -> Codes:
    """The codes of all ``rows``, by autoencoders trained on those numbered ``training``; one a part.

    A part that writes the same on all training examples gets one code. ``SAEError`` where every part does, and for rows
    that are not finite. Cost: ``steps`` steps of all parts at once; seconds for the 144 heads of GPT-2 small.
    """
    settings = settings or CodeSettings()
    if not bool(torch.isfinite(rows).all()):
        raise SAEError("what the parts write is not finite. Look at the model's precision: float16 overflows.")
    mean, scale = moments(rows[training])
    standard = (rows - mean) * scale.reciprocal().nan_to_num(posinf=0.0).unsqueeze(-1)
    found = _autoencoder(standard[training], places, settings, progress)
    latents = found.encode(standard.transpose(0, 1))
    active = (latents > 0).sum(-1).double().mean(1)
    return Codes(_strongest(latents, settings.k), _unstandardised(found, mean, scale), active.cpu().numpy())


def stratified(n_train: int, n_positive: int, n_negative: int, seed: int) -> tuple[list[int], list[int]]:
    """Which positives and which negatives to train on: half and half, a positive more where the number is odd.

    ``SAEError`` where one side has too few: some must be left to count codes on; and for ``n_train`` below 2.
    """
    _check_n_train(n_train)
    wanted, given = {"positive": (n_train + 1) // 2, "negative": n_train // 2}, {"positive": n_positive, "negative": n_negative}
    if missing := [kind for kind, there in given.items() if there == 0]:
        raise SAEError(f"there are no {missing[0]} examples. Codes tell two classes apart: give examples of both.")
    for kind, there in given.items():
        if there < wanted[kind] + 2:
            raise SAEError(
                f"{there} {kind} examples cannot train on {wanted[kind]} (n_train={n_train}) and leave two to count codes on. "
                f"Give {wanted[kind] + 2} or more (--prompts), or lower n_train (--train-examples)."
            )
    order = np.random.default_rng(seed).permutation(min(n_positive, n_negative))
    return order[: wanted["positive"]].tolist(), order[: wanted["negative"]].tolist()


def _check_n_train(n_train: int) -> None:
    if n_train < 2:
        raise SAEError(f"n_train={n_train} cannot hold a positive and a negative example. Give at least 2.")


def moments(rows: Float[Tensor, "example part d_in"]) -> tuple[Float[Tensor, "part d_in"], Float[Tensor, "part"]]:
    """Each part's mean, and its root mean square deviation a coordinate; 0 for a part that is constant but for rounding."""
    mean = rows.mean(0)
    scale = (rows - mean).square().mean((0, 2)).sqrt()
    scale = torch.where(scale > _CONSTANT * mean.square().mean(-1).sqrt(), scale, 0.0)
    if not bool(scale.any()):
        raise SAEError(
            "no part writes anything different on any two training examples, so they all have one code. Read another position "
            '(positions="mean"), or use prompts that differ there.'
        )
    return mean, scale


def _autoencoder(
    rows: Float[Tensor, "example part d_in"], places: Sequence[Place], settings: CodeSettings, progress: bool
) -> SparseAutoencoder:
    wanted = TrainSettings(
        architecture=settings.architecture,
        d_sae=settings.d_sae,
        n_rows=settings.steps * len(rows),
        batch_size=len(rows),
        k=settings.k,
        sparsity=settings.sparsity,
        lr=settings.lr,
        seed=settings.seed,
        scale_inputs=False,
        revive="none",  # of ten rows, sixteen latents need not all have one
    )
    if not settings.trained:
        kind, counting = ("topk", {"k": settings.k}) if wanted.counts else ("relu", {})
        sizes: dict[str, Any] = {"d_in": rows.shape[2], "d_sae": settings.d_sae, "seed": settings.seed, **counting}
        return SparseAutoencoder.random(tuple(places), kind=kind, **sizes)
    with _one_thread():
        return train(of_rows(rows, places), wanted, progress=progress)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps on a few rows are so small that threads would only wait for each other: ten times as long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _strongest(latents: Float[Tensor, "part example d_sae"], k: int) -> Int[np.ndarray, "example part k"]:
    values, indices = latents.topk(k, -1)
    which = torch.where(values > 0, indices, latents.shape[-1]).sort(-1).values
    return which.transpose(0, 1).cpu().numpy()


def _unstandardised(
    autoencoder: SparseAutoencoder, mean: Float[Tensor, "part d_in"], scale: Float[Tensor, "part"]
) -> SparseAutoencoder:
    """The same autoencoder for rows as they are: ``(x - mean) / scale`` goes into its weights. An identity."""
    inverse = scale.reciprocal().nan_to_num(posinf=0.0)[:, None, None]
    return replace(
        autoencoder,
        W_enc=autoencoder.W_enc * inverse,
        W_dec=autoencoder.W_dec * scale[:, None, None],
        b_dec=autoencoder.b_dec * scale.unsqueeze(1) + mean,
    )
