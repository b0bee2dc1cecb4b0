"""What the built-in model learns from: documents of task prompts and of simpler text that needs the same skills.

A document is BOS and then pieces, one a line, cut at the context length. Each piece says which of its tokens can be
known from the text before them; only those get the full loss. Words and templates of the tasks come from their
``train`` split alone. The held-out words appear in the plain text (lists, ownership, repeated sequences, code), so that
their embeddings are trained, but never in the task that they are held out of.

What keeps shortcuts out: prompts with three names and a soft 50/50 target, two years without an order and a uniform
target, "Where is" questions, other pieces of every kind in front, and varying numbers of objects and arguments.
"""

from random import Random

from mechinterp.models.builtin.document import Document, prompt, series, text_nouns, train_words, words_other_than
from mechinterp.models.builtin.plain import write_assignments, write_filler, write_owners, write_repeat, write_reversed
from mechinterp.tasks.colored_objects import TEMPLATES as COLOR_TEMPLATES
from mechinterp.tasks.colored_objects import article
from mechinterp.tasks.docstring import SHAPES, VERBS, Shape
from mechinterp.tasks.greater_than import CENTURIES, CONTROL_TEMPLATES, YEARS, is_held_out
from mechinterp.tasks.greater_than import TEMPLATES as YEAR_TEMPLATES
from mechinterp.tasks.ioi import TEMPLATES as IOI_TEMPLATES
from mechinterp.tasks.words import split_words, words

# Text before and after the object, and whether the color that follows is in Title case: from one step away to four.
STATEMENTS = (
    (" The", " is", False),
    (" The", " is", False),
    (" The color of the", " is", False),
    (" What color is the", "? It is", False),
    (" The", ":", True),
    (" The color of the", ":", True),
    (" The", "? A:", True),
    (" What color is the", "?\nA:", True),
)


def write_ioi(doc: Document, rng: Random, is_abc: bool = False) -> None:
    """The two clauses of one or of two templates, words replaced here and there, and at times things for names."""
    pool = train_words("names") if rng.random() < 0.4 else words_other_than("names")
    first, second, third = rng.sample(pool, 3)
    answer, subject = rng.sample([first, second], 2)
    slots = {"A": first, "B": second, "PLACE": rng.choice(train_words("places")), "GIFT": rng.choice(train_words("gifts"))}
    before, after = rng.choice(split_words(IOI_TEMPLATES, "train")).split(" {S2}")
    if rng.random() < 0.5:
        after = rng.choice(split_words(IOI_TEMPLATES, "train")).split(" {S2}")[1]
    noise = rng.choice((0.0, 0.0, 0.1, 0.3))
    if rng.random() < 0.25:
        write_filler(doc, rng)
        before = " " + before
    prompt(doc, before, slots, rng, noise)
    if is_abc:
        doc.add(f" {third}")
    else:
        doc.answer("s2", f" {first}", f" {second}", said=f" {subject}")
    prompt(doc, after.rsplit(" ", 1)[0], slots, rng, noise)
    doc.add(rng.choice((" to", " to", " for")))
    if is_abc:
        doc.answer("abc", f" {first}", f" {second}", said=f" {answer}")
    else:
        doc.answer("ioi", f" {answer}")
    doc.add(".")


def write_abc(doc: Document, rng: Random) -> None:
    write_ioi(doc, rng, is_abc=True)


def write_years(doc: Document, rng: Random, is_control: bool = False) -> None:
    century, year = rng.choice([(c, y) for c in CENTURIES for y in range(1, 99) if not is_held_out(c, y)])
    templates = CONTROL_TEMPLATES if is_control else YEAR_TEMPLATES
    slots = {"NOUN": rng.choice(train_words("nouns")), "XX1": str(century), "YY": YEARS[year], "XX2": str(century)}
    prompt(doc, rng.choice(split_words(templates, "train")), slots)
    allowed = YEARS if is_control else YEARS[year + 1 :]
    doc.answer("control" if is_control else "years", *allowed, said=rng.choice(allowed)).add(".")


