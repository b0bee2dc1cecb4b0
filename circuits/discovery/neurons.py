"""Attribution of single neurons: every hidden unit of every MLP, named ``m4.n123``.

``-(post' - post) dm/dpost`` summed over positions: attribution patching at its finest grain (Nanda 2023; NeuronNodes in
Kramár et al. 2024, arXiv:2403.00745), all ``n_layers * d_mlp`` numbers from the backward pass that whole MLPs cost. An MLP
is linear in its neurons, so their attributions sum to its own. (Not under zero ablation: cutting the MLP takes ``b_out``
along, and that belongs to no neuron.)

The neuron of a gated MLP is the product of gate and factor. Where a model normalises what its MLPs write (Gemma-2, OLMo-2),
a neuron writes its share of the normalised sum, as a head does: ``post`` is here the activation over the scale of the run
that it is taken from, and the MLP is linear in it. (A ``b_out`` there has a share too, and belongs to no neuron either.)

``exact_neurons`` patches chosen ones, to check the ranking where it matters.
"""

from collections.abc import Callable, Iterable
from typing import Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.ablation import Ablation, Replacement, replacement_for
from circuits.discovery.backward import Backward, by_span, check_steps, in_parts
from circuits.discovery.suffix import CleanRun
from circuits.discovery.walk import BatchScore, Walk, WalkSettings
from circuits.scores import Scores
from circuits.writes import Writes
from mechinterp.cache import ActivationCache
from mechinterp.errors import CircuitError, UnknownNode
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

Posts = list[Float[Tensor, "batch pos d_mlp"]]  # one a layer

_WIDER = 4  # than the residual stream, as MLPs mostly are: of their activations fewer prompts fit in memory
_TOKENS_AT_ONCE = 1024  # of a pass without gradients


def neurons(
    model: Transformer,
    task: Task,
    *,
    steps: int | None = None,
    ablation: str | Ablation = "resample",
    **walk: Unpack[WalkSettings],
) -> Scores:
    """First-order effect of every hidden unit of an MLP, in units of the metric; positive: losing it hurts.

    ``steps`` as in ``attribution``. ``ablation`` is "resample", "mean" or "zero": others say what an MLP writes and not what
    goes on inside it. Cost: three forwards and one backward, and ``steps`` forwards and backwards.
    """
    _check_mlps(model)
    check_steps(steps)
    name, settings = "neurons-ig" if steps else "neurons", {"steps": steps}
    way = Walk(model, task, name, ablation, settings=settings, items="neuron", splits_positions=True, **walk)

    def score(replacement: Replacement) -> BatchScore:
        replace = _replacer(model, task, replacement)

        def score_some(prompts: PromptBatch, replaced: Writes) -> Float[Tensor, "prompt *span item"]:
            record = _post_sites(model)
            run = Backward.of(model, prompts, task.metric, replaced.input, ["mlp_out"], steps=steps, record=record)
            falls = []
            for layer, (clean, post) in enumerate(zip(_posts_of(model, run.cache), replace(prompts), strict=True)):
                gradient = run.gradients[Site("mlp_out", layer)][0] @ _W_out(model, layer).T
                at_position = (clean - post) * gradient
                falls.append(by_span(at_position, prompts) if way.keep_positions else at_position.sum(1))
            return torch.cat(falls, -1)

        runs = _WIDER * (1 + (steps or 0))
        return lambda prompts, replaced, bar: torch.cat([score_some(*some) for some in in_parts(prompts, replaced, runs, bar)])

    return way.scores(score)


@torch.no_grad()
def exact_neurons(
    model: Transformer, task: Task, chosen: Iterable[Node | str], *, ablation: str | Ablation = "resample"
) -> dict[Node, float]:
    """The measured effect of losing each of the ``chosen`` neurons, in units of the metric; positive: losing it hurts.

    Names are those of ``Scores.strongest``: ``"m4.n123"``. Cost: for every neuron one pass through the layers after it.
    """
    _check_mlps(model)
    nodes = sorted({_neuron(model, node) for node in chosen})
    replacement = replacement_for(model, task, ablation)
    replace, falls = _replacer(model, task, replacement), dict.fromkeys(nodes, 0.0)
    for rows in _slices(task.prompts):
        prompts = task.prompts[rows].to(model.device)
        run = CleanRun.record(model, prompts, task.metric, replacement.writes[rows], shares_prefix=replacement.keeps_prefix)
        changes = [new - old for new, old in zip(replace(prompts), _posts(model, prompts.clean), strict=True)]
        for node in nodes:
            falls[node] += float(_patched(run, node, changes).sum()) / len(task)
    return falls


