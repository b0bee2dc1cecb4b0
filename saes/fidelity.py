"""What the model makes of an autoencoder's reconstructions: cross-entropy and KL with it spliced in, and what share it keeps.

1. One clean pass a batch: its predictions, and the residual stream before every layer that is needed.
2. Each group alone, and all groups at once, are spliced in; and, to compare, their places set to zero and to their mean.
   A pass begins at the first layer that is changed.
3. Shares recovered: 1 where the reconstruction is as good as the activation, 0 where it is no better than the ablation.

    found = measure_fidelity(model, autoencoder, tokens)
    found.ce_recovered["mean"].value      # one a place, then all of them at once
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import SAEError
from mechinterp.models.transformer import ResidualStart, Transformer
from mechinterp.sites import Site
from saes.base import SparseAutoencoder
from saes.metrics import mean_activation
from saes.places import Place
from saes.positions import KeptRows, default_keep, on_device, text_positions, tokenizer_of
from saes.splice import ablated, spliced

PerTarget = Float[np.ndarray, "target"]
PerPrompt = Float[np.ndarray, "target prompt"]

BASELINES = ("zero", "mean")
# name -> (the target's autoencoder, its means, where) -> patches
_CHANGES: dict[str, Callable[..., dict]] = {
    "sae": lambda autoencoder, mean, where: spliced(autoencoder, where=where),
    "zero": lambda autoencoder, mean, where: ablated(autoencoder.places, None, where),
    "mean": lambda autoencoder, mean, where: ablated(autoencoder.places, mean, where),
}
_NOTHING = 1e-6  # nats a prediction; the rounding of a float32 pass stays below
_NUMBERS = 1 << 23  # log-probabilities held at once, besides the clean ones: 64 MiB


@dataclass(frozen=True, eq=False)
class Shares:
    """Shares recovered, with the ends of 95 % bootstrap intervals over prompts. NaN: undefined (see ``recovered``)."""

    value: PerTarget
    low: PerTarget
    high: PerTarget


@dataclass(frozen=True, eq=False)
class Fidelity:
    """Nats, means over ``n_predictions``. A target is each group alone, in the order of ``places``, and last all at once.

    ``ce`` and ``kl`` have what the model does with the target sent through the autoencoder ("sae"), set to "zero", and set
    to its "mean" on these kept positions: cross-entropy of the next token, and KL(clean || changed). ``ce_recovered`` and
    ``kl_recovered`` have the shares against "zero" and "mean". Zero is the kinder one: name the baseline you print.
    Autoencoders and ablations act on ``n_kept`` positions, and predictions are counted on all that are text.
    """

    places: tuple[Place, ...]
    n_prompts: int
    n_kept: int
    n_predictions: int
    ce_clean: float
    ce: Mapping[str, PerTarget]
    kl: Mapping[str, PerTarget]
    ce_recovered: Mapping[str, Shares]
    kl_recovered: Mapping[str, Shares]

    @property
    def targets(self) -> tuple[str, ...]:
        return (*map(str, self.places), "all")


def measure_fidelity(
    model: Transformer,
    autoencoder: SparseAutoencoder,
    tokens: Int[Tensor, "batch pos"],
    *,
    keep: Bool[Tensor, "batch pos"] | None = None,
    text: Bool[Tensor, "batch pos"] | None = None,
    mean: Float[Tensor, "group d_in"] | None = None,
    batch_size: int = 8,
) -> Fidelity:
    """How the model predicts with each group alone spliced in, and with all, against zero and mean ablation there.

    ``keep``: where autoencoders and ablations act; ``default_keep`` (text without BOS) if None. ``text``: what is no
    padding, ``text_positions`` if None; a prediction is counted where it and its token are text. ``mean``: what mean ablation
    writes; the mean over the kept positions if None, for one more pass. Also for stand-ins with ``run(tokens, record=[Site,
    ...], patch={Site: patch}) -> (logits, mapping of Site to tensor)``; those start every pass at the beginning.

    Costs, for each batch, one forward and three passes a target from the target's first layer on. For all 144 heads of
    GPT-2 small that is some 420 times a forward on the CPU, six tenths of it unembedding and softmax. Memory: ``batch_size *
    pos * d_vocab`` probabilities in float64 besides the pass's logits. ``SAEError`` for masks that do not fit.
    """
    tokenizer = tokenizer_of(model)
    keep = default_keep(tokens, tokenizer) if keep is None else keep
    text = text_positions(tokens, tokenizer) if text is None else text
    counted = _counted(tokens, text)
    if isinstance(model, Transformer):
        autoencoder.check_fits(model.config)
        autoencoder = autoencoder.to(model.device)
    rows = KeptRows(model, autoencoder.places, tokens, keep, batch_size)
    mean = mean_activation(autoencoder.places, rows) if mean is None else mean
    clean_ce, changed = _measured(model, _targets(autoencoder, mean), tokens, keep, counted, batch_size)
    return _summary(autoencoder, clean_ce, changed, counted.sum(1).cpu().numpy(), int(keep.sum()))


def recovered(cost: PerPrompt, cost_ablated: PerPrompt, n: Int[np.ndarray, "prompt"], *, seed: int = 0) -> Shares:
    """``1 - sum cost / sum cost_ablated``, summed over prompts: ``1 - (CE_sae - CE_clean) / (CE_ablated - CE_clean)``.

    ``cost``: by how much a prompt's summed cross-entropy (or KL) rises. The share is undefined where ablation does not hurt
    beyond its own noise: its sum must exceed twice its standard error over prompts, and 1e-6 nats for each of the ``n``
    predictions. That takes two prompts at least. Of single heads the cross-entropy often does not tell, where KL does, which
    cannot fall below 0. Intervals are from 1,000 draws of the prompts, the same for every target.
    """
    if len(n) < 2:
        nothing = np.full(len(cost), np.nan)
        return Shares(nothing, nothing, nothing)
    total = cost_ablated.sum(-1)
    noise = cost_ablated.std(-1, ddof=1) * len(n) ** 0.5
    defined = (total > 2 * noise) & (total > _NOTHING * n.sum())
    drawn = np.random.default_rng(seed).multinomial(len(n), np.full(len(n), 1 / len(n)), size=1000).T
    value = np.full(len(cost), np.nan)
    low, high = value.copy(), value.copy()
    value[defined] = 1 - cost[defined].sum(-1) / total[defined]
    again = 1 - (cost[defined] @ drawn) / (cost_ablated[defined] @ drawn)
    low[defined], high[defined] = np.quantile(again, [0.025, 0.975], axis=-1)
    return Shares(value, low, high)


@dataclass(frozen=True)
class _Target:
    """What is changed at once. ``layer``: the first one changed, or None where that is before or after all layers."""

    autoencoder: SparseAutoencoder
    mean: Float[Tensor, "group d_in"]

    @property
    def layer(self) -> int | None:
        layers = [place.layer for place in self.autoencoder.places]
        return None if None in layers else min(layer for layer in layers if layer is not None)


def _targets(autoencoder: SparseAutoencoder, mean: Tensor) -> list[_Target]:
    """Each group, and all; one group is all there is."""
    alone = [_Target(autoencoder.group(g), mean[g : g + 1]) for g in range(autoencoder.n_groups)]
    return alone if len(alone) == 1 else [*alone, _Target(autoencoder, mean)]


@dataclass(frozen=True)
class _Clean:
    """A batch as the model itself predicts it, at the predictions that count."""

    tokens: Int[Tensor, "batch pos"]
    counted: Bool[Tensor, "batch prediction"]
    probabilities: Float[Tensor, "count d_vocab"]
    entropy: Float[Tensor, "count"]
    ce: Float[Tensor, "batch"]
    starts: Mapping[int, ResidualStart]

    def losses(self, logits: Float[Tensor, "batch pos d_vocab"]) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
        """Summed over each prompt: cross-entropy of the next token, and ``KL(clean || logits)``.

        KL is the cross-entropy of the clean predictions less their entropy, in float64: it may be a millionth of either.
        """
        own, cross, at = [], [], 0
        for log_q, came in _log_probabilities(logits, self.tokens, self.counted):
            own.append(-log_q.gather(-1, came.unsqueeze(-1)).squeeze(-1))
            cross.append(-(self.probabilities[at : at + len(log_q)] * log_q).sum(-1))
            at += len(log_q)
        kl = (torch.cat(cross) - self.entropy).clamp_min(0)
        return _by_prompt(torch.cat(own), self.counted), _by_prompt(kl, self.counted)


@torch.no_grad()
def _measured(
    model, targets: list[_Target], tokens: Tensor, keep: Tensor, counted: Tensor, batch_size: int
) -> tuple[Float[np.ndarray, "prompt"], dict[str, Float[np.ndarray, "2 target prompt"]]]:
    """Losses summed over each prompt: clean cross-entropy, and by change cross-entropy and KL. ``model`` may be a stand-in."""
    from tqdm.auto import tqdm

    clean_ce = np.empty(len(tokens))
    changed = {change: np.empty((2, len(targets), len(tokens))) for change in _CHANGES}
    batches = [slice(first, first + batch_size) for first in range(0, len(tokens), batch_size)]
    bar = tqdm(total=len(batches) * len(targets) * len(_CHANGES), unit="pass", desc="splicing", delay=2, disable=None)
    with bar:
        for batch in batches:
            clean = _clean(model, targets, tokens[batch], counted[batch])
            clean_ce[batch] = clean.ce.cpu()
            where = on_device(model, keep[batch])
            for number, target in enumerate(targets):
                for change, patches in _CHANGES.items():
                    logits = _run_from(model, target.layer, clean, patches(target.autoencoder, target.mean, where))
                    changed[change][:, number, batch] = torch.stack(clean.losses(logits)).cpu()
                    bar.update()
    return clean_ce, changed


def _clean(model, targets: list[_Target], tokens: Tensor, counted: Tensor) -> _Clean:
    layers = {target.layer for target in targets if target.layer is not None and isinstance(model, Transformer)}
    sites = {layer: Site("resid_pre", layer) for layer in layers}
    tokens, counted = on_device(model, tokens), on_device(model, counted)
    logits, cache = model.run(tokens, record=list(sites.values()))
    own, probabilities, entropy = [], [], []
    for log_p, came in _log_probabilities(logits, tokens, counted):
        own.append(-log_p.gather(-1, came.unsqueeze(-1)).squeeze(-1))
        probabilities.append(p := log_p.exp())
        entropy.append(-(p * log_p).sum(-1))
    starts = {layer: ResidualStart(site, cache[site]) for layer, site in sites.items()}
    return _Clean(tokens, counted, torch.cat(probabilities), torch.cat(entropy), _by_prompt(torch.cat(own), counted), starts)


def _run_from(model, layer: int | None, clean: _Clean, patch: dict) -> Float[Tensor, "batch pos d_vocab"]:
    """The logits with ``patch``; from ``layer`` on, the first that it changes, where the model can."""
    if layer is not None and layer in clean.starts:
        return model.run(None, start=clean.starts[layer], patch=patch)[0]
    return model.run(clean.tokens, patch=patch)[0]


def _log_probabilities(logits: Tensor, tokens: Tensor, counted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities ``[count d_vocab]`` at counted predictions and the tokens that came, some at a time."""
    flat, came = logits[:, :-1][counted], tokens[:, 1:][counted]
    step = max(1, _NUMBERS // logits.shape[-1])
    for rows, target in zip(flat.split(step), came.split(step), strict=True):
        yield rows.double().log_softmax(-1), target


def _by_prompt(values: Float[Tensor, "count"], counted: Bool[Tensor, "batch prediction"]) -> Float[Tensor, "batch"]:
    grid = values.new_zeros(counted.shape)
    grid[counted] = values
    return grid.sum(1)


def _counted(tokens: Tensor, text: Tensor) -> Bool[Tensor, "batch prediction"]:
    if text.shape != tokens.shape:
        raise SAEError(f"text has shape {list(text.shape)}; it marks positions of tokens, {list(tokens.shape)}.")
    counted = text[:, :-1] & text[:, 1:]
    if not counted.any():
        raise SAEError("no position predicts a token that is text. Give prompts of two tokens at least, besides padding.")
    return counted


def _summary(autoencoder: SparseAutoencoder, clean_ce: np.ndarray, changed: dict, n: np.ndarray, n_kept: int) -> Fidelity:
    if autoencoder.n_groups == 1:
        changed = {change: losses.repeat(2, 1) for change, losses in changed.items()}
    ce = {change: losses[0] for change, losses in changed.items()}
    kl = {change: losses[1] for change, losses in changed.items()}
    rise = {change: losses - clean_ce for change, losses in ce.items()}
    return Fidelity(
        places=autoencoder.places,
        n_prompts=len(n),
        n_kept=n_kept,
        n_predictions=int(n.sum()),
        ce_clean=float(clean_ce.sum() / n.sum()),
        ce={change: losses.sum(-1) / n.sum() for change, losses in ce.items()},
        kl={change: losses.sum(-1) / n.sum() for change, losses in kl.items()},
        ce_recovered={baseline: recovered(rise["sae"], rise[baseline], n) for baseline in BASELINES},
        kl_recovered={baseline: recovered(kl["sae"], kl[baseline], n) for baseline in BASELINES},
    )
