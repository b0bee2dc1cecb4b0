"""Small pieces of HTML for notebooks: escaped, without script, legible on a dark page and on a light one.

Text keeps the colour of the page it stands on and colour is laid beneath it, so faintly that black and white text both
stay legible. A sign is never told by colour alone: positive is underlined, negative is underlined with dashes.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape as escape

FOR, AGAINST = (213, 94, 0), (0, 114, 178)  # Okabe and Ito's vermillion and blue, told apart with every common colour vision
RULE = "rgba(128,128,128,.4)"
_MOST = 0.6  # how opaque a colour under text may be
_FONT = "font-family:system-ui,sans-serif;font-size:13px;line-height:1.45"
_CODE = re.compile(r"`([^`]+)`")


def panel(title: str, *parts: str) -> str:
    """A whole representation: its title, and below it parts that are HTML already."""
    return f'<div style="{_FONT}"><div style="font-weight:600;margin:2px 0 4px">{escape(title)}</div>{"".join(parts)}</div>'


def note(text: str) -> str:
    """A line in smaller print.

    >>> note("a < b")
    '<div style="opacity:.75;font-size:12px;margin:3px 0">a &lt; b</div>'
    """
    return f'<div style="opacity:.75;font-size:12px;margin:3px 0">{escape(text)}</div>'


def beside(*parts: str) -> str:
    """Parts that are HTML already side by side, wrapped where there is no room."""
    boxes = "".join(f'<div style="display:inline-block;vertical-align:top;margin-right:16px">{part}</div>' for part in parts)
    return f'<div style="max-width:100%;overflow-x:auto">{boxes}</div>'


def shade(share: float, colour: tuple[int, int, int] | None = None) -> str:
    """CSS for a background: ``share`` from -1 to 1 of the most there is; by default red for and blue against.

    >>> shade(0.5), shade(-1.0)
    ('background:rgba(213,94,0,0.300)', 'background:rgba(0,114,178,0.600)')
    """
    red, green, blue = colour or (FOR if share > 0 else AGAINST)
    return f"background:rgba({red},{green},{blue},{_MOST * min(abs(share), 1.0):.3f})"


def signed(share: float) -> str:
    """``shade``, and the sign again as an underline, as strong: solid for positive, dashed for negative, none for zero."""
    if not share:
        return "border-bottom:2px solid transparent"
    red, green, blue = FOR if share > 0 else AGAINST
    line = f"rgba({red},{green},{blue},{0.15 + 0.85 * min(abs(share), 1.0):.3f})"
    return f"{shade(share)};border-bottom:2px {'solid' if share > 0 else 'dashed'} {line}"


def token(text: str, style: str = "", below: str = "", hint: str = "") -> str:
    """A token in a box of its own, with a word or number under it; ``hint`` shows when a mouse rests on it."""
    box = "display:inline-block;text-align:center;vertical-align:top;margin:1px 1px 3px"
    word = f'<span style="font-family:monospace;padding:1px 3px;border-radius:3px;white-space:pre;{style}">'
    under = f'<br><span style="font-size:10px;opacity:.8">{escape(below)}</span>' if below else ""
    return f'<span style="{box}" title="{escape(hint or text)}">{word}{escape(visible(text))}</span>{under}</span>'


def visible(token: str) -> str:
    """A token as it can be read: line ends as signs, without the spaces at its sides.

    >>> visible(" Mary"), visible("\\n"), visible(" ")
    ('Mary', '⏎', '␣')
    """
    return token.replace("\n", "⏎").strip(" ") or "␣"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, caption: str = "") -> str:
    """Cells of plain text; the first ``left`` columns hold words and stand left, the others stand right."""
    above = f'<caption style="text-align:left;font-weight:600;padding:4px 0">{escape(caption)}</caption>' if caption else ""
    cells = "".join(_cell("th", name, at < left, ' scope="col"') for at, name in enumerate(head))
    lines = [f"<tr>{''.join(_cell('td', text, at < left) for at, text in enumerate(row))}</tr>" for row in rows]
    style = f"border-collapse:collapse;margin:4px 0;{_FONT}"
    top = f"<thead><tr>{cells}</tr></thead>" if any(head) else ""
    return f'<table style="{style}">{above}{top}<tbody>{"".join(lines)}</tbody></table>'


def from_markdown(text: str) -> str:
    """Headings, paragraphs and pipe tables of Markdown that we wrote ourselves.

    >>> from_markdown("### Shared\\n\\nTwo `a0.h1` tasks.")[:20]
    '<div style="font-wei'
    """
    blocks, lines = [], text.splitlines()
    while lines:
        n = next((at for at, line in enumerate(lines) if _sort(line) != _sort(lines[0])), len(lines))
        block, lines = lines[:n], lines[n:]
        blocks.append(_block(_sort(block[0]), block))
    return "".join(blocks)


def _sort(line: str) -> str:
    return "table" if line.startswith("|") else "heading" if line.startswith("#") else "text" if line.strip() else ""


def _block(sort: str, lines: list[str]) -> str:
    if sort == "table":
        head, rule, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        left = next((at for at, dashes in enumerate(rule) if dashes.endswith(":")), len(rule))
        return table(head, rows, left=left)
    if sort == "heading":
        return "".join(f'<div style="font-weight:600;margin:8px 0 2px">{escape(line.lstrip("# "))}</div>' for line in lines)
    words = _CODE.sub(r"<code>\1</code>", escape(" ".join(lines)))
    return f'<div style="margin:4px 0">{words}</div>' if sort else ""


def _cell(tag: str, text: str, is_left: bool, more: str = "") -> str:
    style = f"text-align:{'left' if is_left else 'right'};padding:2px 8px;border-bottom:1px solid {RULE};background:none"
    return f'<{tag} style="{style}"{more}>{escape(text)}</{tag}>'
