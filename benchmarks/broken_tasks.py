"""Tasks bent away from what the built-in model was trained on, to see which of them break it.

Each is one of the model's tasks with something new in it: a third name, another mention, more things, defaults. All
words are in the model's vocabulary, and the answer stays as plain to a person as it was. Nothing here is known to fail:
``benchmarks.repair`` measures that, and lists what did not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from mechinterp.metrics import logit_diff_max, prob_diff
from mechinterp.models.transformer import Transformer
from mechinterp.tasks.base import Example, Task, assemble, pieces, tokenizer_of
from mechinterp.tasks.colored_objects import article
from mechinterp.tasks.words import words

# Slots: IO and S are the two names in either order, IO2, IO3, S2 and S3 further mentions, D and D2 another name.
NAMES: dict[str, Sequence[str]] = {
    "two names (as trained)": (
        "Then, {A} and {B} met at the {PLACE}. {S2} handed a {GIFT} to",
        "After {A} and {B} had dinner at the {PLACE}, {S2} offered a {GIFT} to",
    ),
    "a third name in front": (
        "Everyone knows that {D} was tired. Then, {A} and {B} met at the {PLACE}. {S2} handed a {GIFT} to",
        "Yesterday, {D} was late. After {A} and {B} had dinner at the {PLACE}, {S2} offered a {GIFT} to",
    ),
    "a third name in between": (
        "Then, {A} and {B} met at the {PLACE}. Later, {D} arrived. {S2} handed a {GIFT} to",
        "After {A} and {B} had dinner at the {PLACE}, {D} was tired and {S2} offered a {GIFT} to",
    ),
    "a third name after the giver": (
        "Then, {A} and {B} met at the {PLACE}. {S2} liked {D} and handed a {GIFT} to",
        "After {A} and {B} had dinner at the {PLACE}, {S2} showed {D} the {PLACE} and offered a {GIFT} to",
    ),
    "a third name, said twice": (
        "Then, {D} was tired. Later, {A} and {B} met {D2} at the {PLACE}. {S2} handed a {GIFT} to",
        "{D} was late. After {A} and {B} had dinner with {D2} at the {PLACE}, {S2} offered a {GIFT} to",
    ),
    "the receiver said twice": (
        "Then, {A} and {B} met at the {PLACE}. {IO2} was tired. {S2} handed a {GIFT} to",
        "After {A} and {B} had dinner at the {PLACE}, {IO2} was tired and {S2} offered a {GIFT} to",
    ),
    "the receiver said three times": (
        "Then, {A} and {B} met at the {PLACE}. {IO2} was tired and {IO3} was late. {S2} handed a {GIFT} to",
        "After {A} and {B} had dinner at the {PLACE}, {IO2} was tired, {IO3} was late and {S2} offered a {GIFT} to",
    ),
    "the receiver said twice, afterwards": (
        "Then, {A} and {B} met at the {PLACE}. {S2} knows that {IO2} was tired and handed a {GIFT} to",
        "After {A} and {B} had dinner at the {PLACE}, {S2} knows {IO2} was late and offered a {GIFT} to",
    ),
    "the giver said three times": (
        "Then, {A} and {B} met at the {PLACE}. {S3} was tired. {S2} handed a {GIFT} to",
        "After {A} and {B} had dinner at the {PLACE}, {S3} was tired and {S2} offered a {GIFT} to",
    ),
    "three friends, two givers": (
        "Then, {A}, {B} and {D} met at the {PLACE}. {S2} and {D2} handed a {GIFT} to",
        "After {D}, {A} and {B} had dinner at the {PLACE}, {D2} and {S2} offered a {GIFT} to",
    ),
}


def named(variant: str, model: Transformer, n_prompts: int, seed: int) -> Task:
    """Indirect object identification with one of ``NAMES``; foils are the giver and the further name, where there is one.

    The metric of all but greater-than is the answer's logit less the *largest* foil's, which is positive where the answer wins.
    """
    rng, examples = Random(seed), []
    for index in range(n_prompts):
        io, s, d, *fresh = rng.sample(words("names"), 6)
        first, second = (("IO", io), ("S1", s))[:: 1 if index % 2 else -1]
        template = NAMES[variant][index // 2 % 2]
        said = {"A": first[1], "B": second[1], "S2": s, "S3": s, "IO2": io, "IO3": io, "D": d, "D2": d}
        said |= {"PLACE": rng.choice(words("places")), "GIFT": rng.choice(words("gifts"))}
        labels = {"A": first[0], "B": second[0]}
        parts = [p if isinstance(p, str) else (labels.get(p[0], p[0]), p[1]) for p in pieces(template, said)]
        changed = dict(zip(("IO", "S1", "S2"), fresh, strict=True))
        labelled = [part for part in parts if not isinstance(part, str)]
        replaced = {label: " " * text.startswith(" ") + changed[label] for label, text in labelled if label in changed}
        foils = [s, d] if "{D}" in template else [s]
        examples.append(Example(parts, replaced, [f" {io}"], [f" {foil}" for foil in foils], index // 2 % 2))
    return _task(f"ioi, {variant}", model, examples, NAMES[variant], seed)


@dataclass(frozen=True)
class Scene:
    """How things are shown and asked for. ``LIST`` holds the things, ``EXTRA`` one more in its own sentence."""

    template: str
    n_things: int = 3
    thing: str = "{ARTICLE} {COLOR} {OBJECT}"
    shots: int = 1


SCENES: dict[str, Scene] = {
    "three things (as trained)": Scene("Q: Here on the table lie {LIST}. What is the color of the {QUERY}?\nA:"),
    "no solved question": Scene("Q: Here on the table lie {LIST}. What is the color of the {QUERY}?\nA:", shots=0),
    "four things": Scene("Q: Here on the table lie {LIST}. What is the color of the {QUERY}?\nA:", 4, shots=0),
    "five things": Scene("Q: Here on the table lie {LIST}. What is the color of the {QUERY}?\nA:", 5, shots=0),
    "six things": Scene("Q: Here on the table lie {LIST}. What is the color of the {QUERY}?\nA:", 6, shots=0),
    "eight things": Scene("Q: Here on the table lie {LIST}. What is the color of the {QUERY}?\nA:", 8, shots=0),
    "two solved questions": Scene("Q: Here on the table lie {LIST}. What is the color of the {QUERY}?\nA:", 2, shots=2),
    "one more thing in a sentence of its own": Scene(
        "Q: Here on the table lie {LIST}. I see {EXTRA} under the bed. What is the color of the {QUERY}?\nA:", 4, shots=0
    ),
    "one more thing after the question": Scene(
        "Q: Here on the table lie {LIST}. What is the color of the {QUERY}? Next to me is {EXTRA}.\nA:", 4, shots=0
    ),
    "the question first": Scene("Q: What is the color of the {QUERY}? Here on the table lie {LIST}.\nA:", shots=0),
    "color after the thing": Scene(
        "Q: Look at the table: there is {LIST}. What is the color of the {QUERY}?\nA:",
        thing="a {OBJECT} that is {COLOR}",
        shots=0,
    ),
    "things of others": Scene(
        "Q: Here on the table lie {LIST}. What is the color of the {QUERY}?\nA:",
        thing="the {COLOR} {OBJECT} of {OWNER}",
        shots=0,
    ),
}


def colored(variant: str, model: Transformer, n_prompts: int, seed: int) -> Task:
    """Colored objects in one of ``SCENES``; the foils are all other colors of the scene."""
    scene, rng, examples = SCENES[variant], Random(seed), []
    total = scene.n_things * (scene.shots + 1)
    for _ in range(n_prompts):
        things = rng.sample(words("objects"), total + 1)
        colors = [color for _ in range(scene.shots + 1) for color in rng.sample(words("colors"), scene.n_things)]
        parts = []
        for shot in range(scene.shots + 1):
            here = slice(shot * scene.n_things, (shot + 1) * scene.n_things)
            prefix = "" if shot == scene.shots else f"example{shot + 1}_"
            askable = scene.n_things - ("{EXTRA}" in scene.template)
            asked = rng.randrange(askable)
            parts += _scene(scene, things[here], colors[here], asked, prefix, rng)
            if prefix:
                parts += [(f"{prefix}answer", f" {colors[here][asked].title()}"), "\n"]
        shown, paints = things[here], colors[here]
        foil = rng.choice([n for n in range(askable) if n != asked])
        others = [f" {paint.title()}" for n, paint in enumerate(paints) if n != asked]
        others.sort(key=lambda paint: paint != f" {paints[foil].title()}")
        beside = {"answer_color": (f"color{asked + 1}", 0), "answer_object": (f"object{asked + 1}", 0)}
        replaced = {"query": f" {shown[foil]}"}
        examples.append(Example(parts, replaced, [f" {paints[asked].title()}"], others, 0, beside))
    return _task(f"colored objects, {variant}", model, examples, (scene.template,), seed)


def _scene(scene: Scene, things, colors, asked: int, prefix: str, rng: Random):
    texts, slots = [], {}
    for n, (color, thing) in enumerate(zip(colors, things, strict=True), start=1):
        shape = scene.thing.replace("{ARTICLE}", article(color)).replace("{OWNER}", rng.choice(words("names")))
        texts.append(shape.replace("{COLOR}", f"{{{prefix}color{n}}}").replace("{OBJECT}", f"{{{prefix}object{n}}}"))
        slots |= {f"{prefix}color{n}": color, f"{prefix}object{n}": thing}
    extra = texts.pop() if "{EXTRA}" in scene.template else ""
    listed = ", ".join([*texts[:-1], f"and {texts[-1]}"])
    template = scene.template.replace("{LIST}", listed).replace("{EXTRA}", extra).replace("{QUERY}", f"{{{prefix}query}}")
    return pieces(template, slots | {f"{prefix}query": things[asked]})


@dataclass(frozen=True)
class Signature:
    """How a function is laid out: arguments before and after the documented ones, how many are documented, defaults."""

    n_before: int = 2
    n_documented: int = 2
    n_after: int = 1
    has_defaults: bool = False
    is_repeated: bool = False


SIGNATURES: dict[str, Signature] = {
    "two documented (as trained)": Signature(),
    "five arguments before": Signature(n_before=5),
    "five arguments after": Signature(n_after=5),
    "four documented": Signature(n_documented=4),
    "one documented": Signature(n_documented=1),
    "default values": Signature(has_defaults=True),
    "another function in front": Signature(is_repeated=True),
}


def documented(variant: str, model: Transformer, n_prompts: int, seed: int) -> Task:
    """Docstring with one of ``SIGNATURES``; the foils are all other arguments, and what else is named."""
    shape, rng, examples = SIGNATURES[variant], Random(seed), []
    known = [noun for noun in words("description_nouns") if tokenizer_of(model).single(f" {noun}") is not None]
    for _ in range(n_prompts):
        method, *names = rng.sample(words("variables"), 24)
        nouns = iter(rng.sample([noun for noun in known if noun not in names and noun != method], 20))
        n_arguments = shape.n_before + shape.n_documented + 1 + shape.n_after
        arguments, rest = names[:n_arguments], names[n_arguments:]
        docs = arguments[shape.n_before : shape.n_before + shape.n_documented + 1]
        parts = []
        if shape.is_repeated:  # the same arguments in another order
            shuffled = rng.sample(arguments, n_arguments)
            parts += [f"def {rest.pop()}(self", *(f", {name}" for name in shuffled), "):\n"]
        parts.append(f"def {method}(self")
        for n, name in enumerate(arguments):
            at = n - shape.n_before
            label = f"arg{at + 1}_def" if 0 <= at < len(docs) else f"before{n}" if at < 0 else f"after{at - len(docs)}"
            parts += [",", (label, f" {name}"), *([f" = {rest.pop()}"] if shape.has_defaults else [])]
        parts.append(f'):\n    """Compute {next(nouns)} {next(nouns)} {next(nouns)}\n')
        for n, name in enumerate(docs[:-1], start=1):
            parts += ["\n    :param", (f"arg{n}_doc", f" {name}"), f": {next(nouns)} {next(nouns)}"]
        parts.append("\n    :param")
        foils = [f" {name}" for name in names if name != docs[-1]]
        beside = {"answer_def": (f"arg{len(docs)}_def", 0), "last_doc": (f"arg{len(docs) - 1}_doc", 0)}
        beside |= {"last_def": (f"arg{len(docs) - 1}_def", 0), "last_def+1": (f"arg{len(docs) - 1}_def", 1)}
        replaced = {f"arg{len(docs)}_def": f" {rest[0]}"}
        examples.append(Example(parts, replaced, [f" {docs[-1]}"], foils, 0, beside))
    return _task(f"docstring, {variant}", model, examples, (variant,), seed)


