"""What a dashboard shows of each latent, as plain numbers and words: gathered once, drawn by the page itself.

Attributions are stored sparsely: the sources above ``LISTED`` of the largest, at most ``N_SOURCES``, and what all the others
sum to, so that a page's numbers still add up to the pre-activation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.models.transformer import Transformer
from mechinterp.sites import Site
from saes.base import SparseAutoencoder
from saes.examples import LatentExamples
from saes.families import Signature, dfa_at
from saes.heads import head_shares
from saes.linear import constant
from saes.logits import top_tokens
from saes.places import Place

LISTED = 0.01
N_SOURCES = 24
N_NEAREST = 5
Latent = tuple[Place, int]
Pair = tuple[int, int]  # prompt and position


@dataclass(frozen=True)
class Look:
    """How much is shown: tokens before and after an example, tokens by logits, prompts a pass."""

    buffer: tuple[int, int]
    n_logits: int
    batch_size: int
    progress: bool


def at_heads(autoencoder: SparseAutoencoder) -> bool:
    """Whether every group reads what heads write, so that attribution to heads and sources is defined."""
    return all(place.site.name == "z" for place in autoencoder.places)


def examples_shown(
    model: Transformer,
    autoencoder: SparseAutoencoder,
    tokens: Int[Tensor, "prompt pos"],
    found: Sequence[LatentExamples],
    look: Look,
) -> dict[Latent, dict[Pair, dict[str, Any]]]:
    """Of every example: activations around it and, at heads, the attribution of the activation to heads and sources.

    One pass over the prompts that hold an example.
    """
    wanted: dict[int, dict[Place, list[tuple[int, int]]]] = {}
    for latent in found:
        for prompt, pos in dict.fromkeys(zip(latent.prompt.tolist(), latent.pos.tolist(), strict=True)):
            wanted.setdefault(prompt, {}).setdefault(latent.place, []).append((latent.latent, pos))
    groups = {place: autoencoder.group(place) for place in autoencoder.places}
    sites = {place.site for place in groups}
    if at_heads(autoencoder):
        sites |= {Site(name, place.layer) for place in groups for name in ("v", "pattern")}
    shown: dict[Latent, dict[Pair, dict[str, Any]]] = {(latent.place, latent.latent): {} for latent in found}
    prompts = sorted(wanted)
    bar = {"desc": "dashboard", "unit": "batch", "delay": 2, "disable": None if look.progress else True}
    for start in tqdm(range(0, len(prompts), look.batch_size), **bar):
        some = prompts[start : start + look.batch_size]
        with torch.no_grad():
            _, cache = model.run(tokens[some].to(model.device), record=sites, logits_at="last")
            for row, prompt in enumerate(some):
                for place, pairs in wanted[prompt].items():
                    for latent, pos, example in _of_prompt(groups[place], cache, row, pairs, look.buffer):
                        shown[place, latent][prompt, pos] = example
    return shown


def _of_prompt(
    one: SparseAutoencoder, cache, row: int, pairs: list[tuple[int, int]], buffer: tuple[int, int]
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    latent, pos = torch.tensor(pairs, device=one.W_enc.device).unbind(1)
    x = one.places[0].read(cache)[row].to(one.W_enc.dtype)
    latents = one.encode(x[None])[0][:, latent]
    parts = dfa_at(one, cache, row, pos, latent) if at_heads(one) else None
    for number, (which, at) in enumerate(pairs):
        start = max(0, at - buffer[0])
        around = latents[start : at + buffer[1] + 1, number]
        example = {"pos": at, "activation": short(latents[at, number]), "start": start, "activations": shorts(around)}
        yield which, at, example | ({} if parts is None else _sources(parts[number], one))


def _sources(part: Float[Tensor, "head_index key_pos"], one: SparseAutoencoder) -> dict[str, Any]:
    by_source = part.sum(0)
    size = by_source.abs()
    order = size.argsort(descending=True, stable=True)[:N_SOURCES]
    listed = order[size[order] >= LISTED * size.max()].sort().values
    first = one.places[0].head or 0
    head = (part[:, listed] * by_source[listed].sign()).argmax(0) + first
    rest = by_source.sum() - by_source[listed].sum()
    sources = [list(entry) for entry in zip(listed.tolist(), shorts(by_source[listed]), head.tolist(), strict=True)]
    return {"by_head": shorts(part.sum(1)), "sources": sources, "rest": short(rest)}


def of_weights(model: Transformer, one: SparseAutoencoder, latents: list[int], look: Look) -> list[dict[str, Any]]:
    """What a group's weights alone say of some latents: bias, head shares, direct logits, nearest decoder rows."""
    nothing = {"heads": [], "first_head": 0, "top": [], "bottom": []}
    known = zip(shorts(one.b_enc[0, latents]), shorts(constant(one)[latents]), _nearest(one, latents), strict=True)
    found = [{"bias": bias, "constant": own, "nearest": others, **nothing} for bias, own, others in known]
    if not at_heads(one):
        return found
    effects = top_tokens(model, one, latents, n=min(look.n_logits, model.config.d_vocab))
    shares = head_shares(one, model.config.d_head)[0] if one.places[0].head is None else torch.ones(one.d_sae, 1)
    for row, (latent, entry) in enumerate(zip(latents, found, strict=True)):
        entry["heads"], entry["first_head"] = shorts(shares[latent]), one.places[0].head or 0
        entry["top"] = _pairs(effects.top[row], effects.top_effects[row])
        entry["bottom"] = _pairs(effects.bottom[row], effects.bottom_effects[row])
    return found


