"""Training sparse autoencoders: ours against SAELens' trainers, and against a plain loop over heads.

    python -m benchmarks.sae_speed               # ten minutes on one core
    python -m benchmarks.sae_speed --long        # three times the steps
    python -m benchmarks.sae_speed --quick       # a tenth of them
    python -m benchmarks.sae_speed --same-start  # SAELens begins with our weights, and not as it does by default

Two trainings on the same batches take turns, a few steps each; a ratio is of CPU seconds within a turn, one thread, after
a first turn that does not count. Rows are planted: sums of a few of ``d_in`` directions or more, and a little noise.
Both are then measured on held-out rows by the same code (``saes.metrics``), decoder rows at norm 1. *Loss* is the squared
error, and for ReLU the weighted L1 with it. Peak memory is above that of the rows, each training in a process of its own.
``sae_peers.py`` says what is the same on both sides and what is not.

Equal losses are losses at the end. Learning rate, numbers of steps and planted rows were chosen after trials, so that both
sides come to rest within minutes; before that, SAELens is ahead on top-k, as its smaller first weights turn sooner. On six
of the heads at this rate its loss is 1.64 times lower than ours after 120 steps, 1.12 after 200 and the same after 300; at
a rate of 2e-3 still 1.55 after 300. Begun with our weights it is 1.02 to 1.06 lower at 2e-3 and 5e-3, after 40 to 300 steps.
Equal loss is not equal use of latents either: see how many are never active.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks import measure
from saes.activations import Activations, of_rows
from saes.base import SparseAutoencoder
from saes.logs import Record
from saes.metrics import Reconstruction, reconstruction
from saes.settings import TrainSettings
from saes.steps import start_parameters
from saes.trainer import train


@dataclass(frozen=True)
class Case:
    """What is trained, for how many steps, and how much faster ours must be than ``peer``."""

    title: str
    peer: str
    target: float
    n_groups: int
    d_in: int
    d_sae: int
    architecture: str
    k: int
    batch_size: int
    n_steps: int
    a_turn: int
    n_directions: int
    n_active: float
    n_rows: int = 8192
    n_held: int = 1024

    @property
    def settings(self) -> TrainSettings:
        """Of both sides. Of rates from 2e-3 to 4e-2, 1e-2 left both with the least loss after 300 steps of top-k on six heads.

        No latent is dead for as long as SAELens waits by default (1,000 batches): both auxiliary losses are idle.
        """
        return TrainSettings(
            architecture=self.architecture,
            d_sae=self.d_sae,
            k=self.k,
            batch_size=self.batch_size,
            n_rows=self.n_steps * self.batch_size,
            sparsity=1.0,
            lr=1e-2,
            scale_inputs=False,
            revive="aux" if self.architecture == "topk" else "none",
            dead_after=1000 * self.batch_size,
        )

    @property
    def places(self) -> list[str]:
        return ["z.0"] if self.n_groups == 1 else [f"z.{number // 12}.h{number % 12}" for number in range(self.n_groups)]


def _heads(title: str, architecture: str, d_sae: int, **given: Any) -> Case:
    """All heads of GPT-2 small."""
    return Case(title, n_groups=144, d_in=64, d_sae=d_sae, architecture=architecture, k=16, batch_size=256, **given)


HEADS = {"peer": "SAELens", "target": 3.0, "a_turn": 10, "n_directions": 128, "n_active": 6.0}
WIDE = {"peer": "a plain loop", "target": 1.5, "n_directions": 512, "n_active": 6.0}
CASES = {
    "one": Case(
        title="d_in 512, d_sae 8192, top-k 32, batch 4096",
        peer="SAELens",
        target=3.0,
        n_groups=1,
        d_in=512,
        d_sae=8192,
        architecture="topk",
        k=32,
        batch_size=4096,
        n_steps=50,
        a_turn=5,
        n_directions=512,
        n_active=8.0,
        n_rows=32768,
        n_held=4096,
    ),
    "heads-relu": _heads("144 heads, d_sae 256, ReLU, batch 256", "relu", 256, n_steps=150, **HEADS),
    "heads-topk": _heads("144 heads, d_sae 256, top-k 16, batch 256", "topk", 256, n_steps=300, **HEADS),
    "wide-relu": _heads("144 heads, d_sae 1024, ReLU, batch 256", "relu", 1024, n_steps=80, a_turn=8, **WIDE),
    "wide-topk": _heads("144 heads, d_sae 1024, top-k 16, batch 256", "topk", 1024, n_steps=16, a_turn=2, **WIDE),
}
FACTORS = {"--quick": 0.1, "--long": 3.0}


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    if arguments[:1] == ["peak"]:
        print(_peak(CASES[arguments[1]], arguments[2]))
        return
    factor = next((FACTORS[given] for given in arguments if given in FACTORS), 1.0)
    rows, facts = [], {"load": os.getloadavg(), "arguments": arguments}
    for name, case in CASES.items():
        if arguments and arguments[0] in CASES and name not in arguments:
            continue
        turns = max(4, round(factor * case.n_steps / case.a_turn))
        found, measured = compare(replace(case, n_steps=turns * case.a_turn), "--same-start" not in arguments)
        rows += found
        if case.peer == "SAELens":
            gib = {
                side: float(measure.in_a_process("benchmarks.sae_speed", "peak", name, side)) for side in ("ours", "SAELens")
            }
            measured["GiB"] = gib
            rows.append((f"{case.title}: peak memory above the rows", "", _sides(case, "{:.2f} GiB", *gib.values())))
        facts[name] = measured
    facts["load_after"] = os.getloadavg()
    text = measure.table(rows)
    print(text)
    if "--quick" not in arguments:
        measure.save("-".join(["sae-speed", *(given.strip("-") for given in arguments)]), facts)
    if not arguments:
        _write(text)


def compare(case: Case, own_start: bool) -> tuple[list[tuple[str, str, str]], dict[str, Any]]:
    """Speed, losses and what else shows that both did the same work."""
    rows, held = planted(case)
    peer = _peer(case, rows, own_start)
    autoencoder, ours, theirs = in_turns(case, rows, peer.advance)
    mine, other = _measured(autoencoder, held), _measured(peer.result(), held)
    faster, losses = theirs.per(ours), [_loss(case, found) for found in (mine, other)]
    means = [float(loss.mean()) for loss in losses]
    worst = float(abs(losses[0] / losses[1] - 1).max())
    n_rows = case.a_turn * case.batch_size
    speeds = [n_rows / statistics.median(timing.cpu) for timing in (ours, theirs)]
    spread = f"{faster['cpu']:.2f} ({faster['cpu_lowest']:.2f} to {faster['cpu_highest']:.2f})"
    evidence = [_sides(case, text, *both) for text, both in _evidence(mine, other)]
    table = [
        (f"{case.title}: {case.peer} : ours, CPU", f"≥ {case.target:g}", spread),
        (f"{case.title}: rows a CPU second", "", _sides(case, "{:,.0f}", *speeds)),
        (
            f"{case.title}: loss after {case.n_steps} steps, {case.peer} = 1",
            "0.98 to 1.02",
            f"{means[0] / means[1]:.3f} ({_sides(case, '{:.4g}', *means)})",
        ),
        (f"{case.title}: what else they came to", "", "; ".join(evidence)),
    ]
    facts = {"steps": case.n_steps, "rows": case.settings.n_rows, "ours": ours, "theirs": theirs, "ratio": faster}
    facts = {name: vars(fact) if isinstance(fact, measure.Timing) else fact for name, fact in facts.items()}
    facts |= {"loss": means, "worst_head": worst, "settings": case.settings.to_dict(), "evidence": evidence}
    return table, facts


def in_turns(
    case: Case, rows: Tensor, advance: Callable[[int], None]
) -> tuple[SparseAutoencoder, measure.Timing, measure.Timing]:
    """Our training, and after every few of its steps as many of the other's; seconds of each turn but the first."""
    ours, theirs = measure.Timing([], []), measure.Timing([], [])
    began = _clock()

    def turn(record: Record) -> None:
        nonlocal began
        _note(ours, began)
        began = _clock()
        advance(case.a_turn)
        _note(theirs, began)
        began = _clock()

    autoencoder = train(of_rows(rows, case.places), case.settings, callbacks=[turn], log_every=case.a_turn, progress=False)
    return autoencoder, _but_first(ours), _but_first(theirs)


