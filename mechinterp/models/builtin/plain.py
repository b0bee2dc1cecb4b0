"""Plain text for the built-in model: recall and repetition over every word, held-out ones included.

Colors and objects are paired only as the train split of colored objects may pair them.
"""

from random import Random

from mechinterp.models.builtin.document import FILLER, LISTS, Document, known, prompt, series, train_words
from mechinterp.tasks.words import words


def write_filler(doc: Document, rng: Random) -> None:
    """A sentence to be ignored. It has names of the train split only: a name met here alone would be ignored always."""
    nouns, objects = rng.sample(words("nouns"), 2), rng.sample(words("objects") + words("gifts"), 2)
    described = rng.sample(known("description_nouns"), 2)
    slots = {"N": rng.choice(train_words("names")), "PLACE": rng.choice(words("places")), "O": objects[0], "O2": objects[1]}
    slots |= {"NOUN": nouns[0], "NOUN2": nouns[1], "D": described[0], "D2": described[1]}
    prompt(doc, rng.choice(FILLER), slots | {"V": rng.choice(words("variables"))})


def write_owners(doc: Document, rng: Random) -> None:
    """Who has what, asked in both directions: associative recall over every name and object."""
    n_pairs = rng.choice((2, 3, 4))
    names = rng.sample(words("names"), n_pairs)
    objects = rng.sample(sorted({*words("objects"), *words("gifts"), *words("places"), *words("nouns")}), n_pairs)
    doc.add(series([f"{name} has a {thing}" for name, thing in zip(names, objects, strict=True)]) + ".")
    is_by_thing = rng.random() < 0.5
    for index in rng.choices(range(n_pairs), k=n_pairs + 1):
        if is_by_thing:
            doc.add(f" The {objects[index]} belongs to").answer("owners", f" {names[index]}").add(".")
        else:
            doc.add(f" {names[index]} owns the").answer("owners", f" {objects[index]}").add(".")


def write_assignments(doc: Document, rng: Random) -> None:
    n_pairs = rng.choice((2, 3, 4))
    keys, values = rng.sample(words("variables"), n_pairs), rng.sample(known("description_nouns"), n_pairs)
    doc.add("set")
    for key, value in zip(keys, values, strict=True):
        doc.add(f" {key} = {value},")
    doc.add(" then")
    for index in rng.choices(range(n_pairs), k=n_pairs + 1):
        doc.add(f" {keys[index]} =").answer("assigned", f" {values[index]}").add(",")


def write_reversed(doc: Document, rng: Random) -> None:
    """Pairs, asked by their second word: what stood in front of it. Colors go with objects of the train split only."""
    n_pairs = rng.choice((2, 3, 4, 5))
    is_colored = rng.random() < 0.5
    firsts = rng.sample(list(words("colors")) if is_colored else known(rng.choice(LISTS[:4])), n_pairs)
    seconds = rng.sample(train_words("objects") if is_colored else known(rng.choice(LISTS[4:5] + LISTS[7:])), n_pairs)
    doc.add("list:")
    for first, second in zip(firsts, seconds, strict=True):
        doc.add(f" {first}").add(f" {second}").add(",")
    doc.add(" again:")
    for index in rng.choices(range(n_pairs), k=n_pairs + 1):
        doc.add(f" {seconds[index]}").add(" =").answer("reversed", f" {firsts[index]}").add(",")


def write_repeat(doc: Document, rng: Random) -> None:
    """A sequence of random words again and again (induction), some separated by commas, some starting inside."""
    name = rng.choice(("names", "objects", "nouns", "variables", "description_nouns", "places", "mixed"))
    pool = [w for key in LISTS for w in known(key)] if name == "mixed" else known(name)
    chosen = rng.sample(pool, rng.randint(3, min(20, len(pool))))
    comma = rng.choice(("", ","))
    doc.add("list:")
    for word in chosen:
        doc.add(f" {word}").add(comma)
    for _ in range(rng.choice((1, 1, 2, 3))):
        doc.add(" again:")
        first = rng.choice((0, 0, rng.randrange(len(chosen) - 1)))
        for index in range(first, len(chosen)):
            if index == first and first:
                doc.add(f" {chosen[index]}").add(comma)
            else:
                doc.answer("repeat", f" {chosen[index]}").add(comma)
