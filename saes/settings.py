"""How an autoencoder is trained: every choice in one frozen value, with defaults that fit attention outputs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from mechinterp.errors import SAEError, nearest

COUNTING = ("topk", "batchtopk", "matryoshka")  # they fix the number of latents, rather than weigh them
ARCHITECTURES = ("relu", "gated", "jumprelu", *COUNTING)  # each is a function in saes/objectives.py
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WHOLE = ("d_sae", "n_rows", "batch_size", "k", "seed", "dead_after", "resamplings", "window_bytes")
_POSITIVE = ("d_sae", "n_rows", "batch_size", "k", "lr", "bandwidth", "threshold", "window_bytes")


@dataclass(frozen=True)
class TrainSettings:
    """What ``train`` is to do. Counts of rows are positions of tokens; each autoencoder of a group sees every row.

    ``architecture``: one of ``ARCHITECTURES``. ``k``: latents a position of "topk", and on average of
    "batchtopk" and "matryoshka". ``sparsity``: the weight of what keeps latents few: of the summed latents ("relu",
    "gated") or of their number ("jumprelu"), with the squared error summed over ``d_in``. ``decoder``: "unit" holds rows
    of W_dec at norm 1 (Kissane et al. 2024); "free" weighs latents by the norm of their row instead.
    ``scale_inputs`` brings each group's inputs to a mean norm of ``sqrt(d_in)``, so that one ``sparsity`` and one learning
    rate fit all of them; what is saved takes the unscaled inputs.

    ``warm_up`` and ``decay`` are shares of all steps: learning rate up from 0 (and ``sparsity`` with it), and down to 0 at
    the end. ``clip``: the greatest norm of a group's gradient; None for none. ``precision``: "bfloat16" multiplies in
    bfloat16 and keeps parameters in float32.

    ``revive``: what becomes of latents that have not fired for ``dead_after`` rows (None: 200,000, or a tenth of ``n_rows``
    where that is less): "aux" lets them explain what the others
    leave (Gao et al. 2024, arXiv:2406.04093, A.2), "resample" gives them inputs that are explained badly, ``resamplings``
    times in the first half (Bricken et al. 2023), "none" nothing. None takes "aux" for architectures that count latents
    and "resample" for the others.
    """

    architecture: str = "batchtopk"
    d_sae: int = 1024
    n_rows: int = 2_000_000
    batch_size: int = 1024
    k: int = 16
    sparsity: float = 1.0
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    warm_up: float = 0.05
    decay: float = 0.3
    clip: float | None = 1.0
    seed: int = 0
    decoder: str = "unit"
    scale_inputs: bool = True
    revive: str | None = None
    dead_after: int | None = None
    aux_weight: float = 1 / 32
    resamplings: int = 4
    bandwidth: float = 0.1
    threshold: float = 0.1
    prefixes: tuple[int, ...] = field(default=())
    precision: str = "float32"
    window_bytes: int = 1 << 29

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))
        object.__setattr__(self, "prefixes", tuple(map(int, self.prefixes)))
        self._check_choices()
        self._check_numbers()
        if self.n_rows < self.batch_size:
            raise SAEError(
                f"n_rows={self.n_rows} is less than one batch of {self.batch_size}. Train on more, or lower batch_size."
            )
        if not (0 <= self.warm_up <= 1 and 0 <= self.decay <= 1 and self.warm_up + self.decay <= 1):
            raise SAEError(f"warm_up={self.warm_up} and decay={self.decay} are shares of all steps, together at most 1.")
        if self.counts and self.k > self.d_sae:
            raise SAEError(f"k={self.k} of d_sae={self.d_sae} latents cannot be active. Give k <= d_sae.")
        if self.prefixes and (list(self.prefixes) != sorted(set(self.prefixes)) or self.prefixes[-1] != self.d_sae):
            raise SAEError(f"prefixes={self.prefixes} must grow and end with d_sae={self.d_sae}.")

    def _check_choices(self) -> None:
        choices = {"architecture": ARCHITECTURES, "decoder": ("unit", "free"), "precision": PRECISIONS}
        choices["revive"] = (None, "aux", "resample", "none")
        for name, known in choices.items():
            if (given := getattr(self, name)) not in known:
                names = [str(one) for one in known if one is not None]
                raise SAEError(f"{name} cannot be {given!r}; it is one of {', '.join(names)}.{nearest(str(given), names)}")
        if self.counts and self.decoder == "free":
            raise SAEError(f"{self.architecture!r} compares latents by size, so their rows need norm 1: use decoder='unit'.")

    def _check_numbers(self) -> None:
        """Counts are whole (2e6 is), and each number on its side of 0; NaN is on neither."""
        for name in _WHOLE:
            if (given := getattr(self, name)) is not None:
                if isinstance(given, bool) or not isinstance(given, int | float) or given != given // 1:
                    raise SAEError(f"{name}={given!r} must be a whole number.")
                object.__setattr__(self, name, int(given))
        for name in (*_POSITIVE, *(name for name in ("dead_after", "clip") if getattr(self, name) is not None)):
            if not getattr(self, name) > 0:
                or_none = ", or None" if name in ("dead_after", "clip") else ""
                raise SAEError(f"{name}={getattr(self, name)} must be greater than 0{or_none}.")
        for name in ("sparsity", "aux_weight", "resamplings"):
            if not getattr(self, name) >= 0:
                raise SAEError(f"{name}={getattr(self, name)} must not be negative.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise SAEError(f"betas={self.betas} must be Adam's two, each at least 0 and less than 1.")

    @property
    def counts(self) -> bool:
        return self.architecture in COUNTING

    @property
    def revival(self) -> str:
        return self.revive or ("aux" if self.counts else "resample")

    @property
    def idle_rows(self) -> int:
        """After how many rows without it a latent counts as dead."""
        return self.dead_after or max(1, min(200_000, self.n_rows // 10))

    @property
    def n_steps(self) -> int:
        return self.n_rows // self.batch_size

    def learning_rate(self, step: int) -> float:
        """Up over the first steps, down over the last: linear, and greater than 0 at every step."""
        up, down = self.warm_up * self.n_steps, self.decay * self.n_steps
        return self.lr * min(1.0, (step + 1) / (up + 1), (self.n_steps - step) / (down + 1))

    def weight(self, step: int) -> float:
        """``sparsity`` at a step: it grows with the learning rate, so that no latent dies before it has learnt."""
        return self.sparsity * min(1.0, (step + 1) / (self.warm_up * self.n_steps + 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``TrainSettings.from_dict`` reads them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "TrainSettings":
        known = {one.name for one in fields(cls)}
        if unknown := [name for name in given if name not in known]:
            raise SAEError(
                f"there is no setting {unknown[0]!r}; there are {', '.join(sorted(known))}.{nearest(unknown[0], known)}"
            )
        tuples: dict[str, Any] = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        return cls(**{**given, **tuples})