def planted(case: Case) -> tuple[Float[Tensor, "row group d_in"], Float[Tensor, "group row d_in"]]:
    """Rows to train on and rows held out, of mean square norm ``d_in``: few directions each, and a tenth of noise."""
    generator = torch.Generator().manual_seed(0)
    n_rows = case.n_rows + case.n_held
    rows = torch.empty(n_rows, case.n_groups, case.d_in)
    for group in range(case.n_groups):
        directions = torch.randn(case.n_directions, case.d_in, generator=generator)
        directions /= directions.norm(dim=-1, keepdim=True)
        for some in torch.arange(n_rows).split(4096):
            drawn = torch.rand(len(some), case.n_directions, generator=generator)
            share = case.n_active / case.n_directions
            sizes = torch.where(drawn < share, 0.5 + drawn / share, 0.0)  # 0.5 to 1.5
            noise = torch.randn(len(some), case.d_in, generator=generator) * 0.1 * (case.n_active / case.d_in) ** 0.5
            rows[some, group] = sizes @ directions + noise
    rows *= (case.d_in / rows.square().sum(-1).mean(0)).sqrt().view(-1, 1)
    return rows[: case.n_rows], rows[case.n_rows :].transpose(0, 1).contiguous()


def _peer(case: Case, rows: Float[Tensor, "row group d_in"], own_start: bool) -> Any:
    """The other side, with our first weights (unless it is to have its own) and our batches."""
    activations = of_rows(rows, case.places)
    first = next(activations.batches(case.batch_size, seed=case.settings.seed))
    start = start_parameters(activations.places, first.mean(1), case.settings)
    by_group = rows.transpose(0, 1).contiguous()
    batches = (by_group[:, numbers] for numbers in _row_numbers(case))
    from benchmarks.sae_peers import PlainLoop, SAELens  # SAELens takes seconds to import, and memory

    if case.peer != "SAELens":
        return PlainLoop(batches, activations.places, start, case.settings)
    return SAELens(batches, activations.places, start, case.settings, own_start)