def _patched(run: CleanRun, node: Node, changes: Posts) -> Float[Tensor, "batch"]:
    """By how much the metric falls when one neuron changes: its change, times its row of W_out, joins the stream."""
    assert node.layer is not None
    written = changes[node.layer][:, run.first :, node.index, None] * _W_out(run.model, node.layer)[node.index]
    return run.falls("resid_post", node.layer, written[None])[0]


def _replacer(model: Transformer, task: Task, replacement: Replacement) -> Callable[[PromptBatch], Posts]:
    """What stands in for each prompt's neurons, by the rules of ``circuits.ablation``."""
    if replacement.name == "resample":
        return lambda prompts: _posts(model, prompts.corrupted)
    if replacement.name == "zero":
        return lambda prompts: [torch.zeros_like(post) for post in _posts(model, prompts.clean)]
    if replacement.name == "mean":
        return _by_template(model, task.prompts.to(model.device))
    raise CircuitError(
        f"neurons cannot be replaced by {replacement.name!r}: it says what a whole MLP writes, not what its neurons do. Use "
        "'resample', 'mean' or 'zero', or score whole MLPs with attribution()."
    )


@torch.no_grad()
def _by_template(model: Transformer, prompts: PromptBatch) -> Callable[[PromptBatch], Posts]:
    """Each neuron's mean over the corrupted prompts of one template and length, position by position."""
    layouts = _layouts(prompts).unique(dim=0)

    def index(some: PromptBatch) -> Int[Tensor, "batch"]:
        return (_layouts(some).unsqueeze(1) == layouts).all(-1).int().argmax(1)

    sizes = torch.bincount(index(prompts), minlength=len(layouts)).view(-1, 1, 1)
    means: Posts = []
    for some in (prompts[rows] for rows in _slices(prompts)):
        posts = _posts(model, some.corrupted)
        means = means or [post.new_zeros((len(layouts), *post.shape[1:])) for post in posts]
        for mean, post in zip(means, posts, strict=True):
            mean.index_add_(0, index(some), post / sizes[index(some)])
    return lambda some: [mean[index(some)] for mean in means]


def _layouts(prompts: PromptBatch) -> Int[Tensor, "batch 2"]:
    return torch.stack([prompts.groups, prompts.end], dim=1)


@torch.no_grad()
def _posts(model: Transformer, tokens: Int[Tensor, "batch pos"]) -> Posts:
    """The activations of every layer's hidden units, as they are written."""
    return _posts_of(model, model.run(tokens, record=_post_sites(model), logits_at="last", logits_of=tokens[:, :0])[1])


def _posts_of(model: Transformer, cache: ActivationCache) -> Posts:
    layers = range(model.config.n_layers)
    if not model.config.has_norms_after:
        return [cache["mlp_post", layer] for layer in layers]
    return [cache["mlp_post", layer] / cache["ln2_post_scale", layer] for layer in layers]


def _post_sites(model: Transformer) -> list[str]:
    return ["mlp_post", *["ln2_post_scale"] * model.config.has_norms_after]


def _W_out(model: Transformer, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """What each neuron of a layer writes, with the gain of a normalisation after it."""
    block = model.weights.blocks[layer]
    assert block.W_out is not None
    return block.W_out if block.ln2_post is None or block.ln2_post.w is None else block.W_out * block.ln2_post.w


def _slices(prompts: PromptBatch) -> list[slice]:
    at_once = max(1, _TOKENS_AT_ONCE // prompts.clean.shape[1])
    return [slice(first, first + at_once) for first in range(0, len(prompts), at_once)]


def _check_mlps(model: Transformer) -> None:
    if not model.config.has_mlp:
        raise CircuitError(f"{model.config.name} has attention only, and so no neurons. Use attribution() for its heads.")


def _neuron(model: Transformer, name: Node | str) -> Node:
    node = Node.parse(name) if isinstance(name, str) else name
    n_layers, d_mlp = model.config.n_layers, model.config.d_mlp or 0
    if node.kind == "neuron" and node.pos is None and (node.layer or 0) < n_layers and (node.index or 0) < d_mlp:
        return node
    last = Node.neuron(n_layers - 1, d_mlp - 1)
    raise UnknownNode(
        f"{str(node)!r} is not a neuron of {model.config.name}. They run from 'm0.n0' to {str(last)!r}, and are replaced at "
        "all positions."
    )
