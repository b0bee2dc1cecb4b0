"""Folded weights: the same function of tokens, TransformerLens' own tensors, and what becomes of every activation."""

import warnings

import pytest
import torch
from torch.testing import assert_close

from mechinterp.models.folding import fold
from mechinterp.models.load import load, save
from mechinterp.sites import all_sites

SAME = {"atol": 1e-10, "rtol": 1e-10}
STREAMS = {"embed", "pos_embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in"}
STREAMS |= {"q_input", "k_input", "v_input"}
WITH_VALUE_BIAS = {"v", "z", "result"}


@pytest.fixture(scope="module")
def other_tokens():
    return torch.randint(23, (4, 7), generator=torch.Generator().manual_seed(2))


def centred(x):
    return x - x.mean(-1, keepdim=True)


def watched(model):
    """Every site but one: what heads write can be taken before or after a normalisation, not both at once."""
    return [site for site in all_sites(model.config) if site.name != "z_written"]


def test_log_probabilities_are_the_same_and_the_original_is_untouched(model, tokens):
    before = {name: tensor.clone() for name, tensor in model.weights.named().items()}
    folded = fold(model).run(tokens)[0]
    assert_close(model.weights.named(), before, atol=0, rtol=0)
    logits = model.run(tokens)[0]
    assert_close(folded.log_softmax(-1), logits.log_softmax(-1), **SAME)
    if model.config.logit_soft_cap is not None:
        assert_close(folded, logits, **SAME)


def test_every_activation_is_the_same_or_lacks_its_mean_or_the_values_bias(model, tokens):
    sites, config = watched(model), model.config
    _, raw = model.run(tokens, record=sites)
    _, folded = fold(model).run(tokens, record=sites)
    for site in sites:
        ours, theirs = folded[site], raw[site]
        if site.name in STREAMS and config.centred:
            theirs = centred(theirs)
        if site.name in WITH_VALUE_BIAS and not config.has_norms_after:
            theirs = centred(theirs) if site.name == "result" and config.centred else theirs
            theirs, ours = theirs - theirs[:1, :1], ours - ours[:1, :1]  # one constant a head is all they may differ by
        if site.name == "logits" and config.logit_soft_cap is None:
            theirs = theirs.log_softmax(-1) - ours.log_softmax(-1) + ours
        assert_close(ours, theirs, **SAME, msg=lambda text, site=site: f"{site}: {text}")


def test_resampling_any_site_has_the_same_effect(model, tokens, other_tokens):
    """Differences of two runs lack every constant that folding moves, so circuits found by resampling are the same."""
    sites, folded = watched(model), fold(model)
    others = [one.run(other_tokens, record=sites)[1] for one in (model, folded)]
    for site in sites:
        patches = [{site: lambda value, cache, resampled=other[site]: resampled} for other in others]
        effects = [one.run(tokens, patch=p)[0].log_softmax(-1) for one, p in zip((model, folded), patches, strict=True)]
        assert_close(*effects, **SAME, msg=lambda text, site=site: f"{site}: {text}")


def test_a_head_that_is_set_to_zero_loses_another_thing(plain, tokens):
    silence = {"z.0": lambda value, cache: torch.zeros_like(value)}
    raw, folded = (one.run(tokens, patch=silence)[0].log_softmax(-1) for one in (plain, fold(plain)))
    assert (raw - folded).abs().max() > 1e-3


def test_nothing_is_left_to_fold(model):
    """No gain before a reader, no mean where none is read, no bias of values; folding again changes nothing."""
    config, folded = model.config, fold(model)
    weights, again = folded.weights, fold(folded).weights
    assert_close(again.named(), weights.named(), **SAME)
    for layer, (block, old) in enumerate(zip(weights.blocks, model.weights.blocks, strict=True)):
        assert all(norm is None or norm.w is norm.b is None for norm in (block.ln1, block.ln2, weights.ln_final))
        assert (block.q_norm, block.ln1_post, block.ln2_post) == (old.q_norm, old.ln1_post, old.ln2_post)
        if not config.has_norms_after:
            assert not weights.port_biases(layer)[-config.n_groups :].any()
        if config.centred:
            assert_close(weights.ports(layer).mean(1), torch.zeros_like(weights.ports(layer)[:, 0]), **SAME)
            assert_close(weights.W_O(layer).mean(-1), torch.zeros_like(weights.W_O(layer)[..., 0]), **SAME)


