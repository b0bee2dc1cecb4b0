"""A sparse autoencoder: an activation written as a few of many directions, ``x ~ sum_i f_i W_dec[i] + b_dec``.

There is one class, with a group axis: an autoencoder on a layer's concatenated ``z`` is one group, and those of every head
of a model are ``n_layers * n_heads`` groups in the same tensors. What tells architectures apart is how latents become
active: one function in ``KINDS``. How each is trained is told in ``objectives.py``; batch top-k and Matryoshka
autoencoders are jump-ReLUs once they are trained.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import SAEError, nearest
from mechinterp.models.config import ModelConfig
from saes.places import Place
from saes.pursuit import Pursuit, pursue

Rows = Float[Tensor, "group row d_in"]
Latents = Float[Tensor, "group row d_sae"]


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """``latents = kind((x - b_dec) W_enc + b_enc)``, ``x ~ latents W_dec + b_dec``, one a group.

    ``kind`` is a name of ``KINDS``; ``k`` is the number of latents a position of those that count them. ``threshold`` is
    the jump-ReLU's. A gated autoencoder opens latents where ``(x - b_dec) W_enc + b_gate > 0`` and sizes them by
    ``(x - b_dec) W_enc e^r_mag + b_enc``. ``normalize`` is what SAELens does to every input before and takes back after
    ("none", "constant_norm_rescale", "layer_norm"). ``pursuit`` tells a matching pursuit, which has no encoder (``W_enc`` is
    ``W_dec`` transposed), when to stop. ``about`` holds facts that survive JSON: the model's name, how the
    autoencoder was trained. Rows of ``W_dec`` need not have norm 1; our trainer leaves them so.

    >>> autoencoder = SparseAutoencoder.random([Place.parse("z.0")], d_in=4, d_sae=8, kind="topk", k=2)
    >>> (autoencoder.encode(torch.ones(1, 3, 4)) > 0).sum(-1) <= 2
    tensor([[True, True, True]])
    """

    kind: str
    places: tuple[Place, ...]
    W_enc: Float[Tensor, "group d_in d_sae"]
    b_enc: Float[Tensor, "group d_sae"]
    W_dec: Float[Tensor, "group d_sae d_in"]
    b_dec: Float[Tensor, "group d_in"]
    k: int | None = None
    threshold: Float[Tensor, "group d_sae"] | None = None
    b_gate: Float[Tensor, "group d_sae"] | None = None
    r_mag: Float[Tensor, "group d_sae"] | None = None
    normalize: str = "none"
    pursuit: Pursuit | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise SAEError(f"there is no kind of autoencoder {self.kind!r}; there are {', '.join(KINDS)}.")
        if self.normalize not in NORMALIZATIONS:
            raise SAEError(f"there is no normalization {self.normalize!r}; there are {', '.join(NORMALIZATIONS)}.")
        group, d_in, d_sae = self.W_enc.shape
        shapes = {"b_enc": (group, d_sae), "W_dec": (group, d_sae, d_in), "b_dec": (group, d_in)}
        shapes |= dict.fromkeys(_OWN[self.kind], (group, d_sae))
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is None or tuple(tensor.shape) != shape:
                got = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise SAEError(f"{name} {got}; with W_enc {tuple(self.W_enc.shape)} a {self.kind} autoencoder has {shape}.")
        if len(self.places) != group:
            raise SAEError(f"{len(self.places)} places are named for {group} groups. Name one place a group.")
        if self.kind in _COUNTING and not (self.k and 1 <= self.k <= d_sae):
            raise SAEError(f"k={self.k} latents of {d_sae} cannot be active. Give 1 <= k <= {d_sae}.")

    @classmethod
    def random(cls, places: "list[Place] | tuple[Place, ...]", *, d_in: int, d_sae: int, kind: str = "relu", **given: Any):
        """Untrained: unit decoder rows of random direction, the encoder their transpose (Gao et al. 2024, sec. A.1)."""
        seed = given.pop("seed", 0)
        rows = torch.stack([_directions(d_in, d_sae, seed, place) for place in places])
        own = {"threshold": 0.01, "b_gate": 0.0, "r_mag": 0.0}
        given = {name: torch.full(rows.shape[:2], own[name]) for name in _OWN[kind]} | given
        zeros = {"b_enc": torch.zeros(rows.shape[:2]), "b_dec": torch.zeros(len(rows), d_in)}
        return cls(kind, tuple(places), rows.mT.contiguous(), W_dec=rows, **zeros, **given)

    @property
    def n_groups(self) -> int:
        return len(self.places)

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[2]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec", *_OWN[self.kind])
        return {name: getattr(self, name) for name in names}

    @property
    def W_pre(self) -> Float[Tensor, "group d_in d_sae"]:
        """What ``pre_activations`` multiply inputs with: ``W_enc``, and for gated ones ``W_enc e^r_mag``."""
        return self.W_enc if self.r_mag is None else self.W_enc * self.r_mag.exp().unsqueeze(1)

    def pre_activations(self, x: Float[Tensor, "group *row d_in"]) -> Float[Tensor, "group *row d_sae"]:
        """``(x - b_dec) W_pre + b_enc``: how large each latent would be if it were active."""
        flat, shape = self._normalized(self._flat(x))[0], x.shape[1:-1]
        return _shaped(_affine(flat - self.b_dec.unsqueeze(1), self.W_pre, self.b_enc), shape)

    def encode(self, x: Float[Tensor, "group *row d_in"]) -> Float[Tensor, "group *row d_sae"]:
        """The latents of inputs at each group's place; most are 0. In the units of ``x``, times a decoder row."""
        flat, shape = self._normalized(self._flat(x))[0], x.shape[1:-1]
        return _shaped(KINDS[self.kind](self, flat), shape)

    def decode(self, latents: Float[Tensor, "group *row d_sae"]) -> Float[Tensor, "group *row d_in"]:
        """``latents W_dec + b_dec`` (still normalised, where ``normalize`` is not "none")."""
        flat = latents.flatten(1, -2) if latents.dim() > 2 else latents.unsqueeze(1)
        return _shaped(_affine(flat, self.W_dec, self.b_dec), latents.shape[1:-1])

    def reconstruct(
        self,
        x: Float[Tensor, "group *row d_in"],
        edit: Callable[[Float[Tensor, "group *row d_sae"]], Float[Tensor, "group *row d_sae"]] | None = None,
    ) -> Float[Tensor, "group *row d_in"]:
        """What is left of ``x`` after encoding and decoding; ``edit`` may change the latents in between."""
        flat, undo = self._normalized(self._flat(x))
        latents = _shaped(KINDS[self.kind](self, flat), x.shape[1:-1])
        decoded = self.decode(latents if edit is None else edit(latents))
        return _shaped(undo(self._flat(decoded)), x.shape[1:-1])

    def read(self, cache: ActivationCache) -> Float[Tensor, "group batch pos d_in"]:
        """The activations at each group's place."""
        return torch.stack([place.read(cache) for place in self.places])

    def index(self, place: "Place | str") -> int:
        """Which group stands at a place."""
        wanted = Place.parse(place) if isinstance(place, str) else place
        if wanted not in self.places:
            names = [str(at) for at in self.places]
            raise SAEError(
                f"no autoencoder here stands at {str(wanted)!r}; they stand at {_some(names)}.{nearest(str(wanted), names)}"
            )
        return self.places.index(wanted)

    def group(self, *which: "Place | str | int") -> "SparseAutoencoder":
        """The autoencoders of some groups, by place or number. Shares memory where there is one."""
        numbers = [at if isinstance(at, int) else self.index(at) for at in which]
        rows = slice(numbers[0], numbers[0] + 1 or None) if len(numbers) == 1 else numbers
        chosen = {name: tensor[rows] for name, tensor in self.tensors.items()}
        return replace(self, places=tuple(self.places[number] for number in numbers), **chosen)

    def to(self, device: "torch.device | str | None" = None, dtype: torch.dtype | None = None) -> "SparseAutoencoder":
        moved = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.tensors.items()}
        return replace(self, **moved)

    def check_fits(self, config: ModelConfig) -> None:
        """``SAEError`` unless every group's place is in the model and as wide as the autoencoder."""
        for place in self.places:
            if (width := place.width(config)) != self.d_in:
                raise SAEError(
                    f"this autoencoder reads {self.d_in} numbers a position, and {str(place)!r} of {config.name} has {width}. "
                    f"It was made for {self.about.get('model') or 'another model'}, or for another site."
                )

    def _flat(self, x: Tensor) -> Rows:
        if x.shape[-1] != self.d_in or len(x) != self.n_groups:
            wanted = f"[{self.n_groups}, ..., {self.d_in}]"
            raise SAEError(f"this autoencoder reads {wanted} (group, ..., d_in); it was given {list(x.shape)}.")
        return x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)

    def _normalized(self, x: Rows) -> tuple[Rows, Callable[[Rows], Rows]]:
        return NORMALIZATIONS[self.normalize](x)


