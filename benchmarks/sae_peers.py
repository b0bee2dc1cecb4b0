"""The other sides of ``sae_speed``: SAELens' trainers and a plain loop over heads, at our settings, a few steps at a time.

What is made the same for SAELens: batches and their order, the schedules of the learning rate and of L1, Adam's betas,
clipping at 1, the number of batches after which a latent counts as dead, and (unless ``own_start``) the first weights.
What stays its own: decoder rows of any norm, with top-k chosen by latents times these norms and L1 weighed by them; an Adam
for each autoencoder, not fused; and an auxiliary loss of its own making, at our weight.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAETrainer, StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor

from saes.base import SparseAutoencoder
from saes.objectives import OBJECTIVES
from saes.places import Place
from saes.settings import TrainSettings
from saes.steps import renormalize


class SAELens:
    """A training that goes on when it is told to: ``SAETrainer`` for one autoencoder, ``MultiSAETrainer`` for many."""

    def __init__(
        self,
        batches: Iterator[Float[Tensor, "group row d_in"]],
        places: tuple[Place, ...],
        start: dict[str, Tensor],
        settings: TrainSettings,
        own_start: bool = False,
    ):
        self.places, self.settings = places, settings
        torch.manual_seed(settings.seed)
        self.autoencoders = [_autoencoder(start["W_enc"].shape[1], settings) for _ in places]
        if not own_start:
            for group, autoencoder in enumerate(self.autoencoders):
                autoencoder.load_state_dict({name: tensor[group] for name, tensor in start.items()})
        self.trainer = _trainer(self.autoencoders, batches, settings)

    def advance(self, n_steps: int) -> None:
        """``fit`` up to that many steps further on: it stops at the number of samples that its settings name."""
        self.trainer.cfg.total_training_samples = self.trainer.n_training_samples + n_steps * self.settings.batch_size
        with torch.enable_grad(), contextlib.redirect_stderr(io.StringIO()):
            self.trainer.fit()

    def result(self) -> SparseAutoencoder:
        """The same functions with decoder rows of norm 1: a row's norm moves over to its encoder column and bias."""
        p = {name: torch.stack([dict(one.named_parameters())[name].detach() for one in self.autoencoders]) for name in _NAMES}
        norms = p["W_dec"].norm(dim=-1)
        return SparseAutoencoder(
            self.settings.architecture,
            self.places,
            W_enc=p["W_enc"] * norms.unsqueeze(1),
            b_enc=p["b_enc"] * norms,
            W_dec=p["W_dec"] / norms.unsqueeze(-1),
            b_dec=p["b_dec"],
            k=self.settings.k if self.settings.architecture == "topk" else None,
        )


class PlainLoop:
    """What one writes without us: head after head autograd through the same objective and an Adam of its own."""

    def __init__(self, batches: Iterator[Tensor], places: tuple[Place, ...], start: dict[str, Tensor], settings: TrainSettings):
        self.batches, self.places, self.settings, self.step = batches, places, settings, 0
        self.heads = [
            {name: tensor[group : group + 1].clone().requires_grad_() for name, tensor in start.items()}
            for group in range(len(places))
        ]
        self.optimizers = [
            torch.optim.Adam(list(p.values()), lr=settings.lr, betas=settings.betas, fused=True) for p in self.heads
        ]

    def advance(self, n_steps: int) -> None:
        with torch.enable_grad():
            for _ in range(n_steps):
                batch = next(self.batches)
                for group, (p, optimizer) in enumerate(zip(self.heads, self.optimizers, strict=True)):
                    self._head(p, optimizer, batch[group : group + 1])
                self.step += 1

    def _head(self, p: dict[str, Tensor], optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        settings = self.settings
        optimizer.zero_grad()
        OBJECTIVES[settings.architecture](p, x, settings, settings.weight(self.step)).total.sum().backward()
        W_dec = p["W_dec"]
        assert W_dec.grad is not None
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(-1, keepdim=True) * W_dec
        torch.nn.utils.clip_grad_norm_(p.values(), settings.clip or torch.inf)
        optimizer.param_groups[0]["lr"] = settings.learning_rate(self.step)
        optimizer.step()
        with torch.no_grad():
            renormalize(W_dec)

    def result(self) -> SparseAutoencoder:
        p: dict[str, Any] = {name: torch.cat([head[name].detach() for head in self.heads]) for name in self.heads[0]}
        k = self.settings.k if self.settings.architecture == "topk" else None
        return SparseAutoencoder(self.settings.architecture, self.places, **p, k=k)


_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def _autoencoder(d_in: int, settings: TrainSettings) -> Any:
    if settings.architecture == "topk":
        config = TopKTrainingSAEConfig(d_in=d_in, d_sae=settings.d_sae, k=settings.k, aux_loss_coefficient=settings.aux_weight)
        return TopKTrainingSAE(config)
    warm_up = round(settings.warm_up * settings.n_steps)
    config = StandardTrainingSAEConfig(
        d_in=d_in, d_sae=settings.d_sae, l1_coefficient=settings.sparsity, l1_warm_up_steps=warm_up
    )
    return StandardTrainingSAE(config)


def _trainer(autoencoders: list[Any], batches: Iterator[Tensor], settings: TrainSettings) -> Any:
    config = SAETrainerConfig(
        total_training_samples=settings.n_steps * settings.batch_size,
        train_batch_size_samples=settings.batch_size,
        lr=settings.lr,
        lr_end=settings.lr / 10,  # asked for, and of no effect on a constant rate that decays
        lr_warm_up_steps=round(settings.warm_up * settings.n_steps),
        lr_decay_steps=round(settings.decay * settings.n_steps),
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        dead_feature_window=settings.idle_rows // settings.batch_size,
    )
    if len(autoencoders) == 1:
        return SAETrainer(config, autoencoders[0], (batch[0] for batch in batches))
    names = [str(number) for number in range(len(autoencoders))]
    by_name = (dict(zip(names, batch.unbind(), strict=True)) for batch in batches)
    return MultiSAETrainer(config, dict(zip(names, autoencoders, strict=True)), {name: name for name in names}, by_name)
