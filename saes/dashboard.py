"""One HTML file that shows what an autoencoder's latents are: open it from disk, send it to somebody, keep it.

    write_dashboard(model, autoencoder, tokens, "layer5.html")                       # 200 live latents, drawn at random
    write_dashboard(model, autoencoder, tokens, "one.html", place="z.5", latents=[17])

The panels are those of Kissane et al. 2024 (arXiv:2406.17759): examples by intervals of activation, shares of heads, direct
logits, and attribution by source position. The file holds its style, its script and its data, and loads nothing.
"""

import html
import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from random import Random
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.errors import SAEError
from mechinterp.files import write_text_atomically
from mechinterp.models.transformer import Transformer
from saes.base import SparseAutoencoder, seeded
from saes.dashboard_data import Look, at_heads, examples_shown, groups_shown, of_weights, short, signature_shown
from saes.examples import LatentExamples, find_examples
from saes.families import FAMILIES, Signature, measure_families
from saes.places import Place
from saes.positions import default_keep, tokenizer_of

BYTES_AN_EXAMPLE = 650  # in the file, about; a latent's other panels are another 1500
N_LOGITS = 10


def write_dashboard(
    model: Transformer,
    autoencoder: SparseAutoencoder,
    tokens: Int[Tensor, "prompt pos"],
    path: str | os.PathLike,
    *,
    place: Place | str | None = None,
    latents: Sequence[int] | None = None,
    n_latents: int = 200,
    keep: Bool[Tensor, "prompt pos"] | None = None,
    families: bool | Sequence[Signature] = True,
    data: str = "",
    n_top: int = 20,
    n_sampled: int = 5,
    n_intervals: int = 10,
    buffer: tuple[int, int] = (12, 5),
    max_megabytes: float = 64.0,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Write a dashboard of the latents of ``place`` (None: of all groups) on the text ``tokens``.

    ``latents``: which of every group (``range(autoencoder.d_sae)`` for all); None draws ``n_latents`` of those that are
    active on the text. ``keep`` and the counts are ``find_examples``'; None leaves out BOS and padding, and the page says so.
    ``families``: True measures them at ``z``; or signatures already measured; or False. ``data`` names the text on the
    page. ``buffer``: tokens shown before and after an example, though the whole prompt is a click away.

    Attributions of an example to source positions and heads are there for autoencoders at ``z``. The same arguments give
    the same bytes. Size: up to 650 bytes an example, so 50 kB a latent as the defaults stand, and the prompts; for
    thousands of latents lower ``n_top`` and ``n_sampled``. ``SAEError`` before anything is computed where it would be more
    than ``max_megabytes``. Cost: ``find_examples``, ``measure_families``, and a pass over prompts that hold examples.
    """
    chosen = autoencoder if place is None else autoencoder.group(place)
    keep_given, keep = keep is not None, default_keep(tokens, tokenizer_of(model)) if keep is None else keep
    n_shown = n_latents if latents is None else len(latents) * chosen.n_groups
    _check_size(n_shown, n_top + n_sampled * n_intervals, max_megabytes)
    settings: dict[str, Any] = {"keep": keep, "batch_size": batch_size, "seed": seed, "progress": progress}
    counts = {"n_top": n_top, "n_sampled": n_sampled, "n_intervals": n_intervals}
    found = find_examples(model, chosen, tokens, latents=latents, **counts, **settings)
    if latents is None:
        found = _drawn(found, n_latents, seed)
    if families is True:
        families = measure_families(model, chosen, tokens, **settings) if at_heads(chosen) else ()
    signatures = {(of.place, of.latent): of for of in families or ()}
    look = Look(buffer, N_LOGITS, batch_size, progress)
    index, panels = _content(model, chosen, tokens, found, signatures, look)
    index |= {"n_tokens": int(keep.sum()), "families": list(FAMILIES.items()) if signatures else []}
    title, facts = _about(model, chosen, tokens, keep, keep_given, data, len(found))
    write_text_atomically(path, _page(title, facts, index, panels))


def _check_size(n_latents: int, n_examples: int, max_megabytes: float) -> None:
    megabytes = n_latents * (n_examples * BYTES_AN_EXAMPLE + 1500) / 1e6
    if n_latents < 1 or megabytes > max_megabytes:
        raise SAEError(
            f"{n_latents} latents of up to {n_examples} examples are about {megabytes:.0f} MB of HTML; at least one latent and "
            f"at most {max_megabytes:g} MB are asked for. Show fewer latents, lower n_top or n_sampled, or raise max_megabytes."
        )


def _drawn(found: tuple[LatentExamples, ...], n: int, seed: int) -> tuple[LatentExamples, ...]:
    """``n`` of the live latents, each as likely as the others, in their order."""
    live = [number for number, latent in enumerate(found) if latent.n_active]
    if not live:
        raise SAEError("no latent is active on this text. Give other tokens, or name latents to see their weights.")
    drawn = Random(seeded(seed, "dashboard")).sample(live, min(n, len(live)))
    return tuple(found[number] for number in sorted(drawn))


def _content(
    model: Transformer,
    autoencoder: SparseAutoencoder,
    tokens: Int[Tensor, "prompt pos"],
    found: Sequence[LatentExamples],
    signatures: dict[tuple[str, int], Signature],
    look: Look,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The index of the page, and a panel a latent."""
    shown = examples_shown(model, autoencoder, tokens, found, look)
    prompts = {prompt: row for row, prompt in enumerate(sorted({int(p) for latent in found for p in latent.prompt}))}
    weights: dict[tuple[Place, int], dict[str, Any]] = {}
    for place in autoencoder.places:
        own = [latent.latent for latent in found if latent.place == place]
        weights |= {(place, n): w for n, w in zip(own, of_weights(model, autoencoder.group(place), own, look), strict=True)}
    panels, families, ids = [], [], set()
    texts = [tokens[prompt].tolist() for prompt in prompts]
    for latent in found:
        key, signature = (latent.place, latent.latent), signatures.get((str(latent.place), latent.latent))
        facts = {"n_active": latent.n_active, "maximum": short(latent.maximum), "histogram": latent.histogram.tolist()}
        panel = facts | weights[key] | groups_shown(latent, shown[key], prompts) | {"signature": signature_shown(signature)}
        panels.append(panel)
        ids |= {token for token, _ in (*panel["top"], *panel["bottom"])}
        families.append(None if signature is None else signature.family)
    words = _words(model, sorted(ids.union(*texts)))
    rows = [_row(*row, tokens, words) for row in zip(found, panels, families, strict=True)]
    return {"rows": rows, "prompts": texts, "words": words, "attributed": at_heads(autoencoder)}, panels


def _row(latent: LatentExamples, panel: dict[str, Any], family: str | None, tokens: Tensor, words: dict[int, str]) -> list[Any]:
    """One line of the table: place, latent, density, maximum, first head and its share, family, top token, raised tokens."""
    heads = panel["heads"]
    first = heads.index(max(heads)) if heads else None
    share = None if first is None else [panel["first_head"] + first, heads[first]]
    top = words[int(tokens[latent.prompt[0], latent.pos[0]])] if len(latent.prompt) else ""
    raised = " ".join(words[token].strip() for token, _ in panel["top"][:3])
    size = [short(latent.density), short(latent.maximum)]
    return [str(latent.place), latent.latent, *size, *(share or [None, None]), family, top, raised]


def _words(model: Transformer, ids: list[int]) -> dict[int, str]:
    tokenizer = tokenizer_of(model)
    texts = [str(token) for token in ids] if tokenizer is None else tokenizer.strings(ids)
    return dict(zip(ids, texts, strict=True))


def _about(model, autoencoder: SparseAutoencoder, tokens, keep, keep_given: bool, data: str, n_shown: int) -> tuple[str, str]:
    names = [str(place) for place in autoencoder.places]
    where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} places)"
    title = f"{model.config.name}, {where}: {n_shown} latents"
    left_out = "positions that the caller chose" if keep_given else "BOS and padding"
    facts = (
        f"A {autoencoder.kind} autoencoder of {autoencoder.d_sae} latents on {autoencoder.d_in} numbers, at {where} of "
        f"{model.config.name}. Text: {data or 'as given'}, {len(tokens)} prompts of {tokens.shape[1]}, "
        f"{int(keep.sum())} tokens; left out: {left_out} ({int((~keep).sum())} positions)."
    )
    return title, facts


def _page(title: str, facts: str, index: dict[str, Any], panels: list[dict[str, Any]]) -> str:
    scripts = (
        f'<script type="application/json" id="latent-{number}">{_json(panel)}</script>' for number, panel in enumerate(panels)
    )
    parts = {"title": html.escape(title), "facts": html.escape(facts), "index": _json(index), "latents": "\n".join(scripts)}
    parts |= {"css": _template("dashboard.css"), "js": _template("dashboard.js")}
    # One pass, so that what is put in is not searched for names again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _template("dashboard.html"))


def _json(value: Any) -> str:
    """JSON that cannot close the script element around it, whatever a token says."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _template(name: str) -> str:
    return (resources.files("saes") / "templates" / name).read_text(encoding="utf-8")
