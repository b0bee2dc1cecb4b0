"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al. 2024), in fp32.

Torch's own version works in bf16, which CPUs emulate slowly, and would treat queries, keys and values as one matrix.
Next to AdamW this brings induction and associative recall several times earlier in a model of this size.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's Newton-Schulz coefficients: singular values end in about [0.7, 1.2]


class Muon:
    """Updates ``matrices``, each written ``[d_in, n * d_out]`` and read as ``n`` matrices side by side.

    A matrix with more outputs than inputs takes a step longer by the root of their ratio (Jordan's rule).
    """

    def __init__(self, matrices: Sequence[tuple[Tensor, int]], momentum: float = 0.95, weight_decay: float = 0.01):
        self.matrices, self.momentum, self.weight_decay = list(matrices), momentum, weight_decay
        self.buffers = [torch.zeros_like(matrix) for matrix, _ in self.matrices]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One Nesterov step; ``lr`` is the spectral norm of a square matrix's update. Equal shapes go together."""
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor, float]]] = {}
        for (matrix, n), buffer in zip(self.matrices, self.buffers, strict=True):
            assert matrix.grad is not None
            buffer.lerp_(matrix.grad, 1 - self.momentum)
            ahead = matrix.grad.lerp(buffer, self.momentum)
            for part, update in zip(matrix.chunk(n, dim=1), ahead.chunk(n, dim=1), strict=True):
                is_tall = update.shape[0] > update.shape[1]
                stretch = max(1.0, update.shape[1] / update.shape[0]) ** 0.5
                part.mul_(1 - lr * self.weight_decay)
                wide, wide_update = (part.mT, update.mT) if is_tall else (part, update)
                by_shape.setdefault(tuple(wide.shape), []).append((wide, wide_update, stretch))
        for group in by_shape.values():
            directions = orthogonalize(torch.stack([update for _, update, _ in group]))
            for (part, _, stretch), direction in zip(group, directions, strict=True):
                part.add_(direction, alpha=-lr * stretch)


def orthogonalize(updates: Float[Tensor, "matrix rows columns"]) -> Float[Tensor, "matrix rows columns"]:
    """The nearest semi-orthogonal matrix to each, by five Newton-Schulz steps; rows must not exceed columns."""
    a, b, c = QUINTIC
    x = updates / (updates.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
