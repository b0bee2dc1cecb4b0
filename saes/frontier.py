"""Few latents against a faithful model: train over several sparsities and seeds, measure each, and draw the frontier.

    found = trace_frontier(activations, (model, held_out), {"topk": [8, 16, 32], "relu": [0.5, 1, 2]}, directory="sweep")
    print(found.table())
    found.draw("frontier.png")

One autoencoder at one sparsity says little about its architecture: a method is better where its whole line lies above,
and by more than the band of its seeds.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from mechinterp.errors import SAEError, nearest
from mechinterp.files import read_document, to_document, write_text_atomically
from mechinterp.models.transformer import Transformer
from saes.activations import Activations
from saes.base import SparseAutoencoder
from saes.frontier_picture import Line, draw_lines
from saes.report import SAEReport, evaluate
from saes.settings import TrainSettings
from saes.trainer import train as train_ours

Measure = Callable[[SparseAutoencoder], SAEReport]
Train = Callable[[Activations, TrainSettings], SparseAutoencoder]

_KIND, _RUN_KIND, _VERSION = "mechinterp autoencoder frontier", "mechinterp frontier run", 1
# measure -> how it is called in tables and pictures
MEASURES = {
    "ce_recovered_mean": "CE recovered (mean ablation)",
    "explained_variance": "explained variance",
    "ce_recovered_zero": "CE recovered (zero ablation)",
    "kl_recovered_mean": "KL recovered (mean ablation)",
    "ce_increase": "CE increase (nats)",
    "dead_share": "dead share",
}


@dataclass(frozen=True)
class Point:
    """One autoencoder at one place; "all" as in ``SAEReport.rows``. ``setting`` is its ``k`` or its ``sparsity``."""

    architecture: str
    setting: float
    seed: int
    place: str
    l0: float
    ce_recovered_mean: float
    explained_variance: float
    ce_recovered_zero: float
    kl_recovered_mean: float
    ce_increase: float
    dead_share: float


@dataclass(frozen=True)
class Frontier:
    """What ``trace_frontier`` found: every autoencoder at every place."""

    model: str
    d_sae: int
    points: tuple[Point, ...]

    @property
    def architectures(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(point.architecture for point in self.points))

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(point.place for point in self.points))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({point.seed for point in self.points}))

    def line(self, architecture: str, measure: str = "ce_recovered_mean", place: str = "all") -> Line:
        """A measure against L0. Seeds for which it is undefined are left out, settings without any other are NaN."""
        here = [point for point in self._at(place) if point.architecture == architecture]
        for given, known in ((architecture, self.architectures), (measure, ("l0", *MEASURES))):
            if given not in known:
                raise SAEError(f"there is no {given!r} in this frontier; there are {', '.join(known)}.{nearest(given, known)}")
        stops = []
        for setting in sorted({point.setting for point in here}):
            values = np.array([[point.l0, getattr(point, measure)] for point in here if point.setting == setting])
            l0, known = float(np.median(values[:, 0])), values[~np.isnan(values[:, 1]), 1]
            some = (np.median(known), known.min(), known.max()) if len(known) else (math.nan,) * 3
            stops.append((l0, setting, *map(float, some)))
        stops.sort()
        l0, middle, low, high = (np.array([stop[at] for stop in stops]) for at in (0, 2, 3, 4))
        return Line(tuple(stop[1] for stop in stops), l0, middle, low, high)

    def table(self, place: str = "all") -> str:
        """Markdown: a line for each architecture and setting, medians over seeds with their range."""
        measures = ("l0", *MEASURES)
        head = ["architecture", "setting", "L0", *MEASURES.values()]
        rows = []
        for architecture in dict.fromkeys(point.architecture for point in self._at(place)):
            lines = [self.line(architecture, measure, place) for measure in measures]
            for at, setting in enumerate(lines[0].settings):
                rows.append([architecture, f"{setting:g}", *(_with_range(line, at) for line in lines)])
        cells = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        where = "all places at once" if place == "all" else place
        about = f"{self.model}, {where}, {self.d_sae:,} latents; median of {len(self.seeds)} seeds [lowest, highest]"
        return "\n".join([about, "", *(f"| {' | '.join(row)} |" for row in cells)])

    def __str__(self) -> str:
        return self.table()

    def draw(
        self,
        path: str | os.PathLike | None = None,
        *,
        place: str = "all",
        measures: Sequence[str] = ("ce_recovered_mean", "explained_variance"),
        dpi: int = 160,
    ) -> Any:
        """A matplotlib ``Figure``: a panel for each measure, against L0; a line for each architecture, a band over seeds."""
        architectures = dict.fromkeys(point.architecture for point in self._at(place))
        lines = {name: {of: self.line(of, name, place) for of in architectures} for name in measures}
        panels = {MEASURES.get(name, "L0"): drawn for name, drawn in lines.items()}
        where = "all places at once" if place == "all" else place
        seeds = "median, lowest and highest of " + (f"{len(self.seeds)} seeds" if len(self.seeds) > 1 else "one seed")
        return draw_lines(panels, f"{self.model}, {where}, {self.d_sae:,} latents ({seeds})", path, dpi=dpi)

    def save(self, path: str | os.PathLike) -> None:
        """JSON, whole or not at all. What is undefined (NaN) is null."""
        content = {"model": self.model, "d_sae": self.d_sae, "points": list(map(_plain, self.points))}
        write_text_atomically(path, to_document(_KIND, _VERSION, content))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Frontier":
        """What ``save`` wrote. ``SAEError`` names the file and what is wrong with it."""
        document = read_document(path, _KIND, _VERSION, SAEError)
        try:
            return cls(document["model"], document["d_sae"], _points(document))
        except (TypeError, KeyError) as problem:
            raise SAEError(f"{os.fspath(path)!r} does not hold a usable frontier: {problem!r}.") from problem

    def _at(self, place: str) -> list[Point]:
        if found := [point for point in self.points if point.place == place]:
            return found
        raise SAEError(f"nothing was measured at {place!r}.{nearest(place, self.places)} There are {', '.join(self.places)}.")


def trace_frontier(
    activations: Activations,
    measure: Measure | tuple[Transformer, Int[Tensor, "batch pos"]],
    sweep: Mapping[str, Sequence[float | int]],
    *,
    base: TrainSettings | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    directory: str | os.PathLike | None = None,
    device: str = "cpu",
    train: Train | None = None,
) -> Frontier:
    """Train each architecture at each of its settings with each seed, and measure what comes out.

    ``sweep``: for each architecture the values of ``k``, or of ``sparsity`` for those that do not count latents; what else
    is to be set stands in ``base``. ``device`` is where our own trainer works. ``measure``: a function such as
    ``lambda found: evaluate(model, found, tokens)``, or the model and the tokens to evaluate on, which should not be among
    those trained on.

    With a ``directory`` each finished run is a file there, and is not done again; what our own trainer makes is kept beside
    it, and half-done training goes on. Runs of other settings or activations found there raise ``SAEError``; of a
    ``measure`` that is a function we cannot tell whether it is the same. Costs the product of all in training and measuring.
    """
    from tqdm.auto import tqdm

    of, measured_on = _measure(measure)
    runs = list(_runs(sweep, base or TrainSettings(), seeds))
    facts = {"about": dict(activations.about), "places": list(map(str, activations.places)), "measured_on": measured_on}
    found = []
    for name, settings in tqdm(runs, unit="run", desc="frontier", delay=2, disable=None):
        file = None if directory is None else Path(directory) / f"{name}.json"
        run = {"settings": settings.to_dict(), **facts}
        if file is None or not file.exists():
            found.append(run | _run(activations, of, settings, train or _ours(file, device), file))
            if file is not None:
                write_text_atomically(file, to_document(_RUN_KIND, _VERSION, found[-1]))
        else:
            found.append(_finished(file, run))
    points = tuple(point for run in found for point in _points(run))
    return Frontier(found[0]["model"], runs[0][1].d_sae, points)


def _runs(
    sweep: Mapping[str, Sequence[float | int]], base: TrainSettings, seeds: Sequence[int]
) -> Iterator[tuple[str, TrainSettings]]:
    """A name, which is its file's, and the settings of every run."""
    if not seeds or not sweep or not all(sweep.values()):
        raise SAEError("a frontier takes one seed at least, and one setting for each architecture: {'topk': [8, 16, 32]}, say.")
    for architecture, values in sweep.items():
        counts = replace(base, architecture=architecture, k=1).counts
        for value in values:
            if counts and int(value) != value:
                raise SAEError(f"{architecture!r} counts latents: its settings are whole numbers, not {value}.")
            # 16 and 16.0 are one setting, and one file
            changed: dict[str, Any] = {"k": int(value)} if counts else {"sparsity": float(value)}
            exact = changed["k" if counts else "sparsity"]
            for seed in seeds:
                yield f"{architecture}-{exact}-seed{seed}", replace(base, architecture=architecture, seed=seed, **changed)


