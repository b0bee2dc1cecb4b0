"""Which words of one prompt bring about its answer: contextual decomposition from tokens to a difference of logits.

Hsu et al. 2024 (arXiv:2407.00886, local interpretation), with the hierarchy of phrases of agglomerative contextual
decomposition (Singh et al. 2019, arXiv:1806.05337). A source is a set of tokens; what is relevant of it is its embedding
minus a baseline; its score is the relevant part of ``logit(answer) - logit(foil)`` at the last token.

(The published GPT code takes the *heads of layer 0* at a token for the token, and divides by the whole difference.)
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.decomposition.propagate import propagate
from mechinterp.decomposition.rule_sets import Rules, rules_name, rules_named
from mechinterp.decomposition.sources import INPUT, Reference, Source
from mechinterp.decomposition.totals import Totals
from mechinterp.describing import describe_text
from mechinterp.errors import TaskError, nearest
from mechinterp.files import to_document, write_text_atomically
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.sites import Site
from mechinterp.tasks.base import single_token, tokenizer_of
from mechinterp.text_html import text_html

BASELINES = ("mean", "zero")
_KIND, _VERSION = "mechinterp text attribution", 1
Span = tuple[int, int]  # first token, and the one after the last


@dataclass(frozen=True)
class Phrase:
    """Tokens ``start`` to ``stop - 1`` as one source, and what they bring about together, in logits."""

    start: int
    stop: int
    text: str
    score: float


@dataclass(frozen=True)
class TextAttribution:
    """One score a token, in logits: the part of ``difference`` that is due to it (positive: it speaks for the answer).

    ``difference`` is ``logit(answer) - logit(foil)`` of the whole prompt, or ``logit(answer)`` without a foil. Scores add up
    to it under no rule set but by chance; ``rounds`` holds the phrases of each round of ``phrases=True``.
    """

    tokens: tuple[str, ...]
    scores: Float[np.ndarray, "pos"]
    answer: str
    foil: str | None
    difference: float
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rounds: tuple[tuple[Phrase, ...], ...] = ()

    def strongest(self, n: int = 10) -> list[tuple[str, float]]:
        """The ``n`` tokens of largest magnitude."""
        order = np.argsort(-np.abs(self.scores), kind="stable")[:n]
        return [(self.tokens[at], float(self.scores[at])) for at in order]

    def draw(self, path: str | os.PathLike | None = None) -> Any:
        """The coloured tokens, and below them the phrases: a matplotlib ``Figure``, also written to ``path``."""
        from mechinterp.plots import draw_text

        return draw_text(self, path)

    def save(self, path: str | os.PathLike) -> None:
        """Write everything as a JSON document (``"mechinterp text attribution"``), one token and one score a line."""
        content = {**asdict(self), "scores": self.scores.tolist()}
        write_text_atomically(path, to_document(_KIND, _VERSION, content))

    def describe(self) -> str:
        """The numbers in plain words, by rules: which tokens speak for and against, how much, and what is *not* known."""
        return describe_text(self)

    def _repr_html_(self) -> str:
        return text_html(self)

    def __str__(self) -> str:
        against = "" if self.foil is None else f" against {self.foil!r}"
        width = max(len(repr(token)) for token in self.tokens)
        lines = [f"{token!r:<{width}}  {score:+.3f}" for token, score in zip(self.tokens, self.scores, strict=True)]
        return "\n".join([f"{self.answer!r}{against}: {self.difference:+.3f} logits", *lines])


def decompose(
    model: Transformer,
    text: str,
    *,
    answer: str | None = None,
    foil: str | None = None,
    rules: str | Rules = "tail",
    baseline: str = "mean",
    phrases: bool | str | Sequence[str] = False,
    percentile: float = 80.0,
    max_rounds: int = 10,
    bos: bool | None = None,
) -> TextAttribution:
    """What every token of ``text`` contributes to the answer, in logits; positive: it speaks for the answer.

    ``answer`` and ``foil`` are single tokens with their leading space; None takes the likeliest token and the runner-up
    (the runner-up only if no answer is named). ``baseline``: what is left of a token that is not relevant: the ``"mean"``
    embedding of the vocabulary, at the same position (so a score is due to *which* word stands there), or ``"zero"``,
    which takes a learned position away as well. ``bos``: None prepends BOS where the model was trained with it.

    ``phrases``: parts of the text, each scored as one source (the first place where it stands). Or True, to merge tokens
    into phrases (Singh et al. 2019, algorithm 1): tokens at or above the ``percentile`` of ``|score|`` are the first groups;
    round by round each group may take in a neighbour, by how much that changes the group's score, and those at or above
    the percentile do; until no token is left, or ``max_rounds``. Under rules that simply add (``"linear"``) phrases tell no
    more than their tokens.

    Cost: a propagation a token, half the prompt long on average; with ``phrases`` up to two more for each group and round.
    ``TaskError`` for a text without tokens, words that are several tokens and phrases that are not in the text;
    ``ModelError`` for unknown rules.

    >>> from mechinterp.models.load import load
    >>> found = decompose(load("builtin"), "Then, Mary and John met at the park. John handed a ring to")
    >>> found.answer, found.foil, max(found.strongest(2))[0]
    (' Mary', ' John', ' Mary')
    """
    phrases = [phrases] if isinstance(phrases, str) else phrases
    if not (isinstance(phrases, bool) or phrases) or max_rounds < 1:
        raise TaskError(
            f"phrases={phrases!r} and max_rounds={max_rounds} name no phrase. Give texts, True or False; and 1 or more."
        )
    question = _Question.ask(model, text, answer, foil, rules, baseline, bos)
    singles = [(at, at + 1) for at in range(len(question.tokens))]
    scores = question.scores(singles)
    if isinstance(phrases, bool):
        rounds = _agglomerate(question, scores, percentile, max_rounds) if phrases else ()
    else:
        spans = sorted({question.find(phrase, text) for phrase in phrases})
        rounds = (_phrases(question, question.scored(spans)),)
    settings = {"rules": rules_name(rules), "baseline": baseline, **({"percentile": percentile} if phrases is True else {})}
    tokens = tuple(question.tokenizer.strings(question.tokens.tolist()))
    words = question.tokenizer.strings(question.candidates.tolist())
    return TextAttribution(
        tokens, scores, words[0], (words[1:] or [None])[0], question.difference, model.config.name, settings, rounds
    )


@dataclass(frozen=True)
class _Question:
    """One prompt, its answer and foil, and the clean pass: what sets of tokens are scored against."""

    tokenizer: Tokenizer
    tokens: Int[Tensor, "pos"]
    candidates: Int[Tensor, "candidate"]
    totals: Totals
    reference: Reference
    rules: Rules

    @classmethod
    def ask(cls, model: Transformer, text: str, answer, foil, rules, baseline: str, bos: bool | None) -> "_Question":
        chosen, tokenizer = rules_named(rules), tokenizer_of(model)
        if baseline not in BASELINES:
            known = ", ".join(BASELINES)
            raise TaskError(f"there is no baseline {baseline!r}; there are {known}.{nearest(str(baseline), BASELINES)}")
        if foil is not None and answer in (None, foil):
            raise TaskError(f"the foil {foil!r} needs another answer to stand against. Name both.")
        if not tokenizer.spans(text)[0]:
            raise TaskError("the text has no tokens. Give at least one word.")
        ids = tokenizer.encode(text, bos)
        tokens = torch.tensor([ids], device=model.device)
        with torch.no_grad():
            likeliest = model.run(tokens, logits_at="last")[0][0].topk(2).indices.tolist()
        words = [single_token(tokenizer, word) for word in (answer, foil) if word is not None]
        candidates = torch.tensor(words or likeliest, device=model.device)
        end = torch.tensor([len(ids) - 1])
        totals = Totals.of(model, tokens, ends=end, logits_of=candidates[None], patterns=chosen.attention == "held")
        return cls(tokenizer, tokens[0], candidates, totals, _baseline(model, len(ids), baseline), chosen)

    @property
    def difference(self) -> float:
        return float(self._difference(self.totals.target(Site("logits"))))

    def scores(self, spans: Sequence[Span]) -> Float[np.ndarray, "span"]:
        """What each span of tokens, as one source, contributes to the difference."""
        sources = [Source(tuple(Node("input", pos=at) for at in range(*span))) for span in spans]
        found = np.zeros(len(spans))
        for some, _, splits in propagate(self.totals, sources, [Site("logits")], self.rules, reference=self.reference):
            found[some] = self._difference(splits[Site("logits")].relevant[:, 0]).cpu().double().numpy()
        return found

    def scored(self, spans: Sequence[Span]) -> dict[Span, float]:
        """The spans with their scores."""
        return dict(zip(spans, self.scores(spans).tolist(), strict=True))

    def find(self, phrase: str, text: str) -> Span:
        """The tokens that hold any character of a phrase."""
        at = text.find(phrase)
        if at < 0 or not phrase.strip():
            raise TaskError(f"the phrase {phrase!r} is not in the text. Write it as it stands there.")
        start, stop = at + len(phrase) - len(phrase.lstrip()), at + len(phrase.rstrip())
        _, offsets = self.tokenizer.spans(text)
        before = len(self.tokens) - len(offsets)  # BOS
        inside = [before + token for token, (first, last) in enumerate(offsets) if first < stop and last > start]
        return inside[0], inside[-1] + 1

    def text(self, span: Span) -> str:
        return self.tokenizer.decode(self.tokens[slice(*span)].tolist(), after=self.tokens[: span[0]].tolist())

    def _difference(self, logits: Float[Tensor, "*source candidate"]) -> Float[Tensor, "*source"]:
        return logits[..., 0] - logits[..., 1] if logits.shape[-1] > 1 else logits[..., 0]


def _baseline(model: Transformer, n_pos: int, baseline: str) -> Reference:
    weights, scale = model.weights, model.config.embed_scale
    if baseline == "zero":
        return {}  # nothing is irrelevant of a token
    mean = weights.W_E.mean(0) if scale is None else weights.W_E.mean(0) * scale
    return {INPUT: (mean.expand(n_pos, -1) if weights.W_pos is None else mean + weights.W_pos[:n_pos])[None]}


def _agglomerate(
    question: _Question, singles: Float[np.ndarray, "pos"], percentile: float, max_rounds: int
) -> tuple[tuple[Phrase, ...], ...]:
    """Rounds of groups, each larger than the last."""
    if not 0 <= percentile < 100:
        raise TaskError(f"percentile={percentile} keeps no token. Give a number from 0 to below 100, such as 80.")
    n, size = len(singles), np.abs(singles)
    taken = size >= np.percentile(size, percentile)
    groups = question.scored(_runs(taken))
    rounds = [_phrases(question, groups)]
    while not taken.all() and len(rounds) < max_rounds:
        wider = [(group, wide) for group in groups for wide in ((group[0] - 1, group[1]), (group[0], group[1] + 1))]
        wider = [(group, wide) for group, wide in wider if wide[0] >= 0 and wide[1] <= n]
        gains = np.abs(question.scores([wide for _, wide in wider]) - np.array([groups[group] for group, _ in wider]))
        joins = gains >= np.percentile(gains, percentile)
        for (_, (start, stop)), join in zip(wider, joins, strict=True):
            taken[start:stop] |= join
        groups = question.scored(_runs(taken))
        rounds.append(_phrases(question, groups))
    return tuple(rounds)


def _runs(taken: np.ndarray) -> list[Span]:
    """Maximal runs of tokens that are in."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], taken.astype(int), [0]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _phrases(question: _Question, groups: Mapping[Span, float]) -> tuple[Phrase, ...]:
    return tuple(Phrase(*span, question.text(span), score) for span, score in groups.items())
