"""What codes mean: which prompts share one, what the head attends to on them, and which tokens it writes towards there.

A code is a number and says nothing by itself. What it stands for is told here by example, for each part and each of its
most telling codes: those with the largest share of the part's score. All of it is observation. That a head attends to a name
on the prompts of one code does not show that the code *is* the name, nor that anything later reads it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.code_statistics import columns_of
from circuits.coding import Coded, Examples, coded, examples_of
from circuits.meanings import CodeMeanings, Meaning, Weighed
from circuits.scores import Scores
from circuits.wiring import Wiring
from mechinterp.errors import CircuitError, nearest
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.sites import Site
from mechinterp.store import ActivationStore
from mechinterp.tasks.base import Task, tokenizer_of
from saes.code_rows import weights_of
from saes.codes import CodeSettings
from saes.components import fold

_SIDES = ("clean", "corrupted")
_BATCH = 32  # prompts whose attention patterns are held at a time, or directions whose logits are
_WIDTH = 70  # characters of a prompt before the position that is read; a third of them after it

_Head = tuple[int, int]  # the numbers of a part and of a place


@dataclass(frozen=True, eq=False)
class _Group:
    """The counted examples that have one code: of the part numbered ``part``, at the place numbered ``place``."""

    part: int
    place: int
    rows: Int[Tensor, "member"]
    share: float


@dataclass(frozen=True, eq=False)
class _Counted:
    """The counted examples as text: clean prompts first, their tokens and how much each position counts at each place."""

    examples: Examples
    tokens: Int[Tensor, "example pos"]
    weights: Float[Tensor, "place example pos"]

    @classmethod
    def of(cls, examples: Examples) -> "_Counted":
        prompts = examples.task.prompts
        weights = weights_of(prompts, examples.places, examples.task.tokenizer.bos_id).repeat(1, 2, 1)
        return cls(examples, torch.cat([prompts.clean, prompts.corrupted]).cpu()[examples.rows], weights[:, examples.rows])


@torch.no_grad()
def explain_codes(
    model: Transformer,
    task: Task,
    scores: Scores,
    parts: Iterable[Node | str] | None = None,
    *,
    made: Coded | None = None,
    n_codes: int = 4,
    n_examples: int = 5,
    n_tokens: int = 3,
    store: ActivationStore | None = None,
    progress: bool = False,
) -> CodeMeanings:
    """What the ``n_codes`` most telling codes of each part mean. ``scores`` are of ``codes(...)``, on the same task.

    ``parts``: heads and MLPs (None: those that stand out). Of several positions, a part is explained at its best. At "mean",
    attention too is averaged over all positions that count. The codes are those that were scored: they are made again from
    ``scores.settings``, seed and all, or taken from ``made``. Cost: making them (see ``codes``), and one forward pass of the
    prompts that have the codes. ``CircuitError`` for scores of other methods, models or tasks, codes made in another way, and
    parts without codes.
    """
    _check(model, task, scores, (n_codes, n_examples, n_tokens))
    score = scores.settings["score"]
    made = made or _made_again(model, task, scores, store, progress)
    _check_made(made, scores)
    groups = [group for part in _numbers(made.examples, scores, parts) for group in _telling(made, part, score, n_codes)]
    counted = _Counted.of(made.examples)
    attention, written = _attention(counted, groups), [_written(made, group) for group in groups]
    towards = _towards(model, torch.stack([direction for _, direction in written]), n_tokens)
    found = [
        replace(_meaning(counted, group, attention, n_examples, n_tokens), latents=latents, towards=tokens if latents else ())
        for group, (latents, _), tokens in zip(groups, written, towards, strict=True)
    ]
    return CodeMeanings(scores.model, scores.task, scores.method, len(made.examples.counted), tuple(found))


def is_explainable(scores: Scores) -> bool:
    """Whether scores say how their codes are made: those of ``codes(...)`` do."""
    needed = {"score", "positions", *(one.name for one in fields(CodeSettings))}
    return needed <= set(scores.settings) and scores.settings["score"] in SHARES


def _check(model: Transformer, task: Task, scores: Scores, counts: tuple[int, int, int]) -> None:
    if not is_explainable(scores):
        raise CircuitError(f"scores by {scores.method!r} do not say how codes are made. Give scores of codes(model, task).")
    about = (model.config.name, task.name, len(task), Wiring.of(model.config))
    scored = (scores.model, scores.task, scores.settings["n_prompts"], scores.wiring)
    if about != scored:
        given, wanted = (f"{one[2]} prompts of {one[1]!r} on {one[0]!r}" for one in (about, scored))
        raise CircuitError(f"the codes are of {wanted}, and {given} are given. Give the model and the task that were scored.")
    if min(counts) < 1:
        raise CircuitError("n_codes, n_examples and n_tokens must be at least 1, to show anything.")


def _made_again(model: Transformer, task: Task, scores: Scores, store: ActivationStore | None, progress: bool) -> Coded:
    asked = scores.settings
    settings = CodeSettings(**{one.name: asked[one.name] for one in fields(CodeSettings)})
    examples = examples_of(model, task, asked["positions"], settings.n_train, seed=settings.seed, store=store)
    return coded(examples, settings, progress=progress)


def _check_made(made: Coded, scores: Scores) -> None:
    examples, scored = made.examples, scores.settings
    used = {**made.settings.to_dict(), "positions": list(examples.places)}
    other = [f"{name}={value!r} for {scored[name]!r}" for name, value in used.items() if value != scored[name]]
    if (examples.task.name, len(examples.task)) != (scores.task, scored["n_prompts"]):
        other.append(f"{len(examples.task)} prompts of {examples.task.name!r}")
    if other:
        raise CircuitError(f"made= are not the codes that were scored: {', '.join(other)}. Leave it out, to make them again.")


def _numbers(examples: Examples, scores: Scores, parts: Iterable[Node | str] | None) -> list[int]:
    """Where the wanted parts stand among those that are coded; best first, unless they were named."""
    strength, known = dict(zip(scores.names, scores.values, strict=True)), [str(part) for part in examples.parts]
    if parts is None:
        names = sorted(scores.settings.get("selected", ()), key=lambda name: -strength[name])
    else:
        names = [str(part) for part in ([parts] if isinstance(parts, str | Node) else parts)]
    if not names:
        raise CircuitError("no part stands out, so there is none to explain. Name parts: parts=['a9.h6'].")
    if foreign := [name for name in names if name not in known]:
        raise CircuitError(f"{foreign[0]!r} has no code. There are {known[0]} to {known[-1]}.{nearest(foreign[0], known)}")
    return [known.index(name) for name in names]


def _telling(made: Coded, part: int, score: str, n: int) -> list[_Group]:
    """The ``n`` codes of a part that have most of its score, where it scores best; of equal ones, what more examples have."""
    by_place = [columns_of(values[:, [part]])[0].double() for values in made.values]
    shares = [SHARES[score](hot, made.examples) for hot in by_place]
    place = max(range(len(shares)), key=lambda at: float(shares[at].sum()))
    hot, share = by_place[place], shares[place] / shares[place].sum().clamp_min(1e-30)
    order = sorted(range(hot.shape[1]), key=lambda code: (-float(share[code]), -float(hot[:, code].sum())))
    return [_Group(part, place, hot[:, code].nonzero()[:, 0], float(share[code])) for code in order[:n]]


def _of_label(hot: Float[Tensor, "example code"], examples: Examples) -> Float[Tensor, "code"]:
    return _information(hot, examples.labels)


def _of_answer(hot: Float[Tensor, "example code"], examples: Examples) -> Float[Tensor, "code"]:
    return _information(hot[: len(examples.counted)], examples.prompts.answer.cpu().numpy())


def _of_change(hot: Float[Tensor, "example code"], examples: Examples) -> Float[Tensor, "code"]:
    """How often the code is left or entered as a prompt is corrupted."""
    clean, corrupted = hot.split(len(examples.counted))
    return (clean - corrupted).abs().sum(0)


def _of_count(hot: Float[Tensor, "example code"], examples: Examples) -> Float[Tensor, "code"]:
    clean, corrupted = hot.split(len(examples.counted))
    return ((clean.sum(0) > 0) & (corrupted.sum(0) == 0)).double()


def _information(hot: Float[Tensor, "example code"], labels: Int[np.ndarray, "example"]) -> Float[Tensor, "code"]:
    """``sum over y of p(y, c) log[p(y, c) / (p(y) p(c))]``: what each code adds to the information, in nats; never below 0."""
    kinds = torch.as_tensor(labels == np.unique(labels)[:, None]).to(hot)
    joint = kinds @ hot / len(hot)
    chance = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return torch.special.xlogy(joint, joint / chance.clamp_min(1e-30)).sum(0).clamp_min(0)


# How much each code has of what a score of this name counts.
Share = Callable[[Float[Tensor, "example code"], Examples], Float[Tensor, "code"]]
SHARES: dict[str, Share] = {"information": _of_label, "change": _of_change, "answer": _of_answer, "count": _of_count}


def _attention(counted: _Counted, groups: Sequence[_Group]) -> dict[_Head, Float[Tensor, "example pos"]]:
    """How much each head attends to each position from the place that is read; 0 on examples that no group has."""
    model, parts = counted.examples.model, counted.examples.parts
    wanted = {(g.part, g.place): parts[g.part] for g in groups if parts[g.part].kind == "head"}
    if not wanted:
        return {}
    sites = list({Site("pattern", head.layer) for head in wanted.values()})
    found = {key: torch.zeros(counted.tokens.shape) for key in wanted}
    for rows in torch.cat([g.rows for g in groups if (g.part, g.place) in wanted]).unique().split(_BATCH):
        _, cache = model.run(counted.tokens[rows].to(model.device), record=sites, logits_at="last")
        for (part, place), head in wanted.items():
            pattern = cache[Site("pattern", head.layer)][:, head.index].float().cpu()
            found[part, place][rows] = torch.einsum("bqk,bq->bk", pattern, counted.weights[place, rows])
    return found


def _meaning(
    counted: _Counted,
    group: _Group,
    attention: Mapping[_Head, Float[Tensor, "example pos"]],
    n_examples: int,
    n_tokens: int,
) -> Meaning:
    """All but what the latents are and write."""
    examples, looks = counted.examples, attention.get((group.part, group.place))
    n_clean = int((group.rows < len(examples.counted)).sum())
    return Meaning(
        part=str(examples.parts[group.part]),
        place=examples.places[group.place],
        latents=(),
        n_clean=n_clean,
        n_corrupted=len(group.rows) - n_clean,
        share=round(group.share, 6),
        examples=_some(counted, group, n_clean, n_examples),
        attends=() if looks is None else _by_position(examples, looks, group.rows, n_tokens),
        tokens=() if looks is None else _by_token(counted, looks, group.rows, n_tokens),
        towards=(),
    )


def _written(made: Coded, group: _Group) -> tuple[tuple[int, ...], Float[Tensor, "d_model"]]:
    """The code's latents, and (but for a norm's scale) what they add: ``f W_dec`` (heads: ``f W_dec W_O``), f their means."""
    examples, model = made.examples, made.examples.model
    head, kinds = examples.parts[group.part], made.by_place[group.place]
    n_heads = model.config.n_layers * model.config.n_heads
    codes, number = (kinds[0], group.part) if group.part < n_heads else (kinds[1], group.part - n_heads)
    one, rows = codes.autoencoder.group(number), examples.rows[group.rows]
    latents = [int(latent) for latent in codes.latents[int(rows[0]), number] if latent < one.d_sae]
    outputs = examples.written.heads if head.kind == "head" else examples.written.mlps
    assert outputs is not None
    active = one.encode(outputs[group.place, rows, number].unsqueeze(0).to(one.W_enc))[0].mean(0)
    direction = active[latents] @ one.W_dec[0, latents]
    if head.kind == "mlp" or head.layer is None:
        return tuple(latents), direction.to(model.weights.W_U)
    W_O = model.weights.W_O(head.layer)[head.index]
    return tuple(latents), direction.to(W_O) @ W_O


def _towards(model: Transformer, directions: Float[Tensor, "group d_model"], n: int) -> list[tuple[str, ...]]:
    """The tokens that each direction raises most against the mean of all, through the final norm's gain and W_U."""
    U, tokenizer = fold(model.weights.ln_final, model.weights.W_U, model.config), tokenizer_of(model)
    U = U - U.mean(1, keepdim=True)
    tokens = [(some.to(U) @ U).topk(min(n, U.shape[1])).indices for some in directions.split(_BATCH)]
    return [tuple(tokenizer.strings(row)) for row in torch.cat(tokens).tolist()]