def _row_numbers(case: Case) -> Iterator[Tensor]:
    """Which rows are in which of our batches: ours are drawn from rows that are their own numbers."""
    numbers = of_rows(torch.arange(float(case.n_rows)).view(-1, 1, 1), ["z.0"])
    return (batch.flatten().long() for batch in numbers.batches(case.batch_size, seed=case.settings.seed))


def _peak(case: Case, side: str) -> float:
    """GiB above the rows of a training of three steps."""
    case = replace(case, n_steps=3)
    rows, _ = planted(case)
    if side == "ours":
        activations: Activations = of_rows(rows, case.places)
        return measure.peak_above(lambda: train(activations, case.settings, progress=False))
    _peer(replace(case, n_groups=1, n_rows=case.batch_size), rows[: case.batch_size, :1], False).advance(1)  # imports
    return measure.peak_above(lambda: _peer(case, rows, False).advance(case.n_steps))


def _peak_alone(name: str, side: str) -> float:
    return float(measure.in_a_process("benchmarks.sae_speed", "peak", name, side))


def _measured(autoencoder: SparseAutoencoder, held: Float[Tensor, "group row d_in"]) -> Reconstruction:
    return reconstruction(autoencoder, [held])


def _loss(case: Case, found: Reconstruction) -> Any:
    return found.mse + (case.settings.sparsity * found.l1 if case.architecture == "relu" else 0.0)


def _evidence(mine: Reconstruction, other: Reconstruction) -> Iterator[tuple[str, tuple[float, float]]]:
    for name, text in (("explained_variance", "explained {:.4f}"), ("l0", "L0 {:.1f}"), ("dead_share", "never active {:.1%}")):
        yield text, (float(getattr(mine, name).mean()), float(getattr(other, name).mean()))


def _sides(case: Case, text: str, ours: float, theirs: float) -> str:
    """Both numbers; what stands before a number in ``text`` is said once."""
    return f"{text.format(ours)} ours, {text[text.index('{') :].format(theirs)} {case.peer}"


def _clock() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _note(timing: measure.Timing, began: tuple[float, float]) -> None:
    cpu, wall = _clock()
    timing.cpu.append(cpu - began[0])
    timing.wall.append(wall - began[1])


def _but_first(timing: measure.Timing) -> measure.Timing:
    return measure.Timing(timing.cpu[1:], timing.wall[1:])


def _write(text: str) -> None:
    assert __doc__ is not None
    about = f"Written by `python -m benchmarks.sae_speed` on {datetime.now(UTC):%Y-%m-%d}."
    words = __doc__.split("\n\n", 2)[2]
    measure.RESULTS.joinpath("sae_speed.md").write_text(
        f"# Training sparse autoencoders: speed\n\n{about}\n\n{words}\n{text}\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
