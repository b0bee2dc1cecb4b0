"""Running circuits: many at once over the same prompts, and of each only what is alive (``alive.py``).

Every reader takes what it would take if all edges were cut, ``Σ_u a'_u``, plus what its kept edges bring more,
``Σ_kept (a_u - a'_u)``: the same as the whole stream less what the cut edges bring, but a sum over the few edges that a
circuit keeps. A reader of no living edge needs no sum at all, a part of no living reader no run. The positions before
the first that the ablation changes are run once, and later ones attend to their keys and values.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.alive import Alive
from circuits.writes import Writes, expand, heads_sum
from mechinterp.models.attention import Prefix
from mechinterp.models.transformer import ResidualStart, Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site


@dataclass(frozen=True)
class AllCut:
    """The run in which every edge is cut, from position ``first`` on; what circuits have in common.

    ``pre``, ``mid``, ``last``: the streams that a layer's heads, its MLP and the logits read. ``ports``: q of every head, k
    and v of every group. ``changes``: what each part then writes more than its replacement, or None where that is nothing.
    """

    model: Transformer
    prompts: PromptBatch
    first: int
    clean: Float[Tensor, "batch pos d_model"]
    replaced: Writes
    pre: list[Float[Tensor, "batch pos d_model"]]
    mid: list[Float[Tensor, "batch pos d_model"]]
    last: Float[Tensor, "batch pos d_model"]
    ports: list[tuple[Tensor, Tensor, Tensor]]
    prefix: Prefix | None
    changes: Float[Tensor, "writer batch pos d_model"] | None

    @classmethod
    def of(cls, model: Transformer, prompts: PromptBatch, replaced: Writes) -> "AllCut":
        """About one forward."""
        config, stream, embedded = model.config, replaced.input, model.embed(prompts.clean)
        pre, mid, ports, changes = [], [], [], [embedded[None] - stream]
        for layer, block in enumerate(model.weights.blocks):
            pre.append(stream)
            ports.append(model.project(layer, stream))
            after = stream + heads_sum(model.weights, layer, replaced.z[layer]) + block.b_O
            mid.append(stream if config.parallel else after)
            stream = after + replaced.mlp_out[layer] if config.has_mlp else after
            if not replaced.one_pass:
                z = model.written(layer, model.mix(layer, *ports[-1]))
                changes.append(expand(model.weights, layer, z - replaced.z[layer]))
                if config.has_mlp:
                    changes.append(model.feed_forward(layer, mid[-1])[None] - replaced.mlp_out[layer])
        first = _first_change(embedded - replaced.input) if replaced.one_pass and config.causal else 0
        keys, values = ([port[i][:, :first] for port in ports] for i in (1, 2))
        pre, mid = ([x[:, first:] for x in streams] for streams in (pre, mid))
        return cls(
            model,
            prompts,
            first,
            embedded[:, first:],
            replaced.map(lambda x: x[:, first:]),
            pre,
            mid,
            stream[:, first:],
            [tuple(x[:, first:] for x in port) for port in ports],  # type: ignore[misc]
            Prefix(keys, values, first) if first else None,
            None if replaced.one_pass else torch.cat(changes),
        )


def _first_change(change: Float[Tensor, "batch pos d_model"]) -> int:
    """The first position that the ablation changes in any prompt, but never all of them."""
    changed = (change != 0).any(2).any(0)
    return int(changed.int().argmax()) if bool(changed.any()) else change.shape[1] - 1


@torch.no_grad()
def run_kept(base: AllCut, alive: Alive) -> Float[Tensor, "variant batch d_vocab"]:
    """Logits at END of every circuit of ``alive``. ``living writers * batch * pos * d_model`` numbers at a time."""
    return _Run(base, alive).logits()


class _Run:
    """One pass over all circuits. ``more``: what each living writer writes above its replacement, filled as the pass goes."""

    def __init__(self, base: AllCut, alive: Alive):
        self.base, self.alive, self.wiring, self.model = base, alive, alive.wiring, base.model
        self.more = base.clean.new_empty((int(alive.writes.sum()), *base.clean.shape))
        self.more[self._rows(0, np.arange(len(alive.writes)))] = base.clean - base.replaced.input

    def logits(self) -> Float[Tensor, "variant batch d_vocab"]:
        for layer in range(self.wiring.n_layers):
            self._run_heads(layer)
            if self.wiring.has_mlp:
                self._run_mlp(layer)
        return self._unembed()

    def _run_heads(self, layer: int) -> None:
        """The living heads of a layer, in the circuits that have any."""
        model, ports = self.model, self.wiring.port_slice(layer)
        variants = np.flatnonzero(self.alive.reads[:, ports].any(1))
        if not len(variants):
            return
        which, port = np.nonzero(self.alive.reads[variants, ports])
        streams = self._streams(variants[which], ports.start + port, self.base.pre[layer])
        read = model.project_some(layer, _index(port), streams.flatten(1, 2)).unflatten(1, streams.shape[1:3])
        all_cut = torch.cat(self.base.ports[layer], dim=2).movedim(2, 0)  # [port batch pos d_head], as in `reads`
        inputs = all_cut.repeat(len(variants), 1, 1, 1, 1)
        inputs[_index(which), _index(port)] = read
        sizes = [x.shape[2] for x in self.base.ports[layer]]
        q, k, v = (x.movedim(1, 3).flatten(0, 1) for x in inputs.split(sizes, dim=1))
        z = model.written(layer, model.mix(layer, q, k, v, prefix=self.base.prefix)).unflatten(0, (len(variants), -1))
        heads = self.wiring.head_slice(layer)
        which, head = np.nonzero(self.alive.writes[variants, heads])
        change = z[_index(which), :, :, _index(head)] - self.base.replaced.z[layer].movedim(2, 0)[_index(head)]
        written = torch.bmm(change.flatten(1, 2), model.weights.W_O(layer)[_index(head)])
        self.more[self._rows(heads.start + head, variants[which])] = written.unflatten(1, change.shape[1:3])

    def _run_mlp(self, layer: int) -> None:
        reader = self.wiring.mlp_reader(layer)
        variants = np.flatnonzero(self.alive.reads[:, reader])
        if len(variants):
            streams = self._streams(variants, np.full(len(variants), reader), self.base.mid[layer])
            out = self.model.feed_forward(layer, streams.flatten(0, 1)).unflatten(0, streams.shape[:2])
            writer = self.wiring.head_slice(layer).stop
            self.more[self._rows(writer, variants)] = out - self.base.replaced.mlp_out[layer]

    def _unembed(self) -> Float[Tensor, "variant batch d_vocab"]:
        n, prompts = len(self.alive.kept), self.base.prompts
        rows = torch.arange(len(prompts), device=self.more.device)
        at_end = (slice(None), rows, prompts.end - self.base.first)
        every = np.arange(n)
        streams = self._streams(every, np.full(n, -1), self.base.last[at_end[1:]], at_end).flatten(0, 1).unsqueeze(1)
        start = ResidualStart(Site("resid_post", self.model.config.n_layers - 1), streams)
        logits, _ = self.model.run(None, start=start, logits_at="last")
        return logits.unflatten(0, (n, -1))

    def _streams(self, variants: np.ndarray, readers: np.ndarray, all_cut: Tensor, at=()) -> Float[Tensor, "pair *place"]:
        """What each pair of circuit and reader takes; pairs of one circuit stand together."""
        streams = all_cut.new_empty((len(variants), *all_cut.shape))
        before = int(self.wiring.writers_before[readers].max())
        for variant, pairs in _runs(variants):
            kept = self.alive.kept[variant, :before, readers[pairs]]
            living = np.flatnonzero(self.alive.writes[variant, :before])
            first = int(self.alive.row[variant, 0])
            more = self.more[first : first + len(living)]
            share = torch.as_tensor(kept[:, living], device=more.device).to(more.dtype)
            torch.mm(share, (more[at] if at else more).flatten(1), out=streams[pairs].flatten(1))
        if self.base.changes is not None:
            changes, dead = self.base.changes[:before], ~self.alive.writes[variants, :before]
            share = torch.as_tensor(self.alive.kept[variants, :before, readers] & dead, device=changes.device).to(changes.dtype)
            streams += (share @ (changes[at] if at else changes).flatten(1)).unflatten(1, all_cut.shape)
        return streams.add_(all_cut)

    def _rows(self, writers: np.ndarray | int, variants: np.ndarray) -> Int[Tensor, "pair"]:
        return _index(self.alive.row[variants, writers])


def _index(positions: np.ndarray) -> Int[Tensor, "pair"]:
    return torch.as_tensor(positions)


def _runs(variants: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Equal neighbours as slices."""
    starts = np.flatnonzero(np.append(True, np.diff(variants) != 0))
    for start, stop in zip(starts, [*starts[1:], len(variants)], strict=True):
        yield int(variants[start]), slice(int(start), int(stop))
