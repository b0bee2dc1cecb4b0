"""What a model got right: one number a prompt, higher is better, never averaged here.

A metric takes the logits at each prompt's END and the prompts. Averaging comes last, in the reports, as a ratio of
means with its interval; a metric that averaged by itself would make a score depend on the batch size.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.prompts import PromptBatch

Metric = Callable[[Float[Tensor, "batch d_vocab"], PromptBatch], Float[Tensor, "batch"]]


def logit_diff(logits: Float[Tensor, "batch d_vocab"], prompts: PromptBatch) -> Float[Tensor, "batch"]:
    """Mean logit of the answers minus mean logit of the foils (IOI: Wang et al. 2022, section 2; colored objects).

    A prompt without foils scores its answers' mean logit.
    """
    chosen = logits.gather(1, prompts.candidates)
    answers, foils = (prompts.roles > 0).to(chosen), (prompts.roles < 0).to(chosen)
    return (chosen * answers).sum(1) / answers.sum(1) - (chosen * foils).sum(1) / foils.sum(1).clamp(min=1)


def logit_diff_max(logits: Float[Tensor, "batch d_vocab"], prompts: PromptBatch) -> Float[Tensor, "batch"]:
    """Mean logit of the answers minus the *largest* foil's (docstring: Heimersheim and Janiak 2023).

    The published code returns it negated, because it minimises; ours is higher-is-better.
    """
    chosen = logits.gather(1, prompts.candidates)
    answers = (prompts.roles > 0).to(chosen)
    strongest_foil = chosen.masked_fill(prompts.roles >= 0, -torch.inf).amax(1)
    return (chosen * answers).sum(1) / answers.sum(1) - strongest_foil


def prob_diff(logits: Float[Tensor, "batch d_vocab"], prompts: PromptBatch) -> Float[Tensor, "batch"]:
    """Probability of all answers minus that of all foils, softmax over the full vocabulary.

    Greater-than: Hanna et al. 2023, section 2. In [-1, 1].
    """
    probabilities = logits.softmax(-1).gather(1, prompts.candidates)
    return (probabilities * prompts.roles).sum(1)


def is_preferred(logits: Float[Tensor, "batch d_vocab"], prompts: PromptBatch) -> Float[Tensor, "batch"]:
    """1 where the best answer beats every foil, else 0."""
    return (_best(logits, prompts, prompts.roles > 0) > _best(logits, prompts, prompts.roles < 0)).float()


def is_top(logits: Float[Tensor, "batch d_vocab"], prompts: PromptBatch) -> Float[Tensor, "batch"]:
    """1 where the most likely token of the whole vocabulary is an answer, else 0."""
    winner = logits.argmax(-1, keepdim=True)
    return ((prompts.candidates == winner) & (prompts.roles > 0)).any(1).float()


METRICS: dict[str, Metric] = {
    "logit_diff": logit_diff,
    "logit_diff_max": logit_diff_max,
    "prob_diff": prob_diff,
    "is_preferred": is_preferred,
    "is_top": is_top,
}

# These look at the candidates' logits alone, so the rest of the vocabulary need not be unembedded.
READS_CANDIDATES_ONLY: frozenset[Metric] = frozenset({logit_diff, logit_diff_max, is_preferred})


def kl_divergence(reference: Float[Tensor, "batch d_vocab"], logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch"]:
    """KL(reference ‖ logits) in nats, *summed* over the vocabulary (peers divide by its size: not comparable)."""
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _best(logits, prompts, mask) -> Float[Tensor, "batch"]:
    return logits.gather(1, prompts.candidates).masked_fill(~mask, -torch.inf).amax(1)
