"""What codes mean, as data: printed to be read, saved as JSON. ``code_meanings.py`` finds it."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mechinterp.errors import CircuitError
from mechinterp.files import read_document, to_document, write_text_atomically

_KIND, _VERSION = "mechinterp code meanings", 1

Weighed = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Meaning:
    """One code of one part, read at ``place``.

    ``latents``: those that make the code; none where the part's autoencoder is silent. ``share``: of what the part tells, 0 to
    1 (of its score before chance is taken off). The shares of all its codes add up to 1; all are 0 where it tells nothing.
    ``examples``: some of the prompts that have the code, as ("clean" or "corrupted", text with the position that was read in
    brackets).

    ``attends`` and ``tokens``: where the head's attention rests, seen from the place, as means over all prompts of the code:
    by position that the task names and by token. Each is a part of 1, the whole. Empty for MLPs. ``towards``: the tokens whose
    logits rise most by what the code's latents add to the stream, directly, past all later layers; empty for silence.
    """

    part: str
    place: str
    latents: tuple[int, ...]
    n_clean: int
    n_corrupted: int
    share: float
    examples: tuple[tuple[str, str], ...]
    attends: Weighed
    tokens: Weighed
    towards: tuple[str, ...]

    def __str__(self) -> str:
        name = " + ".join(f"latent {latent}" for latent in self.latents) or "no latent active"
        lines = [f"{name}: {self.n_clean} clean, {self.n_corrupted} corrupted; {self.share:.0%} of what the part tells"]
        if self.attends:
            lines.append(f"  attends to      {_weighed(self.attends)}; tokens {_weighed((repr(t), w) for t, w in self.tokens)}")
        lines += [f"  writes towards  {', '.join(map(repr, self.towards))}"] if self.towards else []
        return "\n".join([*lines, *(f"  {side:<14}  {text}" for side, text in self.examples)])


@dataclass(frozen=True)
class CodeMeanings:
    """What ``explain_codes`` found: the parts in the order of their scores, each with its codes, the most telling first.

    ``n_pairs``: pairs of prompts on which codes were counted; those that trained autoencoders are not among them.
    """

    model: str
    task: str
    method: str
    n_pairs: int
    meanings: tuple[Meaning, ...]

    def save(self, path: str | os.PathLike) -> None:
        """JSON, whole or not at all."""
        write_text_atomically(path, to_document(_KIND, _VERSION, asdict(self)))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CodeMeanings":
        """What ``save`` wrote, equal. ``CircuitError`` names the file and what is wrong with it."""
        document = read_document(path, _KIND, _VERSION, CircuitError)
        try:
            facts: dict[str, Any] = {one.name: document[one.name] for one in fields(cls)}
            facts["meanings"] = tuple(Meaning(**_tuples(one)) for one in facts["meanings"])
            return cls(**facts)
        except (TypeError, KeyError, AttributeError) as problem:
            raise CircuitError(f"{os.fspath(path)!r} does not hold usable meanings of codes: {problem}") from problem

    def text(self, n_parts: int | None = None, n_codes: int | None = None) -> str:
        """The first ``n_parts`` parts and ``n_codes`` codes of each (None: all), to be read."""
        by_part: dict[tuple[str, str], list[Meaning]] = {}
        for one in self.meanings:
            by_part.setdefault((one.part, one.place), []).append(one)
        blocks = [f"What codes mean, on {self.n_pairs} clean and {self.n_pairs} corrupted prompts that trained nothing"]
        for (part, place), meanings in list(by_part.items())[:n_parts]:
            told = "\n".join(map(str, meanings[:n_codes])).replace("\n", "\n  ")
            blocks.append(f"{part}, read at {place}\n  {told}")
        return "\n\n".join(blocks)

    def __str__(self) -> str:
        return self.text()


def _weighed(pairs: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {weight:.2f}" for name, weight in pairs)


def _tuples(meaning: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in meaning.items()}
    return plain | {name: tuple(map(tuple, plain[name])) for name in ("examples", "attends", "tokens")}
