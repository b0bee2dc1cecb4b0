"""Getting and keeping a model: what is saved is loaded equal, and what is not there is said."""

import json

import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from mechinterp.errors import ModelError
from mechinterp.models.config import ModelConfig
from mechinterp.models.load import load, save
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights


def toy_tokenizer():
    ids = {"<bos>": 0, "a": 1, " b": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<bos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(" b", "isolated")
    return Tokenizer(backend, "toy", bos_id=0, pad_id=2, prepends_bos=True)


def test_what_is_saved_is_loaded_equal(model, tokens, tmp_path):
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.config == model.config
    assert again.weights.fingerprint == model.weights.fingerprint
    named = again.weights.named()
    assert named.keys() == model.weights.named().keys()
    assert all(torch.equal(named[name], tensor) for name, tensor in model.weights.named().items())
    assert torch.equal(again.run(tokens)[0], model.run(tokens)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_saved_and_can_be_asked_for(plain, tmp_path, dtype):
    save(plain.to(dtype=dtype), tmp_path / "model")
    assert load(tmp_path / "model").dtype == dtype
    assert load(tmp_path / "model", dtype=torch.float64).dtype == torch.float64


def test_the_tokenizer_is_saved_with_the_facts_its_file_does_not_tell(plain, tmp_path):
    save(Transformer(plain.weights, toy_tokenizer()), tmp_path / "model")
    again = load(tmp_path / "model").tokenizer
    assert (again.bos_id, again.pad_id, again.prepends_bos) == (0, 2, True)
    assert again.encode("a b") == [0, 1, 2]


def test_another_tokenizer_replaces_the_one_found(plain, tmp_path):
    save(plain, tmp_path / "model")
    mine = toy_tokenizer()
    assert load(tmp_path / "model").tokenizer is None
    assert load(tmp_path / "model", tokenizer=mine).tokenizer is mine
    assert load(plain, tokenizer=mine).tokenizer is mine


def test_an_existing_directory_is_never_written_to(plain, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match="exists already. Choose another directory"):
        save(plain, tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []


def test_nothing_is_left_of_a_save_that_fails(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("mechinterp.models.load.save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(plain, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_tells_weights_and_settings_apart_and_nothing_else(plain, make_model):
    assert make_model().weights.fingerprint == plain.weights.fingerprint
    others = [
        make_model(seed=1),
        make_model(norm_eps=1e-6),
        make_model(activation="gelu"),
        plain.to(dtype=torch.float32),
    ]
    assert len({plain.weights.fingerprint, *(other.weights.fingerprint for other in others)}) == 5


def test_weights_from_their_own_names_are_the_same_weights(model):
    again = Weights.from_named(model.config, model.weights.named())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.weights.parameters(), strict=True))


def test_per_head_matrices_are_views_of_what_the_pass_multiplies_by(plain):
    block = plain.weights.blocks[1]
    assert plain.weights.W_Q(1).shape == (3, 12, 5)
    assert plain.weights.W_K(1).untyped_storage().data_ptr() == block.W_QKV.untyped_storage().data_ptr()
    assert torch.equal(plain.weights.W_V(1)[2], block.W_QKV[:, 40:45])
    assert torch.equal(plain.weights.W_O(1)[2], block.W_O[10:15])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.attn.W_O": None}, r"lacks 'blocks.1.attn.W_O' of shape \(3, 5, 12\)"),
        ({"embed.W_E": torch.zeros(2, 12)}, r"'embed.W_E' has shape \(2, 12\) and should have \(23, 12\)"),
        ({"unembed.b_U": torch.zeros(5)}, r"'unembed.b_U' has shape \(5,\) and should have \(23,\)"),
    ],
)
def test_weights_that_lack_or_misfit_a_tensor_are_refused_by_its_name(plain, change, message):
    named = {name: tensor for name, tensor in (plain.weights.named() | change).items() if tensor is not None}
    with pytest.raises(ModelError, match=message):
        Weights.from_named(plain.config, named)


def test_missing_biases_are_zeros(plain):
    named = {name: tensor for name, tensor in plain.weights.named().items() if ".b_" not in name}
    weights = Weights.from_named(plain.config, named)
    assert not weights.blocks[0].b_QKV.any()
    assert weights.b_U is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./no/such/folder", "there is no directory './no/such/folder'"),
        (7, "cannot load a model from int. Pass a name"),
    ],
)
def test_what_is_no_model_is_refused(source, message):
    with pytest.raises(ModelError, match=message):
        load(source)


def test_a_name_that_cannot_be_fetched_suggests_one_that_is_here(lens):
    with pytest.raises(ModelError, match=r"cannot load 'buildin'.*Did you mean 'builtin'.*Without a network"):
        load("buildin")


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match="has no config.json, so it holds no model"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 1"),
        ({"rotary": True}, "facts that this engine does not know: rotary"),
        ({"activation": "gelu_nwe"}, "no activation 'gelu_nwe'.*Did you mean 'gelu_new'"),
        ({"normalization": "rms_norm"}, "no normalization 'rms_norm'"),
        ({"n_layers": 0}, "n_layers must be at least 1, not 0"),
    ],
)
def test_a_config_of_other_facts_is_refused(plain, change, message):
    facts = json.loads(plain.config.to_json()) | change
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_json(json.dumps(facts))


@pytest.mark.parametrize(
    ("text", "message"), [('{"model_type": "gpt2", ', "does not describe"), ('{"model_type": "gpt2"}', "lacks 'n_embd'")]
)
def test_a_broken_config_is_named_with_what_it_lacks(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    save_file({"wte.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_transformer_lens_adding_bos_does_not_make_every_task_begin_with_it(plain, make_hooked):
    """TransformerLens reloads tokenizers so that they add BOS; how a model came to us must not change the prompts."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<bos>": 0, "a": 1}, unk_token="a"))
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    hooked = make_hooked(plain)
    hooked.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")
    assert Tokenizer.from_transformers(hooked.tokenizer, "toy").prepends_bos
    assert not load(hooked).tokenizer.prepends_bos
