"""Colored objects (Merullo et al. 2024, arXiv:2310.08744): the color of the thing that is asked about.

    Q: On the table lie a blue pencil, a black necklace, and a yellow lighter. What color is the pencil?
    A:  ->  Blue

The colors of the scene are lower case, the answer is Title case. By default one solved question with other objects and
other colors stands in front, as in the released data. The sentences are ours.
"""

from random import Random

from mechinterp.errors import TaskError
from mechinterp.metrics import logit_diff
from mechinterp.tasks.base import Example, Piece, Task, assemble, pieces, tokenizer_of, wants_bos
from mechinterp.tasks.words import Split, choose, chosen_templates, usable, words

TEMPLATES = (
    "Q: Look at the {SURFACE}: there is {LIST}. Which color has the {QUERY}?\nA:",
    "Q: Here on the {SURFACE} lie {LIST}. What is the color of the {QUERY}?\nA:",
    "Q: The {SURFACE} holds {LIST}. Tell me the color of the {QUERY}.\nA:",
    "Q: Someone left {LIST} on the {SURFACE}. What color was the {QUERY}?\nA:",
    "Q: There are three things on the {SURFACE}: {LIST}. What color is the {QUERY}?\nA:",
    "Q: I put {LIST} on the {SURFACE}. Do you know the color of the {QUERY}?\nA:",
    "Q: You can see {LIST} on the {SURFACE}. What color does the {QUERY} have?\nA:",
    "Q: Next to the {SURFACE} I see {LIST}. Say what color the {QUERY} has.\nA:",
    "Q: We found {LIST} under the {SURFACE}. What color is the {QUERY}?\nA:",
    "Q: My {SURFACE} has {LIST} on it. Please tell me what color the {QUERY} is.\nA:",
)

N_OBJECTS = 3

# What the corruption replaces, given the scene's labels and words: the asked thing, the foil's, one that is not there.
CORRUPTIONS = {
    "query": lambda asked, foil, absent: {"query": foil[1]},
    "swap-objects": lambda asked, foil, absent: {asked[0]: foil[1], foil[0]: asked[1]},
    "absent": lambda asked, foil, absent: {"query": absent},
}


def colored_objects(
    model,
    n_prompts: int = 64,
    seed: int = 0,
    *,
    corruption: str = "query",
    split: Split = "all",
    shots: int = 1,
    template: int | None = None,
    bos: bool | None = None,
) -> Task:
    """Prompts whose metric is logit(color asked for) - logit(the foil's color) at END, in logits.

    ``corruption``: ``"query"`` asks for another object of the same scene, the foil (the published minimal pair);
    ``"swap-objects"`` exchanges the asked object and the foil in the scene, so that the same question has the foil's
    answer; ``"absent"`` asks for an object that is not there. ``shots`` solved questions (0 or 1) stand in front.
    Positions: color1..3 object1..3 (the scene), answer_color answer_object foil_color foil_object, query, END, and for
    the solved question example_color1..3 example_object1..3 example_query example_answer.
    """
    tokenizer = tokenizer_of(model)
    corrupt = choose(CORRUPTIONS, corruption, "corruption of colored objects")
    choose({"0": 0, "1": 1}, str(shots), "number of shots (objects and colors of all questions must differ)")
    lists, dropped = usable(tokenizer, split, objects=N_OBJECTS * 2 + 1, surfaces=1)
    colors = [color for color in words("colors") if all(tokenizer.single(f" {c}") is not None for c in (color, color.title()))]
    dropped["colors"] = len(words("colors")) - len(colors)
    if len(colors) < N_OBJECTS * 2:
        raise TaskError(
            f"only {len(colors)} of {len(words('colors'))} colors are single tokens in lower and in Title case (with a leading "
            f"space) in the tokenizer {tokenizer.name!r}, and this task needs {N_OBJECTS * 2}. Use a model with a larger "
            "vocabulary."
        )
    templates = chosen_templates(len(TEMPLATES), split, template)
    rng = Random(seed)
    examples = []
    for index in range(n_prompts):
        group = templates[index % len(templates)]
        *things, absent = rng.sample(lists["objects"], N_OBJECTS * (shots + 1) + 1)
        paints = rng.sample(colors, N_OBJECTS * (shots + 1))
        surface = rng.choice(lists["surfaces"])
        parts: list[Piece] = []
        if shots:
            shown = rng.randrange(N_OBJECTS)
            parts += _question(group, surface, paints[:N_OBJECTS], things[:N_OBJECTS], shown, "example_")
            parts += [("example_answer", f" {paints[shown].title()}"), "\n"]
        paints, things = paints[-N_OBJECTS:], things[-N_OBJECTS:]
        asked, foil = rng.sample(range(N_OBJECTS), 2)
        parts += _question(group, surface, paints, things, asked, "")
        replaced = corrupt(*((f"object{i + 1}", f" {things[i]}") for i in (asked, foil)), f" {absent}")
        answers, foils = ([f" {paints[i].title()}"] for i in (asked, foil))
        examples.append(Example(parts, replaced, answers, foils, group, _aliases(asked, foil)))
    return Task(
        name="colored-objects",
        prompts=assemble(tokenizer, examples, bos=wants_bos(tokenizer, bos, published=False)),
        metric=logit_diff,
        metric_name="logit_diff",
        corruption=corruption,
        group_names=TEMPLATES,
        tokenizer=tokenizer,
        notes={"seed": seed, "split": split, "shots": shots, "dropped": dropped},
    )


def _question(group: int, surface: str, colors, things, asked: int, prefix: str) -> list[Piece]:
    numbers = range(1, N_OBJECTS + 1)
    scene = ", ".join(
        f"{'and ' if n == N_OBJECTS else ''}{article(color)} {{{prefix}color{n}}} {{{prefix}object{n}}}"
        for n, color in zip(numbers, colors, strict=True)
    )
    template = TEMPLATES[group].replace("{LIST}", scene).replace("{QUERY}", f"{{{prefix}query}}")
    slots = {f"{prefix}color{n}": color for n, color in zip(numbers, colors, strict=True)}
    slots |= {f"{prefix}object{n}": thing for n, thing in zip(numbers, things, strict=True)}
    return pieces(template.replace("{SURFACE}", surface), slots | {f"{prefix}query": things[asked]})


def _aliases(asked: int, foil: int) -> dict[str, tuple[str, int]]:
    roles = {"answer": asked + 1, "foil": foil + 1}
    return {f"{role}_{part}": (f"{part}{n}", 0) for role, n in roles.items() for part in ("color", "object")}


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
