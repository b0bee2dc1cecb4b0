"""Training: batches of activations in, a sparse autoencoder for every place out.

    activations = stream(model, corpus, each_layer(model.config))
    autoencoder = train(activations, architecture="topk", d_sae=2048, k=16, directory="run")

All groups are trained in one pass over the activations. Run again with the same ``directory``, an interrupted training goes
on from its last checkpoint, to the numbers it would have had; a finished one is read back.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.errors import SAEError, nearest
from saes.activations import Activations
from saes.base import SparseAutoencoder
from saes.checkpoints import check_same, read_checkpoint, write_checkpoint
from saes.fast_steps import Outcome
from saes.files import load, save
from saes.logs import Callback, cut_log, means, to_jsonl
from saes.revival import resample, resamples_at
from saes.settings import TrainSettings
from saes.steps import fill_gradients, renormalize, start_parameters, trained

LOG = "training.jsonl"
_FORGET = 0.1  # of batch top-k's running threshold, a step: slower, it lags behind short trainings


@dataclass
class _State:
    """All that changes while training, and all that a checkpoint holds."""

    parameters: dict[str, Tensor]
    moments: dict[str, list[Tensor]]
    idle: Float[Tensor, "group d_sae"]
    scale: Float[Tensor, "group"]
    threshold: Float[Tensor, "group"]
    step: int = 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        moments = {f"adam{n}.{name}": tensor for name, both in self.moments.items() for n, tensor in enumerate(both)}
        return {**self.parameters, **moments, "idle": self.idle, "scale": self.scale, "running_threshold": self.threshold}


def train(
    activations: Activations,
    settings: TrainSettings | None = None,
    *,
    directory: Path | str | None = None,
    callbacks: Iterable[Callback] = (),
    device: torch.device | str = "cpu",
    log_every: int | None = None,
    checkpoint_seconds: float = 60.0,
    progress: bool = True,
    **changes: Any,
) -> SparseAutoencoder:
    """An autoencoder for each of the ``activations``' places. ``changes`` are settings: see ``TrainSettings``.

    With a ``directory``: checkpoints every ``checkpoint_seconds``, a log (``training.jsonl``), and at the end the
    autoencoder in SAELens' format (``autoencoder``). ``log_every`` steps (default: a hundred times in all), ``callbacks`` get
    a record. Memory: parameters four times (Adam), and about three windows of activations.

    Raises ``SAEError`` for settings or activations that cannot be trained on, a loss that is no longer finite, and a
    directory that holds another run.
    """
    settings = _settings(settings, changes)
    directory = None if directory is None else Path(directory)
    facts = {"settings": settings.to_dict(), "places": list(map(str, activations.places)), "about": dict(activations.about)}
    if directory is not None and (directory / "autoencoder").exists():
        return _finished(directory, facts)
    state = _resumed(directory, facts, activations, settings, torch.device(device))
    told = [*callbacks, *([to_jsonl(directory / LOG)] if directory else [])]
    _run(state, activations, settings, told, directory, facts, log_every, checkpoint_seconds, progress)
    about = {**activations.about, "training": settings.to_dict()}
    done = trained(activations.places, state.parameters, settings, state.scale, state.threshold, about).to("cpu")
    if directory is not None:
        _checkpoint(directory, state, facts)
        _save(done, directory / "autoencoder")
    return done


def _run(state, activations, settings, told, directory, facts, log_every, checkpoint_seconds, progress) -> None:
    """Step after step, from the state's on to the last."""
    step_by = log_every or max(1, settings.n_steps // 100)
    batches = activations.batches(settings.batch_size, seed=settings.seed, start=state.step, window_bytes=settings.window_bytes)
    leaves = [tensor.requires_grad_() for tensor in state.parameters.values()]
    optimizer = _adam(state, settings)
    saved, bar = time.monotonic(), _bar(state, settings, progress)
    with bar, torch.no_grad():
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)
        while state.step < settings.n_steps:
            x = next(batches).to(state.scale.device).mul_(state.scale.view(-1, 1, 1))
            outcome = _step(state, optimizer, x, settings, activations)
            bar.update()
            if state.step % step_by == 0 or state.step == settings.n_steps:
                record = _record(state, outcome, x, settings)
                _check_finite(state.step, outcome, activations)
                bar.set_postfix(
                    {name: f"{value:.3g}" for name, value in means(record).items() if name in ("loss", "l0", "dead")}
                )
                for tell in told:
                    tell(record)
            if directory is not None and time.monotonic() - saved > checkpoint_seconds and state.step < settings.n_steps:
                _check_finite(state.step, outcome, activations)
                _checkpoint(directory, state, facts)
                saved = time.monotonic()


def _step(state: _State, optimizer: Any, x: Tensor, settings: TrainSettings, activations: Activations) -> Outcome:
    """One batch: gradients, Adam, what follows of them, and the count of idle latents."""
    p = state.parameters
    gradients = {name: tensor.grad for name, tensor in p.items() if tensor.grad is not None}
    outcome = fill_gradients(p, gradients, x, settings, settings.weight(state.step), state.idle)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate(state.step)
    optimizer.step()
    state.idle = torch.where(outcome.fired > 0, 0.0, state.idle + x.shape[1])
    if resamples_at(state.step, settings):
        dead = state.idle >= settings.idle_rows
        revived = resample(p, state.moments, x, outcome.residual, dead, activations.places, settings, state.step)
        state.idle.masked_fill_(revived, 0.0)
    if settings.decoder == "unit":
        renormalize(p["W_dec"])
    if outcome.lowest is not None:
        lowest = torch.where(outcome.lowest.isfinite(), outcome.lowest, state.threshold)
        state.threshold = torch.lerp(state.threshold, lowest, min(1.0, max(_FORGET, 10 / (state.step + 1))))
    state.step += 1
    return outcome


