"""The two runs of path patching (see ``paths``), for many senders at once.

Rows are stacked along the batch, sender-major: all prompts of the first sender, then all of the second. What is carried
from layer to layer is the *change* of the residual stream, so that what a frozen head writes need not be written at all.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery import suffix
from circuits.discovery.suffix import CleanRun
from circuits.writes import Writes, heads_sum
from mechinterp.nodes import PORTS, Node

# Where receivers listen, the stream as it enters a layer or as its MLP reads it, and what they hear there: a change.
Place = tuple[str, int]
Heard = Mapping[Place, Float[Tensor, "row at d_model"]]


@torch.no_grad()
def path_falls(
    run: CleanRun,
    senders: Sequence[Node],
    groups: Sequence[tuple[Node, ...]],
    at: Int[Tensor, "batch at"],
    *,
    frozen_mlps: bool,
    bar: tqdm,
) -> Float[Tensor, "group sender batch"]:
    """The fall of the metric for each sender, when the receivers of each group read what it sends to them at ``at``.

    Senders and the receivers of a group are in order of computation, the logits in a group of their own. ``at`` counts
    from the run's first position.
    """
    written = run.delta.map(lambda x: _take(x, at))
    places = {_place(receiver, run) for group in groups for receiver in group}
    at_once, falls = max(1, suffix.TOKENS_AT_ONCE // at.numel()), []
    for first in range(0, len(senders), at_once):
        heard = _sent(run, at, written, senders[first : first + at_once], places, frozen_mlps)
        falls.append(torch.stack([_received(run, at, heard, group) for group in groups]))
        bar.update(falls[-1].numel())
    return torch.cat(falls, dim=1)


def _sent(run: CleanRun, at: Tensor, written: Writes, senders: Sequence[Node], places: set[Place], frozen_mlps: bool) -> Heard:
    """Run 1: all senders go up together, each from the layer where it writes; heads stay as they are."""
    config = run.model.config
    change = written.input if senders[0].kind == "input" else written.input[:0]
    passed = {("stream", 0): change}
    for layer in range(max(layer + (what == "mlp") for what, layer in places)):
        heads = [sender.index for sender in senders if sender.kind == "head" and sender.layer == layer]
        from_heads = torch.einsum("bphd,hdm->hbpm", written.z[layer][:, :, heads], run.model.weights.W_O(layer)[heads])
        with_heads = torch.cat([change, from_heads.flatten(0, 1)])
        passed["mlp", layer] = read = change if config.parallel else with_heads
        change = with_heads
        if config.has_mlp and not frozen_mlps and len(read):
            change = torch.cat([with_heads[: len(read)] + _mlp_change(run, layer, read, at), with_heads[len(read) :]])
        if Node.mlp(layer) in senders:
            change = torch.cat([change, written.mlp_out[layer]])
        passed["stream", layer + 1] = change
    n_rows = len(senders) * len(at)  # who writes only after a place was read is silent there
    return {place: F.pad(passed[place], (0, 0, 0, 0, 0, n_rows - len(passed[place]))) for place in places}


def _received(run: CleanRun, at: Tensor, heard: Heard, group: tuple[Node, ...]) -> Float[Tensor, "sender batch"]:
    """Run 2, in stacks of few enough senders."""
    n_layers, batch, place = run.model.config.n_layers, len(at), _place(group[0], run)
    if group[0].kind == "logits":
        end = (at == run.ends.unsqueeze(1)).int().argmax(1, keepdim=True)
        return run.falls("resid_post", n_layers - 1, _take(heard[place], end).unflatten(0, (-1, batch)))
    rows = batch * max(1, suffix.TOKENS_AT_ONCE // (batch * run["resid_pre", 0].shape[1]))
    parts = ({place: x[first : first + rows] for place, x in heard.items()} for first in range(0, len(heard[place]), rows))
    return torch.cat([_by_layers(run, at, part, group) for part in parts])


def _by_layers(run: CleanRun, at: Tensor, heard: Heard, group: tuple[Node, ...]) -> Float[Tensor, "sender batch"]:
    """From the first layer that receives to the last, one by one; what follows is a suffix of the clean run."""
    config, first, top = run.model.config, group[0].layer or 0, group[-1].layer or 0
    variants = len(heard[_place(group[0], run)]) // len(at)
    change = torch.zeros_like(run["resid_pre", first]).repeat(variants, 1, 1)
    for layer in range(first, top + 1):
        ports = [receiver for receiver in group if receiver.layer == layer and receiver.port]
        mid = change
        if ports or layer > first:
            mid = change + _attention_change(run, at, layer, change, heard, ports, untouched=layer == first)
        read = change if config.parallel else mid
        if Node.mlp(layer) in group:
            read = _put(read, at, heard["mlp", layer])
        end = run.ends.unsqueeze(1) if layer == config.n_layers - 1 else None  # in the last layer, END alone counts
        if end is not None:
            mid, read = _take(mid, end), _take(read, end)
        change = mid + _mlp_change(run, layer, read, end) if config.has_mlp else mid
    return run.falls("resid_post", top, change.unflatten(0, (variants, -1)))


def _attention_change(
    run: CleanRun, at: Tensor, layer: int, change: Tensor, heard: Heard, ports: Sequence[Node], *, untouched: bool
) -> Float[Tensor, "row pos d_model"]:
    """What a layer's heads write in run 2 minus what they write in the clean run. ``untouched``: nothing has changed yet."""
    model, stream, variants = run.model, run["resid_pre", layer], len(change) // len(at)
    if untouched:
        mixed = [run[port, layer].repeat(variants, 1, 1, 1) for port in PORTS]
    else:
        mixed = list(model.project(layer, stream.repeat(variants, 1, 1) + change))
    if ports:
        received = model.project(layer, _take(stream, at).repeat(variants, 1, 1) + heard["stream", layer])
        for i, port in enumerate(PORTS):
            heads = [receiver.index for receiver in ports if receiver.port == port]  # or groups of them
            mixed[i] = mixed[i].clone()
            mixed[i][:, :, heads] = _put(mixed[i][:, :, heads], at, received[i][:, :, heads])
    written = model.written(layer, model.mix(layer, *mixed, prefix=run.prefix))
    clean = run[model.config.write_site, layer].repeat(variants, 1, 1, 1)
    return heads_sum(model.weights, layer, written - clean)