def _relu(autoencoder: SparseAutoencoder, x: Rows) -> Latents:
    return _pre(autoencoder, x).relu_()


def _topk(autoencoder: SparseAutoencoder, x: Rows) -> Latents:
    """The k largest, where they are positive."""
    pre = _pre(autoencoder, x)
    values, indices = pre.topk(autoencoder.k or 0, sorted=False)
    return torch.zeros_like(pre).scatter_(-1, indices, values.relu())


def _abstopk(autoencoder: SparseAutoencoder, x: Rows) -> Latents:
    """The k largest by magnitude, with their signs."""
    pre = _pre(autoencoder, x)
    indices = pre.abs().topk(autoencoder.k or 0, sorted=False).indices
    return torch.zeros_like(pre).scatter_(-1, indices, pre.gather(-1, indices))


def _jumprelu(autoencoder: SparseAutoencoder, x: Rows) -> Latents:
    """``ReLU(pre)`` where ``pre`` exceeds the latent's own threshold (Rajamanoharan et al. 2024, arXiv:2407.14435)."""
    assert autoencoder.threshold is not None
    pre = _pre(autoencoder, x)
    return pre.relu() * (pre > autoencoder.threshold.unsqueeze(1))


def _gated(autoencoder: SparseAutoencoder, x: Rows) -> Latents:
    """A gate says whether, a magnitude how much (Rajamanoharan et al. 2024, arXiv:2404.16014)."""
    assert autoencoder.b_gate is not None
    assert autoencoder.r_mag is not None
    shared = torch.bmm(x - autoencoder.b_dec.unsqueeze(1), autoencoder.W_enc)
    magnitude = shared * autoencoder.r_mag.exp().unsqueeze(1) + autoencoder.b_enc.unsqueeze(1)
    return magnitude.relu() * (shared + autoencoder.b_gate.unsqueeze(1) > 0)


