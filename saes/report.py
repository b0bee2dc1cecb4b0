"""One value that says how good an autoencoder is: what it rebuilds, with how few latents, and what the model makes of it.

report = evaluate(model, autoencoder, tokens)
print(report)                                  # one line a place, then all of them spliced in at once
report.save("report.json"); SAEReport.load("report.json")
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import SAEError
from mechinterp.files import array_from_text, array_to_text, read_document, to_document, write_text_atomically
from mechinterp.models.transformer import Transformer
from mechinterp.store import ActivationStore
from saes.base import SparseAutoencoder
from saes.fidelity import Fidelity, Shares, measure_fidelity
from saes.metrics import Cosines, PerGroup, Reconstruction, cosines, mean_activation, reconstruction
from saes.places import Place
from saes.positions import KeptRows, default_keep, text_positions, tokenizer_of

_KIND, _VERSION = "mechinterp autoencoder report", 1
_NUMBERS = ("mse", "explained_variance", "explained_variance_legacy", "cosine", "l2_ratio", "relative_bias", "l0", "l1")
_COSINES = ("encoder_decoder", "nearest_encoder", "nearest_decoder")
# column -> (its entry in ``rows``, how it is written)
_COLUMNS = {
    "L0": ("l0", ".1f"),
    "dead": ("dead_share", ".1%"),
    "> 10 %": ("denser_than_10_percent", ".1%"),
    "var. expl.": ("explained_variance", ".3f"),
    "cosine": ("cosine", ".3f"),
    "norm ratio": ("l2_ratio", ".3f"),
    "CE +nats": ("ce_increase", ".4f"),
    "KL nats": ("kl", ".4f"),
    "CE rec. (mean)": ("ce_recovered_mean", ".3f"),
    "CE rec. (zero)": ("ce_recovered_zero", ".3f"),
    "KL rec. (mean)": ("kl_recovered_mean", ".3f"),
}


@dataclass(frozen=True, eq=False)
class SAEReport:
    """What ``evaluate`` found. ``left_out`` says in words which positions were: BOS, padding, or what the caller chose.

    ``effective_heads``: over how many heads a live latent of a group's is spread, exp of the entropy of its shares, mean
    over latents; None for autoencoders that do not read concatenated heads. ``cosines``: None where not asked for.
    """

    model: str
    kind: str
    d_in: int
    d_sae: int
    left_out: str
    reconstruction: Reconstruction
    fidelity: Fidelity
    cosines: Cosines | None = None
    effective_heads: PerGroup | None = None

    @property
    def places(self) -> tuple[Place, ...]:
        return self.reconstruction.places

    def rows(self) -> list[dict[str, Any]]:
        """Name and number of everything measured: one dictionary a place, and one for "all".

        In the last, reconstruction and sparsity are means over places, and fidelity is of all places changed at once.
        """
        per_group = self._per_group()
        with_all = {name: [*values, values.mean()] for name, values in per_group.items()} | self._per_target()
        return [
            {"place": target} | {name: float(values[at]) for name, values in with_all.items()}
            for at, target in enumerate(self.fidelity.targets)
        ]

    def table(self) -> str:
        """A Markdown table under a line that says what was measured on what."""
        rows = [[row["place"], *(_written(row[name], how) for name, how in _COLUMNS.values())] for row in self.rows()]
        lines = [["place", *_COLUMNS], ["---", *["---:"] * len(_COLUMNS)], *rows]
        r, f = self.reconstruction, self.fidelity
        about = (
            f"{self.kind}, {self.d_in} to {self.d_sae} latents, on {self.model}: {r.n_rows:,} positions of {f.n_prompts:,} "
            f"prompts ({self.left_out}); cross-entropy {f.ce_clean:.4f} nats without it, over {f.n_predictions:,} predictions."
        )
        return "\n".join([about, "", *(f"| {' | '.join(cells)} |" for cells in lines)])

    def __str__(self) -> str:
        return self.table()

    def save(self, path: str | os.PathLike) -> None:
        """JSON, whole or not at all. What is undefined (NaN) is null."""
        facts = {name: getattr(self, name) for name in ("model", "kind", "d_in", "d_sae", "left_out")}
        content = facts | {"places": [str(place) for place in self.places]}
        content["reconstruction"] = {"n_rows": self.reconstruction.n_rows} | _plain(self.reconstruction, _NUMBERS)
        content["density"] = array_to_text(self.reconstruction.density)
        content["fidelity"] = _fidelity_to_plain(self.fidelity)
        content["cosines"] = self.cosines and _plain(self.cosines, _COSINES)
        content["effective_heads"] = None if self.effective_heads is None else _nulls(self.effective_heads)
        write_text_atomically(path, to_document(_KIND, _VERSION, content))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SAEReport":
        """What ``save`` wrote. ``SAEError`` names the file and what is wrong with it."""
        document = read_document(path, _KIND, _VERSION, SAEError)
        try:
            return _from_document(document)
        except (TypeError, KeyError, ValueError, AttributeError) as problem:
            raise SAEError(f"{os.fspath(path)!r} does not hold a usable report: {problem!r}.") from problem

    def _per_group(self) -> dict[str, np.ndarray]:
        r = self.reconstruction
        found = {name: getattr(r, name) for name in _NUMBERS} | {"dead_share": r.dead_share}
        found |= {f"denser_than_{percent}_percent": r.denser_than(percent / 100) for percent in (1, 10)}
        if self.cosines is not None:
            found |= {f"cosine_{name}": getattr(self.cosines, name) for name in _COSINES}
        return found if self.effective_heads is None else found | {"effective_heads": self.effective_heads}

    def _per_target(self) -> dict[str, np.ndarray]:
        f = self.fidelity
        found = {"ce": f.ce["sae"], "ce_increase": f.ce["sae"] - f.ce_clean, "kl": f.kl["sae"]}
        for baseline in f.ce_recovered:
            found |= {f"ce_{baseline}_ablated": f.ce[baseline], f"kl_{baseline}_ablated": f.kl[baseline]}
            for name, shares in (("ce", f.ce_recovered[baseline]), ("kl", f.kl_recovered[baseline])):
                found |= {f"{name}_recovered_{baseline}{end}": getattr(shares, at) for end, at in _ENDS.items()}
        return found


_ENDS = {"": "value", "_low": "low", "_high": "high"}


def evaluate(
    model: Transformer,
    autoencoder: SparseAutoencoder,
    tokens: Int[Tensor, "batch pos"],
    *,
    keep: Bool[Tensor, "batch pos"] | None = None,
    text: Bool[Tensor, "batch pos"] | None = None,
    store: ActivationStore | None = None,
    batch_size: int = 8,
    with_cosines: bool = True,
) -> SAEReport:
    """Reconstruction, sparsity and fidelity on ``tokens``, which should be others than the autoencoder was trained on.

    Autoencoders act, and are measured, at ``keep``; by default on text without BOS. Activations are read from ``store`` if
    there is one (and recorded there at first), else from two passes of the model. ``model`` may be a stand-in as in
    ``fidelity``, which takes nearly all of the time; see there for ``text`` and the cost. ``with_cosines=False`` spares
    what grows with ``d_sae^2``.
    """
    tokenizer = tokenizer_of(model)
    chosen = default_keep(tokens, tokenizer) if keep is None else keep
    rows = KeptRows(model, autoencoder.places, tokens, chosen, batch_size, store)
    mean = mean_activation(autoencoder.places, rows)
    found = reconstruction(autoencoder, rows, mean=mean)
    config = getattr(model, "config", None)
    return SAEReport(
        model=str(getattr(config, "name", type(model).__name__)),
        kind=autoencoder.kind,
        d_in=autoencoder.d_in,
        d_sae=autoencoder.d_sae,
        left_out=_left_out(tokens, chosen, tokenizer),
        reconstruction=found,
        fidelity=measure_fidelity(model, autoencoder, tokens, keep=chosen, text=text, mean=mean, batch_size=batch_size),
        cosines=cosines(autoencoder) if with_cosines else None,
        effective_heads=_effective_heads(autoencoder, found, getattr(config, "d_head", None)),
    )


def _left_out(tokens: Tensor, keep: Tensor, tokenizer: Any) -> str:
    if tokenizer is None:
        return f"{int((~keep).sum()):,} positions left out; the model has no tokenizer to tell BOS by"
    text = text_positions(tokens, tokenizer)
    is_bos = text & (tokens == tokenizer.bos_id) if tokenizer.bos_id is not None else torch.zeros_like(keep)
    bos = "no BOS" if not is_bos.any() else "BOS kept" if (keep & is_bos).any() else "BOS left out"
    others = int((text & ~keep & ~is_bos).sum())
    return ", ".join([bos, f"{int((~text).sum()):,} of padding left out", *([f"{others:,} others left out"] if others else [])])


def _effective_heads(autoencoder: SparseAutoencoder, found: Reconstruction, d_head: int | None) -> PerGroup | None:
    """None unless every group reads what the heads of a layer gather side by side, and we know how wide a head is."""
    if d_head is None or any(at.head is not None or at.site.name != "z" for at in autoencoder.places):
        return None
    from saes.heads import head_shares, summarize_heads

    shares = head_shares(autoencoder, d_head)
    live = torch.from_numpy(found.density > 0).to(shares.device)
    return summarize_heads(shares, live).effective_heads.double().cpu().numpy()


def _written(value: float, how: str) -> str:
    return "undefined" if math.isnan(value) else format(value, how)


def _plain(found: Any, names: Sequence[str]) -> dict[str, list[float | None]]:
    return {name: _nulls(getattr(found, name)) for name in names}


def _nulls(values: Float[np.ndarray, "n"]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _array(values: Sequence[float | None]) -> Float[np.ndarray, "n"]:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _fidelity_to_plain(found: Fidelity) -> dict[str, Any]:
    plain: dict[str, Any] = {name: getattr(found, name) for name in ("n_prompts", "n_kept", "n_predictions", "ce_clean")}
    for kind in ("ce", "kl"):
        plain[kind] = {change: _nulls(values) for change, values in getattr(found, kind).items()}
        shares: Mapping[str, Shares] = getattr(found, f"{kind}_recovered")
        plain[f"{kind}_recovered"] = {baseline: _plain(of, tuple(_ENDS.values())) for baseline, of in shares.items()}
    return plain


def _from_document(document: Mapping[str, Any]) -> SAEReport:
    places = tuple(map(Place.parse, document["places"]))
    numbers = dict(document["reconstruction"])
    density = array_from_text(document["density"])
    rebuilt = Reconstruction(
        places, numbers.pop("n_rows"), density=density, **{name: _array(values) for name, values in numbers.items()}
    )
    plain = dict(document["fidelity"])
    for kind in ("ce", "kl"):
        plain[kind] = {change: _array(values) for change, values in plain[kind].items()}
        plain[f"{kind}_recovered"] = {
            baseline: Shares(**{end: _array(values) for end, values in ends.items()})
            for baseline, ends in plain[f"{kind}_recovered"].items()
        }
    angles, heads = document["cosines"], document["effective_heads"]
    return SAEReport(
        **{name: document[name] for name in ("model", "kind", "d_in", "d_sae", "left_out")},
        reconstruction=rebuilt,
        fidelity=Fidelity(places, **plain),
        cosines=angles and Cosines(**{name: _array(values) for name, values in angles.items()}),
        effective_heads=None if heads is None else _array(heads),
    )
