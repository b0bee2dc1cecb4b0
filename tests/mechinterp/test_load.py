"""Getting and keeping a model: what is saved is loaded equal, and what is not there is said."""

import json

import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from mechinterp.errors import ModelError, TaskError
from mechinterp.models.checkpoint import Checkpoint
from mechinterp.models.config import ModelConfig
from mechinterp.models.folding import fold
from mechinterp.models.load import load, save
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights
from mechinterp.tasks import ioi


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
def test_the_dtype_is_saved_and_can_be_asked_for(model, tokens, tmp_path, dtype):
    lower = model.to(dtype=dtype)
    save(lower, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.dtype == dtype
    assert again.weights.fingerprint == lower.weights.fingerprint
    assert torch.equal(again.run(tokens)[0], lower.run(tokens)[0])
    assert load(tmp_path / "model", dtype=torch.float64).dtype == torch.float64


def test_a_tied_unembedding_is_written_once_and_stays_tied(make_hugging_face, tmp_path):
    make_hugging_face("gemma").save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs", dtype=torch.bfloat16)
    save(model, tmp_path / "ours")
    assert model.weights.is_tied
    assert load(tmp_path / "ours").weights.is_tied
    assert load(tmp_path / "ours", dtype=torch.float32).weights.is_tied
    assert "unembed.W_U" not in Checkpoint(tmp_path / "ours")


@pytest.mark.parametrize("variant", ["plain", "llama"])
def test_a_model_can_be_loaded_folded(make_model, tokens, tmp_path, variant):
    """Once, in float32 at least, whatever it is stored in and put into."""
    stored = make_model(variant).to(dtype=torch.bfloat16)
    save(stored, tmp_path / "model")
    folded = load(tmp_path / "model", fold=True)
    assert folded.dtype == torch.bfloat16
    assert folded.weights.ln_final.w is None
    exact = fold(stored.to(dtype=torch.float32))
    assert load(tmp_path / "model", fold=True, dtype=torch.float32).weights.fingerprint == exact.weights.fingerprint
    assert folded.weights.fingerprint == exact.to(dtype=torch.bfloat16).weights.fingerprint
    assert load(stored, fold=True).weights.fingerprint == folded.weights.fingerprint


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


def test_a_file_is_refused_and_its_directory_asked_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config.json' is a file. Give the directory that it lies in"):
        load(tmp_path / "config.json")


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match="has no config.json, so it holds no model"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 1"),
        ({"rotery": True}, "facts that this engine does not know: rotery"),
        ({"activation": "gelu_nwe"}, "no activation 'gelu_nwe'.*Did you mean 'gelu_new'"),
        ({"normalization": "batch_norm"}, "no normalization 'batch_norm'"),
        ({"n_layers": 0}, "n_layers must be at least 1, not 0"),
    ],
)
def test_a_config_of_other_facts_is_refused(plain, change, message):
    facts = json.loads(plain.config.to_json()) | change
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_json(json.dumps(facts))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "gpt2", ', "does not describe a model: Expecting property name"),
        ("[]", "does not describe a model: it names no model_type, such as 'llama'"),
        ('{"model_type": ["llama"]}', "does not describe a model: it names no model_type"),
        ('{"model_type": "gemma3", "vision_config": {}}', "'gemma3' model, which reads more than text; .*its language model"),
        ('{"model_type": "llama", "quantization_config": "gptq"}', r"holds quantized weights \(gptq\)"),
        ('{"model_type": "llama", "quantization_config": null}', "lacks 'embed_tokens.weight'"),
        ('{"model_type": "gpt2"}', "lacks 'wpe.weight'"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "does not describe a model: .*'hidden_size' expected int"),
        ('{"model_type": "lama"}', "holds a 'lama' model, which is none that the engine runs: .*Did you mean 'llama'"),
    ],
)
def test_a_broken_config_is_named_with_what_it_lacks(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    save_file({"wte.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("family", "facts", "message"),
    [
        ("llama", {"hidden_size": 28}, r"'embed.W_E' has shape \(40, 24\) and should have \(40, 28\)"),
        ("llama", {"num_key_value_heads": 4}, r"'model.layers.0.self_attn.k_proj.weight' has shape \(16, 24\).*contradict"),
        ("llama", {"num_hidden_layers": 1}, "9 tensors that a model of its config.json would not use"),
        ("llama", {"num_hidden_layers": 3}, "lacks 'model.layers.2.self_attn.q_proj.weight'"),
        ("llama", {"model_type": "qwen3"}, "lacks 'model.layers.0.self_attn.q_norm.weight'"),
        ("qwen3", {"model_type": "llama"}, "4 tensors that a model of its config.json would not use .*q_norm"),
        ("phi3", {"num_key_value_heads": 1}, r"qkv_proj.weight' has shape \(48, 24\).*contradict"),
        ("gemma", {"tie_word_embeddings": False}, "lacks 'lm_head.weight'"),
    ],
    ids=str,
)
def test_a_configuration_that_contradicts_the_weights_is_refused(make_hugging_face, tmp_path, family, facts, message):
    make_hugging_face(family).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("theirs", [True, False], ids=["Hugging Face's", "ours"])
def test_a_file_that_is_not_whole_is_refused_by_name(make_hugging_face, plain, tmp_path, theirs):
    directory = tmp_path / "model"
    if theirs:
        make_hugging_face("llama").save_pretrained(directory)
    else:
        save(plain, directory)
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[:-100], whole[:20], b"", b"no tensors at all"):
        file.write_bytes(broken)
        with pytest.raises(ModelError, match=r"model.safetensors is no whole safetensors file .*Download or write it again"):
            load(directory)
    file.unlink()
    with pytest.raises(ModelError, match="lacks model.safetensors"):
        load(directory)
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has pytorch_model.bin: pickles, .*save_pretrained"):
        load(directory)


def test_a_file_that_is_written_over_does_not_change_a_model_that_was_loaded_from_it(plain, tokens, tmp_path):
    save(plain, tmp_path / "model")
    model = load(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert torch.equal(model.run(tokens)[0], plain.run(tokens)[0])


def test_weights_in_a_format_that_is_not_multiplied_by_are_refused(plain, tmp_path):
    save(plain, tmp_path / "model")
    named = plain.weights.named() | {"embed.W_E": torch.zeros(23, 12, dtype=torch.int8)}
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ModelError, match="holds 'embed.W_E' in I8, which the engine does not multiply by; it reads F64, F32"):
        load(tmp_path / "model")


def test_a_shard_that_is_missing_or_unlisted_is_refused_by_name(make_hugging_face, tmp_path):
    make_hugging_face("llama").save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match="lacks model-00002"):
        load(tmp_path)
    index.write_text(text[:-40])
    with pytest.raises(ModelError, match="index.json does not say which shard holds which tensor"):
        load(tmp_path)


def test_a_directory_without_a_tokenizer_runs_ids_and_says_so_where_text_is_needed(make_hugging_face, prompts, tmp_path):
    make_hugging_face("llama").save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.tokenizer is None
    assert model.run(prompts)[0].shape == (3, 9, 40)
    with pytest.raises(
        TaskError, match=r"this model has no tokenizer, and prompts are text. Load it with one: load\(..., tokeniz"
    ):
        ioi(model, n_prompts=2)


def test_a_tokenizer_that_cannot_be_read_is_named_and_may_be_replaced(make_hugging_face, tmp_path):
    make_hugging_face("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be read .*Pass `tokenizer=` to use another"):
        load(tmp_path)
    mine = toy_tokenizer()
    assert load(tmp_path, tokenizer=mine).tokenizer is mine
