"""An activation as relevant + irrelevant: what chosen sources brought about, and everything else."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """``relevant + irrelevant = total``, always. Of the three numbers two are held, and the third follows.

    ``Split(relevant, irrelevant)`` carries both parts, as the papers write it. ``Split.within(total, relevant)`` is for
    a pass that is known: the total is the clean run's, shared by all sources (it may lack the leading axis ``source``),
    and only the relevant part is carried.

    >>> Split.within(torch.tensor([3.0, 2.0]), torch.tensor([1.0, -1.0])).irrelevant
    tensor([2., 3.])
    """

    relevant: Float[Tensor, "*axes"]
    _irrelevant: Float[Tensor, "*axes"] | None = None
    _total: Float[Tensor, "*known_axes"] | None = None

    @classmethod
    def within(cls, total: Float[Tensor, "*known_axes"], relevant: Float[Tensor, "*axes"]) -> "Split":
        """The part ``relevant`` of a known ``total``."""
        return cls(relevant, None, total)

    @property
    def irrelevant(self) -> Float[Tensor, "*axes"]:
        if self._irrelevant is not None:
            return self._irrelevant
        assert self._total is not None
        return self._total - self.relevant

    @property
    def total(self) -> Float[Tensor, "*known_axes"]:
        if self._total is not None:
            return self._total
        assert self._irrelevant is not None
        return self.relevant + self._irrelevant

    @property
    def carries_both(self) -> bool:
        """Whether both parts are held, rather than one and a known total."""
        return self._irrelevant is not None

    def map(self, change) -> "Split":
        """The same linear change (a slice, a reshape, a product) of both parts and of the total, as far as they are held."""
        parts = (None if part is None else change(part) for part in (self._irrelevant, self._total))
        return Split(change(self.relevant), *parts)

    def __add__(self, other: "Split") -> "Split":
        """Part by part. Known totals are added too."""
        if self._total is not None and other._total is not None:
            return Split.within(self._total + other._total, self.relevant + other.relevant)
        return Split(self.relevant + other.relevant, self.irrelevant + other.irrelevant)


def share(
    relevant: Float[Tensor, "*axes"], irrelevant: Float[Tensor, "*axes"], *, overwrite: bool = False
) -> Float[Tensor, "*axes"]:
    """``|relevant| / (|relevant| + |irrelevant|)``, element by element, and 0 where both are 0.

    Computed as ``1 / (1 + |irrelevant / relevant|)``, in place where ``irrelevant`` may be overwritten: fresh memory costs
    more than the arithmetic. The published code adds 1e-8 to the denominator, which loses the bias where both parts are
    small (half of it at 1e-8); and in half precision 1e-8 is 0, and 0/0 no number.
    """
    ratio = torch.div(irrelevant, relevant, out=irrelevant) if overwrite else irrelevant / relevant
    return ratio.abs_().add_(1).reciprocal_().nan_to_num_(0.0)
