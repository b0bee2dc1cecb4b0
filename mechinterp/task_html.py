"""A task in a notebook: its first prompts with their named positions, and what the corruption changes."""

from collections.abc import Sequence

from mechinterp.html import note, panel, shade, token
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.prompts import PromptBatch

# Of Tol's muted palette, told apart with every common colour vision; each name also stands under its token.
_COLOURS = ((204, 102, 119), (68, 119, 220), (221, 170, 51), (68, 170, 153), (170, 80, 150), (17, 140, 70), (136, 204, 238))
_BESIDE = (128, 128, 128)  # positions that are named after another, such as S1+1
_CHANGED = "outline:1.5px dashed currentColor;outline-offset:-1px"


def task_html(about: str, prompts: PromptBatch, tokenizer: Tokenizer, group_names: Sequence[str], n: int = 3) -> str:
    """The first ``n`` pairs token by token: positions coloured and named, changed tokens outlined, answers and foils below."""
    rows = [_pair(prompts, row, tokenizer, group_names) for row in range(min(n, len(prompts)))]
    more = f", {n} of them shown" if len(prompts) > n else ""
    legend = "Under each token stand the names of its position; the corruption changes the tokens in dashed boxes."
    return panel(f"{about} ({len(prompts):,} prompts{more})", *rows, note(legend))


def _pair(prompts: PromptBatch, row: int, tokenizer: Tokenizer, group_names: Sequence[str]) -> str:
    stop = int(prompts.end[row]) + 1
    clean, corrupted = (tokens[row, :stop].tolist() for tokens in (prompts.clean, prompts.corrupted))
    names: dict[int, list[str]] = {}
    for name, at in prompts.positions.items():
        names.setdefault(int(at[row]), []).append(name)
    order = [name for name in prompts.positions if not _is_beside(name)]
    words = tokenizer.strings(clean)
    above = "".join(
        token(word, _style(names.get(at, []), order), ", ".join(names.get(at, [])), f"clean, position {at}: {word!r}")
        for at, word in enumerate(words)
    )
    below = "".join(
        token(word, _CHANGED if changed else "opacity:.55", hint=f"corrupted, position {at}: {word!r}")
        for at, (word, changed) in enumerate(
            zip(tokenizer.strings(corrupted), [one != other for one, other in zip(clean, corrupted, strict=True)], strict=True)
        )
    )
    group = int(prompts.groups[row])
    kind = f" · {group_names[group]}" if group < len(group_names) else ""
    answers = f"answer {_words(prompts, row, tokenizer, 1)}"
    foils = _words(prompts, row, tokenizer, -1)
    about = f"{answers}{f' · foil {foils}' if foils else ''}{kind}"
    return f'<div style="margin:4px 0 8px"><div>{above}</div><div>{below}</div>{note(about)}</div>'


def _style(names: Sequence[str], order: Sequence[str]) -> str:
    own = [name for name in names if name in order]
    if own:
        return shade(0.75, _COLOURS[order.index(own[0]) % len(_COLOURS)])
    return shade(0.3, _BESIDE) if names else ""


def _is_beside(name: str) -> bool:
    return "+" in name or "-" in name


def _words(prompts: PromptBatch, row: int, tokenizer: Tokenizer, role: int, n: int = 4) -> str:
    ids = prompts.candidates[row][prompts.roles[row] == role].tolist()
    shown = ", ".join(map(repr, tokenizer.strings(ids[:n])))
    return f"{shown} and {len(ids) - n:,} more" if len(ids) > n else shown
