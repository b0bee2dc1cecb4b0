"""Prompt files as others publish them, read exactly as they are.

Each reader turns the rows of one format into ``Pair``s. Words stay text, so that any tokenizer can take them; a column
of token ids belongs to ONE tokenizer and the file does not say which, so ids are believed only where the row also holds
the word to check them against, or where the caller says ``trust_ids=True``.
"""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechinterp.errors import TaskError
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.tasks.rows import read_rows

Prompt = str | Sequence[int]
Word = str | int


@dataclass(frozen=True)
class Pair:
    """One row: two prompts (text, or token ids) and the tokens to compare (text with its space, or ids)."""

    clean: Prompt
    corrupted: Prompt
    answers: Sequence[Word]
    foils: Sequence[Word]


@dataclass(frozen=True)
class Source:
    """What a reader may look at: the content of the file and the choices of the caller."""

    path: Path
    content: Any
    tokenizer: Tokenizer
    companion: Path | None
    corruption: str | None
    trust_ids: bool

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content

    def chosen(self, *known: str) -> str:
        """The corruption asked for, the first of ``known`` if none was."""
        if self.corruption is not None and self.corruption not in known:
            raise TaskError(f"{self.path.name} has no corruption {self.corruption!r}; it has {', '.join(known)}.")
        return self.corruption or known[0]


@dataclass(frozen=True)
class Format:
    """A published form: the columns that give it away, its usual metric, and how a file of it becomes pairs."""

    keys: frozenset[str]
    metric: str
    read: Callable[[Source], tuple[list[Pair], str]]


def detect(content: Any, path: Path) -> str:
    """The name of the first format whose keys the file has. ``TaskError`` says what was found."""
    found = keys_of(content)
    for name, form in FORMATS.items():
        if form.keys <= found:
            return name
    forms = "; ".join(f"{name}: {', '.join(sorted(form.keys))}" for name, form in FORMATS.items())
    raise TaskError(
        f"{path.name} has the columns {', '.join(sorted(found)) or '(none)'}, which no known format has ({forms}). "
        'Simplest: one JSON object a line, {"clean": ..., "corrupted": ..., "answers": [" Mary"], "foils": [" John"]}.'
    )


def keys_of(content: Any) -> frozenset[str]:
    """Column names of a table; ``[0]``, ``[1]`` for rows that are lists; top-level keys of an object."""
    first = content[0] if isinstance(content, list) and content else content
    if isinstance(first, list):
        return frozenset(f"[{index}]" for index in range(len(first)))
    return frozenset(first) if isinstance(first, dict) else frozenset()


def own(source: Source) -> tuple[list[Pair], str]:
    """Our own JSON lines: ``clean``, ``corrupted``, ``answers``, ``foils`` (a word or a list of words)."""
    return [
        Pair(row["clean"], row["corrupted"], _listed(row["answers"]), _listed(row["foils"])) for row in source.rows
    ], "from file"


def auto_circuit(source: Source) -> tuple[list[Pair], str]:
    """UFO-101/auto-circuit: ``prompts`` of ``clean``, ``corrupt``, ``answers``, ``wrong_answers``."""
    prompts = source.content["prompts"]
    parts = [part for prompt in prompts for key in ("clean", "corrupt", "answers", "wrong_answers") for part in prompt[key]]
    if not all(isinstance(part, str | int) for part in parts):
        raise TaskError(
            f"{source.path.name} holds vectors, or answers at several positions (auto-circuit's MicroModel and Tracr files); "
            "only prompts of text or token ids, answered at their end, can be read."
        )
    if not all(isinstance(prompt["clean"], str) for prompt in prompts) and not source.trust_ids:
        raise TaskError(_untrusted(source, "its prompts are token ids"))
    return [Pair(p["clean"], p["corrupt"], p["answers"], p["wrong_answers"]) for p in prompts], "corrupt"


