"""Notebook pieces: escaped, without script, and with the numbers in them."""

import re
from html.parser import HTMLParser

import pytest

import mechinterp as mi
from mechinterp import html
from mechinterp.tasks import TASKS, ioi

VOID = {"br"}


class Page(HTMLParser):
    """What stands on a page, once every tag is known to be closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.tags.append(tag)
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def model():
    return mi.load("builtin")


NASTY = "<script>alert('x')</script> & \"quoted\""


@pytest.mark.parametrize(
    "made",
    [
        html.panel(NASTY),
        html.note(NASTY),
        html.token(NASTY, below=NASTY, hint=NASTY),
        html.table([NASTY], [[NASTY]], caption=NASTY),
        html.from_markdown(f"### {NASTY}\n\n{NASTY}\n\n| {NASTY} |\n| --- |\n| {NASTY} |"),
    ],
)
def test_whatever_is_shown_is_escaped(made):
    page = Page(made)
    assert "script" not in page.tags
    assert NASTY in page.text


def test_a_sign_is_told_without_colour():
    positive, negative, nothing = html.signed(0.5), html.signed(-0.5), html.signed(0.0)
    assert ("solid" in positive, "dashed" in negative, "transparent" in nothing) == (True, True, True)


def luminance(colour) -> float:
    channels = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), channels, strict=True))


@pytest.mark.parametrize(("page", "ink"), [((255, 255, 255), (17, 17, 17)), ((17, 19, 24), (230, 230, 230))])
@pytest.mark.parametrize("share", [-1.0, -0.4, 0.4, 1.0])
def test_text_stays_legible_on_every_shade_of_both_pages(page, ink, share):
    *colour, opacity = map(float, re.findall(r"[\d.]+", html.shade(share)))
    laid = [opacity * c + (1 - opacity) * p for c, p in zip(colour, page, strict=True)]
    light, dark = sorted((luminance(laid), luminance(ink)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) > 4.5  # WCAG AA


def test_markdown_tables_become_tables():
    page = Page(html.from_markdown("About `this`.\n\n### Shared\n\n| a | b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |"))
    assert [page.tags.count(tag) for tag in ("table", "tr", "td", "code")] == [1, 3, 4, 1]
    assert page.words == ["About ", "this", ".", "Shared", "a", "b", "x", "1", "y", "2"]


def test_a_task_shows_its_positions_its_changes_and_its_answers(model):
    task = ioi(model, n_prompts=5, seed=0)
    page = Page(task._repr_html_())
    names = {name for words in page.words for name in words.split(", ")}
    assert set(task.prompts.positions) <= names
    changed = (task.prompts.clean != task.prompts.corrupted)[:3].sum()
    assert task._repr_html_().count("dashed currentColor") == changed
    for row in range(3):
        answer, *_ = model.tokenizer.strings([int(task.prompts.answer[row])])
        assert f"answer {answer!r}" in page.text
    assert "5 prompts, 3 of them shown" in page.text


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_shown(model, name):
    page = Page(TASKS[name](model, n_prompts=2, seed=0)._repr_html_())
    assert name in page.text
    assert "END" in page.text


def test_a_text_attribution_shows_every_token_with_its_number(model):
    found = mi.decompose(model, "Then, Mary and John met. John gave a ring to", phrases=True, max_rounds=2)
    page = Page(found._repr_html_())
    assert all(html.visible(token) in page.words for token in found.tokens)
    assert all(f"{score:+.2f}" in page.words for score in found.scores)
    assert all(f"{phrase.score:+.2f}" in page.words for phrase in found.rounds[-1])
