"""Other people's models in our engine: the same logits, or a refusal that says why."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from mechinterp.errors import ModelError
from mechinterp.models.load import load
from mechinterp.sites import all_sites

SIZES = {
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 24,
    "vocab_size": 40,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CLOSE = {"atol": 1e-4, "rtol": 0}  # the engine's promise in float32


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def make_gpt2():
    """``make_gpt2(n_inner=50)``: Hugging Face's own GPT-2, random in every weight, norms and biases included."""
    transformers = pytest.importorskip("transformers")

    def make(**facts):
        torch.manual_seed(0)
        config = transformers.GPT2Config(**(SIZES | facts), attn_implementation="eager")
        model = transformers.GPT2LMHeadModel(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
        return model.requires_grad_(False)

    return make


def logits_of(model, prompts):
    with torch.no_grad():
        return model(prompts).logits


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"n_inner": 50},
        {"tie_word_embeddings": False},
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"layer_norm_epsilon": 0.1},
    ],
    ids=lambda facts: "-".join(map(str, facts.items())) or "as is",
)
def test_a_hugging_face_gpt2_directory_runs_as_hugging_face_runs_it(make_gpt2, prompts, tmp_path, facts):
    theirs = make_gpt2(**facts)
    theirs.save_pretrained(tmp_path)
    assert_close(load(tmp_path).run(prompts)[0], logits_of(theirs, prompts), **CLOSE)


def test_a_sharded_directory_is_read_whole(make_gpt2, prompts, tmp_path):
    theirs = make_gpt2()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_close(load(tmp_path).run(prompts)[0], logits_of(theirs, prompts), **CLOSE)
    next(tmp_path.glob("model-00001*")).unlink()
    with pytest.raises(ModelError, match="lacks model-00001"):
        load(tmp_path)


def test_names_without_the_transformer_prefix_are_read(make_gpt2, prompts, tmp_path):
    """Published GPT-2 files name their tensors so."""
    theirs = make_gpt2()
    theirs.save_pretrained(tmp_path)
    bare = {n.removeprefix("transformer."): t.contiguous() for n, t in theirs.state_dict().items() if n != "lm_head.weight"}
    save_file(bare, tmp_path / "model.safetensors")
    assert_close(load(tmp_path).run(prompts)[0], logits_of(theirs, prompts), **CLOSE)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"model_type": "llama"}, "holds a 'llama' model; the engine runs 'gpt2' so far"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True changes the forward pass"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False changes the forward pass"),
        ({"activation_function": "gelu_fast"}, "no activation 'gelu_fast'.*Did you mean 'gelu"),
        ({"tie_word_embeddings": False}, "lacks 'lm_head.weight'"),
    ],
)
def test_a_directory_that_would_compute_something_else_is_refused(make_gpt2, tmp_path, facts, message):
    make_gpt2().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_a_directory_of_pickles_is_refused_and_told_how_to_convert(make_gpt2, tmp_path):
    theirs = make_gpt2()
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"lacks model.safetensors.*never pickles.*save_pretrained"):
        load(tmp_path)


def test_a_truncated_checkpoint_is_refused_by_name(make_gpt2, tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model.safetensors cannot be read as safetensors .* Download it again"):
        load(tmp_path)


def test_an_incomplete_checkpoint_is_refused_by_the_tensor_that_lacks(make_gpt2, tmp_path):
    theirs = make_gpt2()
    theirs.save_pretrained(tmp_path)
    kept = {
        n: t.contiguous() for n, t in theirs.state_dict().items() if "h.1.mlp.c_fc.weight" not in n and n != "lm_head.weight"
    }
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="lacks 'h.1.mlp.c_fc.weight'"):
        load(tmp_path)


# --- TransformerLens ------------------------------------------------------------------------------------------------


def test_a_hooked_transformer_runs_as_it_did(model, tokens, make_hooked):
    theirs = make_hooked(model)
    ours = load(theirs)
    assert_close(ours.run(tokens)[0], theirs(tokens), atol=1e-10, rtol=1e-10)
    assert (ours.config.has_mlp, ours.config.parallel) == (model.config.has_mlp, model.config.parallel)
    assert all_sites(ours.config) == all_sites(model.config)


def test_a_processed_hooked_transformer_keeps_its_numbers(plain, tokens, make_hooked):
    """Folded norms, centred weights: other activations than the raw model's, the same probabilities."""
    theirs = make_hooked(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
    ours = load(theirs)
    assert ours.weights.ln_final.w is None
    assert_close(ours.run(tokens)[0], theirs(tokens), atol=1e-9, rtol=1e-9)
    assert_close(ours.run(tokens)[0].softmax(-1), plain.run(tokens)[0].softmax(-1), atol=1e-6, rtol=0)
    _, cache = theirs.run_with_cache(tokens)
    mine = ours.run(tokens, record=["z", "resid_post", "ln1_normalized"])[1].to_transformer_lens()
    for name, value in mine.items():
        assert_close(value, cache[name], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("facts", [{"use_attn_scale": False}, {"attn_scale": 3.0}])
def test_the_scale_of_attention_is_kept(plain, tokens, make_hooked, facts):
    theirs = make_hooked(plain, **facts)
    assert_close(load(theirs).run(tokens)[0], theirs(tokens), atol=1e-10, rtol=1e-10)


@pytest.fixture(scope="module")
def make_bridge(lens, make_gpt2):
    def make(compatible: bool):
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        theirs = make_gpt2()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bridge = build_bridge_from_module(
                theirs,
                architecture="GPT2LMHeadModel",
                hf_config=theirs.config,
                tokenizer=None,
                dtype=torch.float32,
                device="cpu",
                model_name="small",
            )
            if compatible:
                bridge.enable_compatibility_mode(disable_warnings=True)
        return bridge

    return make


@pytest.mark.parametrize("compatible", [False, True], ids=["raw", "compatibility mode"])
def test_a_bridge_runs_as_it_did(make_bridge, prompts, compatible):
    theirs = make_bridge(compatible)
    ours = load(theirs)
    assert not any(tensor.requires_grad for tensor in ours.weights.parameters())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted, cache = theirs.run_with_cache(prompts)
    assert_close(ours.run(prompts)[0], wanted, **CLOSE)
    mine = ours.run(prompts, record=["q", "z", "pattern", "mlp_post", "resid_post"])[1].to_transformer_lens()
    for name, value in mine.items():
        assert_close(value, cache[name], **CLOSE)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"positional_embedding_type": "rotary", "rotary_dim": 4}, "learned positions, not 'rotary'"),
        ({"n_key_value_heads": 1}, r"grouped keys \(1 for 2 heads\)"),
        ({"gated_mlp": True}, "gated_mlp=True changes the forward pass"),
        ({"normalization_type": "RMS"}, "LayerNorm or none, not 'RMS'"),
        ({"attention_dir": "bidirectional"}, "attention_dir='bidirectional' changes the forward pass"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"act_fn": "gelu_fast"}, "no activation 'gelu_fast'"),
        ({"d_vocab_out": 5}, r"'unembed.W_U' has shape \(8, 5\) and should have \(8, 11\)"),
    ],
)
def test_a_hooked_transformer_that_we_would_run_otherwise_is_refused(lens, facts, message):
    about = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_head": 4, "d_mlp": 16, "d_vocab": 11, "n_ctx": 6}
    about |= {"act_fn": "gelu_new", "device": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lens.HookedTransformer(lens.HookedTransformerConfig(**about | facts))
    with pytest.raises(ModelError, match=message):
        load(theirs)