def _matching_pursuit(autoencoder: SparseAutoencoder, x: Rows) -> Latents:
    """One latent after another, each the best for the residual. ``W_enc`` and ``b_enc`` have no part in it."""
    return pursue(x - autoencoder.b_dec.unsqueeze(1), autoencoder.W_dec, autoencoder.pursuit or Pursuit())


def _pre(autoencoder: SparseAutoencoder, x: Rows) -> Latents:
    return _affine(x - autoencoder.b_dec.unsqueeze(1), autoencoder.W_enc, autoencoder.b_enc)


def _shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    """The rows of each group in their axes again; without any, the one row."""
    return rows.unflatten(1, shape) if shape else rows.squeeze(1)


def _affine(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return torch.baddbmm(b.unsqueeze(1), x, W)


def _identity(x: Rows) -> tuple[Rows, Callable[[Rows], Rows]]:
    return x, lambda y: y


def _constant_norm(x: Rows) -> tuple[Rows, Callable[[Rows], Rows]]:
    """Every input at norm ``sqrt(d_in)``."""
    scale = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
    return x * scale, lambda y: y / scale


def _layer_norm(x: Rows) -> tuple[Rows, Callable[[Rows], Rows]]:
    """Every input centred and divided by its own deviation, as SAELens does it: Bessel's correction, 1e-5 going in alone."""
    mean = x.mean(-1, keepdim=True)
    deviation = (x - mean).std(-1, keepdim=True)
    return (x - mean) / (deviation + 1e-5), lambda y: y * deviation + mean


KINDS: dict[str, Callable[[SparseAutoencoder, Rows], Latents]] = {
    "relu": _relu,
    "topk": _topk,
    "jumprelu": _jumprelu,
    "gated": _gated,
    "abstopk": _abstopk,
    "matching_pursuit": _matching_pursuit,
}
NORMALIZATIONS = {"none": _identity, "constant_norm_rescale": _constant_norm, "layer_norm": _layer_norm}
_OWN = {"jumprelu": ("threshold",), "gated": ("b_gate", "r_mag")} | dict.fromkeys(
    ("relu", "topk", "abstopk", "matching_pursuit"), ()
)
_COUNTING = ("topk", "abstopk")


def _directions(d_in: int, d_sae: int, seed: int, place: Place) -> Float[Tensor, "d_sae d_in"]:
    """Unit rows that depend on the seed and the place alone: a head's autoencoder starts alike alone and among others."""
    generator = torch.Generator().manual_seed(seeded(seed, str(place)))
    rows = torch.randn(d_sae, d_in, generator=generator)
    return rows / rows.norm(dim=-1, keepdim=True)


def seeded(seed: int, *names: "str | int") -> int:
    """A seed of one's own for each name, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:7], "big")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