def _by_token(counted: _Counted, looks: Float[Tensor, "example pos"], rows: Int[Tensor, "member"], n: int) -> Weighed:
    mean = torch.bincount(counted.tokens[rows].flatten(), weights=looks[rows].flatten()) / len(rows)
    best = mean.topk(min(n, int((mean > 0).sum())))
    names = counted.examples.task.tokenizer.strings(best.indices.tolist())
    return tuple(zip(names, _rounded(best.values), strict=True))


def _by_position(examples: Examples, looks: Float[Tensor, "example pos"], rows: Int[Tensor, "member"], n: int) -> Weighed:
    """By named position; the first token, where heads rest, has its own name, and "elsewhere" has the others."""
    prompts = examples.prompts
    names = [*prompts.span_names, "the first token"]
    spans = prompts.spans.cpu().repeat(2, 1)[rows]
    spans[:, 0] = torch.where(spans[:, 0] == len(names) - 2, len(names) - 1, spans[:, 0])
    mean = torch.bincount(spans.flatten(), weights=looks[rows].flatten(), minlength=len(names)) / len(rows)
    best = mean.topk(min(n, int((mean > 0).sum())))
    return tuple((names[span], weight) for span, weight in zip(best.indices.tolist(), _rounded(best.values), strict=True))


def _some(counted: _Counted, group: _Group, n_clean: int, n: int) -> tuple[tuple[str, str], ...]:
    """The first clean and the first corrupted prompts of a code: as many of each as their numbers say, but one of each."""
    n = min(n, len(group.rows))
    first = round(n * n_clean / len(group.rows))
    if 0 < n_clean < len(group.rows) and n > 1:
        first = min(max(first, 1), n - 1)
    rows = [*group.rows[:n_clean][:first].tolist(), *group.rows[n_clean:][: n - first].tolist()]
    half = len(counted.examples.counted)
    return tuple((_SIDES[row >= half], _around(counted, group.place, row)) for row in rows)


def _around(counted: _Counted, place: int, row: int) -> str:
    """The prompt around the position that is read, which stands in brackets; its end, where many positions are."""
    end = int(counted.examples.prompts.end.repeat(2)[row])
    ids, decode = counted.tokens[row, : end + 1].tolist(), counted.examples.task.tokenizer.decode
    read = counted.weights[place, row].nonzero()[:, 0].tolist()
    at = read[0] if len(read) == 1 else end + 1
    before, here, after = (decode(ids[i:j], after=ids[:i]) for i, j in ((0, at), (at, at + 1), (at + 1, None)))
    before = before if len(before) <= _WIDTH else f"...{before[-_WIDTH:]}"
    after = after if len(after) <= _WIDTH // 3 else f"{after[: _WIDTH // 3]}..."
    return " ".join((f"{before}[{here}]{after}" if here else before).splitlines())


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
