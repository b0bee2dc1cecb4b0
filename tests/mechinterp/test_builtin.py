"""The built-in model: it passes its gates, its tokenizer is exact, and its corpus kept the held-out words out."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch

import mechinterp as mi
from mechinterp.models import builtin
from mechinterp.models.builtin import gates
from mechinterp.models.builtin.batches import KINDS, Sampler
from mechinterp.models.builtin.corpus import WRITERS
from mechinterp.models.builtin.document import Document, vocabulary_texts
from mechinterp.models.builtin.muon import Muon, orthogonalize
from mechinterp.models.builtin.train import Recipe, initial_weights, loss_of, train
from mechinterp.models.builtin.vocabulary import build_tokenizer
from mechinterp.models.transformer import Transformer
from mechinterp.tasks import TASKS
from mechinterp.tasks.words import split_words, words

DIRECTORY = Path(builtin.__path__[0])
SMALL = Recipe(d_model=32, d_mlp=32, n_heads=4, n_layers=2, n_documents=4, max_steps=3, decay=1, measure_every=5, n_held_out=4)


@pytest.fixture(scope="module")
def model():
    return mi.load("builtin")


@cache
def encode(text):
    return mi.load("builtin").tokenizer.encode(text, bos=False)


def test_every_gate_is_passed_on_held_out_words_and_sentences(model):
    assert not gates.failures(gates.measure(model, n_prompts=300))


def test_a_missed_gate_is_named_with_its_figure_and_its_range(model):
    figures = gates.measure(model, n_prompts=10) | {"docstring: C is the top token": 0.5}
    assert "docstring: C is the top token is 0.500, and must lie in [0.95, 1.0]" in gates.failures(figures)


def test_the_files_that_ship_are_small():
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir() if path.suffix in {".safetensors", ".json"}) < 8e6


def test_the_tokenizer_that_ships_is_the_one_of_the_corpus(model):
    assert model.tokenizer.backend.get_vocab() == build_tokenizer(vocabulary_texts()).get_vocab()


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_decoded_as_they_were_written(model, name):
    task = TASKS[name](model, 40)
    for index in range(40):
        text = task.text(index).removeprefix("<bos>")
        assert "<unk>" not in text
        assert model.tokenizer.decode(model.tokenizer.encode(text, bos=False)) == text


def test_words_numbers_and_indents_are_one_token_each(model):
    text = 'In 1732, Mary had:\n    """Compute'
    tokens = ["In", " 17", "32", ",", " Mary", " had", ":", "\n", "   ", ' """', "Compute"]
    assert model.tokenizer.strings(encode(text)) == tokens


@pytest.mark.parametrize("writer", WRITERS)
def test_the_corpus_has_no_unknown_token(model, writer):
    unknown = model.tokenizer.backend.token_to_id("<unk>")
    for seed in range(50):
        document = Document(encode)
        WRITERS[writer](document, Random(seed))
        assert unknown not in document.ids


@pytest.mark.parametrize(("writer", "list_name"), [("ioi", "names"), ("docstring", "variables")])
def test_the_corpus_never_answers_a_task_with_a_held_out_word(model, writer, list_name):
    held_out = {encode(f" {word}")[0] for word in split_words(words(list_name), "held-out")}
    for seed in range(300):
        document = Document(encode)
        WRITERS[writer](document, Random(seed))
        answers = {i for _, ids, kind in document.targets if kind == writer for i in ids}
        assert not answers & held_out


def test_the_corpus_never_colors_a_held_out_object(model):
    held_out = [f" {thing}" for thing in split_words(words("objects"), "held-out")]
    colors = {encode(f" {color}")[0] for color in words("colors")}
    things = {encode(thing)[0] for thing in held_out}
    for name in ("colors", "reversed"):
        for seed in range(300):
            document = Document(encode)
            WRITERS[name](document, Random(seed))
            pairs = zip(document.ids, document.ids[1:], strict=False)
            assert not [pair for pair in pairs if pair[0] in colors and pair[1] in things]


def test_each_prediction_stands_where_its_answer_is():
    for name, write in WRITERS.items():
        document = Document(encode)
        write(document, Random(1))
        assert all(document.ids[index] in ids for index, ids, _ in document.targets), name


def test_shares_shrink_as_a_task_is_learned():
    sampler = Sampler(encode, 943, 96, Random(0))
    before = dict(zip(WRITERS, sampler.shares(), strict=True))
    kind = torch.full((10,), list(KINDS).index("ioi"))
    for _ in range(100):
        sampler.learn_from(kind, torch.ones(10))
    after = dict(zip(WRITERS, sampler.shares(), strict=True))
    assert after["ioi"] < 0.5 * before["ioi"]
    assert after["colors"] == before["colors"]


def test_orthogonalized_matrices_have_singular_values_near_one():
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))))
    assert singular.min() > 0.5
    assert singular.max() < 1.3


def test_muon_steps_downhill_on_matrices_of_any_shape():
    torch.manual_seed(0)
    for shape, n in (((8, 24), 3), ((16, 8), 1), ((8, 16), 1)):
        matrix = torch.randn(shape, requires_grad=True)
        optimizer, losses = Muon([(matrix, n)]), []
        for _ in range(60):
            matrix.grad = None
            loss = matrix.square().sum()
            loss.backward()
            optimizer.step(0.05)
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]


def test_training_lowers_the_loss_and_goes_on_from_what_it_saved(tmp_path):
    train(tmp_path / "first", SMALL)
    train(tmp_path / "second", replace(SMALL, seed=1), start=tmp_path / "first")
    d_vocab = mi.load("builtin").config.d_vocab
    batch = Sampler(encode, d_vocab, SMALL.n_ctx, Random(1)).batch(8)
    models = [Transformer(initial_weights(SMALL, d_vocab)), mi.load(tmp_path / "first"), mi.load(tmp_path / "second")]
    losses = [loss_of(model, batch)[0].item() for model in models]
    assert losses == sorted(losses, reverse=True)
