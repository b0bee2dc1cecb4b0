"""TransformerLens' objects in our engine: what they compute, processed or raw, or a refusal that says why."""

import warnings

import pytest
import tokenizers
import torch
from torch.testing import assert_close

from mechinterp.errors import ModelError
from mechinterp.models.load import load
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights
from mechinterp.sites import all_sites

CLOSE = {"atol": 1e-4, "rtol": 0}  # the engine's promise in float32
TURNED = {"atol": 1e-6, "rtol": 1e-6}  # a HookedTransformer in float64 has angles in float64, we have them in float32
# TransformerLens has rotary frequencies of a base alone; these give those of the variants.
BASES = {"gemma2": {"rotary_base": 100.0, "rotary_base_local": 50.0}}


def as_hooked(make_hooked, model, **facts):
    """With the angles that TransformerLens computes, not ours."""
    bases = BASES.get(model.config.name, {"rotary_base": 100.0}) if model.config.rotary else {}
    return make_hooked(model, **(bases | facts))


def test_a_hooked_transformer_runs_as_it_did(expressible, tokens, make_hooked):
    theirs = as_hooked(make_hooked, expressible)
    model = load(theirs)
    assert_close(model.run(tokens)[0], theirs(tokens), **TURNED)
    assert all_sites(model.config) == all_sites(expressible.config)
    if model.config.rotary is None:
        assert_close(model.run(tokens)[0], theirs(tokens), atol=1e-10, rtol=1e-10)


def without(model, *names):
    """The model without its tensors of these names."""
    named = {name: tensor for name, tensor in model.weights.named().items() if not name.endswith(names)}
    return Transformer(Weights.from_named(model.config, named))


