"""``mechinterp decompose``: which words of one prompt bring about its answer, as a table, a picture and a file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp.cli import say
from mechinterp.cli.inputs import load_model
from mechinterp.cli.owners import clashes
from mechinterp.cli.results import folder_written_whole
from mechinterp.cli.words import model_in_words, numbers, shortened, table
from mechinterp.errors import TaskError, nearest

FOLDER = "mechinterp-decompose"
FILES = ("tokens.json", "tokens.png")
MEANINGS = {
    "tail": "the effect of replacing the token, with the norm scales of the clean run held",
    "paper": "the equations of Hsu et al. 2024, which follow the direct effect on the logits more than the whole one",
    "frozen": "the equations of Hsu et al. 2024, with the attention patterns of the clean run held",
    "exact": "the effect of replacing the token, with nothing held",
    "held": "the effect of replacing the token, with norm scales and attention patterns held",
    "linear": "relevance patching: norm scales, attention patterns and slopes held, so that tokens add up",
}


def decompose(
    text: Annotated[str, typer.Argument(help="A prompt; its next token is explained.")],
    model: Annotated[str, typer.Option(help="builtin, a model's name, or a directory with weights.")] = "builtin",
    answer: Annotated[
        str | None,
        typer.Option(help="A token, with its leading space: ' Mary'. Default: the likeliest, against the runner-up."),
    ] = None,
    foil: Annotated[str | None, typer.Option(help="A token that the answer is to stand against.")] = None,
    rules: Annotated[str, typer.Option(help=f"What a score means: {', '.join(MEANINGS)}.")] = "tail",
    baseline: Annotated[str, typer.Option(help="What a token is replaced by: the mean embedding, or zero.")] = "mean",
    phrases: Annotated[bool, typer.Option("--phrases", help="Merge tokens into phrases, round by round.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    out: Annotated[Path, typer.Option(help="A folder, or a file (.png, .svg, .pdf) for the picture.")] = Path(FOLDER),
) -> None:
    """Score every word of a prompt by what it contributes to the answer."""
    from mechinterp import decompose as attribute

    _check_choices(text, answer, foil, rules, baseline)
    is_picture = _names_a_picture(out)
    folder = out.parent if is_picture else out
    with folder_written_whole(folder, () if is_picture else FILES) as scratch:
        for warning in clashes():
            say.warn(warning)
        transformer = load_model(model, device)
        print(f"Model   {model}: {model_in_words(transformer.config)}")
        _warn_of_spaces(transformer.tokenizer, answer, foil)
        found = attribute(transformer, text, answer=answer, foil=foil, rules=rules, baseline=baseline, phrases=phrases)
        _say_tokens(found, text, is_named=answer is not None)
        if phrases:
            _say_phrases(found)
        found.draw(scratch / (out.name if is_picture else "tokens.png"))
        if not is_picture:
            found.save(scratch / "tokens.json")
        written = sorted(file.name for file in scratch.iterdir())
    print(f"\nWritten to {folder}: {', '.join(written)}")


def _check_choices(text: str, answer: str | None, foil: str | None, rules: str, baseline: str) -> None:
    """What can be told without a model; whether the words are single tokens, only its tokenizer knows."""
    from mechinterp.attribution import BASELINES
    from mechinterp.decomposition.rule_sets import rules_named

    if not text.strip():
        raise TaskError("the text is empty. Give at least one word.")
    if foil is not None and answer in (None, foil):
        raise TaskError(f"--foil {foil!r} needs another word to stand against. Name it with --answer.")
    rules_named(rules)
    if baseline not in BASELINES:
        known = ", ".join(BASELINES)
        raise TaskError(f"there is no baseline {baseline!r}. There are: {known}.{nearest(baseline, BASELINES)}")


def _names_a_picture(out: Path) -> bool:
    """By its suffix. A folder may have dots in its name (``run-0.5``), but ``tokens.jpg`` was meant to be a file."""
    from mechinterp.plots import SUFFIXES

    if out.is_dir() or not out.suffix[1:].isalpha():
        return False
    if out.suffix.lower() not in SUFFIXES:
        raise TaskError(f"--out {out}: pictures are written as {', '.join(SUFFIXES)}. Give one of these, or a folder.")
    return True


def _warn_of_spaces(tokenizer: Any, *words: str | None) -> None:
    """Most vocabularies hold a word with and without its space, and after a prompt few people mean the one without."""
    for word in filter(None, words if tokenizer else ()):
        if word[0].isalnum() and None not in (tokenizer.single(word), tokenizer.single(f" {word}")):
            say.warn(f"{word!r} and {f' {word}'!r} are two tokens, and the one without a space is explained.")


def _say_tokens(found: Any, text: str, is_named: bool) -> None:
    """The prompt, what is explained and how, and every token with its score."""
    against = "" if found.foil is None else f" against {found.foil!r}"
    chosen = "" if is_named else ", the two likeliest tokens"
    value = f"a {'logit' if found.foil is None else 'difference'} of {found.difference:+.3g}"
    rules, baseline = found.settings["rules"], found.settings["baseline"]
    print(f"Text    {shortened(text)}, {len(found.tokens)} tokens")
    print(f"Answer  {found.answer!r}{against}{chosen}: {value}")
    print(f"Rules   {rules}, from the {baseline} embedding: {MEANINGS[rules]}")
    rows = zip(map(repr, found.tokens), numbers(found.scores.tolist(), sign="+"), strict=True)
    print("\n" + table(("token", "score"), rows, right=(1,)))
    print(f"score: the part of {found.difference:+.3g} logits that is due to the token; positive: it speaks for the answer")


def _say_phrases(found: Any) -> None:
    """What the phrases of each round bring about together."""
    merged = [(n if at == 0 else "", phrase) for n, round in enumerate(found.rounds, 1) for at, phrase in enumerate(round)]
    scores = numbers([phrase.score for _, phrase in merged], sign="+")
    rows = [(str(n), shortened(phrase.text, 80), score) for (n, phrase), score in zip(merged, scores, strict=True)]
    print("\n" + table(("round", "phrase", "score"), rows, right=(0, 2)))
    print("score: of the phrase as a whole; from round to round, phrases take in the neighbours that change it the most")