def greater_than(source: Source) -> tuple[list[Pair], str]:
    """EAP-IG: the label is the two-digit start year. Later years are answers, the others foils (Hanna et al. 2023)."""
    column = "label" if "label" in source.rows[0] else "correct_idx"
    years = [f"{year:02d}" for year in range(100)]
    pairs = []
    for line, row in enumerate(source.rows, start=2):
        start = int(row[column])
        if not 0 <= start <= 98 or years[start] not in re.findall(r"\d\d(?=\D|$)", row["clean"]):
            raise TaskError(
                f"{source.path.name}, line {line}: {column} = {start} should be the two last digits (00 to 98) of the "
                f"year in {row['clean']!r}."
            )
        pairs.append(Pair(row["clean"], row["corrupted"], years[start + 1 :], years[: start + 1]))
    return pairs, "corrupted"


def two_ids(source: Source) -> tuple[list[Pair], str]:
    """EAP-IG's IOI and colored objects: ``correct_idx`` and ``incorrect_idx``, checked against the words of the prompt."""
    corruption = source.chosen("corrupted", *(["corrupted_hard"] if "corrupted_hard" in source.rows[0] else []))
    pairs = [Pair(row["clean"], row[corruption], [int(row["correct_idx"])], [int(row["incorrect_idx"])]) for row in source.rows]
    return _checked(source, pairs, lambda row: (row["clean"].lower(), row["clean"].lower())), corruption


def gender_bias(source: Source) -> tuple[list[Pair], str]:
    """eap-ig-faithfulness: the row holds two ids and no word to check them against."""
    if not source.trust_ids:
        raise TaskError(_untrusted(source, "it holds token ids and no words to check them against"))
    return [
        Pair(row["clean"], row["corrupted"], [int(row["clean_answer_idx"])], [int(row["corrupted_answer_idx"])])
        for row in source.rows
    ], "corrupted"


def fact_retrieval(source: Source) -> tuple[list[Pair], str]:
    """eap-ig-faithfulness: the ids are of the *first* token of the country, and checked against it."""
    pairs = [
        Pair(row["clean"], row["corrupted"], [int(row["country_idx"])], [int(row["corrupted_country_idx"])])
        for row in source.rows
    ]
    return _checked(source, pairs, lambda row: (row["country"], row["corrupted_country"])), "corrupted"


def hypernymy(source: Source) -> tuple[list[Pair], str]:
    """eap-ig-faithfulness: words in Python lists written as text, each taken with a leading space."""
    return [
        Pair(row["clean"], row["corrupted"], _spaced(row["answers"]), _spaced(row["corrupted_answers"])) for row in source.rows
    ], "corrupted"


def subject_verb(source: Source) -> tuple[list[Pair], str]:
    """eap-ig-faithfulness: ``plural`` 0 or 1; the verbs stand in a second file with the columns ``sing`` and ``plur``."""
    verbs = read_rows(_companion(source, "combined_verb_list.csv", "the verbs, with columns sing and plur"))
    forms = [tuple(f" {row[number]}" for row in verbs) for number in ("sing", "plur")]
    return [
        Pair(row["clean"], row["corrupted"], forms[int(row["plural"])], forms[1 - int(row["plural"])]) for row in source.rows
    ], "corrupted"


def circuit_reuse(source: Source) -> tuple[list[Pair], str]:
    """jmerullo/circuit_reuse: a list of ``[prompt, answer]``; the minimal pairs are a second file, row by row."""
    sibling = source.path.name.replace("_data_", "_mindiff_data_")
    minimal = read_rows(_companion(source, sibling, "the minimal pairs, row i with row i"))
    if len(minimal) != len(source.content):
        raise TaskError(f"{source.path.name} has {len(source.content)} rows and its minimal pairs {len(minimal)}.")
    return [
        Pair(clean, corrupted, [answer], [foil])
        for (clean, answer), (corrupted, foil) in zip(source.content, minimal, strict=True)
    ], "minimal pair"


def mib(source: Source) -> tuple[list[Pair], str]:
    """MIB rows, with whichever counterfactual was asked for (the first that the rows hold, if none was)."""
    known = sorted(key for key in source.rows[0] if key.endswith("_counterfactual"))
    usual = [key for key in ("s2_io_flip_counterfactual", "symbol_counterfactual", "random_counterfactual") if key in known]
    if not known:
        raise TaskError(f"{source.path.name} looks like MIB rows, but no key ends in '_counterfactual'.")
    corruption = source.chosen(*usual, *(key for key in known if key not in usual))
    return [_mib_pair(row, row[corruption], source) for row in source.rows], corruption.removesuffix("_counterfactual")


