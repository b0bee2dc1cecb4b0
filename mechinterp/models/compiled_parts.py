"""What models set by hand are made of: named subspaces, heads written in them, distractors, and a rotation.

A head's score is a sum of products and its output a sum of copies (Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits": the QK and the OV circuit). Here both are given as pairs of small matrices, each pair in
dimensions of its own, so that a head is written as it is spoken: "attends where the query's token equals the key's
previous token; copies the token to the output".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.models.config import ModelConfig
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights

D_MLP = 32
# Distractors write with this gain, and hear each other through this one: louder than the circuit, yet never a howl.
LOUDNESS, ECHO = 6.0, 0.1
# Spreads the distractors' attention scores to about ±1: neither uniform nor one-hot.
_CURIOSITY = 3.0


@dataclass(frozen=True)
class Stream:
    """A residual stream cut into named subspaces at right angles, given by their dimensions.

    >>> stream = Stream({"token": 2, "out": 2})
    >>> stream.read("token") @ stream.write("out")      # a matrix that moves a token to the output
    tensor([[0., 0., 1., 0.],
            [0., 0., 0., 1.],
            [0., 0., 0., 0.],
            [0., 0., 0., 0.]], dtype=torch.float64)
    """

    sizes: Mapping[str, int]

    @property
    def d_model(self) -> int:
        return sum(self.sizes.values())

    def read(self, name: str, weights: Float[Tensor, "size width"] | None = None) -> Float[Tensor, "d_model width"]:
        """Takes the subspace's coordinates out of the stream; with ``weights``, these combinations of them."""
        names = list(self.sizes)
        first = sum(self.sizes[before] for before in names[: names.index(name)])
        weights = torch.eye(self.sizes[name]).double() if weights is None else weights.double()
        matrix = torch.zeros(self.d_model, weights.shape[1], dtype=torch.float64)
        matrix[first : first + self.sizes[name]] = weights
        return matrix

    def write(self, name: str) -> Float[Tensor, "size d_model"]:
        """Puts coordinates into the subspace."""
        return self.read(name).T


@dataclass(frozen=True)
class Head:
    W_Q: Float[Tensor, "d_model d_head"]
    W_K: Float[Tensor, "d_model d_head"]
    W_V: Float[Tensor, "d_model d_head"]
    W_O: Float[Tensor, "d_head d_model"]


def write_head(d_head: int, attend: Sequence[tuple[Tensor, Tensor]], move: Sequence[tuple[Tensor, Tensor]]) -> Head:
    """A head whose score is the sum over ``attend`` of <query Q, key K>, and which adds ``value V O`` for ``move``.

    Each pair ``(Q, K)`` is ``[d_model, width]`` twice, each ``(V, O)`` is ``[d_model, width]`` and
    ``[width, d_model]``; the widths of either list sum to at most ``d_head``.
    """
    return Head(
        W_Q=_fill([Q for Q, _ in attend], d_head),
        W_K=_fill([K for _, K in attend], d_head),
        W_V=_fill([V for V, _ in move], d_head),
        W_O=_fill([W.T for _, W in move], d_head).T,
    )


def assemble_model(
    tokenizer: Tokenizer,
    stream: Stream,
    layers: Sequence[Mapping[str, Head]],
    W_U: Float[Tensor, "d_model d_vocab"],
    *,
    seed: int,
    rotate: bool,
    n_heads: int = 4,
) -> tuple[Transformer, dict[str, str]]:
    """The model, and which head plays which role, e.g. ``{"previous": "a0.h2"}``.

    ``layers`` holds each layer's written heads by role; ``seed`` shuffles them among ``n_heads`` heads, the others
    being distractors, and each layer has a distractor MLP. Distractors read everything and write to the subspace
    ``"noise"``, which nobody else reads. ``stream`` also has ``"token"`` and ``"position"``, where the embeddings are
    one-hot. ``rotate`` turns the finished stream into a random basis, in which no axis means anything.
    """
    rng, generator = Random(seed), torch.Generator().manual_seed(seed)
    d_head = next(iter(layers[0].values())).W_Q.shape[1]
    named = {"embed.W_E": stream.write("token"), "pos_embed.W_pos": stream.write("position"), "unembed.W_U": W_U}
    roles: dict[str, str] = {}
    for layer, written in enumerate(layers):
        places = dict(zip(rng.sample(range(n_heads), len(written)), written, strict=True))
        roles |= {role: f"a{layer}.h{place}" for place, role in places.items()}
        noise = [_distractor_head(stream, d_head, generator) for _ in range(n_heads)]
        heads = [written[places[i]] if i in places else noise[i] for i in range(n_heads)]
        for matrix in ("W_Q", "W_K", "W_V", "W_O"):
            named[f"blocks.{layer}.attn.{matrix}"] = torch.stack([getattr(head, matrix) for head in heads])
        W_in, W_out = _distractor_mlp(stream, generator)
        named |= {f"blocks.{layer}.mlp.W_in": W_in, f"blocks.{layer}.mlp.W_out": W_out}
    config = ModelConfig(
        name=tokenizer.name,
        n_layers=len(layers),
        n_heads=n_heads,
        d_model=stream.d_model,
        d_head=d_head,
        d_mlp=D_MLP,
        d_vocab=W_U.shape[1],
        n_ctx=stream.sizes["position"],
        normalization="none",
        attention_scale=1.0,
    )
    if rotate:
        named = _rotated(named, _orthogonal(stream.d_model, stream.d_model, generator))
    return Transformer(Weights.from_named(config, named).to(dtype=torch.float32), tokenizer), roles


def _fill(parts: Sequence[Tensor], d_head: int) -> Float[Tensor, "d_model d_head"]:
    """The parts side by side, and zeros for the head's dimensions that nobody needs."""
    joined = torch.cat(list(parts), dim=1)
    assert joined.shape[1] <= d_head, f"a written head needs {joined.shape[1]} dimensions and has {d_head}"
    return torch.nn.functional.pad(joined, (0, d_head - joined.shape[1]))


def _distractor_head(stream: Stream, d_head: int, generator: torch.Generator) -> Head:
    W_Q, W_K, W_V = (_ears(stream, d_head, generator) for _ in range(3))
    W_O = _orthogonal(d_head, stream.sizes["noise"], generator)
    return Head(_CURIOSITY * W_Q, _CURIOSITY * W_K, W_V, LOUDNESS * W_O @ stream.write("noise"))


def _distractor_mlp(stream: Stream, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    W_out = _orthogonal(D_MLP, stream.sizes["noise"], generator)
    return _CURIOSITY * _ears(stream, D_MLP, generator), LOUDNESS * W_out @ stream.write("noise")


def _ears(stream: Stream, width: int, generator: torch.Generator) -> Float[Tensor, "d_model width"]:
    """Random directions of the whole stream, the other distractors' noise turned down."""
    quiet = 1 - (1 - ECHO) * stream.read("noise").sum(1, keepdim=True)
    return quiet * _orthogonal(stream.d_model, width, generator)


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> Float[Tensor, "rows columns"]:
    """Random, with orthonormal columns (or rows, if there are fewer of them)."""
    if rows < columns:
        return _orthogonal(columns, rows, generator).T
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def _rotated(named: Mapping[str, Tensor], R: Float[Tensor, "d_model d_model"]) -> dict[str, Tensor]:
    """The same model in another basis of the residual stream: what writes is followed by R, what reads undoes it."""
    writes = ("W_E", "W_pos", "W_O", "W_out")
    return {name: W @ R if name.endswith(writes) else R.T @ W for name, W in named.items()}
