"""The clean run as a place to restart from: a patch in layer 9 costs layers 9 to 12, and only where something differs.

Three savings, each exact. A patched stream enters at the layer where it first differs (*suffix*). Positions before the
first token that clean and corrupted prompts differ in are never computed again, their keys and values are attended to
as they were (*prefix*). Many patches of one layer are stacked along the batch (*variants*).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.measure import measure
from circuits.writes import Writes, sites
from mechinterp.cache import ActivationCache
from mechinterp.metrics import Metric
from mechinterp.models.attention import Prefix
from mechinterp.models.transformer import ResidualStart, Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site

TOKENS_AT_ONCE = 512  # of one stacked pass: what an MLP holds of them still fits a CPU's cache, and more gains nothing


@dataclass(frozen=True)
class CleanRun:
    """A recorded clean run of one batch, the difference that the ablation makes to each writer, and the metric."""

    model: Transformer
    prompts: PromptBatch
    metric: Metric
    cache: ActivationCache
    delta: Writes
    first: int
    clean_metric: Float[Tensor, "batch"]

    @classmethod
    def record(
        cls, model: Transformer, prompts: PromptBatch, metric: Metric, replacement: Writes, *, shares_prefix: bool
    ) -> "CleanRun":
        """One clean forward. ``shares_prefix``: the ablation leaves what both prompts share as it is (resampling does)."""
        wanted = [*sites(model), "resid_pre", "q", "k", "v", "z", "resid_post"]
        wanted += ["resid_mid"] if model.config.has_mlp and not model.config.parallel else []
        prompts = prompts.to(model.device)
        _, cache = model.run(prompts.clean, record=wanted, logits_at="last", logits_of=prompts.clean[:, :0])
        first = first_that_differs(model, prompts, shares_prefix=shares_prefix)
        last = Site("resid_post", model.config.n_layers - 1)
        start = ResidualStart(last, _at(cache[last], prompts.end))
        clean, _ = measure(model, prompts, metric, start=start, logits_at=torch.zeros_like(prompts.end))
        delta = (replacement - Writes.of(cache, model.weights)).map(lambda x: x[:, first:])
        return cls(model, prompts, metric, cache, delta, first, clean[0])

    def __getitem__(self, site: tuple[str, int]) -> Float[Tensor, "batch pos ..."]:
        """A clean activation, from the first position that can differ on."""
        return self.cache[site][:, self.first :]

    @property
    def prefix(self) -> Prefix | None:
        return Prefix.of(self.cache, self.model.config.n_layers, self.first) if self.first else None

    @property
    def n_tokens(self) -> int:
        """How many positions of the batch can differ."""
        return len(self.prompts) * (self.prompts.clean.shape[1] - self.first)

    @property
    def ends(self):
        """END, counted from the first position that can differ."""
        return self.prompts.end - self.first

    def after_attention(self, layer: int) -> str:
        """Where the stream goes on once a layer's heads have written."""
        return "resid_mid" if self.model.config.has_mlp and not self.model.config.parallel else "resid_post"

    def falls(self, name: str, layer: int, added: Float[Tensor, "variant batch pos d_model"]) -> Float[Tensor, "variant batch"]:
        """By how much the metric falls when each variant is ``added`` to the clean stream at ``(name, layer)``.

        ``added`` covers the positions from ``first`` on, or END alone where later layers could not tell (last layer).
        """
        stream = self[name, layer]
        at_end = added.shape[2] == 1 and stream.shape[1] != 1
        if at_end:
            stream = _at(stream, self.ends)
        at_once = max(1, TOKENS_AT_ONCE // (stream.shape[0] * stream.shape[1]))
        return torch.cat([self._falls(name, layer, stream, some, at_end) for some in added.split(at_once)])

    def _falls(self, name, layer, stream, added, at_end: bool) -> Float[Tensor, "variant batch"]:
        value = (stream + added).flatten(0, 1)
        start = ResidualStart(Site(name, layer), value, None if at_end else self.prefix)
        at = torch.zeros_like(self.prompts.end) if at_end else self.prompts.end
        patched, _ = measure(
            self.model, self.prompts, self.metric, start=start, logits_at=at.repeat(len(added)), variants=len(added)
        )
        return self.clean_metric - patched


def first_that_differs(model: Transformer, prompts: PromptBatch, *, shares_prefix: bool) -> int:
    """The position before which the ablation changes nothing, and at most END. ``shares_prefix``: as in ``CleanRun.record``."""
    if not (shares_prefix and model.config.causal):  # or what comes later is seen, and changes it
        return 0
    return min(prompts.shared_prefix, int(prompts.end.min()))


def _at(x: Float[Tensor, "batch pos d_model"], ends: Tensor) -> Float[Tensor, "batch 1 d_model"]:
    return x[torch.arange(len(x), device=x.device), ends].unsqueeze(1)


def at_end(run: CleanRun, x: Float[Tensor, "row pos *rest"]) -> Float[Tensor, "row 1 *rest"]:
    """The END position of stacked rows (variant-major)."""
    ends = run.ends.repeat(x.shape[0] // len(run.ends))
    return x[torch.arange(len(x), device=x.device), ends].unsqueeze(1)