def _mib_pair(row: Mapping[str, Any], counterfactual: Mapping[str, Any], source: Source) -> Pair:
    facts, choices = row.get("metadata") or {}, row.get("choices") or {}
    if "indirect_object" in facts:
        answers, foils = [facts["indirect_object"]], [facts["subject"]]
    elif "label" in choices and "answerKey" in row:
        right = choices["label"][int(row["answerKey"])]
        answers, foils = [right], [label for label in choices["label"] if label != right]
    elif "label" in row and "label" in counterfactual:
        answers, foils = [row["label"]], [counterfactual["label"]]
    else:
        raise TaskError(
            f"{source.path.name}: a MIB row needs metadata.indirect_object, or choices and answerKey, or label; "
            f"found {', '.join(sorted(row))}."
        )
    clean = row["prompt"]
    return Pair(clean, counterfactual["prompt"], *([_continuing(clean, str(w)) for w in words] for words in (answers, foils)))


def _continuing(prompt: str, word: str) -> str:
    """The word as it follows the prompt: with its space, unless one of the two brings it."""
    return word if prompt[-1:].isspace() or word[:1].isspace() else f" {word}"


def _checked(source: Source, pairs: list[Pair], words: Callable[[Mapping[str, Any]], tuple[str, str]]) -> list[Pair]:
    """The pairs, if every id decodes to (the beginning of) the word that its row says, or if the ids are trusted."""
    if source.trust_ids:
        return pairs
    for row, pair in zip(source.rows, pairs, strict=True):
        for token, word in zip((pair.answers[0], pair.foils[0]), words(row), strict=True):
            text = source.tokenizer.decode([int(token)]).strip().lower()
            if not text or text not in word.lower():
                raise TaskError(_untrusted(source, f"token {token} decodes to {text!r}, which does not fit {word!r}"))
    return pairs


def _untrusted(source: Source, why: str) -> str:
    return (
        f"{source.path.name} was made with one tokenizer, and it does not look like {source.tokenizer.name!r}: {why}. "
        "If you know that it is the right one, say so with trust_ids=True."
    )


def _companion(source: Source, usual: str, what: str) -> Path:
    """The second file of a two-file format: the one given, or its usual name beside the first."""
    path = source.companion or source.path.with_name(usual)
    if not path.is_file() or path == source.path:
        raise TaskError(f"{source.path.name} needs a second file ({what}); none at {path}. Pass it as companion=.")
    return path


def _listed(words: str | Sequence[str]) -> Sequence[str]:
    return [words] if isinstance(words, str) else words


def _spaced(literal: str) -> list[str]:
    # literal_eval reads lists, never calls anything: the file is data. `eval` would run whatever it says.
    return [f" {word}" for word in ast.literal_eval(literal)]


# The most telling first: a file is of the first format whose keys it has.
FORMATS: dict[str, Format] = {
    "own": Format(frozenset({"clean", "corrupted", "answers", "foils"}), "logit_diff", own),
    "auto-circuit": Format(frozenset({"prompts"}), "logit_diff", auto_circuit),
    "circuit-reuse": Format(frozenset({"[0]", "[1]"}), "logit_diff", circuit_reuse),
    "mib": Format(frozenset({"prompt"}), "logit_diff", mib),
    "eap-ig-two-ids": Format(frozenset({"clean", "corrupted", "correct_idx", "incorrect_idx"}), "logit_diff", two_ids),
    "gender-bias": Format(
        frozenset({"clean", "corrupted", "clean_answer_idx", "corrupted_answer_idx"}), "logit_diff", gender_bias
    ),
    "fact-retrieval": Format(frozenset({"clean", "corrupted", "country", "country_idx"}), "logit_diff", fact_retrieval),
    "hypernymy": Format(frozenset({"clean", "corrupted", "answers", "corrupted_answers"}), "prob_diff", hypernymy),
    "subject-verb": Format(frozenset({"clean", "corrupted", "plural"}), "logit_diff", subject_verb),
    "eap-ig-greater-than": Format(frozenset({"clean", "corrupted", "label"}), "prob_diff", greater_than),
    "eap-ig-greater-than-idx": Format(frozenset({"clean", "corrupted", "correct_idx"}), "prob_diff", greater_than),
}
