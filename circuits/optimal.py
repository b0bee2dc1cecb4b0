"""Optimal ablation: for each writer the constant that is missed least when it stands in for the writer.

Li and Janson 2024 (arXiv:2409.09951, section 2). Resampling and the mean put something in a writer's place that the rest
of the model may take for information, and the damage is then counted as the writer's importance. The optimal constant
``a* = argmin_a E KL(model ‖ model with this writer's output a)``, the same at all positions of all prompts, does the
least damage that any constant can; what is still lost is what the writer really tells. No corrupted prompts are needed.

All constants are fitted at once: each row of a step is a prompt with *one* writer replaced, the writers in turn, so a
step costs one forward and one backward however many writers there are. A head's constant lives before ``W_O``, as its
``z`` (``z_written`` where that is normalised), which is all that it could write.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.masked import run_node_mask
from circuits.training import Draw, train
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.errors import CircuitError
from mechinterp.metrics import kl_divergence
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch

_PROMPTS_AT_ONCE = 256  # of a forward pass without gradients


@dataclass(frozen=True)
class Constants:
    """One constant a writer, and the loss of replacing each writer by it, or by its mean: nats, on the prompts of the fit.

    ``values`` are in order of computation: the input's, then layer by layer all heads' ``z`` and the MLP's. It is an
    ablation: pass it as ``ablation=`` to use the same constants for discovery and, on other prompts, for evaluation.
    """

    values: tuple[Float[Tensor, "..."], ...]
    loss: Float[Tensor, "writer"]
    loss_of_mean: Float[Tensor, "writer"]

    __name__ = "optimal"

    def __call__(self, model: Transformer, prompts: PromptBatch) -> Writes:
        config = model.config
        layer = [(config.n_heads, config.d_head), (config.d_model,)][: 1 + config.has_mlp]
        if [tuple(value.shape) for value in self.values] != [(config.d_model,), *layer * config.n_layers]:
            raise CircuitError(f"these constants were fitted on a model of another shape than {config.name}. Fit them anew.")
        return _everywhere(model, prompts, self.values)


def optimal(model: Transformer, prompts: PromptBatch) -> Writes:
    """The optimal constant of each writer, fitted on these very prompts with the settings of ``fit_constants``.

    Constants that were fitted to the prompts they are judged on flatter the circuit: for numbers to be reported, fit on
    others (``optimal_ablation(fit_on=...)``, or ``fit_constants`` once for many calls).
    """
    return fit_constants(model, prompts)(model, prompts)


def optimal_ablation(
    *,
    steps: int = 100,
    lr: float = 0.2,
    batch_size: int | None = None,
    seed: int = 0,
    fit_on: PromptBatch | None = None,
    progress: bool = False,
) -> Callable[[Transformer, PromptBatch], Writes]:
    """``optimal`` with settings. ``fit_on``: prompts to fit on instead of those that are ablated. It fits at every use."""

    def optimal(model: Transformer, prompts: PromptBatch) -> Writes:
        settings = {"steps": steps, "lr": lr, "batch_size": batch_size, "seed": seed, "progress": progress}
        return fit_constants(model, fit_on or prompts, **settings)(model, prompts)

    return optimal


def fit_constants(
    model: Transformer,
    prompts: PromptBatch,
    *,
    steps: int = 100,
    lr: float = 0.2,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Constants:
    """Fit every writer's constant on the clean prompts, from its mean over all their positions.

    ``lr`` is in units of each writer's own spread; ``batch_size``: None for as many rows as there are writers. Afterwards
    each writer's loss is measured with the constant and with the mean, and the better one kept: on these prompts nothing
    is worse than the mean. Position 0 is replaced like any other; padding is not seen. Cost: ``steps`` forwards and
    backwards of ``batch_size`` prompts, and two forwards of all prompts a writer.
    """
    prompts, n_writers = prompts.to(model.device), len(Wiring.of(model.config).writers)
    means, spreads = _means_and_spreads(model, prompts)
    whole = torch.cat([_whole(model, some) for some in prompts.split(_PROMPTS_AT_ONCE)])
    offsets = [torch.zeros_like(mean, requires_grad=True) for mean in means]

    def learned() -> list[Tensor]:
        return [mean + spread * offset for mean, spread, offset in zip(means, spreads, offsets, strict=True)]

    def loss(draw: Draw) -> Float[Tensor, ""]:
        rows, lost = draw.rows.to(model.device), draw.shuffled(n_writers).to(model.device)
        return _loss(model, prompts[rows], whole[rows], lost, learned()).mean()

    train(
        loss,
        torch.optim.Adam(offsets, lr=lr),
        n_prompts=len(prompts),
        batch_size=n_writers if batch_size is None else batch_size,
        steps=steps,
        seed=seed,
        name="optimal ablation",
        progress=progress,
    )
    with torch.no_grad():
        found = learned()
        of_mean, of_found = (_losses(model, prompts, whole, constants) for constants in (means, found))
    better = (of_found < of_mean).split([mean.shape[0] if mean.dim() == 2 else 1 for mean in means])
    chosen = [
        torch.where(flags[:, None] if mean.dim() == 2 else flags, new, mean)
        for flags, new, mean in zip(better, found, means, strict=True)
    ]
    return Constants(tuple(chosen), torch.minimum(of_found, of_mean), of_mean)


def _loss(
    model: Transformer,
    prompts: PromptBatch,
    whole: Float[Tensor, "row d_vocab"],
    lost: Int[Tensor, "row"],
    constants: Sequence[Tensor],
) -> Float[Tensor, "row"]:
    """How far each prompt's output is from the whole model's when the writer ``lost`` is replaced by its constant."""
    kept = torch.ones((len(lost), len(Wiring.of(model.config).writers)), device=model.device)
    kept[torch.arange(len(lost), device=model.device), lost] = 0
    return kl_divergence(whole, run_node_mask(model, prompts, kept, _everywhere(model, prompts, constants)))


def _losses(model: Transformer, prompts: PromptBatch, whole: Tensor, constants: Sequence[Tensor]) -> Float[Tensor, "writer"]:
    """Every writer's loss, averaged over all prompts; rows are writer-major."""
    n_writers, n = len(Wiring.of(model.config).writers), len(prompts)
    rows = torch.arange(n_writers * n, device=model.device).split(_PROMPTS_AT_ONCE)
    found = [_loss(model, prompts[some % n], whole[some % n], some // n, constants) for some in rows]
    return torch.cat(found).view(n_writers, n).mean(1)


def _everywhere(model: Transformer, prompts: PromptBatch, constants: Sequence[Tensor]) -> Writes:
    """The constants at every position of every prompt, as views. Like writers, they stand in order of computation."""
    first, *rest = (constant.expand(*prompts.clean.shape, *constant.shape) for constant in constants)
    if not model.config.has_mlp:
        return Writes(model.weights, first, tuple(rest), ())
    return Writes(model.weights, first, tuple(rest[::2]), tuple(rest[1::2]))


@torch.no_grad()
def _whole(model: Transformer, prompts: PromptBatch) -> Float[Tensor, "prompt d_vocab"]:
    logits, _ = model.run(prompts.clean, logits_at=prompts.end)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def _means_and_spreads(model: Transformer, prompts: PromptBatch) -> tuple[list[Tensor], list[Tensor]]:
    """Each writer's mean over prompts and positions up to END, and its root-mean-square distance from it a coordinate."""
    parts = []
    for some in prompts.split(_PROMPTS_AT_ONCE):
        writes = Writes.during(model, some.clean)
        layers = zip(writes.z, writes.mlp_out, strict=True) if writes.mlp_out else ((z,) for z in writes.z)
        in_order = [writes.input, *(tensor for layer in layers for tensor in layer)]
        seen = torch.arange(some.clean.shape[1], device=model.device) <= some.end[:, None]
        parts.append([tensor[seen] for tensor in in_order])
    values = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    means = [value.mean(0) for value in values]
    spreads = [(v - mean).square().mean(0).mean(-1, keepdim=True).sqrt() for v, mean in zip(values, means, strict=True)]
    return means, spreads
