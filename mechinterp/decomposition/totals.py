"""One clean pass, in which every activation is known: the totals that all splits are splits of."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import ModelError
from mechinterp.models.config import ModelConfig
from mechinterp.models.normalization import normalize
from mechinterp.models.transformer import Transformer
from mechinterp.sites import Site, all_sites
from mechinterp.store import ActivationStore

_NAMES = (
    *("resid_pre", "q", "k", "v", "z", "z_written", "attn_out", "resid_mid"),
    *("mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out", "resid_post"),
)


@dataclass(frozen=True)
class Totals:
    """The activations of a clean pass from position ``first`` on, or with ``at_end`` at each prompt's END alone.

    ``ends``: where logits are wanted (None: everywhere). ``logits_of``: the tokens they are wanted of (None: all).
    """

    model: Transformer
    cache: ActivationCache
    ends: Int[Tensor, "batch"] | None = None
    logits_of: Int[Tensor, "batch candidate"] | None = None
    first: int = 0
    at_end: bool = False

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: Transformer,
        tokens: Int[Tensor, "batch pos"],
        *,
        ends: Int[Tensor, "batch"] | None = None,
        logits_of: Int[Tensor, "batch candidate"] | None = None,
        patterns: bool = False,
        store: ActivationStore | None = None,
    ) -> "Totals":
        """One forward, or none where ``store`` holds it. ``patterns``: attention, too, for rules that hold it."""
        wanted = (*_NAMES, "pattern") if patterns else _NAMES
        sites = [site for site in all_sites(model.config) if site.name in wanted]
        tokens = tokens.to(model.device)
        if store is None:
            _, cache = model.run(tokens, record=sites, logits_at="last", logits_of=tokens[:, :0])
        else:
            cache = store.cached_run(model, tokens, sites, dtype=model.dtype)
        _check(tokens, ends, logits_of, model.config.d_vocab)
        ends, logits_of = (None if at is None else at.to(model.device) for at in (ends, logits_of))
        return cls(model, cache, ends, logits_of)

    @staticmethod
    def size_of_a_token(model: Transformer) -> int:
        """Bytes that a pass keeps of each token (patterns not counted)."""
        kept = (width(model.config, site) for site in all_sites(model.config) if site.name in _NAMES)
        return sum(kept) * model.weights.W_E.element_size()

    @property
    def shape(self) -> tuple[int, int]:
        """How many prompts, and of how many positions in all."""
        return self.cache["resid_pre", 0].shape[:2]  # type: ignore[return-value]

    @property
    def queries(self) -> Int[Tensor, "#batch query_pos"]:
        """The positions that are looked at."""
        if self.at_end and self.ends is not None:
            return self.ends[:, None]
        return torch.arange(self.first, self.shape[1], device=self.model.device)[None]

    def __call__(self, name: str, layer: int) -> Float[Tensor, "batch here *axes"]:
        return self.here(self._all(name, layer)[:, self.first :])

    def here(self, x: Float[Tensor, "batch pos *axes"]) -> Float[Tensor, "batch here *axes"]:
        """What is given from ``first`` on, at the positions that are looked at."""
        return x if not self.at_end else x[self._rows].unsqueeze(1)

    def stacked_here(self, x: Shaped[Tensor, "source batch pos *axes"]) -> Shaped[Tensor, "source batch here *axes"]:
        """The same of a stack."""
        return x if not self.at_end else x[:, *self._rows].unsqueeze(2)

    def narrowed(self) -> "Totals":
        """The same pass, looked at where logits are wanted."""
        return self if self.ends is None else replace(self, at_end=True)

    def before(self, name: str, layer: int) -> Float[Tensor, "batch prefix group d_head"]:
        """Keys or values in front of ``first``, where nothing is relevant."""
        return self._all(name, layer)[:, : self.first]

    def pattern(self, layer: int) -> Float[Tensor, "batch head_index query_pos key_pos"]:
        """The attention of the positions looked at, on the keys from ``first`` on."""
        if Site("pattern", layer) not in self.cache:
            raise ModelError(
                "these rules hold the attention patterns, and this pass did not record them: Totals.of(..., patterns=True)."
            )
        rows = self._all("pattern", layer)[:, :, self.first :, self.first :]
        return self.here(rows.transpose(1, 2)).transpose(1, 2)

    def mlp_out_before_its_norm(self, layer: int) -> Float[Tensor, "batch here d_model"]:
        """What an MLP writes; where that is normalised, computed again as it was before."""
        block = self.model.weights.blocks[layer]
        if block.ln2_post is None or block.W_out is None:
            return self("mlp_out", layer)
        out = self("mlp_post", layer) @ block.W_out
        return out if block.b_out is None else out + block.b_out

    def uncapped_logits(self, columns: slice | Int[Tensor, "column"] = slice(None)) -> Float[Tensor, "batch pos column"]:
        """Of the positions looked at, for some tokens or all."""
        model = self.model
        stream = normalize(self("resid_post", model.config.n_layers - 1), model.weights.ln_final, model.config)
        logits = stream @ model.weights.W_U[:, columns]
        return logits if model.weights.b_U is None else logits + model.weights.b_U[columns]

    def target(self, site: Site) -> Float[Tensor, "batch *axes"]:
        """The total of what can be a target, as far as it is wanted."""
        if site.layer is not None:
            return self(site.name, site.layer)
        columns, chosen = self.columns
        return self.as_wanted(self.model.capped(self.narrowed().uncapped_logits(columns)), chosen)

    @property
    def columns(self) -> tuple[slice | Int[Tensor, "column"], Int[Tensor, "batch candidate"] | None]:
        """The columns of W_U that are needed, each once, and where among them each prompt's wanted tokens are."""
        return (slice(None), None) if self.logits_of is None else self.logits_of.unique(return_inverse=True)

    def as_wanted(
        self, logits: Float[Tensor, "*source batch pos column"], chosen: Int[Tensor, "batch candidate"] | None
    ) -> Float[Tensor, "*axes token"]:
        """Logits of the needed columns as those of each prompt's tokens; at END without an axis of positions."""
        if chosen is not None:
            logits = logits.gather(-1, chosen.unsqueeze(1).expand(*logits.shape[:-1], -1))
        return logits if self.ends is None else logits.squeeze(-2)

    def _all(self, name: str, layer: int) -> Tensor:
        """At all positions, where the model is: a cache from a store lies in main memory."""
        return self.cache[name, layer].to(self.model.device)

    @property
    def _rows(self) -> tuple[Tensor, Tensor]:
        assert self.ends is not None
        return torch.arange(len(self.ends), device=self.ends.device), self.ends - self.first