def _adam(state: _State, settings: TrainSettings) -> torch.optim.Adam:
    """Adam over the state's parameters, with the state's own moments."""
    is_fused = state.scale.device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(list(state.parameters.values()), lr=settings.lr, betas=settings.betas, fused=is_fused)
    for name, parameter in state.parameters.items():
        mean, square = state.moments[name]
        count = torch.tensor(float(state.step), device=parameter.device if is_fused else "cpu")
        optimizer.state[parameter] = {"step": count, "exp_avg": mean, "exp_avg_sq": square}
    return optimizer


def _resumed(
    directory: Path | None, facts: dict[str, Any], activations: Activations, settings: TrainSettings, device: torch.device
) -> _State:
    """The state of the last checkpoint, or one that has not begun."""
    if directory is None:
        return _fresh(activations, settings, device)
    if directory.exists() and not directory.is_dir():
        raise SAEError(f"{str(directory)!r} is a file; a training needs a folder. Choose another name.")
    directory.mkdir(parents=True, exist_ok=True)
    step, tensors = read_checkpoint(directory, facts) or (0, {})
    cut_log(directory / LOG, step)
    if not tensors:
        return _fresh(activations, settings, device)
    moved = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}  # not over the file, and aligned
    names = sorted(name for name in moved if f"adam0.{name}" in moved)
    moments = {name: [moved[f"adam0.{name}"], moved[f"adam1.{name}"]] for name in names}
    parameters = {name: moved[name] for name in names}
    return _State(parameters, moments, moved["idle"], moved["scale"], moved["running_threshold"], step)


def _fresh(activations: Activations, settings: TrainSettings, device: torch.device) -> _State:
    """Scales and means are measured on the first batch."""
    first = next(activations.batches(settings.batch_size, seed=settings.seed, window_bytes=settings.window_bytes))
    norms = torch.linalg.vector_norm(first, dim=-1).mean(-1).clamp_min(1e-12)
    scale = float(activations.d_in) ** 0.5 / norms if settings.scale_inputs else torch.ones_like(norms)
    mean = first.mean(1) * scale.unsqueeze(-1)
    started = start_parameters(activations.places, mean, settings)
    parameters = {name: started[name].to(device) for name in sorted(started)}  # sums over them must not depend on their order
    moments = {name: [torch.zeros_like(t), torch.zeros_like(t)] for name, t in parameters.items()}
    idle = torch.zeros_like(parameters["b_enc"])
    return _State(parameters, moments, idle, scale.to(device), torch.zeros_like(scale).to(device))


def _finished(directory: Path, facts: dict[str, Any]) -> SparseAutoencoder:
    done = load(directory / "autoencoder")
    if read_checkpoint(directory, facts) is None:  # it would refuse another run; without one, the autoencoder says whose it is
        given = {"settings": done.about.get("training"), "places": list(map(str, done.places))}
        given["about"] = {name: value for name, value in done.about.items() if name in facts["about"]}
        check_same(directory / "autoencoder", given, json.loads(json.dumps(facts)))
    return done


def _save(done: SparseAutoencoder, path: Path) -> None:
    try:
        save(done, path)
    except OSError as problem:
        raise SAEError(
            f"the autoencoder cannot be written to {str(path)!r} ({problem}). The last checkpoint is whole; make room and run "
            "the same again."
        ) from problem


def _checkpoint(directory: Path, state: _State, facts: dict[str, Any]) -> None:
    write_checkpoint(directory, state.step, {name: tensor.detach() for name, tensor in state.tensors.items()}, facts)


def _record(state: _State, outcome: Outcome, x: Tensor, settings: TrainSettings) -> dict[str, Any]:
    """What callbacks are told; lists run over places."""
    step = state.step - 1
    variance = (x - x.mean(1, keepdim=True)).square().sum((1, 2)) / x.shape[1]
    by_place = {
        "loss": outcome.error + outcome.penalty,
        "error": outcome.error,
        "explained": 1 - outcome.error / variance.clamp_min(1e-12),
        "l0": outcome.fired.sum(1) / x.shape[1],
        "dead": (state.idle >= settings.idle_rows).float().mean(1),
    }
    about = {"step": state.step, "rows": state.step * settings.batch_size}
    about |= {"lr": settings.learning_rate(step), "weight": settings.weight(step)}
    return about | {name: value.tolist() for name, value in by_place.items()}


def _check_finite(step: int, outcome: Outcome, activations: Activations) -> None:
    """Before anything is told or kept of it."""
    for place, loss in zip(activations.places, (outcome.error + outcome.penalty).tolist(), strict=True):
        if not abs(loss) < float("inf"):
            raise SAEError(f"the loss at {str(place)!r} is {loss} at step {step}. Lower lr, or set clip.")


def _settings(given: TrainSettings | None, changes: dict[str, Any]) -> TrainSettings:
    known = [one.name for one in fields(TrainSettings)]
    for name in changes:
        if name not in known:
            raise SAEError(f"there is no setting {name!r}; there are {', '.join(known)}.{nearest(name, known)}")
    return replace(given or TrainSettings(), **changes)


def _bar(state: _State, settings: TrainSettings, progress: bool) -> Any:
    hidden = None if progress else True
    return tqdm(total=settings.n_steps, initial=state.step, desc="training", unit="step", delay=2, disable=hidden)
