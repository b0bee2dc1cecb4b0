"""What ``mechinterp discover`` says of methods that watch what parts write and change nothing: codes, probes, divergence."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mechinterp.cli.words import numbers, table

SCORES = {
    "codes": "nats of information between the part's code and clean or corrupted, beyond chance",
    "codes-change": "share of the prompt pairs in which corrupting the prompt changes the part's code",
    "codes-answer": "nats of information between the part's code and the answer, on clean prompts, beyond chance",
    "codes-count": "codes of the part that occur on clean prompts and on no corrupted one, beyond chance",
    "codes-paper": "codes of the head that occur on clean prompts and on no corrupted one, as published, in a softmax",
    "codes-edges": "nats that two codes tell together beyond each alone (negative: they say the same), beyond chance",
    "divergence": "how far the part's output moves when what differs is blanked, as a fraction of its size (0 to 1)",
    "probe": "area under the ROC curve of a linear probe of the part for clean or corrupted, beyond chance",
}
_N_EXPLAINED = (3, 2)  # parts, and codes of each


def is_watched(scores: Any) -> bool:
    """Whether parts were watched, and nothing was cut."""
    return scores.method in SCORES or "n_counted" in scores.settings


def parts_ranked(scores: Any, looks: Mapping[str, str], n: int) -> None:
    """The ``n`` best parts beside their control; what the numbers are; how many stand out, with training and without."""
    best = scores.order()[:n]
    names = [scores.names[item] for item in best]
    control = [scores.settings.get("untrained", {}).get("values", {}).get(name) for name in names]
    cells = iter(numbers([*scores.values[best].tolist(), *(value for value in control if value is not None)]))
    columns = {"part": names, "score": [next(cells) for _ in best], "q": _rates(scores, names)}
    columns["untrained"] = ["" if value is None else next(cells) for value in control]
    columns["attention on clean prompts"] = [looks.get(name, "") for name in names] if looks else []
    shown = {name: column for name, column in columns.items() if any(column)}
    right = [column for column, name in enumerate(shown) if name in ("score", "q", "untrained")]
    print("\n" + table(list(shown), zip(*shown.values(), strict=True), right=right))
    what_was_counted(scores, shown)


def what_was_counted(scores: Any, columns: Collection[str] = ()) -> None:
    """What the score and the ``columns`` are, how many items stand out, with training and without, and facts of the codes."""
    facts, control = scores.settings, scores.settings.get("untrained", {})
    items = "pairs of parts" if scores.items == "edge" else "parts"
    print(f"score: {SCORES.get(scores.method, scores.unit)}; what {items} know, not what they do")
    if "q" in columns:
        print("q: the rate of false discoveries among parts at least as far beyond their own chance level")
    if "untrained" in columns:
        print("untrained: the same score by autoencoders that were never trained, to be beaten")
    told = ["this method has no threshold of its own"]
    if "selected" in facts:
        n = facts.get("n_pairs", scores.n_selectable)
        told = [f"{_n_selected(facts):,} of {n:,} {items} stand out, with no answer key"]
    told += [f"untrained, {_n_selected(control):,} would"] if "selected" in control else []
    if (alike := control.get("rank_correlation")) is not None:
        told.append(f"rank correlation of trained and untrained {alike:.2f}")
    print("; ".join(told))
    if "l0" in facts:
        places = facts["positions"]
        size = f"{facts['n_train']} examples trained, {facts['n_counted']} counted"
        print(f"codes: read at {places if isinstance(places, str) else ', '.join(places)}; {size}; ", end="")
        print(f"{facts['codes_a_part']:.1f} codes a part, {facts['l0']:.2f} latents active, {facts['silent']:.0%} silent")


def try_next(scores: Any, task: Any) -> str:
    """What to say, and to do, where no part stands out."""
    named, judged = ", ".join([*task.prompts.positions, "mean"]), scores.values[scores.values > 0]
    if len(judged) == scores.n_selectable and len(set(judged.tolist())) == 1:
        return (
            f"all parts score alike by {scores.method!r}, so none stands out: what tells these prompts apart is written "
            f"everywhere. Try prompts that differ in less, or other --positions ({named})."
        )
    told = f"no part stands out by {scores.method!r} on {scores.settings.get('n_counted', 2 * len(task))} prompts"
    other = "" if scores.method == "codes-change" else "--method codes-change, which asks what changes within aligned pairs; "
    return f"{told}, so the order of parts may be chance. Try {other}more --prompts; or other --positions ({named})."


def codes_explained(found: Any) -> None:
    """The first codes of the best parts."""
    print(f"\n{found.text(*_N_EXPLAINED)}")
    if (more := len({one.part for one in found.meanings}) - _N_EXPLAINED[0]) > 0:
        print(f"\n... and the codes of {more} more parts")


def _n_selected(facts: Mapping[str, Any]) -> int:
    return facts.get("n_selected", len(facts["selected"]))


def _rates(scores: Any, names: Sequence[str]) -> list[str]:
    """The false discovery rates that the threshold goes by; none where a method has no p-values."""
    import numpy as np

    from circuits.code_statistics import false_discovery_rates

    p = scores.settings.get("p")
    if not p:
        return []
    rates = dict(zip(p, false_discovery_rates(np.array(list(p.values()), dtype=float)).tolist(), strict=True))
    return [f"{rates[name]:.3f}" if name in rates else "" for name in names]
