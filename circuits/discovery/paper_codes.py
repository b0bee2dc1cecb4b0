"""Circuits from discrete codes exactly as published: heads are scored by how many codes only positives have.

O'Neill & Bui 2024 (arXiv:2405.12522), as their code does it (sae-circuits at 10fd2e7), step by step:

1. What each head writes on each prompt, averaged over positions with BOS; clean prompts are positive, corrupted negative.
2. One autoencoder for all heads, trained on a few prompts drawn from both kinds (``saes/paper_codes.py``); argmax codes.
3. ``u[h] = |codes of h in positives - codes of h in negatives|``, sets over all prompts, those of training among them.
4. Nodes: softmax of u. "Edges": the same count for every ordered pair of heads, pairs sorted, their heads written out one after
   the other, the first ``n_heads^2 / 2`` entries kept; a head scores how often it appears.

Use it to reproduce the paper. ``codes.py`` is what we would use: the count favours heads that vary much, whatever they vary
with; it grows with the number of prompts and has no chance level; a softmax changes no ranking (over all heads), and the
"edge" score is one of heads: pairs have no direction, no layer order, and no path between them is asked for. Prompts are our
tasks': theirs were 250 + 250, their IOI negatives three names.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.coding import Examples
from circuits.discovery.code_scores import beside, in_scores
from circuits.scores import Scores
from mechinterp.errors import CircuitError, SAEError, nearest
from mechinterp.models.transformer import Transformer
from mechinterp.store import ActivationStore
from mechinterp.tasks.base import Task
from saes.code_rows import read_parts, weights_of
from saes.paper_codes import PaperCodes, PaperSettings, assign_paper_codes

_UNITS = {"node": "codes", "edge": "appearances"}
_SOFTMAX = {"all": None, "layer": 0}  # over which axis of [layer head]

Heads = Float[np.ndarray, "head"]


def paper_codes(
    model: Transformer,
    task: Task,
    *,
    level: str = "node",
    positions: str | Sequence[str] = "mean-with-bos",
    n_train: int = 10,
    d_sae: int = 200,
    steps: int = 500,
    lr: float = 1e-3,
    sparsity: float = 0.02,
    normalize: bool = False,
    softmax: str | None = "all",
    seed: int = 0,
    trained: bool = True,
    store: ActivationStore | None = None,
    progress: bool = False,
) -> Scores:
    """How many codes each head uses on positives alone, as published. MLPs and the input are not coded and score 0.

    ``level``: "node", or their "edge", which scores heads too (step 4 above) and is no score of edges. ``positions``:
    "mean-with-bos" is what they ran, "END" their other choice ("last"); any one that ``weights_of`` knows will do.
    ``normalize``: count as a share of all codes of the head (of the pair: of those in positives plus those in negatives, as
    they have it).
    ``softmax``: over "all" heads, over "layer"s for each head index (their ``across_layer``, which changes the ranking), or
    None for the counts. The other settings are ``PaperSettings``. Training prompts are drawn from all, not half and half.
    ``settings["untrained"]`` has the same of an untrained autoencoder; it is missing with ``trained=False``, which scores by
    that one.

    Cost: one forward pass, or none with a ``store`` that has it, then seconds (see ``assign_paper_codes``); their dense pair
    counts, twice 6.6 GB for GPT-2 small, are not made. Memory: ``2 n_prompts n_heads d_model`` numbers.

    Raises ``CircuitError`` for an unknown level or softmax, ``SAEError`` for several positions or an unknown one, more
    training prompts than there are, and heads that write the same on every prompt.
    """
    _check(level, softmax)
    made = PaperSettings(n_train, d_sae, steps, lr, sparsity, trained, seed)
    place = _one_of(positions)
    examples = _examples(model, task, place, made, store)
    rows = written_as_published(model, examples.written.heads[0])
    if not bool((rows != rows[:1]).any()):
        raise SAEError(
            f"at {place!r} no head writes anything different on any two prompts, so no code is a positive's own. Read "
            'another position (positions="mean-with-bos"), or use prompts that differ there.'
        )

    def scored(codes: PaperCodes) -> Heads:
        values = score_of_codes(codes.values, examples.labels == 1, level=level, normalize=normalize)
        return values if softmax is None else _softmax(values, model.config.n_heads, softmax)

    codes = assign_paper_codes(rows, examples.training, made, progress=progress)
    values = scored(codes)
    facts: dict[str, Any] = {"level": level, "positions": place, "normalize": normalize, "softmax": softmax}
    facts |= made.to_dict() | {"n_counted": len(examples.rows)} | _facts(codes)
    if trained:
        control = assign_paper_codes(rows, examples.training, PaperSettings(d_sae=d_sae, seed=seed, trained=False))
        facts["untrained"] = _facts(control) | beside(examples, values, scored(control))
    name = "codes-paper" if level == "node" else "codes-paper-edge"
    return in_scores(examples, values, name, _unit(level, normalize, softmax), facts)


@torch.no_grad()
def written_as_published(model: Transformer, z: Float[Tensor, "example part d_head"]) -> Float[Tensor, "example part d_model"]:
    """``z W_O`` of each head as TransformerLens gives it: value biases moved into ``b_O``, ``W_O`` centred over d_model.

    Its ``from_pretrained`` does both by default (it centres for LayerNorm alone), and a head's output lacks a constant for it.
    ``z`` must be a mean over positions (weights that sum to 1): attention adds up to 1, so the value bias comes through whole.
    Like theirs, outputs are those before a normalisation of what heads write.
    """
    W, config, found = model.weights, model.config, []
    for layer, here in enumerate(z.unflatten(1, (config.n_layers, config.n_heads)).unbind(1)):
        block, biases = W.blocks[layer], W.port_biases(layer)[-config.n_groups :]
        if block.ln1 is not None and block.ln1.b is not None:
            biases = biases + torch.einsum("m,gmd->gd", block.ln1.b, W.W_V(layer))
        biases = biases.repeat_interleave(config.n_heads // config.n_groups, dim=0)
        W_O = block.W_O - block.W_O.mean(-1, keepdim=True) if config.centred else block.W_O
        W_O = W_O.unflatten(0, biases.shape)
        found.append(torch.einsum("ehd,hdm->ehm", here - biases.to(here), W_O.to(here)))
    return torch.cat(found, 1)


def score_of_codes(
    codes: Int[np.ndarray, "example head"],
    positive: Bool[np.ndarray, "example"],
    *,
    level: str = "node",
    normalize: bool = False,
) -> Heads:
    """Steps 3 and 4 without the softmax: codes that only positives use, or how often a head stands among the first pairs."""
    if level == "node":
        unique, either, _ = _counts(codes, positive)
        return unique / either if normalize else unique.astype(float)
    n_heads = codes.shape[1]
    found = unique_pairs(codes, positive, normalize=normalize)
    # Theirs is numpy's unstable sort, whose ties depend on the machine. Ours leaves them in array order, read backwards as
    # they read it: of equal pairs, those of later heads come first. In small models, where most pairs count 0, this alone
    # moves an area under the curve by 0.1 and more.
    order = np.argsort(found.ravel(), kind="stable")[::-1]
    entries = np.stack(np.unravel_index(order, found.shape), 1).ravel()
    return np.bincount(entries[: n_heads**2 // 2], minlength=n_heads).astype(float)


def unique_pairs(
    codes: Int[np.ndarray, "example head"], positive: Bool[np.ndarray, "example"], *, normalize: bool = False
) -> Float[np.ndarray, "head head"]:
    """``U[h1, h2]``: pairs of codes that occur together in a positive and in no negative. Symmetric, 0 on the diagonal."""
    n_heads, n_codes = codes.shape[1], int(codes.max()) + 1
    found = np.zeros((n_heads, n_heads))
    for one in range(n_heads - 1):
        unique, _, both = _counts(codes[:, one, None] * n_codes + codes[:, one + 1 :], positive)
        found[one, one + 1 :] = unique / both if normalize else unique
    return found + found.T


def _counts(keys: Int[np.ndarray, "example column"], positive: Bool[np.ndarray, "example"]) -> tuple[np.ndarray, ...]:
    """Of each column, how many keys: in positives and no negative; in either; in positives plus in negatives.

    Sorted with negatives before positives of the same key, a key is a positive's own if its first example is positive.
    """
    marked = np.sort(2 * keys + positive[:, None], axis=0)
    is_first = np.diff(marked // 2, axis=0, prepend=-1) != 0
    unique = (is_first & (marked % 2 == 1)).sum(0)
    return unique, is_first.sum(0), (np.diff(marked, axis=0, prepend=-1) != 0).sum(0)


def _softmax(values: Heads, n_heads: int, over: str) -> Heads:
    grid = values.reshape(-1, n_heads)
    raised = np.exp(grid - grid.max(_SOFTMAX[over], keepdims=True))
    return (raised / raised.sum(_SOFTMAX[over], keepdims=True)).ravel()


def _examples(model: Transformer, task: Task, place: str, made: PaperSettings, store: ActivationStore | None) -> Examples:
    """Step 1, and the training prompts of step 2."""
    n = len(task)
    if made.n_train > 2 * n:
        raise SAEError(f"n_train={made.n_train} prompts cannot be drawn from {n} positives and {n} negatives. Give fewer.")
    weights = weights_of(task.prompts, (place,), task.tokenizer.bos_id).repeat(1, 2, 1)
    tokens = torch.cat([task.prompts.clean, task.prompts.corrupted])
    written = read_parts(model, tokens, weights, mlps=False, store=store)
    training = torch.randperm(2 * n, generator=torch.Generator().manual_seed(made.seed))[: made.n_train]
    return Examples(model, task, (place,), written, training, torch.arange(n))


def _facts(codes: PaperCodes) -> dict[str, float]:
    used = [len(np.unique(head)) for head in codes.values.T]
    found = {"l0": codes.l0, "silent": codes.silent, "codes_a_part": float(np.mean(used))}
    return {name: round(value, 4) for name, value in found.items()}


def _unit(level: str, normalize: bool, softmax: str | None) -> str:
    unit = "share of codes" if normalize and level == "node" else _UNITS[level]
    return unit if softmax is None else f"softmax of {unit}"


def _one_of(positions: str | Sequence[str]) -> str:
    places = [positions] if isinstance(positions, str) else list(positions)
    if len(places) != 1:
        given = ", ".join(places) or "none"
        raise SAEError(f"the published codes are read at one position, and {given} are given. Name one, or use codes(...).")
    return places[0]


def _check(level: str, softmax: str | None) -> None:
    if level not in _UNITS:
        raise CircuitError(f"there is no level {level!r}; there are {', '.join(_UNITS)}.{nearest(level, _UNITS)}")
    if softmax is not None and softmax not in _SOFTMAX:
        raise CircuitError(f"there is no softmax over {softmax!r}; there are {', '.join(_SOFTMAX)}, and None for the counts.")
