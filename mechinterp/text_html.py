"""A token attribution in a notebook: every token on its colour with its number, and below them the phrases."""

from mechinterp.describing import Attributed
from mechinterp.html import note, panel, signed, token


def text_html(found: Attributed) -> str:
    """Colour goes with ``|score|`` as a share of the largest shown; hovering gives position and score."""
    against = "" if found.foil is None else f" against {found.foil!r}"
    phrases = [phrase for of_round in found.rounds for phrase in of_round]
    scores = [*map(float, found.scores), *(phrase.score for phrase in phrases)]
    largest = max(map(abs, scores), default=0.0) or 1.0
    singles = [
        token(text, signed(float(score) / largest), f"{score:+.2f}", f"{at}: {text!r} {score:+.4f} logits")
        for at, (text, score) in enumerate(zip(found.tokens, found.scores, strict=True))
    ]
    rows = ["".join(singles)]
    for count, of_round in enumerate(found.rounds):
        words = [
            token(p.text, signed(p.score / largest), f"{p.score:+.2f}", f"{p.start} to {p.stop - 1}: {p.score:+.4f} logits")
            for p in of_round
        ]
        rows += [note(f"phrases, round {count + 1}"), "".join(words)]
    about = ", ".join([found.model, *(f"{name}: {value}" for name, value in found.settings.items())])
    sign = f"{about}. Red on a solid line speaks for {found.answer!r}{against}, blue on a dashed line speaks against it."
    return panel(f"{found.answer!r}{against}: {found.difference:+.3f} logits", *rows, note(sign))
