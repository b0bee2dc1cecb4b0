"""What an attribution graph draws: parts in columns of tokens, joined by signed links; and which of them there is room for.

A *place* is a part and the token whose column it stands in. A *term* is one edge of the circuit between two places. All
terms between the same two places are one link, whose weight is their sum: the pages that show these graphs keep one link a
pair, so query, key and value of a head stay apart inside the link (``edges``) and not as nodes of their own.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from math import fsum

from mechinterp.nodes import Node

Place = tuple[Node, int]


@dataclass(frozen=True)
class Term:
    """An edge as far as it runs from ``source`` to ``target``; ``reader`` is the port (or part) that reads it there.

    ``weight`` is None where the circuit has no scores.
    """

    source: Place
    target: Place
    reader: Node
    weight: float | None


@dataclass(frozen=True)
class Links:
    """The terms of each pair of places, those that are shown, and the size of the rest.

    ``n_hidden``: how many terms, ``hidden``: the sum of their magnitudes, ``shown``: that of the terms there are.
    """

    terms: dict[tuple[Place, Place], list[Term]]
    n_hidden: int = 0
    hidden: float = 0.0
    shown: float = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "shown", fsum(self.strength(pair) for pair in self.terms))

    @classmethod
    def of(cls, terms: Iterable[Term], n_hidden: int = 0, hidden: float = 0.0) -> "Links":
        """All of them; the last two count what was left out before."""
        by_pair = defaultdict(list)
        for term in terms:
            by_pair[term.source, term.target].append(term)
        return cls(dict(by_pair), n_hidden, hidden)

    @cached_property
    def places(self) -> set[Place]:
        return {place for pair in self.terms for place in pair}

    def strength(self, pair: tuple[Place, Place]) -> float:
        """The sum of magnitudes of a link's terms, 1 for each without a score."""
        return fsum(1.0 if term.weight is None else abs(term.weight) for term in self.terms[pair])

    def weight(self, pair: tuple[Place, Place]) -> float:
        """Their signed sum."""
        return fsum(1.0 if term.weight is None else term.weight for term in self.terms[pair])

    def joined(self, other: "Links") -> "Links":
        """The terms of both."""
        terms = [term for links in (self, other) for of_pair in links.terms.values() for term in of_pair]
        return Links.of(terms, self.n_hidden + other.n_hidden, self.hidden + other.hidden)

    def strongest(self, n: int) -> "Links":
        """The ``n`` strongest links; ties stay in order."""
        return self._without(sorted(self.terms, key=lambda pair: -self.strength(pair))[n:])

    def at_most(self, n_places: int) -> "Links":
        """Without the weaker places of each part that stands in more than ``n_places`` columns.

        circuit-tracer's page deletes whatever stands in more than two thirds of them, all of it.
        """
        mass: dict[Place, float] = defaultdict(float)
        for pair in self.terms:
            for place in pair:
                mass[place] += self.strength(pair)
        by_part: dict[Node, list[Place]] = defaultdict(list)
        for place in sorted(mass, key=lambda place: (-mass[place], place[1])):
            by_part[place[0].at(None)].append(place)
        crowded = {part: places for part, places in by_part.items() if part.kind not in ("input", "logits")}
        dropped = {place for places in crowded.values() for place in places[n_places:]}
        return self._without([pair for pair in self.terms if dropped & {*pair}]) if dropped else self

    def shares(self) -> dict[Place, float]:
        """What pages may prune by: going from the strongest place to the weakest, the share of all links' strength so far.

        A place is as strong as the links that leave it. The logits come first, with 0.
        """
        leaving: dict[Place, float] = dict.fromkeys(self.places, 0.0)
        for pair in self.terms:
            leaving[pair[0]] += self.strength(pair)
        ranked = sorted(leaving, key=lambda place: (place[0].kind != "logits", -leaving[place], place[0], place[1]))
        so_far, shares = 0.0, {}
        for place in ranked:
            so_far += leaving[place]
            shares[place] = min(so_far / self.shown, 1.0) if self.shown else 0.0
        return shares

    def _without(self, pairs: Collection[tuple[Place, Place]]) -> "Links":
        gone = set(pairs)
        kept = {pair: terms for pair, terms in self.terms.items() if pair not in gone}
        n_hidden = self.n_hidden + sum(len(self.terms[pair]) for pair in gone)
        return Links(kept, n_hidden, self.hidden + fsum(self.strength(pair) for pair in gone))