def _ours(file: Path | None, device: str) -> Train:
    """Our trainer, which keeps what it does in a folder beside the run's file."""
    folder = None if file is None else file.with_suffix("")
    return lambda activations, settings: train_ours(activations, settings, directory=folder, device=device, progress=False)


def _run(activations: Activations, measure: Measure, settings: TrainSettings, train: Train, file: Path | None) -> dict:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    report = measure(train(activations, settings))
    setting = float(settings.k if settings.counts else settings.sparsity)
    measured: list[dict[str, Any]] = [{name: row[name] for name in ("place", "l0", *MEASURES)} for row in report.rows()]
    points = [Point(settings.architecture, setting, settings.seed, **row) for row in measured]
    return {"model": report.model, "points": list(map(_plain, points))}


def _finished(file: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """A run's file, if it is of this very run."""
    document = read_document(file, _RUN_KIND, _VERSION, SAEError)
    if other := [name for name, value in run.items() if document.get(name) != value]:
        raise SAEError(
            f"{os.fspath(file)!r} is of another sweep: its {', '.join(other)} differ from this one's. Give this sweep a "
            "directory of its own, or remove the file."
        )
    return document


def _measure(measure: Any) -> tuple[Measure, str | None]:
    """The function to measure with, and what tells the model and tokens apart from others."""
    if not isinstance(measure, tuple):
        return measure, None
    model, tokens = measure
    digest = hashlib.sha256(repr((model.weights.fingerprint, tuple(tokens.shape))).encode())
    digest.update(tokens.detach().cpu().contiguous().numpy().data)
    return (lambda autoencoder: evaluate(model, autoencoder, tokens, with_cosines=False)), digest.hexdigest()[:24]


def _plain(point: Point) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(point).items()}


def _points(document: Mapping[str, Any]) -> tuple[Point, ...]:
    return tuple(_point(entry) for entry in document["points"])


def _point(entry: Mapping[str, Any]) -> Point:
    numbers: dict[str, Any] = {name: math.nan if value is None else value for name, value in entry.items()}
    return Point(**numbers)


def _with_range(line: Line, at: int) -> str:
    low, middle, high = (float(values[at]) for values in (line.low, line.middle, line.high))
    if math.isnan(middle):
        return "undefined"
    return f"{middle:.3g}" if low == high else f"{middle:.3g} [{low:.3g}, {high:.3g}]"