def write_control(doc: Document, rng: Random) -> None:
    write_years(doc, rng, is_control=True)


def write_colors(doc: Document, rng: Random) -> None:
    n_objects = rng.choice((2, 3, 3))
    objects, colors = rng.sample(train_words("objects"), n_objects), rng.sample(words("colors"), n_objects)
    things = [f"{article(color)} {color} {thing}" for color, thing in zip(colors, objects, strict=True)]
    surface = rng.choice(train_words("surfaces"))
    template = rng.choice(split_words(COLOR_TEMPLATES, "train"))
    scene, question = template.split(". ", 1)
    noise = rng.choice((0.0, 0.0, 0.1, 0.3))
    asked = rng.choices(range(n_objects), k=n_objects + 1)  # again and again, or elimination would do
    if rng.random() < 0.5:
        prompt(doc, scene.removeprefix("Q: "), {"SURFACE": surface, "LIST": series(things)}, rng, noise)
        for index in asked:
            before, after, is_title = rng.choice(STATEMENTS)
            color = colors[index].title() if is_title else colors[index]
            doc.add(f".{before} {objects[index]}{after}").answer("stated", f" {color}")
        doc.add(".")
        return
    prompt(doc, scene, {"SURFACE": surface, "LIST": series(things)}, rng, noise)
    doc.add(".")
    for turn, index in enumerate(asked[: rng.choice((1, 2, 3))]):
        if turn:
            doc.add("\nQ:")
            question = rng.choice(split_words(COLOR_TEMPLATES, "train")).split(". ", 1)[1]
        if rng.random() < 0.1:
            doc.add(f" Where is the {objects[index]}?\nA:").answer("where", " On").add(" the")
            doc.answer("where", f" {surface}")
        else:
            prompt(doc, " " + question, {"QUERY": objects[index]}, rng, noise)
            doc.answer("colors", f" {colors[index].title()}")


def write_docstring(doc: Document, rng: Random) -> None:
    """Any layout but the held-out ones, arguments of unequal description too, and at times other words for arguments."""
    markers = (":param", "@param", ":arg", "-")
    held_out = split_words(SHAPES, "held-out")
    while True:
        n_match = rng.choice((2, 3, 3, 4))
        described = [rng.choice((1, 2, 2, 3))] * n_match
        if rng.random() < 0.3:
            described = [rng.choice((1, 2, 3)) for _ in described]
        shape = Shape(rng.choice(markers), rng.randrange(4), rng.randrange(3), rng.choice((2, 3)), described[0])
        if shape not in held_out:
            break
    pool = train_words("variables") if rng.random() < 0.4 else words_other_than("variables")
    names = rng.sample(pool, 1 + shape.n_before + n_match + shape.n_after)
    nouns = [noun for noun in rng.sample(text_nouns(), 40) if noun not in names]
    doc.add(f"def {names[0]}(self")
    for name in names[1:]:
        doc.add(",").add(f" {name}")
    doc.add(f'):\n    """{rng.choice(VERBS)}' + "".join(f" {nouns.pop()}" for _ in range(shape.n_summary)) + "\n")
    documented = names[1 + shape.n_before : 1 + shape.n_before + n_match]
    for turn, (name, n_described) in enumerate(zip(documented, described, strict=True)):
        doc.add(f"\n    {shape.marker}")
        doc.answer("docstring", f" {name}") if turn else doc.add(f" {name}")
        doc.add(":")
        for _ in range(n_described):
            doc.add(f" {nouns.pop()}")


WRITERS = {
    "ioi": write_ioi,
    "abc": write_abc,
    "years": write_years,
    "control": write_control,
    "colors": write_colors,
    "docstring": write_docstring,
    "repeat": write_repeat,
    "owners": write_owners,
    "assigned": write_assignments,
    "reversed": write_reversed,
    "filler": write_filler,
}
