"""Discrete codes as published (O'Neill & Bui 2024, arXiv:2405.12522, and their code, sae-circuits at 10fd2e7).

    a = ReLU(W_enc (x - b) + b_enc)          x: what one head wrote on one prompt, in d_model
    y = W_dec a + b                          one autoencoder for all heads of the model
    loss = mean over all entries (y - x)^2 + sparsity * mean over rows of sum(a)
    code = argmax a                          0 where no latent is active

It is trained on all heads of a few prompts, whole batches at a time, by Adam. ``codes.py`` is what we would do instead. Kept
as it was, and said, because results depend on it:

1. Both weights are brought to unit norm along their *last* axis. Of ``W_enc`` that is a latent's direction. Of ``W_dec`` it is
   an output coordinate over latents: atoms have norm sqrt(d_in / d_sae) on average, not 1.
2. The error is a mean over coordinates, the penalty a sum over latents, and inputs are as large as the model makes them: what
   ``sparsity`` means depends on width and scale. Often most rows end with no active latent, and code 0.
3. Latent 0 and "nothing" are the same code.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.errors import SAEError

_AT_ONCE = 1 << 24  # latents held at a time


@dataclass(frozen=True)
class PaperSettings:
    """``n_train``: prompts to train on. ``steps`` are whole batches. Docstring had ``sparsity`` 0.05, the other tasks 0.02.

    ``trained=False`` leaves the autoencoder as it was drawn: the control that a trained one must beat.
    """

    n_train: int = 10
    d_sae: int = 200
    steps: int = 500
    lr: float = 1e-3
    sparsity: float = 0.02
    trained: bool = True
    seed: int = 0

    def __post_init__(self):
        for name in ("n_train", "d_sae", "steps"):
            if getattr(self, name) < 1:
                raise SAEError(f"{name}={getattr(self, name)} trains nothing. Give at least 1.")
        if not (0 < self.lr < float("inf") and 0 <= self.sparsity < float("inf")):
            raise SAEError(f"lr={self.lr} and sparsity={self.sparsity} must be finite, lr above 0 and sparsity not below.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class PaperAutoencoder:
    """The four parameters; both weights have rows of unit norm. Rows of ``W_dec`` are not its atoms (see 1 above)."""

    W_enc: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_in d_sae"]
    b: Float[Tensor, "d_in"]

    @classmethod
    def random(cls, d_in: int, d_sae: int, seed: int = 0) -> "PaperAutoencoder":
        """As published: rows of random direction, ``b_enc`` uniform within ``1 / sqrt(d_in)``, ``b`` 0."""
        draw = torch.Generator().manual_seed(seed)
        W_enc = F.normalize(torch.randn(d_sae, d_in, generator=draw), dim=-1)
        b_enc = (2 * torch.rand(d_sae, generator=draw) - 1) / d_in**0.5
        W_dec = F.normalize(torch.randn(d_in, d_sae, generator=draw), dim=-1)
        return cls(W_enc, b_enc, W_dec, torch.zeros(d_in))

    def encode(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_sae"]:
        """``ReLU(W_enc (x - b) + b_enc)``, without a copy of ``x``."""
        return torch.addmm(self.b_enc - self.W_enc @ self.b, x, self.W_enc.T).relu_()

    def decode(self, latents: Float[Tensor, "row d_sae"]) -> Float[Tensor, "row d_in"]:
        return torch.addmm(self.b, latents, self.W_dec.T)

    def loss(self, x: Float[Tensor, "row d_in"], sparsity: float) -> float:
        """What training lowers."""
        latents = self.encode(x)
        return float((self.decode(latents) - x).square().mean() + sparsity * latents.sum(1).mean())

    @property
    def parameters(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True, eq=False)
class PaperCodes:
    """One integer a prompt and head. ``l0``: active latents a row; ``silent``: the share of rows with none."""

    values: Int[np.ndarray, "example part"]
    autoencoder: PaperAutoencoder
    l0: float
    silent: float


def assign_paper_codes(
    rows: Float[Tensor, "example part d_in"],
    training: Int[Tensor, "some"],
    settings: PaperSettings | None = None,
    *,
    progress: bool = False,
) -> PaperCodes:
    """The codes of all ``rows`` by one autoencoder, trained on those examples numbered ``training`` (``SAEError``: on none).

    ``SAEError`` for rows that are not finite. Cost: at most ``steps`` times five products of ``row d_in`` with ``d_in d_sae``,
    and one where few latents are active: 4 s on a core for ten prompts of GPT-2 small.
    """
    settings = settings or PaperSettings()
    if not bool(torch.isfinite(rows).all()):
        raise SAEError("what the heads write is not finite. Look at the model's precision: float16 overflows.")
    if len(training) == 0:
        raise SAEError("no example is named to train on. Name at least one.")
    found = PaperAutoencoder.random(rows.shape[2], settings.d_sae, settings.seed)
    found = PaperAutoencoder(*(tensor.to(rows) for tensor in found.parameters))
    if settings.trained:
        found = train_paper(found, rows[training].flatten(0, 1), settings, progress=progress)
    return _coded(found, rows)


@torch.no_grad()
def train_paper(
    start: PaperAutoencoder, x: Float[Tensor, "row d_in"], settings: PaperSettings, *, progress: bool = False
) -> PaperAutoencoder:
    """``settings.steps`` steps of Adam from ``start``, which is left as it is. The published loop with its gradients written
    by hand: the same numbers but for rounding, several times as fast."""
    p = PaperAutoencoder(*(tensor.clone().requires_grad_() for tensor in start.parameters))
    for parameter in p.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.Adam(p.parameters, lr=settings.lr, fused=True)
    total = x.sum(0)
    for _ in tqdm(range(settings.steps), desc="paper codes", unit="step", delay=2, disable=None if progress else True):
        _normalize(p)
        _fill_gradients(p, x, total, settings.sparsity)
        optimizer.step()
    _normalize(p)
    return PaperAutoencoder(*(tensor.detach() for tensor in p.parameters))


def _normalize(p: PaperAutoencoder) -> None:
    """In every forward pass, and no part of the gradient: rows that Adam's momentum has made longer are cut to 1."""
    for W in (p.W_enc, p.W_dec):
        F.normalize(W, dim=-1, out=W)


