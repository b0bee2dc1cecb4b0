"""A circuit while it is being cut down: its run, kept up to date, and what a change at one reader does behind it.

Greedy search (ACDC) goes through the readers from the logits down to layer 0. What is already cut then lies at or behind
the reader in hand, and three things follow, each exact:

1. Everything before that reader runs as in the clean run: its stream, and what a cut edge takes from it, are known.
2. A part whose outgoing edges are all cut is *dead*: nothing it reads can matter. A part that lives reaches the logits
   through kept edges, so a change spreads along kept edges alone, as a difference from the current run.
3. A part read by no living key or value is read at END alone (the last layer always, with few edges most of the others),
   and is computed there alone.

Where the heads of a layer share a normalisation, what one of them gathers changes what all of them write: they live or die
together, are read wherever any of them is, and are computed together.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.discovery.suffix import CleanRun, at_end
from circuits.wiring import Wiring
from mechinterp.models.attention import Heads, mix


class PrunedRun:
    """The run of a circuit that starts with all edges. ``kept`` is its grid; ``cut`` takes edges away.

    Readers must come from the logits down. It holds the residual stream of every living reader it has come to:
    ``readers * batch * pos * d_model`` numbers at most, and as many for the writers.
    """

    def __init__(self, run: CleanRun, wiring: Wiring):
        self.run, self.wiring = run, wiring
        self.kept = wiring.allowed.copy()
        self.streams: dict[int, Tensor] = {}  # reader: what it reads, [batch pos d_model]
        self.ports: dict[int, Tensor] = {}  # reader: the query, key or value made of it, [batch pos d_head]
        self.written: dict[int, Tensor] = {}  # writer: its z or mlp_out
        self.everywhere: set[int] = set()  # writers that are read at other positions than END
        self.begun: set[tuple[int | None, bool]] = set()  # a layer's heads, or its MLP, once a reader of theirs came up
        self.logits = len(wiring.readers) - 1
        self.parts = [np.flatnonzero(by).tolist() for by in wiring.reads.T]  # the writers that read through a reader
        self.readers = [np.flatnonzero(through).tolist() for through in wiring.reads]  # of a head: its q, k and v
        deltas = run.delta.first(len(wiring.writers))
        by_width = {True: deltas, False: at_end(run, deltas.flatten(0, 1)).unflatten(0, deltas.shape[:2])}
        self.changes = {width: (change, change.flatten(1).any(1).tolist()) for width, change in by_width.items()}
        last = run["resid_post", wiring.n_layers - 1]
        self.streams[self.logits] = at_end(run, last)

    def reach(self, reader: int) -> bool:
        """Begin with a reader, whose parts' outgoing edges are all decided: False if nothing that it reads can matter."""
        node = self.wiring.readers[reader]
        stage = (node.layer, node.kind == "mlp")
        if reader != self.logits and stage not in self.begun:
            self.begun.add(stage)
            begin = self._begin_mlp if node.kind == "mlp" else self._begin_heads
            begin(node.layer or 0)
        return reader in self.streams

    def _begin_mlp(self, layer: int) -> None:
        part = self.wiring.head_slice(layer).stop
        if self._lives(part):
            before = "resid_pre" if self.run.model.config.parallel else "resid_mid"
            self.streams[self.wiring.mlp_reader(layer)] = self._seen(part, self.run[before, layer])
            self.written[part] = self._seen(part, self.run["mlp_out", layer])

    def _begin_heads(self, layer: int) -> None:
        config, heads = self.run.model.config, self.wiring.head_slice(layer)
        parts = range(heads.start, heads.stop)
        living = [part for part in parts if self._lives(part)]
        if living and config.has_joint_heads:
            living = parts
            self.everywhere |= {*parts} if self.everywhere.intersection(parts) else set()
        for part in living:
            self.written[part] = self._seen(part, self.run[config.write_site, layer][:, :, part - heads.start])
            for port, reader in zip("qkv", self.readers[part], strict=True):
                made = self.run[port, layer][:, :, reader - self.wiring.port_slice(layer, port).start]
                stream, widely = self.run["resid_pre", layer], self._reads_everywhere(reader)
                self.streams[reader] = stream if widely else at_end(self.run, stream)
                self.ports[reader] = made if widely else at_end(self.run, made)

    def _lives(self, part: int) -> bool:
        """Whether anything is still read of what a part writes; and notes it if that is at other positions than END."""
        outgoing = np.flatnonzero(self.kept[part]).tolist()
        if any(map(self._reads_everywhere, outgoing)):
            self.everywhere.add(part)
        return bool(outgoing)

    def carried(self, reader: int) -> tuple[Float[Tensor, "writer batch pos d_model"], list[bool]]:
        """What cutting the edge from each writer changes in what ``reader`` reads, where it reads, and whether it does."""
        return self.changes[self._reads_everywhere(reader)]

    def tokens(self, reader: int) -> int:
        """How many positions of the batch a change at ``reader`` goes on with."""
        widely = not self.everywhere.isdisjoint(self.parts[reader])
        return self.run.n_tokens if widely else len(self.run.prompts)

    def ends(
        self, reader: int, change: Float[Tensor, "variant batch pos d_model"], keep: bool = False
    ) -> Float[Tensor, "variant batch 1 d_model"]:
        """The final stream at END if ``change`` is added to what ``reader`` reads; ``keep`` (one variant) makes it so."""
        spread = _Spread(self, reader, change.flatten(0, 1), keep)
        if reader != self.logits:
            for layer in range(self.wiring.readers[reader].layer or 0, self.wiring.n_layers):
                spread.through_heads(layer)
                spread.through_mlp(layer)
        return spread.at_logits().unflatten(0, change.shape[:2])

    def cut(self, reader: int, writers: Sequence[int], change: Float[Tensor, "batch pos d_model"]) -> None:
        """Cut the edges from ``writers`` into ``reader`` for good; together they change what it reads by ``change``."""
        self.kept[writers, reader] = False
        if bool(change.any()):
            self.ends(reader, change[None], keep=True)

    def _reads_everywhere(self, reader: int) -> bool:
        return self.wiring.readers[reader].port in ("k", "v") or not self.everywhere.isdisjoint(self.parts[reader])

    def _seen(self, part: int, x: Tensor) -> Tensor:
        return x if part in self.everywhere else at_end(self.run, x)


