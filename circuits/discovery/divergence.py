"""Divergence: how far each part's output moves when the tokens that inform the answer are blanked.

A screen: it says what news of these tokens reaches a part, and not what the part does with it. With ``o`` what a part writes
at the end of a prompt, and ``o'`` what it writes there when the informative tokens are blanked, a prompt's score is

    |o - o'| / (|o| + |o'|)                                  "size": 0 to 1, by the triangle inequality
    |o - o'|^2 / mean (|o - m|^2 + |o' - m|^2)               "spread": 0 to 2 in the mean; m the mean of all o and o'
    |o - o'| / |r|                                           "stream": r the residual stream that the logits read

"size" is free of a part's scale and needs one prompt alone: it is 0.71 where the two stand at right angles, as copies of two
tokens do, and 1 where only one of the two is there or they are opposite. "spread" is free of what a part always writes, too:
where blanked tokens are as good as drawn anew it is Jansen's estimator of a total sensitivity index (1999, "Analysis of
variance designs for model output"; for vectors Gamboa et al. 2014, arXiv:1311.1797), the share of the part's variance that
these tokens account for.
"stream" compares parts with each other: a quiet part counts for little. It is free of the model's scale only.

How good a screen (``benchmarks/results/screening.md``): against exact patching, of the heads of the built-in model on its four
tasks, "size" has a mean AUROC of .89, "spread" and "stream" .84 and .85, the change of codes .82; attribution patching has
.96 for two forward passes and a backward one, so that this is for where no metric can be differentiated. In models set by
hand, whose distractors are loud, "size" ranks every head of the circuit first (read where heads act), "stream" last.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.walk import scores_of
from circuits.scores import Scores
from mechinterp.errors import CircuitError, nearest
from mechinterp.models.trace import Patch
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

Where = Bool[Tensor, "batch pos"]
Blanking = Callable[[PromptBatch, Where], tuple[Int[Tensor, "batch pos"], Mapping[Site | str, Patch]]]
Parts = Float[Tensor, "place prompt part"]
_ROUNDING = 100.0  # times the precision: what moves less than this fraction of its size has not moved,
_RESOLVED = 0.01  # but for what moves by this much: of bfloat16, 100 times the precision would be nearly all there is


def divergence(
    model: Transformer,
    task: Task,
    *,
    blank: str | int = "corrupted",
    tokens: str | Sequence[str] | None = None,
    positions: str | Sequence[str] = "END",
    relative_to: str = "size",
    batch_size: int = 32,
    progress: bool = False,
) -> Scores:
    """How far each head and MLP moves, as a fraction: at least 0, and 0 for what the blanked tokens do not reach.

    Blanked are the ``tokens`` at these named positions; None: those in which clean and corrupted prompts differ. They become,
    by ``blank``, ``"corrupted"``: those of the corrupted prompt, others of their kind; ``"mean"``: the mean embedding of all
    that is blanked, which is that of no token; or a token id. ``positions`` is where outputs are read: "END", or what the task
    names, or several, of which each part's largest mean counts. Heads are read without ``b_O``, which belongs to none of them.
    The input is not judged and scores 0.

    Cost: two forward passes, whatever the number of parts. No score says which way a part pushes. ``CircuitError`` for names
    that are not known, and where nothing is blanked.

    >>> from mechinterp.models.compiled import induction
    >>> planted = induction()
    >>> planted.roles["induction"], divergence(planted.model, planted.task, tokens=["B"]).strongest(1)
    ('a1.h3', [('a1.h3', 0.7068...)])
    """
    known_fraction(relative_to)
    places = (positions,) if isinstance(positions, str) else tuple(positions)
    tokens = [tokens] if isinstance(tokens, str) else tokens
    if not places:
        known = ", ".join(dict.fromkeys([*task.prompts.positions, "END"]))
        raise CircuitError(f"no position is named to read outputs at. Name some of {known}.")
    mask = _informative(task, tokens)
    blanking = _blanking(model, task, mask, blank)
    moves = []
    with tqdm(total=len(task), desc="divergence", unit="prompt", disable=not progress, delay=2) as bar:
        for prompts, here in zip(task.batches(batch_size), mask.split(batch_size), strict=True):
            prompts, here = prompts.to(model.device), here.to(model.device)
            at = torch.stack([_position(prompts, place) for place in places])
            blanked = blanking(prompts, here)
            moves.append(Moves.between(_written(model, prompts.clean, {}, at), _written(model, *blanked, at)))
            bar.update(len(prompts))
    fractions = FRACTIONS[relative_to](Moves.joined(moves))
    facts = {"blank": blank, "tokens": None if tokens is None else list(tokens), "positions": list(places)}
    return _in_scores(model, task, fractions, facts | {"relative_to": relative_to})


@dataclass(frozen=True, eq=False)
class Moves:
    """What is needed of each part's outputs ``o`` and ``o'``: lengths prompt by prompt, and the sum of both over prompts."""

    moved: Parts  # |o - o'|
    clean: Parts  # |o|
    blanked: Parts  # |o'|
    stream: Float[Tensor, "place prompt 1"]  # |r|, of the clean prompt
    total: Float[Tensor, "place part d_model"]

    @classmethod
    def between(cls, clean: tuple[Tensor, Tensor], blanked: tuple[Tensor, Tensor]) -> "Moves":
        """Of the parts' outputs and the residual stream, in two passes."""
        (one, stream), (other, _) = clean, blanked
        unresolved = min(_ROUNDING * torch.finfo(one.dtype).eps, _RESOLVED)
        one, other, stream = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (one, other, stream))
        moved, size, other_size = (x.norm(dim=-1).double() for x in (one - other, one, other))
        rounding = unresolved * torch.maximum(size, other_size)
        return cls(
            torch.where(moved > rounding, moved, 0.0),
            size,
            other_size,
            stream.norm(dim=-1, keepdim=True).double(),
            (one.double() + other.double()).sum(1),
        )

    @classmethod
    def joined(cls, batches: Sequence["Moves"]) -> "Moves":
        moved, clean, blanked, stream = (
            torch.cat([getattr(batch, name) for batch in batches], 1) for name in ("moved", "clean", "blanked", "stream")
        )
        return cls(moved, clean, blanked, stream, torch.stack([batch.total for batch in batches]).sum(0))