@pytest.mark.parametrize("variant", ["plain", "llama", "qwen3", "gemma2", "gptj"])
def test_a_processed_hooked_transformer_keeps_its_numbers(make_model, tokens, make_hooked, variant):
    """Folded norms, centred weights: other activations than the raw model's, the same probabilities."""
    config = make_model(variant).config
    absent = (*["b_gate", "b_in"] * config.gated, *["b_V"] * config.has_norms_after)
    theirs = as_hooked(make_hooked, without(make_model(variant), *absent))
    before = theirs(tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        uncapped = config.logit_soft_cap is None
        theirs.process_weights_(fold_ln=True, center_writing_weights=config.centred, center_unembed=uncapped)
    model = load(theirs)
    assert model.weights.ln_final.w is None
    assert_close(model.run(tokens)[0], theirs(tokens), **TURNED)
    assert_close(model.run(tokens)[0].softmax(-1), before.softmax(-1), **TURNED)
    _, cache = theirs.run_with_cache(tokens)
    mine = model.run(tokens, record=["z", "resid_post", "ln1_normalized"])[1].to_transformer_lens()
    for name, value in mine.items():
        assert_close(value, cache[name], **TURNED)


@pytest.mark.parametrize(
    ("variant", "facts"),
    [
        ("plain", {"use_attn_scale": False}),
        ("plain", {"attn_scale": 3.0}),
        ("plain", {"attention_dir": "bidirectional"}),
        ("plain", {"act_fn": "gelu_fast"}),
        ("plain", {"use_local_attn": True, "window_size": 2, "attn_types": ["global", "local", "global"]}),
        ("llama", {"rotary_base": 7.0}),
        ("llama", {"rotary_dim": 2}),
        ("gptj", {"rotary_base": 7.0}),
        ("llama", {"rotary_scaling_factor": 3.0}),
        ("gemma2", {"rotary_scaling_factor": 3.0}),
        ("llama", {"use_NTK_by_parts_rope": True, "NTK_original_ctx_len": 16}),
        ("llama", {"use_yarn_rope": True, "yarn_factor": 4.0, "yarn_attention_factor": 1.3}),
        ("gemma2", {"use_yarn_rope": True, "yarn_factor": 4.0, "yarn_global_attn_only": True}),
        ("llama", {"use_logn_attn": True}),
    ],
    ids=str,
)
def test_what_a_hooked_transformer_is_told_is_kept(make_model, tokens, make_hooked, variant, facts):
    """Scales, directions, windows, and every way of making angles that TransformerLens has."""
    theirs = as_hooked(make_hooked, without(make_model(variant), "b_gate"), **facts)
    assert_close(load(theirs).run(tokens)[0], theirs(tokens), **TURNED)


@pytest.mark.parametrize(
    ("variant", "facts"),
    [
        ("llama", {}),  # the bias that TransformerLens adds behind the gate
        ("plain", {"n_key_value_heads": 3}),  # groups of one head
        ("attention_only", {"normalization": "rms_norm"}),
    ],
    ids=str,
)
def test_what_a_hooked_transformer_holds_is_read(make_model, tokens, make_hooked, variant, facts):
    theirs = as_hooked(make_hooked, without(make_model(variant, **facts), "b_gate"))
    assert_close(load(theirs).run(tokens)[0], theirs(tokens), **TURNED)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True changes the forward pass"),
        (
            {"positional_embedding_type": "shortformer"},
            "'shortformer' is none of the engine's positions: standard, rotary, alibi",
        ),
        ({"positional_embedding_type": "alibi", "n_heads": 3, "d_head": 3}, "n_heads=3 with ALiBi is run .* in its own way"),
        ({"post_embedding_ln": True}, "post_embedding_ln=True changes the forward pass"),
        ({"final_rms": True}, "final_rms=True asks for another normalisation at the end"),
        ({"clip_qkv": 2.0}, "clip_qkv=2.0 changes the forward pass"),
        ({"num_experts": 2, "experts_per_token": 1}, "num_experts=2 changes the forward pass"),
        ({"use_logn_attn": True, "train_seq_length": 3}, r"use_logn_attn=True changes what prompts longer .* \(3\) mean"),
        ({"use_qk_norm": True, "use_attention_sinks": True}, "use_attention_sinks=True"),
        ({"act_fn": "solu"}, "no activation 'solu'"),
        ({"d_vocab_out": 5}, r"'unembed.W_U' has shape \(8, 5\) and should have \(8, 11\)"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_a_hooked_transformer_that_we_would_run_otherwise_is_refused(lens, facts, message):
    about = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "d_mlp": 16, "d_vocab": 11, "n_ctx": 6}
    about |= {"act_fn": "gelu_new", "device": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lens.HookedTransformer(lens.HookedTransformerConfig(**about | facts))
    with pytest.raises(ModelError, match=message):
        load(theirs)


# --- bridges --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_bridge(lens, make_hugging_face):
    """``make_bridge("llama", compatible=True)``: the bridge of a small Hugging Face model, its weights processed or not."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    def make(family, compatible=False, tokenizer=None):
        theirs = make_hugging_face(family)
        about = {"architecture": type(theirs).__name__, "hf_config": theirs.config, "tokenizer": None}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bridge = build_bridge_from_module(theirs, **about, dtype=torch.float32, device="cpu", model_name=f"small-{family}")
            if compatible:
                bridge.enable_compatibility_mode(disable_warnings=True)
        bridge.tokenizer = tokenizer
        return bridge

    return make


SHARED = ["q", "z", "pattern", "mlp_post", "resid_post", "attn_out", "mlp_out"]


@pytest.mark.parametrize("compatible", [False, True], ids=["raw", "compatibility mode"])
def test_a_bridge_of_every_family_runs_as_it_did(make_bridge, family, prompts, compatible):
    theirs = make_bridge(family, compatible)
    model = load(theirs)
    assert not any(tensor.requires_grad for tensor in model.weights.parameters())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits, cache = theirs.run_with_cache(prompts)
    assert_close(model.run(prompts)[0], logits, **CLOSE)
    mine = model.run(prompts, record=SHARED)[1].to_transformer_lens()
    for name, value in mine.items():
        if name in cache:
            assert_close(value, cache[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_raw_bridge_is_the_model_that_its_directory_holds(make_bridge, make_hugging_face, tmp_path, family):
    """The same tensors, tied where they were."""
    make_hugging_face(family).save_pretrained(tmp_path)
    directory, bridge = load(tmp_path), load(make_bridge(family))
    assert bridge.weights.is_tied
    assert all(torch.equal(a, b) for a, b in zip(bridge.weights.parameters(), directory.weights.parameters(), strict=True))


def test_what_was_done_to_a_bridges_weights_is_what_is_loaded(make_bridge, prompts):
    theirs = make_bridge("gpt2")
    with torch.no_grad():
        theirs.blocks[1].attn.q.weight *= 2
        logits = theirs(prompts)
    assert_close(load(theirs).run(prompts)[0], logits, **CLOSE)


@pytest.mark.parametrize("facts", [{}, {"attn_only": True}, {"normalization_type": "RMS", "gated_mlp": True}], ids=str)
def test_a_bridge_of_transformer_lens_own_making_runs_as_it_did(lens, prompts, facts):
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    about = {"n_layers": 2, "n_heads": 3, "d_model": 24, "d_head": 8, "d_mlp": 32, "d_vocab": 40, "n_ctx": 16, "seed": 0}
    about |= {"act_fn": "gelu_new", "normalization_type": "LN", "device": "cpu"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = TransformerBridge.boot_native(TransformerBridgeConfig(**about | facts))
        assert_close(load(theirs).run(prompts)[0], theirs(prompts), **CLOSE)
        turning = TransformerBridge.boot_native(
            TransformerBridgeConfig(**about, positional_embedding_type="rotary", rotary_dim=8)
        )
    with pytest.raises(ModelError, match="does not say by which angles it turns. Build a HookedTransformer"):
        load(turning)


def test_a_bridge_of_a_family_that_we_do_not_run_is_refused_by_name(make_bridge):
    theirs = make_bridge("gpt2")
    theirs.original_model.config.model_type = "mamba"
    with pytest.raises(ModelError, match="small-gpt2 holds a 'mamba' model, which is none that the engine runs: gpt2, "):
        load(theirs)


# --- what comes with them -------------------------------------------------------------------------------------------


def adding_bos(eos="</s>"):
    """A tokenizer as TransformerLens hands them over, whatever the model was trained with."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "</s>": 2}, unk_token="a"))
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)


@pytest.mark.parametrize(
    ("family", "eos", "prepends"),
    [("gpt2", "</s>", False), ("llama", "</s>", True), ("llama", "<s>", False), ("opt", "<s>", True)],
)
def test_bos_comes_first_where_the_family_was_trained_so_and_not_where_transformer_lens_adds_it(
    make_bridge, family, eos, prepends
):
    """How a model came to us must not change the prompts."""
    tokenizer = adding_bos(eos)
    assert Tokenizer.from_transformers(tokenizer, "toy").prepends_bos
    assert load(make_bridge(family, tokenizer=tokenizer)).tokenizer.prepends_bos == prepends
    assert load(make_bridge(family)).tokenizer is None


def test_a_hooked_transformers_tokenizer_comes_along(plain, make_hooked):
    hooked = make_hooked(plain)
    hooked.tokenizer = adding_bos()
    assert load(hooked).tokenizer.encode("a") == [1]


def test_a_name_is_fetched_by_a_bridge_that_keeps_nothing(lens, make_bridge, prompts, monkeypatch, tmp_path):
    """Weights are not held twice, they come in the dtype asked for, and the tokenizer is the published one."""
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    asked, bridge = {}, make_bridge("llama", tokenizer=adding_bos())
    with torch.no_grad():
        logits = bridge(prompts)
    monkeypatch.setattr(TransformerBridge, "boot_transformers", lambda name, **how: asked.update(how, name=name) or bridge)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: adding_bos())
    model = load("some/llama", dtype=torch.float32)
    assert asked == {"name": "some/llama", "device": "cpu", "dtype": torch.float32}
    assert model.tokenizer.prepends_bos
    assert_close(model.run(prompts)[0], logits, **CLOSE)
    assert sum(parameter.numel() for parameter in bridge.original_model.parameters()) == 0
