"""Greater-than (Hanna et al. 2023, arXiv:2305.00586): an end year lies after its start year.

    The voyage ran from the year 1732 to the year 17  ->  any of 33 .. 99

A year is usable where the tokenizer splits `` 1732`` into exactly `` 17`` and ``32``; GPT-2's does not for all. Start
years run over 02 .. 98 and are drawn evenly, so that a right and a wrong answer always exist. The sentences are ours.
"""

from random import Random

from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import TaskError
from mechinterp.metrics import prob_diff
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import Example, Task, assemble, pieces, tokenizer_of, wants_bos
from mechinterp.tasks.words import HELD_OUT_EVERY, Split, choose, chosen_templates, usable

TEMPLATES = (
    "The {NOUN} went on from the year {XX1}{YY} until the year {XX2}",
    "The {NOUN} began in {XX1}{YY} and ended in {XX2}",
    "People say that the {NOUN} started in {XX1}{YY} and stopped in {XX2}",
    "From {XX1}{YY} on, the {NOUN} continued to {XX2}",
    "The {NOUN} ran from the year {XX1}{YY} to the year {XX2}",
    "The {NOUN} of {XX1}{YY} was over by the year {XX2}",
    "After the {NOUN} of the year {XX1}{YY} came a new one in the year {XX2}",
    "The work on the {NOUN} started in {XX1}{YY} and was finished in {XX2}",
    "There was a {NOUN} from the year {XX1}{YY} to {XX2}",
    "The {NOUN} first appeared in {XX1}{YY} and was finished in the year {XX2}",
)
CONTROL_TEMPLATES = (
    "One {NOUN} started in {XX1}{YY} and another started in {XX2}",
    "The {NOUN} ended in the year {XX1}{YY} and a different one ended in the year {XX2}",
    "A {NOUN} was planned in {XX1}{YY} while another was planned in {XX2}",
    "There was a {NOUN} in the year {XX1}{YY} and another in the year {XX2}",
    "The {NOUN} began in the year {XX1}{YY} and another began in the year {XX2}",
    "One {NOUN} began in {XX1}{YY} and a different one began in {XX2}",
    "The {NOUN} stopped in {XX1}{YY} while another stopped in {XX2}",
    "The {NOUN} continued in the year {XX1}{YY} and another continued in the year {XX2}",
    "One {NOUN} was over in {XX1}{YY} and another was over in {XX2}",
)

CENTURIES = tuple(range(10, 20))
YEARS = tuple(f"{year:02d}" for year in range(100))

CORRUPTIONS = {
    "01": lambda rng, years, year: 1,
    "random-year": lambda rng, years, year: rng.choice([other for other in years if other != year]),
}


def greater_than(
    model,
    n_prompts: int = 64,
    seed: int = 0,
    *,
    corruption: str = "01",
    split: Split = "all",
    template: int | None = None,
    bos: bool | None = None,
) -> Task:
    """Prompts whose metric is P(later years) - P(years up to YY), in [-1, 1].

    ``corruption``: ``"01"`` makes the start year xx01, after which every year is allowed (published); ``"random-year"``
    is another year of the century. ``split="held-out"`` draws nouns, sentences and (century, year) pairs that the
    built-in model never saw together with this task. ``bos=None``: no BOS unless the model was trained with one.
    Positions: NOUN XX1 YY XX2 END. Argmax accuracy says nothing here, as any late year is right:
    see ``cutoff_sharpness`` and ``greater_than_control``.
    """
    return _generate(model, n_prompts, seed, corruption, split, template, bos, TEMPLATES, "greater-than")


def greater_than_control(
    model, n_prompts: int = 64, seed: int = 0, *, corruption: str = "01", split: Split = "all", bos: bool | None = None
) -> Task:
    """The control: two years without an order ("began in the year 1732 and another began in the year 17").

    A model that has learned the order, and not just late years, scores about 0.
    """
    return _generate(model, n_prompts, seed, corruption, split, None, bos, CONTROL_TEMPLATES, "greater-than-control")


def cutoff_sharpness(logits: Float[Tensor, "batch d_vocab"], prompts: PromptBatch) -> Float[Tensor, "batch"]:
    """P(YY+1) - P(YY-1): how sharply the allowed years begin (Hanna et al. 2023, section 2)."""
    years = logits.softmax(-1).gather(1, prompts.candidates)  # the later years first, then the earlier ones, ascending
    n_later = (prompts.roles > 0).sum(1)
    before = (prompts.roles != 0).sum(1) - 2  # the last foil is YY itself
    assert bool((before >= n_later).all())
    return years[:, 0] - years.gather(1, before[:, None])[:, 0]


def is_held_out(century: int, year: int) -> bool:
    """Every fifth (century, year) pair, a different set of years in each century."""
    return (7 * century + year) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def _generate(model, n_prompts, seed, corruption, split, template, bos, sentences, name) -> Task:
    tokenizer = tokenizer_of(model)
    corrupt = choose(CORRUPTIONS, corruption, "corruption of greater-than")
    lists, dropped = usable(tokenizer, split, nouns=1)
    starts, valid, dropped["years"] = _start_years(tokenizer, split)
    templates = chosen_templates(len(sentences), split, template)
    rng = Random(seed)
    queue: list[int] = []
    examples = []
    for index in range(n_prompts):
        queue = queue or rng.sample(sorted(starts), len(starts))
        year = queue.pop()
        century = rng.choice(starts[year])
        group = templates[index % len(templates)]
        slots = {"NOUN": rng.choice(lists["nouns"]), "XX1": str(century), "YY": YEARS[year], "XX2": str(century)}
        other = corrupt(rng, valid[century], year)
        replaced = {"YY": YEARS[other]}
        examples.append(Example(pieces(sentences[group], slots), replaced, YEARS[year + 1 :], YEARS[: year + 1], group))
    return Task(
        name=name,
        prompts=assemble(tokenizer, examples, bos=wants_bos(tokenizer, bos, published=False)),
        metric=prob_diff,
        metric_name="prob_diff",
        corruption=corruption,
        group_names=sentences,
        tokenizer=tokenizer,
        notes={"seed": seed, "split": split, "dropped": dropped},
    )


def _start_years(tokenizer: Tokenizer, split: Split) -> tuple[dict[int, list[int]], dict[int, list[int]], int]:
    """The centuries that each start year may have, the valid years of each century, and how many pairs were dropped."""
    unusable = [year for year in YEARS if tokenizer.single(year) is None]
    if unusable:
        raise TaskError(
            f"greater-than reads its answer as one token of two digits, and {tokenizer.name!r} splits {unusable[0]!r} "
            "into several. Use a model whose tokenizer keeps two digits together, such as GPT-2."
        )
    valid = {
        century: [year for year in range(1, 99) if _is_two_tokens(tokenizer, century, YEARS[year])] for century in CENTURIES
    }
    wanted = [
        (century, year)
        for century in CENTURIES
        for year in range(2, 99)
        if split == "all" or is_held_out(century, year) == (split == "held-out")
    ]
    kept = [(century, year) for century, year in wanted if {1, year} <= set(valid[century])]
    if not kept:
        raise TaskError(f"no year such as 1732 is exactly two tokens (' 17', '32') in {tokenizer.name!r}. Use another model.")
    starts: dict[int, list[int]] = {}
    for century, year in kept:
        starts.setdefault(year, []).append(century)
    return starts, valid, len(wanted) - len(kept)


def _is_two_tokens(tokenizer: Tokenizer, century: int, year: str) -> bool:
    ids, _ = tokenizer.spans(f" {century}{year}")
    return ids == [tokenizer.single(f" {century}"), tokenizer.single(year)]