YEARS: dict[str, Sequence[str]] = {
    "one year (as trained)": ("The {NOUN} began in {XX1}{YY} and ended in {XX2}",),
    "another year in front": ("The {NOUN2} ended in {XX3}{ZZ}. The {NOUN} began in {XX1}{YY} and ended in {XX2}",),
    "another start year in between": (
        "The {NOUN} began in {XX1}{YY}. The {NOUN2} began in {XX3}{ZZ}. The {NOUN} ended in {XX2}",
    ),
    "another end year in between": (
        "The {NOUN} began in {XX1}{YY}, the {NOUN2} ended in {XX3}{ZZ} and the {NOUN} ended in {XX2}",
    ),
}


def dated(variant: str, model: Transformer, n_prompts: int, seed: int) -> Task:
    """Greater-than with one of ``YEARS``: answers are the years after YY, whatever ZZ is. Look at the metric: any late year
    counts as right, so accuracy says nothing."""
    rng, examples = Random(seed), []
    years = [f"{year:02d}" for year in range(100)]
    for _ in range(n_prompts):
        start, other = rng.sample(range(2, 99), 2)
        noun, further = rng.sample(words("nouns"), 2)
        slots = dict.fromkeys(("XX1", "XX2", "XX3"), str(rng.randrange(11, 20)))
        slots |= {"YY": years[start], "ZZ": years[other], "NOUN": noun, "NOUN2": further}
        parts = pieces(YEARS[variant][0], slots)
        examples.append(Example(parts, {"YY": "01"}, years[start + 1 :], years[: start + 1]))
    return _task(f"greater-than, {variant}", model, examples, YEARS[variant], seed, prob_diff)


Make = Callable[[str, Transformer, int, int], Task]
FAMILIES: dict[str, tuple[Make, Sequence[str]]] = {
    "ioi": (named, tuple(NAMES)),
    "colored-objects": (colored, tuple(SCENES)),
    "docstring": (documented, tuple(SIGNATURES)),
    "greater-than": (dated, tuple(YEARS)),
}


def _task(name, model, examples, group_names, seed, metric=logit_diff_max) -> Task:
    tokenizer = tokenizer_of(model)
    prompts = assemble(tokenizer, examples, bos=tokenizer.prepends_bos)
    return Task(name, prompts, metric, metric.__name__, "custom", tuple(group_names), tokenizer, {"seed": seed})