def _nearest(one: SparseAutoencoder, latents: list[int]) -> list[list[list[Any]]]:
    """The latents of the same group whose decoder rows point most nearly the same way."""
    unit = torch.nn.functional.normalize(one.W_dec[0], dim=-1)
    found = []
    for some in torch.tensor(latents, dtype=torch.long, device=unit.device).split(512):
        cosine = unit[some] @ unit.T
        cosine[torch.arange(len(some)), some] = -torch.inf
        best = cosine.topk(min(N_NEAREST, one.d_sae - 1))
        found += [_pairs(*row) for row in zip(best.indices, best.values, strict=True)]
    return found


def groups_shown(found: LatentExamples, shown: dict[Pair, dict[str, Any]], prompts: dict[int, int]) -> dict[str, Any]:
    """A latent's examples, each once, and which of them stand in each group, under a heading."""
    numbers = {pair: number for number, pair in enumerate(shown)}
    examples = [{"prompt": prompts[prompt], **example} for (prompt, _), example in shown.items()]
    pairs = [numbers[pair] for pair in zip(found.prompt.tolist(), found.pos.tolist(), strict=True)]
    groups = []
    for interval in sorted(set(found.interval.tolist())):
        low, high = found.bounds(interval) if interval else (0.0, 0.0)
        title = f"{low:.3g} to {high:.3g}, {found.share(interval):.1%} of activations" if interval else "Most active"
        inside = [pair for pair, own in zip(pairs, found.interval.tolist(), strict=True) if own == interval]
        groups.append({"title": title, "examples": inside})
    return {"examples": examples, "groups": groups}


def signature_shown(signature: Signature | None) -> list[list[Any]]:
    """Name and number of each measurement."""
    if signature is None:
        return []
    names = {
        "present": "from the present token",
        "previous": "from the previous token",
        "near": "from the last tokens",
        "first": "from position 0",
        "induction": "from after an earlier occurrence",
        "sources": "sources, effectively",
        "positional": "variance by position",
        "to_first": "attention to position 0",
        "repeat_induction": "induction, random repeated",
        "repeats": "second against first copy",
    }
    numbers = {name: getattr(signature, name) for name in names}
    return [[names[name], None if value is None else short(value)] for name, value in numbers.items()]


def short(value: "float | Tensor") -> float | int:
    """Four significant digits; 0 is written with one character."""
    return float(f"{float(value):.4g}") or 0


def shorts(values: Float[Tensor, "n"]) -> list[float | int]:
    return [short(value) for value in values.tolist()]


def _pairs(which: Int[Tensor, "n"], values: Float[Tensor, "n"]) -> list[list[Any]]:
    return [[number, value] for number, value in zip(which.tolist(), shorts(values), strict=True)]