class _Spread:
    """A change on its way through the kept edges: for each writer it has come to, what that writes more than before."""

    def __init__(self, current: PrunedRun, reader: int, change: Float[Tensor, "row pos d_model"], keep: bool):
        self.current, self.run, self.model, self.keep = current, current.run, current.run.model, keep
        self.origin, self.change = reader, change
        self.variants = len(change) // len(current.run.prompts)
        self.wide, self.narrow = _Table(), _Table()

    def at_logits(self) -> Float[Tensor, "row 1 d_model"]:
        found, streams = self._read([self.current.logits])
        return streams[0] if found else self._now(self.current.streams[self.current.logits])

    def through_mlp(self, layer: int) -> None:
        if not self.model.config.has_mlp:
            return
        wiring, reader = self.current.wiring, self.current.wiring.mlp_reader(layer)
        if reader in self.current.streams:
            for stream in self._read([reader])[1]:
                self._write(wiring.head_slice(layer).stop, self.model.feed_forward(layer, stream))

    def through_heads(self, layer: int) -> None:
        current, ports = self.current, self.current.wiring.port_slice(layer)
        living = [reader for reader in range(ports.start, ports.stop) if reader in current.ports]
        wide = [reader for reader in living if current._reads_everywhere(reader)]
        moved = self._project(layer, *self._read(wide))
        moved |= self._project(layer, *self._read([reader for reader in living if reader not in wide]))
        parts = {part for reader in moved for part in current.parts[reader] if part in current.written}
        if parts and self.model.config.has_joint_heads:
            heads = current.wiring.head_slice(layer)
            parts = range(heads.start, heads.stop)
        for everywhere in (True, False):
            some = sorted(part for part in parts if (part in current.everywhere) is everywhere)
            if some:
                self._mix(layer, some, moved, everywhere)

    def _read(self, readers: list[int]) -> tuple[list[int], Float[Tensor, "found row pos d_model"]]:
        """Those of ``readers`` (all at END, or none) that the change comes to, and what they read now."""
        if self.origin in readers:
            found, brought = [self.origin], self.change[None]
        else:
            table = self.wide if readers and self.current._reads_everywhere(readers[0]) else self.narrow
            edges = self.current.kept[table.writers][:, readers]
            reached = np.flatnonzero(edges.any(axis=0))
            if not len(reached):
                return [], self.change[:0, None]
            found, brought = [readers[i] for i in reached], table.through(edges[:, reached])
        now = torch.stack([self.current.streams[reader] for reader in found])
        streams = (brought.unflatten(1, (self.variants, -1)) + now.unsqueeze(1)).flatten(1, 2)
        if self.keep:
            self.current.streams |= zip(found, streams, strict=True)
        return found, streams

    def _project(
        self, layer: int, readers: list[int], streams: Float[Tensor, "found row pos d_model"]
    ) -> dict[int, Float[Tensor, "row pos d_head"]]:
        """Queries, keys and values that ports make of streams of their own."""
        if not readers:
            return {}
        ports = torch.as_tensor(readers, device=streams.device) - self.current.wiring.port_slice(layer).start
        made = self.model.project_some(layer, ports, streams.flatten(1, 2)).unflatten(1, streams.shape[1:3])
        if self.keep:
            self.current.ports |= zip(readers, made, strict=True)
        return dict(zip(readers, made, strict=True))

    def _mix(self, layer: int, parts: list[int], moved: Mapping[int, Tensor], everywhere: bool) -> None:
        """The heads in ``parts`` attend again, with what has changed of their queries, keys and values."""
        wiring, weights, prefix = self.current.wiring, self.model.weights, self.run.prefix
        queries, keys, values = map(list, zip(*(self.current.readers[part] for part in parts), strict=True))
        whole = len(parts) == wiring.n_heads
        if whole:  # heads that share a key take it once; of some heads, each takes its own
            keys, values = (sorted(set(readers)) for readers in (keys, values))
        q, k, v = (torch.stack([self._port(reader, moved) for reader in port], dim=2) for port in (queries, keys, values))
        if prefix is not None:
            groups = [reader - wiring.port_slice(layer, "k").start for reader in keys]
            old = (kept[layer][:, :, groups].repeat(self.variants, 1, 1, 1) for kept in (prefix.keys, prefix.values))
            k, v = (torch.cat([before, new], dim=1) for before, new in zip(old, (k, v), strict=True))
        at = torch.arange(self.run.first, k.shape[1], device=k.device)[None]
        at = at if everywhere else self.run.prompts.end.repeat(self.variants)[:, None]
        indices = [part - wiring.head_slice(layer).start for part in parts]
        heads = Heads.of(weights, layer, at, only=None if whole else indices)
        z = mix(heads.turn_q(q), heads.turn_k(k), v, heads, is_triangle=everywhere and prefix is None)
        W_O = weights.W_O(layer)
        for part, head, one in zip(parts, indices, self.model.written(layer, z).unbind(2), strict=True):
            self._write(part, one, W_O[head])

    def _port(self, reader: int, moved: Mapping[int, Tensor]) -> Float[Tensor, "row pos d_head"]:
        return moved[reader] if reader in moved else self._now(self.current.ports[reader])

    def _now(self, value: Float[Tensor, "batch pos d"]) -> Float[Tensor, "row pos d"]:
        return value.repeat(self.variants, 1, 1)

    def _write(self, part: int, value: Float[Tensor, "row pos d"], W_O: Tensor | None = None) -> None:
        more = value - self._now(self.current.written[part])
        more = more if W_O is None else more @ W_O
        if part in self.current.everywhere:
            self.wide.add(part, more)
            more = at_end(self.run, more)
        self.narrow.add(part, more)
        if self.keep:
            self.current.written[part] = value


class _Table:
    """What some writers write more than before, in one piece of memory that grows by doubling."""

    def __init__(self):
        self.writers: list[int] = []
        self.values = torch.empty(0)

    def add(self, writer: int, more: Float[Tensor, "row pos d_model"]) -> None:
        filled = len(self.writers)
        if filled == len(self.values):
            grown = more.new_empty((max(4, 2 * filled), *more.shape))
            if filled:
                grown[:filled] = self.values
            self.values = grown
        self.values[filled] = more
        self.writers.append(writer)

    def through(self, edges: Bool[np.ndarray, "writer reader"]) -> Float[Tensor, "reader row pos d_model"]:
        """The sum over the writers that each reader takes from."""
        values = self.values[: len(self.writers)]
        return (torch.as_tensor(edges.T).to(values) @ values.flatten(1)).unflatten(1, values.shape[1:])
