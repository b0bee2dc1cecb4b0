"""Other people's models in our engine: the same logits, or a refusal that says why."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mechinterp.errors import ModelError
from mechinterp.models.load import load

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


def test_a_directory_of_every_family_runs_as_hugging_face_runs_it(make_hugging_face, family, prompts, tmp_path):
    theirs = make_hugging_face(family)
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
        ({"model_type": "gpt3"}, r"holds a 'gpt3' model, which is none that the engine runs: gpt2, .*Did you mean 'gpt"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True changes the forward pass"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False changes the forward pass"),
        ({"activation_function": "gelu_fats"}, "no activation 'gelu_fats'.*Did you mean 'gelu"),
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
    with pytest.raises(ModelError, match=r"lacks model.safetensors. It has pytorch_model.bin: pickles.*save_pretrained"):
        load(tmp_path)


def test_a_truncated_checkpoint_is_refused_by_name(make_gpt2, tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model.safetensors is no whole safetensors file .* Download or write it again"):
        load(tmp_path)


def test_an_incomplete_checkpoint_is_refused_by_the_tensor_that_lacks(make_gpt2, tmp_path):
    theirs = make_gpt2()
    theirs.save_pretrained(tmp_path)
    kept = {
        n: t.contiguous() for n, t in theirs.state_dict().items() if "h.1.mlp.c_fc.weight" not in n and n != "lm_head.weight"
    }
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="lacks 'transformer.h.1.mlp.c_fc.weight'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("family", "facts"),
    [
        ("llama", {"sliding_window": 3}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"hidden_activation": "relu"}),
        ("olmo2", {"sliding_window": 3}),
        ("gemma", {"hidden_activation": None, "sliding_window": 3, "final_logit_softcapping": 1.0}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": "relu"}),
        ("gemma2", {"hidden_act": "relu"}),
        ("gpt_neox", {"num_key_value_heads": 1}),
        ("phi", {"head_dim": 10}),
    ],
    ids=str,
)
def test_settings_are_heeded_where_the_familys_own_model_heeds_them(make_hugging_face, prompts, tmp_path, family, facts):
    """Published files carry other families' settings along."""
    theirs = make_hugging_face(family, **facts)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    assert_close(load(tmp_path).run(prompts)[0], logits_of(theirs, prompts), **CLOSE)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_gains_stored_less_one_in_half_precision_are_added_in_full(make_hugging_face, prompts, tmp_path, family):
    transformers = pytest.importorskip("transformers")
    make_hugging_face(family).bfloat16().save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    expected = logits_of(theirs, prompts)
    assert_close(load(tmp_path, dtype=torch.float32).run(prompts)[0], expected, **CLOSE)
    folded = load(tmp_path, dtype=torch.float32, fold=True).run(prompts)[0]
    assert_close(folded.log_softmax(-1), expected.log_softmax(-1), **CLOSE)
    assert load(tmp_path, fold=True).dtype == load(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("family", "facts"), [("opt", {"layer_norm_elementwise_affine": False}), ("gemma3_text", {"attn_logit_softcapping": 3.0})]
)
def test_a_setting_that_the_engine_does_not_do_is_refused_by_name(make_hugging_face, tmp_path, family, facts):
    make_hugging_face(family, **facts).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{next(iter(facts))}=.* changes the forward pass"):
        load(tmp_path)


def rewrite(directory, change):
    stored = load_file(directory / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in change(stored).items()}, directory / "model.safetensors")


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.bias", "model.norm.bias", "lm_head.bias"])
def test_a_bias_that_the_familys_model_does_not_have_is_refused(make_hugging_face, tmp_path, name):
    make_hugging_face("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda stored: stored | {name: torch.ones(1)})
    with pytest.raises(ModelError, match=f"1 tensors that a model of its config.json would not use \\({name}"):
        load(tmp_path)


def test_a_bias_that_the_familys_model_has_must_be_there(make_hugging_face, tmp_path):
    make_hugging_face("qwen2").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda stored: {name: tensor for name, tensor in stored.items() if not name.endswith(".bias")})
    with pytest.raises(ModelError, match="lacks 'model.layers.0.self_attn.q_proj.bias'"):
        load(tmp_path)


def test_tensors_of_one_model_have_one_dtype(make_hugging_face, prompts, tmp_path):
    """Some checkpoints keep norms in float32 beside matrices in bfloat16; Hugging Face makes them one, too."""
    make_hugging_face("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda stored: {n: t if "norm" in n else t.bfloat16() for n, t in stored.items()})
    model = load(tmp_path)
    assert {tensor.dtype for tensor in model.weights.parameters()} == {torch.bfloat16}
    assert model.run(prompts)[0].dtype == torch.bfloat16


def test_shards_that_a_whole_file_replaced_are_not_read(make_gpt2, prompts, tmp_path):
    theirs = make_gpt2()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_close(load(tmp_path).run(prompts)[0], logits_of(theirs, prompts), **CLOSE)


def test_an_inner_model_saved_by_itself_is_read(make_hugging_face, prompts, tmp_path):
    theirs = make_hugging_face("opt")
    theirs.model.save_pretrained(tmp_path)
    assert_close(load(tmp_path).run(prompts)[0], logits_of(theirs, prompts), **CLOSE)


def test_an_adapter_beside_the_model_is_refused(make_gpt2, tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter .* Merge the two"):
        load(tmp_path)


def test_an_opt_that_projects_its_embedding_is_refused(make_hugging_face, tmp_path):
    make_hugging_face("opt", word_embed_proj_dim=12).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"embeds tokens in 12 dimensions .* projects them to 24"):
        load(tmp_path)