def _mlp_change(
    run: CleanRun, layer: int, change: Float[Tensor, "row pos d_model"], at: Int[Tensor, "batch at"] | None
) -> Float[Tensor, "row pos d_model"]:
    """What a layer's MLP writes when its stream has changed so, minus what it writes in the clean run.

    ``at``: the positions that ``change`` covers; None for all.
    """
    read, wrote = run["resid_pre" if run.model.config.parallel else "resid_mid", layer], run["mlp_out", layer]
    if at is not None:
        read, wrote = _take(read, at), _take(wrote, at)
    variants = len(change) // len(read)
    return run.model.feed_forward(layer, read.repeat(variants, 1, 1) + change) - wrote.repeat(variants, 1, 1)


def _place(receiver: Node, run: CleanRun) -> Place:
    """Where a receiver listens. The logits read what a layer after the last would."""
    layer = run.model.config.n_layers if receiver.layer is None else receiver.layer
    return ("mlp" if receiver.kind == "mlp" else "stream", layer)


def _take(x: Float[Tensor, "row pos *rest"], at: Int[Tensor, "batch at"]) -> Float[Tensor, "row at *rest"]:
    """Some positions of stacked rows."""
    at = at.repeat(len(x) // len(at), 1)
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), at]


def _put(
    x: Float[Tensor, "row pos *rest"], at: Int[Tensor, "batch at"], value: Float[Tensor, "row at *rest"]
) -> Float[Tensor, "row pos *rest"]:
    """A copy of ``x`` with ``value`` at some positions."""
    at, x = at.repeat(len(x) // len(at), 1), x.clone()
    x[torch.arange(len(x), device=x.device).unsqueeze(1), at] = value
    return x
