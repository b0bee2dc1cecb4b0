"""Models with circuits set by hand: the exact circuit is known, edge by edge, and random parts stand beside it.

``induction`` and ``indirect_object`` each give a model, a task made for it, and the edges that matter on it. They are
the ground truth that every discovery method must find. What holds for both:

* *The truth belongs to resample ablation* with the task's own corrupted prompts: an edge is in ``circuit_edges`` if the
  logit difference changes when this edge alone carries what it would carry in the corrupted run. An edge that is wired
  but carries the same in both runs is not in it; each function lists its own. Under zero or mean ablation the truth is
  another one.
* *Cutting an edge of the truth costs more than half a logit; cutting any other changes nothing but rounding* (1e-5).
  All the others may be cut at once and the model answers as before.
* *Size gives nothing away.* The distractors (random heads and MLPs) read the whole residual stream, differ between
  clean and corrupted prompts and write more loudly than the circuit, into a subspace that neither the circuit nor the
  unembedding reads. The residual stream is rotated at random, and the seed says which head plays which role.
* *Attention is hard, but not saturated*, so that gradients still see it: edge attribution patching, too, ranks the
  circuit first. Methods that look at sizes alone do worse than chance.
* *There is no normalisation.* Through it every edge would touch every other, and the truth would be a matter of degree.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from mechinterp.metrics import logit_diff
from mechinterp.models.compiled_parts import Head, Stream, assemble_model, write_head
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import Example, Task, assemble, pieces

D_HEAD = 24
LOGIT_SCALE = 5.0


@dataclass(frozen=True)
class Planted:
    """A model, a task, and the edges of the circuit that does the task, named as in ``"input->a0.h1.v"``.

    ``ablation`` is what replaces a cut edge for this truth to hold; ``roles`` says which head does what.
    """

    model: Transformer
    task: Task
    circuit_edges: frozenset[str]
    ablation: str
    roles: Mapping[str, str]
    description: str


LETTERS = tuple("abcdefghijklmnopqrstuvwx")
INDUCTION_EDGES = (
    "input->{previous}.v",
    "{previous}->{induction}.k",
    "input->{induction}.q",
    "input->{induction}.v",
    "{induction}->logits",
)


def induction(seed: int = 0, n_prompts: int = 32, *, sharpness: float = 5.0, rotate: bool = True) -> Planted:
    """The letter that followed last time: two layers of four heads and an MLP, 110 edges, five of them the circuit.

    The *previous-token head* of layer 0 attends one position back and copies the letter it finds. The *induction head*
    of layer 1 attends from the last letter to wherever the letter before is the same, and copies what stands there to
    the output (Elhage et al. 2021; Olsson et al. 2022, "In-context Learning and Induction Heads", arXiv:2209.11895).

    Prompts: eight letters, then one of the middle six again. Corrupted: eight others, likewise; its answer is the foil.
    Wired, but not in the truth: ``q`` and ``k`` of the previous-token head read positions, the same in both runs.

    ``sharpness`` is the score of a match. At 5 the right place gets more than nine tenths of the attention. At 20 the
    softmax is saturated: a cut matters as ever, but the gradient of the scores is gone, and edge attribution patching
    no longer sees three of the five edges. ``rotate=False`` leaves the subspaces along the axes, to be looked at.

    >>> planted = induction()
    >>> planted.task.text(0), planted.task.text(0, corrupted=True)
    ('m n b i q p x j n', 's f t d u c e k c')
    """
    tokenizer, n_seen, n_letters = _tokenizer("planted-induction", LETTERS), 8, len(LETTERS)
    sizes = {"token": n_letters + 1, "position": n_seen + 1, "previous": n_letters, "out": n_letters, "noise": 32}
    stream = Stream(sizes)
    letter, place = stream.read("token", torch.eye(n_letters + 1, n_letters)), stream.read("position")
    one_back = stream.read("position", torch.ones(n_seen).diag(-1))
    look_back = write_head(D_HEAD, attend=[(sharpness * one_back, place)], move=[(letter, stream.write("previous"))])
    continue_match = write_head(
        D_HEAD,
        attend=[(sharpness * letter, stream.read("previous"))],
        move=[(letter, stream.write("out"))],
    )
    model, roles = assemble_model(
        tokenizer,
        stream,
        [{"previous": look_back}, {"induction": continue_match}],
        W_U=LOGIT_SCALE * stream.read("out", torch.eye(n_letters, n_letters + 1)),
        seed=seed,
        rotate=rotate,
    )
    prompts = _induction_prompts(n_prompts, n_seen, seed)
    return Planted(
        model=model,
        task=_task("induction", "other-letters", prompts, tokenizer, seed, "induction"),
        circuit_edges=frozenset(edge.format(**roles) for edge in INDUCTION_EDGES),
        ablation="resample",
        roles=roles,
        description="A previous-token head tells an induction head what came before each letter.",
    )


NAMES = ("Mary", "John", "Anna", "Paul", "Lisa", "Mark", "Emma", "Adam", "Ruth", "Jack", "Kate", "Dean")
ORDERS = {
    "ABBA": "Then {IO} and {S1} met and {S2} wrote to",
    "BABA": "Then {S1} and {IO} met and {S2} wrote to",
}
INDIRECT_OBJECT_EDGES = (
    "input->{duplicate}.q",
    "input->{duplicate}.k",
    "{duplicate}->{inhibit_name}.k",
    "input->{inhibit_name}.v",
    "{duplicate}->{inhibit_place}.k",
    "{duplicate}->{inhibit_place}.v",
    "{inhibit_name}->{mover}.q",
    "{inhibit_place}->{mover}.q",
    "input->{mover}.k",
    "input->{mover}.v",
    "{mover}->logits",
    "{inhibit_name}->{late_mover}.q",
    "{inhibit_place}->{late_mover}.q",
    "input->{late_mover}.k",
    "input->{late_mover}.v",
    "{late_mover}->logits",
)


def indirect_object(seed: int = 0, n_prompts: int = 32, *, rotate: bool = True) -> Planted:
    """The name said once: four layers of four heads and an MLP, 479 edges, sixteen of them the circuit.

    The classes are those of Wang et al. 2022 (arXiv:2211.00593, section 3), without induction and negative heads:

    * layer 0, *duplicate-token head*: at S2 attends to the same name before, and writes "said before", and where.
    * layer 1, two *S-inhibition heads*: at END attend to what was said before. One moves its name (Wang's token
      signal, read at S2 from the input), the other the place of S1 (the position signal, read from the duplicate head).
    * layers 2 and 3, a *name mover* each: at END attend to names, but not to the name or the place that is inhibited,
      and copy what they find to the output.

    Prompts alternate between ABBA and BABA; corrupted, they have three other, different names. Wired, but not in the
    truth, as they are the same in both runs: that the inhibition heads and the movers act at END (``q`` from input),
    that a head with nothing to find rests on the first word (``k`` from input), and that the duplicate head says "there
    is a name, here" (``v`` from input).

    >>> planted = indirect_object()
    >>> planted.task.text(0), planted.task.text(0, corrupted=True)
    ('Then Emma and Dean met and Dean wrote to', 'Then Mary and Lisa met and Adam wrote to')
    """
    words = tuple(dict.fromkeys(word for order in ORDERS.values() for word in order.split() if "{" not in word))
    tokenizer = _tokenizer("planted-indirect-object", NAMES + words)
    n_names, n_words, n_ctx = len(NAMES), len(NAMES + words) + 1, len(ORDERS["ABBA"].split())
    tokens = {"token": n_words, "not_name": n_names, "out": n_names}
    places = {"position": n_ctx, "where": n_ctx, "not_place": n_ctx}
    stream = Stream(tokens | places | {"said": 1, "noise": 32})
    model, roles = assemble_model(
        tokenizer,
        stream,
        _indirect_object_heads(stream, end=(NAMES + words).index("to")),
        W_U=LOGIT_SCALE * stream.read("out", torch.eye(n_names, n_words)),
        seed=seed,
        rotate=rotate,
    )
    prompts = assemble(tokenizer, _indirect_object_examples(n_prompts, seed), bos=False)
    return Planted(
        model=model,
        task=_task("indirect-object", "abc", prompts, tokenizer, seed, *ORDERS),
        circuit_edges=frozenset(edge.format(**roles) for edge in INDIRECT_OBJECT_EDGES),
        ablation="resample",
        roles=roles,
        description="A duplicate-token head feeds two S-inhibition heads, which steer two name movers away from S.",
    )


def _indirect_object_heads(stream: Stream, end: int) -> list[dict[str, Head]]:
    """The written heads, layer by layer. The numbers are attention scores: a match 6, a place to rest 3."""
    name = stream.read("token", torch.eye(stream.sizes["token"], stream.sizes["out"]))
    is_name, is_end = name.sum(1, keepdim=True), stream.read("token")[:, [end]]
    place = stream.read("position")
    anywhere, first = place.sum(1, keepdim=True), place[:, :1]
    duplicate = write_head(
        D_HEAD,
        # The same name scores 6, but 12 less at the query's own place: a name does not repeat itself.
        attend=[(6 * name, name), (-12 * place, place), (3 * anywhere, first)],
        move=[(is_name, stream.write("said")), (place[:, 1:], stream.write("where")[1:])],
    )
    to_what_was_said = [(is_end, 6 * stream.read("said") + 3 * first)]
    inhibit_name = write_head(D_HEAD, to_what_was_said, move=[(name, stream.write("not_name"))])
    inhibit_place = write_head(D_HEAD, to_what_was_said, move=[(stream.read("where"), stream.write("not_place"))])
    mover = write_head(
        D_HEAD,
        attend=[
            (5 * is_end, is_name),
            (-2.5 * stream.read("not_name"), name),
            (-2.5 * stream.read("not_place"), place),
        ],
        move=[(name, stream.write("out"))],
    )
    return [
        {"duplicate": duplicate},
        {"inhibit_name": inhibit_name, "inhibit_place": inhibit_place},
        {"mover": mover},
        {"late_mover": mover},
    ]


def _induction_prompts(n_prompts: int, n_seen: int, seed: int) -> PromptBatch:
    rng = Random(seed)
    clean, corrupted, repeated, candidates = [], [], [], []
    for _ in range(n_prompts):
        letters = rng.sample(range(len(LETTERS)), 2 * n_seen)
        seen, other = letters[:n_seen], letters[n_seen:]
        # The first letter has none before it, and the last one's successor would be the question itself.
        at, other_at = (rng.randrange(1, n_seen - 1) for _ in range(2))
        clean.append([*seen, seen[at]])
        corrupted.append([*other, other[other_at]])
        repeated.append(at)
        candidates.append([seen[at + 1], other[other_at + 1]])
    first, end = torch.tensor(repeated), torch.full((n_prompts,), n_seen)
    return PromptBatch(
        clean=torch.tensor(clean),
        corrupted=torch.tensor(corrupted),
        end=end,
        candidates=torch.tensor(candidates),
        roles=torch.tensor([[1, -1]]).repeat(n_prompts, 1),
        groups=torch.zeros(n_prompts, dtype=torch.long),
        positions={"A1": first, "B": first + 1, "A2": end, "END": end},
    )


def _indirect_object_examples(n_prompts: int, seed: int) -> list[Example]:
    rng, examples = Random(seed), []
    for index in range(n_prompts):
        group = index % len(ORDERS)
        io, s, *others = rng.sample(NAMES, 5)
        words = pieces(list(ORDERS.values())[group], {"IO": io, "S1": s, "S2": s})
        replaced = {label: f" {other}" for label, other in zip(("IO", "S1", "S2"), others, strict=True)}
        examples.append(Example(words, replaced, [io], [s], group))
    return examples


def _task(name: str, corruption: str, prompts: PromptBatch, tokenizer: Tokenizer, seed: int, *groups: str) -> Task:
    return Task(name, prompts, logit_diff, "logit_diff", corruption, groups, tokenizer, notes={"seed": seed})


def _tokenizer(name: str, words: tuple[str, ...]) -> Tokenizer:
    """One token a word; what is not in the list is ``<unk>``, the last token."""
    backend = Backend(models.WordLevel({word: i for i, word in enumerate((*words, "<unk>"))}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, name)


COMPILED: dict[str, Callable[..., Planted]] = {"induction": induction, "indirect-object": indirect_object}
