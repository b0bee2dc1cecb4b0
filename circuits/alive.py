"""Which parts of a circuit have to be run at all.

A part that no kept path joins to the logits is read by nobody: it need not be run. A part whose every input is cut does
what it does when *everything* is cut, the same in all circuits: it is run once for all of them. What is left is alive,
and in a small circuit that is little. Both are read off the masks before any tensor is touched, and both are exact.

Where the heads of a layer share a normalisation (``joint``) each of them depends on what all of them read: if one lives,
all do, and what one of them needs, all need.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from circuits.wiring import Wiring


@dataclass(frozen=True)
class Alive:
    """``kept``: which edges each circuit keeps. ``reads``: which readers take something that is not wholly ablated, and
    are needed; ``writes``: which writers are needed and do something else than with everything cut.
    """

    wiring: Wiring
    kept: Bool[np.ndarray, "variant writer reader"]
    reads: Bool[np.ndarray, "variant reader"]
    writes: Bool[np.ndarray, "variant writer"]

    @classmethod
    def of(
        cls, wiring: Wiring, kept: Bool[np.ndarray, "variant edge"], *, dead_carry_nothing: bool, joint: bool = False
    ) -> "Alive":
        """``dead_carry_nothing``: a part whose inputs are all cut writes exactly its replacement, as under resampling.
        ``joint``: the heads of a layer share a normalisation (``ModelConfig.has_joint_heads``).
        """
        grid = wiring.grid(kept)
        is_needed, is_needed_reader = _needed(wiring, grid, joint)
        reads, writes = is_needed_reader.copy(), np.zeros(grid.shape[:2], dtype=bool)
        writes[:, 0] = True
        for parts, readers, through in _stages(wiring, joint):
            before = int(wiring.writers_before[readers.start])
            brings = grid[:, :before, readers]
            brings = brings & writes[:, :before, None] if dead_carry_nothing else brings
            reads[:, readers] &= brings.any(1)
            writes[:, parts] = is_needed[:, parts] & (reads[:, readers] @ through.T)
        return cls(wiring, grid, reads, writes)

    @cached_property
    def row(self) -> Int[np.ndarray, "variant writer"]:
        """Where each living writer stands among all of them, variant by variant; -1 for the others."""
        rows = np.full(self.writes.shape, -1)
        rows[self.writes] = np.arange(int(self.writes.sum()))
        return rows

    def __getitem__(self, variants: slice) -> "Alive":
        return Alive(self.wiring, self.kept[variants], self.reads[variants], self.writes[variants])


def _needed(
    wiring: Wiring, grid: Bool[np.ndarray, "variant writer reader"], joint: bool
) -> tuple[Bool[np.ndarray, "variant writer"], Bool[np.ndarray, "variant reader"]]:
    """Which parts and which readers have a kept path to the logits; from the last layer to the first."""
    writers, readers = np.zeros(grid.shape[:2], dtype=bool), np.zeros((len(grid), grid.shape[2]), dtype=bool)
    readers[:, -1] = True
    for parts, its_readers, through in reversed(list(_stages(wiring, joint))):
        writers[:, parts] = (grid[:, parts, its_readers.stop :] & readers[:, None, its_readers.stop :]).any(2)
        readers[:, its_readers] = writers[:, parts] @ through
    return writers, readers


def _stages(wiring: Wiring, joint: bool) -> Iterator[tuple[slice, slice, Bool[np.ndarray, "part reader"]]]:
    """A layer's heads, its MLP, the next layer's heads, ...: which writers, their readers, and who depends on which."""
    for layer in range(wiring.n_layers):
        heads, ports = wiring.head_slice(layer), wiring.port_slice(layer)
        own = wiring.reads[heads, ports]
        yield heads, ports, np.ones_like(own) if joint else own
        if wiring.has_mlp:
            mlp = wiring.mlp_reader(layer)
            yield slice(heads.stop, heads.stop + 1), slice(mlp, mlp + 1), np.ones((1, 1), dtype=bool)