def _to_size(moves: Moves) -> Parts:
    return _over(moves.moved, moves.clean + moves.blanked)


def _to_spread(moves: Moves) -> Parts:
    """``mean |o - m|^2 + |o' - m|^2 = mean (|o|^2 + |o'|^2) - 2 |m|^2``."""
    mean = moves.total / (2 * moves.moved.shape[1])
    squares = (moves.clean.square() + moves.blanked.square()).mean(1)
    return _over(moves.moved.square(), (squares - 2 * mean.square().sum(-1))[:, None])


def _to_stream(moves: Moves) -> Parts:
    return _over(moves.moved, moves.stream)


FRACTIONS: dict[str, Callable[[Moves], Parts]] = {"size": _to_size, "spread": _to_spread, "stream": _to_stream}


def known_fraction(name: str) -> None:
    """``CircuitError`` names what divergence can be relative to."""
    if name not in FRACTIONS:
        raise CircuitError(f"relative_to={name!r} is none of {', '.join(map(repr, FRACTIONS))}.{nearest(name, FRACTIONS)}")


def _over(part: Tensor, whole: Tensor) -> Parts:
    """``part / whole``, and 0 where nothing moved, whatever it is a fraction of."""
    return torch.where(part > 0, part / whole.clamp(min=torch.finfo(part.dtype).tiny), 0.0)


@torch.no_grad()
def _written(
    model: Transformer, tokens: Int[Tensor, "batch pos"], patch: Mapping[Site | str, Patch], at: Int[Tensor, "place batch"]
) -> tuple[Float[Tensor, "place batch part d_model"], Float[Tensor, "place batch d_model"]]:
    """What heads and MLPs write there, in the wiring's order, and the residual stream behind the last layer."""
    last, rows = Site("resid_post", model.config.n_layers - 1), torch.arange(len(tokens), device=tokens.device)
    writes = model.config.write_site
    sites = [last, writes, *(["mlp_out"] if model.config.has_mlp else [])]
    _, cache = model.run(tokens, record=sites, patch=patch, logits_at="last", logits_of=tokens[:, :0])
    parts = []
    for layer in range(model.config.n_layers):
        z = cache[writes, layer][rows, at]
        parts.append(torch.einsum("pbhd,hdm->pbhm", z, model.weights.W_O(layer)))
        parts += [cache["mlp_out", layer][rows, at][:, :, None]] if model.config.has_mlp else []
    return torch.cat(parts, 2), cache[last][rows, at]


def _informative(task: Task, names: Sequence[str] | None) -> Bool[Tensor, "prompt pos"]:
    """Which tokens are blanked."""
    prompts = task.prompts
    mask = prompts.clean != prompts.corrupted
    if names is not None:
        mask = torch.zeros_like(mask)
        for name in names:
            mask.scatter_(1, _position(prompts, name)[:, None], True)
    if not bool(mask.any()):
        raise CircuitError(
            f"no token of {task.name!r} is blanked: clean and corrupted prompts are the same, or tokens=[] names none. Choose "
            f"another corruption, or tokens among {', '.join(prompts.positions)}."
        )
    return mask


def _blanking(model: Transformer, task: Task, mask: Bool[Tensor, "prompt pos"], blank: str | int) -> Blanking:
    """From prompts, and where they are blanked, to the tokens and the patch of the second pass."""
    if blank == "mean":
        mean = model.weights.W_E[task.prompts.clean[mask].to(model.device)].mean(0) * (model.config.embed_scale or 1.0)
        return lambda prompts, here: (
            prompts.clean,
            {Site("embed"): lambda embed, _: torch.where(here[..., None], mean, embed)},
        )
    if blank == "corrupted":
        return lambda prompts, here: (torch.where(here, prompts.corrupted, prompts.clean), {})
    if isinstance(blank, int) and 0 <= blank < model.config.d_vocab:
        return lambda prompts, here: (torch.where(here, blank, prompts.clean), {})
    raise CircuitError(f"blank={blank!r} is neither 'corrupted' nor 'mean' nor a token, 0 to {model.config.d_vocab - 1}.")


def _position(prompts: PromptBatch, name: str) -> Int[Tensor, "batch"]:
    known = {**prompts.positions, "END": prompts.end}
    if name not in known:
        raise CircuitError(f"the task names no position {name!r}; it names {', '.join(known)}.{nearest(name, known)}")
    return known[name]


def _in_scores(model: Transformer, task: Task, fractions: Parts, facts: Mapping[str, Any]) -> Scores:
    """Each part's largest mean over places, with that place's fractions prompt by prompt; 0 for the input."""
    best = fractions.mean(1).argmax(0)
    chosen = fractions[best, :, torch.arange(len(best), device=best.device)].T
    per_prompt = torch.cat([torch.zeros_like(chosen[:, :1]), chosen], 1).cpu().numpy()
    facts = {"settings": facts, "items": "node", "unit": "fraction", "per_prompt": per_prompt}
    return scores_of(model, task, "divergence", per_prompt.mean(0), None, **facts, allow_zero=True)
