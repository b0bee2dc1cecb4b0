"""TransformerLens' processed weights as an explicit choice: the same function of tokens, written in other weights.

Some facts about a transformer cannot be seen from outside: a gain can stand in a normalisation or in the matrices that
read from it; what a normalisation takes off can be written or not; a bias on values can be each head's or the layer's.
``fold`` chooses one form of each, in four steps (Nanda and Bloom, TransformerLens, ``further_comments.md``):

1. gain and bias of a normalisation go into the matrices that read from it, and of these goes what it hides from them;
2. what is written into the stream is centred, where everything that reads it takes off the mean (LayerNorm);
3. the unembedding is centred over the vocabulary, which a softmax does not notice (a soft cap would);
4. biases of values go into the layer's: a pattern sums to one, so a head writes its bias whatever it attends to.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.models.config import ModelConfig
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Block, Norm, Weights

_FOLDED = Norm(None, None)


@torch.no_grad()
def fold(model: Transformer) -> Transformer:
    """A model with TransformerLens' processed numerics, beside ``model``, which stays as it is: keep it to go back.

    Log-probabilities are equal, logits up to a constant at each position (with a logit soft cap equal). Patterns, queries,
    keys, hidden neurons and what normalisations make of the stream are equal too. What *parts* are changes:

    * the stream and what is added to it lack their mean (LayerNorm; RMSNorm reads the mean, so there they are the same);
    * a head's ``v``, ``z`` and write lack the bias of its values, which ``attn_out`` has as ``b_O``, nobody's;
    * a direct effect on a token's logit is one relative to the mean of all tokens.

    So direct attributions, decompositions and zero ablations differ, and autoencoders of ``z`` or of the stream belong to
    the model that they were trained on. Differences between two runs of the model lack all of these constants: effects of
    resampling on a logit difference (``eap``, ``exact``, circuits' faithfulness) are the same in both.

    RMSNorm's gains go into what reads them and nothing is centred; gains of normalisations *after* heads and MLP and those
    of queries and keys stay, as no matrix reads from these alone, and under a normalisation after attention so do biases of
    values. What does not change is shared with ``model``, not copied; an unembedding that was tied is not any longer. In
    half precision changed weights are rounded anew: fold first, convert then (as ``load(..., fold=True)`` does).

    >>> from mechinterp.models.load import load
    >>> model = load("builtin")
    >>> tokens = torch.tensor([model.tokenizer.encode("Then, Mary and John met")])
    >>> folded, raw = fold(model).run(tokens)[0], model.run(tokens)[0]
    >>> torch.allclose(folded.log_softmax(-1), raw.log_softmax(-1), atol=1e-4)
    True
    """
    weights, config = model.weights, model.config
    W_U, b_U = _reading(weights.ln_final, weights.W_U, weights.b_U, config)
    if config.logit_soft_cap is None:
        W_U, b_U = _without_mean(W_U), None if b_U is None else _without_mean(b_U)
    folded = Weights(
        config,
        W_E=_writing(weights.W_E, config),
        W_pos=None if weights.W_pos is None else _writing(weights.W_pos, config),
        blocks=tuple(_fold_values(_fold_block(block, config), config) for block in weights.blocks),
        ln_final=_without_gain(weights.ln_final),
        W_U=W_U,
        b_U=b_U,
    )
    return replace(model, weights=folded)


def _fold_block(block: Block, config: ModelConfig) -> Block:
    W_QKV, b_QKV = _reading(block.ln1, block.W_QKV, block.b_QKV, config)
    attention = {"W_QKV": W_QKV, "b_QKV": b_QKV, "W_O": _writing(block.W_O, config), "b_O": _writing(block.b_O, config)}
    norms = {"ln1": _without_gain(block.ln1), "ln2": _without_gain(block.ln2)}
    mlp: dict[str, Tensor | None] = {}
    for name in ("in", "gate"):
        if (W := getattr(block, f"W_{name}")) is not None:
            mlp[f"W_{name}"], mlp[f"b_{name}"] = _reading(block.ln2, W, getattr(block, f"b_{name}"), config)
    for name in ("W_out", "b_out"):
        if (written := getattr(block, name)) is not None:
            mlp[name] = _writing(written, config)
    return replace(block, **attention, **norms, **mlp)


def _fold_values(block: Block, config: ModelConfig) -> Block:
    """Step 4. A normalisation after attention would have to pass the bias through its scale: there it stays."""
    n = config.n_groups * config.d_head
    of_values = block.b_QKV[-n:]
    if config.has_norms_after or not of_values.any():
        return block
    for_every_head = of_values.unflatten(0, (config.n_groups, -1)).repeat_interleave(config.n_heads // config.n_groups, 0)
    b_QKV = torch.cat([block.b_QKV[:-n], torch.zeros_like(of_values)])
    return replace(block, b_QKV=b_QKV, b_O=block.b_O + for_every_head.flatten() @ block.W_O)


def _reading(
    norm: Norm | None, W: Float[Tensor, "d_model d_out"], b: Float[Tensor, "d_out"] | None, config: ModelConfig
) -> tuple[Float[Tensor, "d_model d_out"], Float[Tensor, "d_out"] | None]:
    """Step 1: what reads a normalised stream, as it reads one without gain and bias."""
    if norm is None:
        return W, b
    if norm.b is not None:
        b = norm.b @ W if b is None else b + norm.b @ W
    if norm.w is not None:
        W = W * norm.w.unsqueeze(1)
    return (W - W.mean(0) if config.centred else W), b


def _writing(written: Float[Tensor, "*rows d_model"], config: ModelConfig) -> Float[Tensor, "*rows d_model"]:
    """Step 2."""
    return _without_mean(written) if config.centred else written


def _without_mean(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    return x - x.mean(-1, keepdim=True)


def _without_gain(norm: Norm | None) -> Norm | None:
    return None if norm is None else _FOLDED