def _fill_gradients(p: PaperAutoencoder, x: Float[Tensor, "row d_in"], total: Float[Tensor, "d_in"], sparsity: float) -> None:
    """Rows without an active latent have slopes only in ``b``, and the error ``b - x``: of them the sum is enough."""
    latents = p.encode(x)
    some = latents.any(1)
    inputs, latents = x[some] - p.b, latents[some]
    per_entry = 2 / x.numel()
    down = torch.addmm(inputs, latents, p.W_dec.T, beta=-1).mul_(per_entry)  # y - x, since inputs are x - b
    slopes = (down @ p.W_dec).add_(sparsity / len(x)).masked_fill_(latents == 0, 0.0)
    of_b_enc = slopes.sum(0)
    summed = per_entry * (p.W_dec @ latents.sum(0) + len(x) * p.b - total)  # of the slopes of y over all rows
    gradients = (_across(slopes.T @ inputs, p.W_enc), of_b_enc, _across(down.T @ latents, p.W_dec), summed - of_b_enc @ p.W_enc)
    for parameter, gradient in zip(p.parameters, gradients, strict=True):
        parameter.grad = gradient


def _across(gradient: Float[Tensor, "row column"], W: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    """Without its part along each row of ``W``, which would only change a norm that is 1."""
    return gradient.addcmul_((gradient * W).sum(-1, keepdim=True), W, value=-1)


@torch.no_grad()
def _coded(found: PaperAutoencoder, rows: Float[Tensor, "example part d_in"]) -> PaperCodes:
    codes, active, silent = [], 0.0, 0.0
    for some in rows.split(max(1, _AT_ONCE // (rows.shape[1] * len(found.b_enc)))):
        latents = found.encode(some.flatten(0, 1))
        codes.append(latents.argmax(-1).unflatten(0, some.shape[:2]))
        counts = (latents > 0).sum(-1)
        active, silent = active + float(counts.sum()), silent + float((counts == 0).sum())
    n_rows = rows.shape[0] * rows.shape[1]
    return PaperCodes(torch.cat(codes).cpu().numpy(), found, active / n_rows, silent / n_rows)
