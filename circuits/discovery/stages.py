"""A circuit traced from the logits upstream, stage by stage: who writes to them, who steers those, who informs these.

As Wang et al. 2022 (arXiv:2211.00593, sec. 3) found the heads of indirect object identification and Merullo et al. 2024
(arXiv:2310.08744) those of colored objects: the first stage's receivers are the logits; the heads that matter most become
the next stage's receivers by their queries, the heads that matter to those by their keys and values, and so on. Each
stage is one call of ``path_patching``. What the papers decide by eye, which port at which position to follow, is a
setting; what they decide by a cut, how many heads to keep, is one too.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from circuits.ablation import Ablation
from circuits.discovery.paths import (
    LOGITS,
    MLPs,
    Nodes,
    check_positions,
    listed,
    open_to,
    parse_receivers,
    parse_senders,
    path_links,
    path_patching,
)
from circuits.discovery.walk import WalkSettings
from circuits.graph import Circuit
from circuits.scores import Scores
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError, TaskError
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.tasks.base import Task

_KEPT = 0.02  # of all senders, as Merullo et al. keep where nothing else is said: 3 of GPT-2 small's heads, 8 of medium's


@dataclass(frozen=True)
class Stage:
    """One step upstream.

    ``scores``: what each sender does through all ``receivers`` together. ``kept``: the strongest senders, best first.
    ``links``: edge scores of the kept senders, each receiver by itself; None if nothing was kept.
    """

    receivers: tuple[Node, ...]
    position: str | None
    scores: Scores
    kept: tuple[Node, ...]
    links: Scores | None


def staged(
    model: Transformer,
    task: Task,
    *,
    start: Nodes = "logits",
    start_position: str | None = None,
    stages: Sequence[str] = ("q", "kv"),
    n_per_stage: int | None = None,
    threshold: float | None = None,
    senders: Nodes | None = "heads",
    mlps: MLPs = "recomputed",
    ablation: str | Ablation = "resample",
    **walk: Unpack[WalkSettings],
) -> list[Stage]:
    """Path patching from ``start`` upstream; one ``Stage`` for it and one for each of ``stages``, fewer if it runs dry.

    ``stages`` says by which ports, and at which named position, the heads kept by one stage receive in the next:
    ``("q@END", "kv@S2")`` for the queries at END of the heads that write to the logits, then for the keys and values at S2
    of the heads that write to those queries. Without ``@`` all positions receive. A kept MLP receives as a whole, and
    nothing flows into a kept input: there the trace ends. ``start_position``: where ``start`` receives.

    Kept are the ``n_per_stage`` senders of largest magnitude, so negative ones as well, but for those below
    ``threshold``, which is in units of the metric; given neither, the strongest 2 % of the senders, at least one. The
    other settings are those of ``path_patching``, and so is the cost of a stage, twice.

    >>> from mechinterp.models.compiled import indirect_object
    >>> planted = indirect_object(n_prompts=8)
    >>> stages = staged(planted.model, planted.task, stages=("q@END", "kv"), threshold=0.1)
    >>> roles = {head: role for role, head in planted.roles.items()}
    >>> [sorted(roles[str(head)] for head in stage.kept) for stage in stages]
    [['late_mover', 'mover'], ['inhibit_name', 'inhibit_place'], ['duplicate']]
    """
    everyone = parse_senders(model, senders, (LOGITS,))
    steps = [("", start_position), *map(_parse_step, stages)]
    for _, position in steps:
        check_positions(task, position, ())
    if n_per_stage is None and threshold is None:
        n_per_stage = max(1, round(_KEPT * len(everyone)))
    found: list[Stage] = []
    for ports, position in steps:
        receivers = _inputs(model, found[-1].kept, ports) if found else parse_receivers(model, start)
        able = open_to(model, receivers)
        if not (sending := [sender for sender in everyone if sender in able]):
            break
        settings: dict[str, Any] = {"mlps": mlps, "positions": position, "ablation": ablation, **walk}
        try:
            scores = path_patching(model, task, receivers=receivers, senders=sending, **settings)
            kept = _strongest(scores, n_per_stage, threshold)
            links = path_links(model, task, receivers=receivers, senders=kept, **settings) if kept else None
        except TaskError as problem:
            raise TaskError(f"stage {len(found) + 1}, into {listed(receivers)}: {problem}") from problem
        found.append(Stage(receivers, position, scores, kept, links))
    return found


def staged_circuit(stages: Sequence[Stage], threshold: float = 0.0) -> Circuit:
    """All stages in one graph, to be drawn: an edge from each kept sender to each receiver that it reaches by itself.

    An edge's ``weight`` is what this one sender does through this one receiver, paths through MLPs included unless they
    were frozen; edges weaker than ``threshold`` are left out, and what two stages both found has the larger weight. If only
    heads were senders, as in the papers, this is the trace of a search and no circuit to be run: nothing leaves the input.
    """
    links = [stage.links for stage in stages if stage.links is not None]
    if not links:
        raise CircuitError("no stage kept anything, so there is nothing to draw. Lower the threshold of `staged`.")
    values = np.stack([scores.values for scores in links])
    weights = np.take_along_axis(values, np.abs(values).argmax(0)[None], axis=0)[0]
    return links[0].wiring.circuit(
        (weights != 0) & (np.abs(weights) >= threshold),
        weights,
        model=links[0].model,
        task=links[0].task,
        method="path-patching",
        unit=links[0].unit,
        settings=json.dumps({"stages": [_in_words(stage) for stage in stages], "mlps": links[0].settings["mlps"]}),
        threshold=threshold,
    )


def _parse_step(step: str) -> tuple[str, str | None]:
    ports, _, position = step.partition("@")
    if not re.fullmatch("[qkv]+@?", step[: len(ports) + 1]):
        raise CircuitError(
            f"{step!r} is no stage. A stage names ports, and a position if it has one: 'q', 'kv', 'q@END', 'kv@S2'."
        )
    return ports, position or None


def _inputs(model: Transformer, kept: Sequence[Node], ports: str) -> tuple[Node, ...]:
    """What these parts read: heads by ``ports`` (shared ones are their group's), MLPs as they are, the input nothing."""
    wiring = Wiring.of(model.config)
    read = wiring.reads[[wiring.writers.index(part) for part in kept]].any(0)
    readers = [wiring.readers[reader] for reader in np.flatnonzero(read)]
    return tuple(sorted(reader for reader in readers if reader.port is None or reader.port in ports))


def _strongest(scores: Scores, n: int | None, threshold: float | None) -> tuple[Node, ...]:
    """Senders with a score, strongest first. What scores exactly zero does nothing, and is not kept to fill a number."""
    sizes = np.abs(scores.values)
    kept = [writer for writer in scores.order().tolist() if sizes[writer] > 0 and sizes[writer] >= (threshold or 0.0)]
    return tuple(scores.wiring.writers[writer] for writer in kept[:n])


def _in_words(stage: Stage) -> str:
    return listed(stage.receivers) + (f" at {stage.position}" if stage.position else "")