def width(config: ModelConfig, site: Site) -> int:
    """How many numbers a token has at a site of the stream, of heads or of an MLP."""
    sizes = {"d_model": config.d_model, "head_index": config.n_heads, "group": config.n_groups, "d_head": config.d_head}
    return math.prod((sizes | {"d_mlp": config.d_mlp or 0})[axis] for axis in site.axes.split()[2:])


def _check(tokens: Tensor, ends: Tensor | None, logits_of: Tensor | None, d_vocab: int) -> None:
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ModelError(f"tokens must be prompts by positions, at least one of each, not {tuple(tokens.shape)}.")
    n_batch, n_pos = tokens.shape
    if ends is not None and not (ends.shape == (n_batch,) and bool(((ends >= 0) & (ends < n_pos)).all())):
        raise ModelError(f"ends must be one position for each of {n_batch} prompts, 0 to {n_pos - 1}, not {ends.tolist()}.")
    if logits_of is None:
        return
    if logits_of.dim() != 2 or len(logits_of) != n_batch or not bool(((logits_of >= 0) & (logits_of < d_vocab)).all()):
        raise ModelError(
            f"logits_of must be token ids from 0 to {d_vocab - 1}, as many for each of {n_batch} prompts, not "
            f"{tuple(logits_of.shape)} from {int(logits_of.min())} to {int(logits_of.max())}."
        )