def test_what_does_not_change_is_shared(make_model):
    for variant, shared in (("llama", ("W_O", "W_out", "b_out")), ("olmo2", ("W_QKV", "b_QKV", "W_O", "W_in", "W_gate"))):
        model = make_model(variant)
        folded = fold(model)
        assert folded.weights.W_E is model.weights.W_E
        for block, old in zip(folded.weights.blocks, model.weights.blocks, strict=True):
            assert all(getattr(block, name) is getattr(old, name) for name in shared)


def test_a_tied_unembedding_is_untied(make_model, tokens):
    model = make_model("llama")
    named = {name: tensor for name, tensor in model.weights.named().items() if name != "unembed.W_U"}
    tied = type(model)(model.weights.from_named(model.config, named))
    assert tied.weights.is_tied
    assert not fold(tied).weights.is_tied
    assert_close(fold(tied).run(tokens)[0].log_softmax(-1), tied.run(tokens)[0].log_softmax(-1), **SAME)


def test_a_folded_model_is_saved_and_loaded_equal(model, tokens, tmp_path):
    folded = fold(model)
    save(folded, tmp_path / "folded")
    again = load(tmp_path / "folded")
    assert again.weights.fingerprint == folded.weights.fingerprint != model.weights.fingerprint
    assert_close(again.run(tokens)[0], folded.run(tokens)[0], atol=0, rtol=0)


ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_base": 100}
LLAMA = ROTARY | {"normalization_type": "RMS", "gated_mlp": True, "n_key_value_heads": 2, "act_fn": "silu"}
GEMMA = LLAMA | {"act_fn": "gelu_new", "use_normalization_before_and_after": True, "output_logits_soft_cap": 4.0}
ROTATES = {"learned_positions": False}


@pytest.mark.parametrize(
    ("variant", "facts", "about"),
    [
        ("plain", {}, {}),
        ("attention_only", {}, {}),
        ("parallel", ROTATES, ROTARY),
        ("llama", {}, LLAMA),
        ("qwen3", {}, LLAMA | {"use_qk_norm": True}),
        ("gemma2", {"local_rotary": None}, GEMMA),
    ],
    ids=["gpt2", "attention only", "neox", "llama", "qwen3", "gemma2"],
)
def test_the_weights_are_those_that_transformer_lens_makes(make_model, lens, variant, facts, about):
    """In single precision, as TransformerLens folds. Asked to, it centres an unembedding that feeds a soft cap, which is
    another model, and gives a layer a bias under a normalisation after attention, where no head's write could be told."""
    from transformer_lens.weight_processing import ProcessWeights

    model = make_model(variant, **facts).to(dtype=torch.float32)
    config, named = model.config, {name: tensor.clone() for name, tensor in model.weights.named().items()}
    sizes = {n: getattr(config, n) for n in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx")}
    kinds = {"act_fn": "gelu_new", "attn_only": not config.has_mlp, "parallel_attn_mlp": config.parallel}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = lens.HookedTransformerConfig(**sizes, **(kinds | about))
        choices = {"center_unembed": config.logit_soft_cap is None, "fold_value_biases": not config.has_norms_after}
        theirs = ProcessWeights.process_weights(named, cfg, **choices)
    ours = fold(model).weights.named()
    gains = {name for name in theirs if name not in ours}
    assert_close({name: tensor for name, tensor in theirs.items() if name in ours}, ours, atol=1e-5, rtol=1e-5)
    assert gains
    assert all(name.split(".")[-2] in ("ln1", "ln2", "ln_final") for name in gains)
    assert all((theirs[name] == (1.0 if name.endswith("w") else 0.0)).all() for name in gains)
