"""Scores of heads that need no task: on heads set by hand, and against the whole vocabulary-by-vocabulary circuit."""

from dataclasses import replace

import pytest
import torch

from mechinterp import load
from mechinterp.errors import ModelError
from mechinterp.head_scores import (
    BACK,
    copying_scores,
    ordinary_tokens,
    readout,
    repeated_tokens,
    repetition_scores,
    token_streams,
)
from mechinterp.models.compiled import NAMES, indirect_object, induction
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node


def of(name: str, scores: torch.Tensor) -> float:
    head = Node.parse(name)
    return scores[head.layer, head.index].item()


def negated(model: Transformer, layer: int) -> Transformer:
    """The same model with the output weights of a layer's heads turned round."""
    blocks = list(model.weights.blocks)
    blocks[layer] = replace(blocks[layer], W_O=-blocks[layer].W_O)
    return replace(model, weights=replace(model.weights, blocks=tuple(blocks)))


def test_random_tokens_are_said_twice_and_are_ordinary():
    model = load("builtin")
    tokens = repeated_tokens(model, 5, seed=3)
    assert (tokens[:, 0] == model.tokenizer.bos_id).all()
    first, second = tokens[:, 1:].chunk(2, 1)
    assert torch.equal(first, second)
    assert torch.isin(first, ordinary_tokens(model)).all()
    assert all(len(row.unique()) == len(row) for row in first)
    assert tokens.shape[1] <= model.config.n_ctx
    assert torch.equal(tokens, repeated_tokens(model, 5, seed=3))
    assert not torch.equal(tokens, repeated_tokens(model, 5, seed=4))


def test_special_tokens_are_not_ordinary():
    model = load("builtin")
    special = {model.tokenizer.bos_id, model.tokenizer.pad_id, model.tokenizer.backend.token_to_id("<unk>")}
    assert special.isdisjoint(ordinary_tokens(model).tolist())
    assert len(ordinary_tokens(model)) == model.config.d_vocab - len(special)
    planted = induction().model
    assert planted.tokenizer.strings(ordinary_tokens(planted).tolist()) == list("abcdefghijklmnopqrstuvwx")


def test_a_model_without_a_tokenizer_says_any_token(plain):
    assert len(ordinary_tokens(plain)) == plain.config.d_vocab
    assert repetition_scores(plain, n_prompts=3).n_repeated == plain.config.n_ctx // 2


def test_the_planted_induction_model_has_its_two_heads():
    planted = induction()
    found = repetition_scores(planted.model)
    assert of(planted.roles["previous"], found.shares["previous token"]) > 0.9
    assert of(planted.roles["induction"], found.shares["induction"]) > 0.8 > 4 * found.chance
    for name in ("previous token", "induction"):
        assert (found.shares[name] > 0.5).sum() == 1


def test_the_planted_duplicate_token_head_is_one_where_names_are_repeated():
    planted = indirect_object()
    names = torch.tensor([planted.model.tokenizer.single(name) for name in NAMES])
    found = repetition_scores(planted.model, among=names)
    assert of(planted.roles["duplicate"], found.shares["duplicate token"]) > 0.9
    assert (found.shares["duplicate token"] > 0.5).sum() == 1


def test_shares_are_those_of_the_recorded_patterns(model):
    found = repetition_scores(model, n_prompts=3, seed=2, batch_size=2)
    tokens, n = repeated_tokens(model, 3, seed=2), found.n_repeated
    _, cache = model.run(tokens, record=["pattern.1"])
    pattern = cache["pattern", 1]
    queries = range(n, 2 * n)
    places = {"induction": lambda q: q - n + 1, "duplicate token": lambda q: q - n, "previous token": lambda q: q - 1}
    for name in BACK:
        place = places.get(name, lambda q: 0)
        wanted = torch.stack([pattern[:, :, q, place(q)] for q in queries]).mean((0, 1))
        assert torch.allclose(found.shares[name][1], wanted)
    assert found.chance == pytest.approx(sum(1 / (q + 1) for q in queries) / n)


def test_copying_is_that_of_the_whole_circuit_from_token_to_token(model):
    """With every matrix written out: E through the head's own normalisation, V, O, the final gain, U."""
    weights, config = model.weights, model.config
    E = weights.W_E * (config.embed_scale or 1.0)
    if config.has_mlp:
        E = E + torch.cat([model.feed_forward(0, E[token][None, None])[:, 0] for token in range(config.d_vocab)])
    U = weights.W_U
    centring = torch.eye(config.d_model, dtype=E.dtype) - config.centred / config.d_model
    if config.has_norms_before:
        E = E @ centring
        E = E / (E.square().mean(1, keepdim=True) + config.norm_eps).sqrt()
    if weights.ln_final is not None:
        U = centring @ (U if weights.ln_final.w is None else torch.diag(weights.ln_final.w) @ U)
    U = U - U.mean(1, keepdim=True)
    found = copying_scores(model)
    for layer, block in enumerate(weights.blocks):
        read = E if block.ln1 is None or block.ln1.w is None else E * block.ln1.w
        for head in range(config.n_heads):
            circuit = read @ weights.W_V(layer)[config.group_of(head)] @ weights.W_O(layer)[head] @ U
            eigenvalues = torch.linalg.eigvals(circuit)
            whole = eigenvalues.abs().sum().item()
            assert found[layer, head].item() == pytest.approx(circuit.trace().item() / whole, abs=1e-6)


def test_a_head_with_its_output_turned_round_suppresses_what_it_copied(plain):
    before, after = copying_scores(plain), copying_scores(negated(plain, 1))
    assert torch.allclose(after[1], -before[1])
    assert torch.allclose(after[[0, 2]], before[[0, 2]])


def test_planted_movers_copy_and_nobody_else():
    planted = indirect_object()
    found = copying_scores(planted.model)
    for role in ("mover", "late_mover"):
        assert of(planted.roles[role], found) == pytest.approx(1, abs=1e-4)
    assert (found != 0).sum() == 2


def test_the_readout_tells_what_an_addition_does_to_the_logits_while_the_scale_is_held(model, tokens):
    """Each token's logit over the mean, of two streams that have one scale: the difference is the readout's."""
    sites = ["resid_post.2", *([] if model.weights.ln_final is None else ["ln_final_scale"])]
    logits, cache = model.run(tokens, record=sites)
    scale = cache["ln_final_scale"] if model.weights.ln_final is not None else 1.0
    if (cap := model.config.logit_soft_cap) is not None:
        logits = cap * torch.atanh(logits / cap)
    above = logits - logits.mean(-1, keepdim=True)
    constant = torch.zeros(model.config.d_vocab, dtype=logits.dtype)
    for bias in (
        model.weights.b_U,
        None if (norm := model.weights.ln_final) is None or norm.b is None else norm.b @ model.weights.W_U,
    ):
        constant = constant if bias is None else constant + bias
    wanted = cache["resid_post", 2] @ readout(model) / scale + constant - constant.mean()
    assert torch.allclose(above, wanted)


def test_streams_of_tokens_are_normalised_where_heads_normalise(model):
    streams = token_streams(model)
    if not model.config.has_norms_before:
        return
    if model.config.centred:
        assert torch.allclose(streams.mean(1), torch.zeros(model.config.d_vocab, dtype=streams.dtype), atol=1e-9)
    assert torch.allclose(streams.square().mean(1), torch.ones(model.config.d_vocab, dtype=streams.dtype), atol=1e-3)


def test_too_few_tokens_or_positions_are_said(plain):
    with pytest.raises(ModelError, match="2 tokens may be said: too few to say three twice"):
        repetition_scores(plain, among=torch.tensor([1, 2]))
