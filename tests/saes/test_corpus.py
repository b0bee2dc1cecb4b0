"""Text packed into rows without losing or doubling a token, and which positions count."""

import itertools
import json
from dataclasses import replace

import pytest
import tokenizers
import torch

from mechinterp.errors import SAEError, TaskError
from mechinterp.metrics import logit_diff
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import Task
from saes.corpus import Corpus, corpus_of_tasks, corpus_of_texts, read_texts

WORDS = [f"w{number}" for number in range(2, 23)]
TEXTS = ["w2 w3 w4", "w5", "w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16", "w17 w18", "w19 w20 w21"]


@pytest.fixture(scope="module")
def reads(make_model):
    """A model that reads 9 positions, with a tokenizer of whole words, 0 its BOS and 1 its padding."""
    ids = {"<bos>": 0, "<pad>": 1, **{word: number for number, word in enumerate(WORDS, 2)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<bos>", "<pad>"])
    return replace(make_model(), tokenizer=Tokenizer(backend, "words", bos_id=0, pad_id=1))


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@pytest.mark.parametrize("context", range(2, 10))
@pytest.mark.parametrize("bos", [None, False])
def test_rows_in_a_row_are_the_texts_in_a_row(reads, context, bos):
    corpus = corpus_of_texts(reads, TEXTS, context=context, bos=bos)
    expected = [token for text in TEXTS for token in ids_of(text)]
    found = corpus.tokens[corpus.keep].tolist()
    assert found == expected[: len(found)]
    left_out = len(expected) - len(found)
    assert corpus.tokens.shape[1] == context
    if bos is False:
        assert left_out == len(expected) % context
        assert corpus.keep.all()
    else:
        assert left_out < context
        assert (corpus.tokens[:, 0] == 0).all()
        assert not corpus.keep[corpus.tokens == 0].any()
        assert torch.equal(corpus.keep, corpus.tokens != 0)


def test_every_document_begins_with_bos_and_none_has_two(reads):
    corpus = corpus_of_texts(reads, TEXTS, context=4)
    assert corpus.tokens.tolist() == [
        [0, 2, 3, 4],
        [0, 5, 0, 6],
        [0, 7, 8, 9],
        [0, 10, 11, 12],
        [0, 13, 14, 15],
        [0, 16, 0, 17],
        [0, 18, 0, 19],
    ]  # w20 w21 would be one short


def test_a_row_that_bos_completes_is_not_left_out(reads):
    assert corpus_of_texts(reads, ["w2 w3 w4 w5 w6 w7"], context=4).tokens.tolist() == [[0, 2, 3, 4], [0, 5, 6, 7]]


def test_a_long_document_is_cut_like_any(reads):
    words = [WORDS[number % 21] for number in range(5000)]
    corpus = corpus_of_texts(reads, [" ".join(words)], context=8)
    assert corpus.tokens[corpus.keep].tolist() == ids_of(" ".join(words))[: 7 * (5000 // 7)]


def test_it_reads_no_further_than_it_must(reads):
    asked = []
    endless = (asked.append(number) or {"text": "w2 w3 w4"} for number in itertools.count())
    corpus = corpus_of_texts(reads, endless, context=4, n_tokens=37)
    assert corpus.tokens.shape == (10, 4)
    assert len(asked) == 10


def test_by_default_rows_are_as_long_as_the_model_reads(reads):
    assert corpus_of_texts(reads, TEXTS).tokens.shape[1] == 9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"context": 1}, "context=1: plain reads 2 to 9 positions"),
        ({"context": 10}, "context=10: plain reads 2 to 9 positions"),
        ({"n_tokens": 0}, "n_tokens=0 must be at least 1, or None"),
        ({"texts": ["w2 w3"]}, "shorter than one row of 9 tokens"),
        ({"texts": []}, "shorter than one row of 9 tokens"),
        ({"texts": [{"content": "w2"}]}, "a string or a record with 'text'; found .*content"),
    ],
)
def test_what_makes_no_rows_is_refused(reads, given, message):
    with pytest.raises(SAEError, match=message):
        corpus_of_texts(reads, **({"texts": TEXTS} | given))


def test_a_model_without_a_tokenizer_is_refused(plain):
    with pytest.raises(TaskError, match="this model has no tokenizer"):
        corpus_of_texts(plain, TEXTS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "w2 w3"}\n\n"w4"\n{"text": "w5", "id": 3}'),
        ("a.json", '["w2 w3", {"text": "w4"}, {"text": "w5"}]'),
        ("a.txt", "w2 w3\n\n \nw4\n\n\nw5"),
    ],
)
def test_files_are_read_document_by_document(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert [text.strip() for text in read_texts(tmp_path / name)] == ["w2 w3", "w4", "w5"]
    assert list(read_texts(str(tmp_path / name))) == list(read_texts(tmp_path / name))


def test_lines_of_a_block_stay_together(tmp_path):
    (tmp_path / "a.txt").write_text("w2\nw3\n\nw4\n")
    assert list(read_texts(tmp_path / "a.txt")) == ["w2\nw3\n", "w4\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text", "'a.csv' is not a kind of text that is read. Give .jsonl, .json or .txt"),
        ("a.jsonl", b'{"text": "w2"}\n{"text"', "a.jsonl' is not what its name says"),
        ("a.json", b"[", "a.json' is not what its name says"),
        ("a.json", b'{"text": "w2"}', "a.json' holds a dict. Give a list of strings or records"),
        ("a.json", b"[3]", "a string or a record with 'text'; found '3'"),
        ("a.txt", b"\xff\xfe\x00", "a.txt' is not what its name says"),
    ],
)
def test_files_that_are_no_texts_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SAEError, match=message):
        list(read_texts(tmp_path / name))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SAEError, match="there is no file .*none.txt'. Give one of text"):
        next(read_texts(tmp_path / "none.txt"))


def test_records_as_datasets_streams_give_them(reads, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text, "meta": {}}) for text in TEXTS))
    streamed = ({"text": text, "meta": {"pile_set_name": "none"}} for text in TEXTS)
    ours, theirs = (corpus_of_texts(reads, texts, context=5) for texts in (read_texts(tmp_path / "a.jsonl"), streamed))
    assert torch.equal(ours.tokens, theirs.tokens)


def task(tokenizer: Tokenizer, name: str, width: int) -> Task:
    """Two prompts with BOS, the second one token shorter."""
    clean = torch.arange(2, 2 + 2 * width).view(2, width)
    clean[:, 0] = 0
    clean[1, -1] = 1
    few = torch.zeros(2, 1, dtype=torch.int64)
    prompts = PromptBatch(clean, clean + (clean > 1), torch.tensor([width - 1, width - 2]), few, few + 1, few[:, 0], {})
    return Task(name, prompts, logit_diff, "logit_diff", "words", ("all",), tokenizer)


def test_tasks_are_kept_up_to_their_end_without_bos(reads):
    tasks = task(reads.tokenizer, "short", 3), task(reads.tokenizer, "long", 5)
    corpus = corpus_of_tasks(*tasks)
    assert corpus.tokens.shape == (8, 5)
    assert corpus.name == "short+long"
    assert corpus.tokens[:3].tolist() == [[0, 3, 4, 1, 1], [0, 6, 1, 1, 1], [0, 4, 5, 1, 1]]
    assert corpus.keep.int().tolist() == [
        *[[0, 1, 1, 0, 0], [0, 1, 0, 0, 0]] * 2,
        *[[0, 1, 1, 1, 1], [0, 1, 1, 1, 0]] * 2,
    ]
    clean = corpus_of_tasks(*tasks, corrupted=False)
    assert torch.equal(clean.tokens, corpus.tokens[[0, 1, 4, 5]])
    with pytest.raises(SAEError, match="no task is given"):
        corpus_of_tasks()
    other = replace(tasks[0], tokenizer=replace(reads.tokenizer, name="letters"))
    with pytest.raises(SAEError, match=r"of several tokenizers \(letters, words\). Give those of one model"):
        corpus_of_tasks(tasks[1], other)


def test_rows_of_ones_own_leave_out_bos_and_padding(reads):
    tokens = torch.tensor([[0, 5, 1, 6, 1], [0, 1, 1, 1, 1], [7, 0, 8, 9, 1]])
    assert Corpus.of(tokens, reads.tokenizer).keep.int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]]
    assert Corpus.of(tokens).keep.all()
    assert Corpus.of(tokens, reads.tokenizer).n_kept == 6


def test_a_split_is_disjoint_complete_and_the_seeds():
    corpus = Corpus.of(torch.arange(200).view(40, 5))
    trained_on, held_out = corpus.split(0.25, seed=3)
    assert (len(trained_on), len(held_out)) == (30, 10)
    firsts = [set(part.tokens[:, 0].tolist()) for part in (trained_on, held_out)]
    assert not firsts[0] & firsts[1]
    assert firsts[0] | firsts[1] == set(range(0, 200, 5))
    assert torch.equal(corpus.split(0.25, seed=3)[1].tokens, held_out.tokens)
    assert not torch.equal(corpus.split(0.25, seed=4)[1].tokens, held_out.tokens)
    for share in (0.0, 1.0, -0.1, 0.99):
        with pytest.raises(SAEError, match=f"held_out={share} of 40 rows leaves nothing on one side"):
            corpus.split(share)


def test_a_fingerprint_changes_with_a_token_and_with_a_position():
    tokens, keep = torch.arange(20).view(4, 5), torch.ones(4, 5, dtype=torch.bool)
    corpus, other = Corpus(tokens, keep), tokens.clone()
    other[3, 4] = 0
    less = keep.clone()
    less[3, 4] = False
    assert corpus.fingerprint == Corpus(tokens.int(), keep.clone()).fingerprint
    assert len({corpus.fingerprint, Corpus(other, keep).fingerprint, Corpus(tokens, less).fingerprint}) == 3
    assert corpus[1:3].fingerprint == corpus[torch.tensor([1, 2])].fingerprint != corpus.fingerprint


def test_nothing_to_keep_and_shapes_that_differ_are_refused():
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(SAEError, match="no position of these tokens is to be kept"):
        Corpus(tokens, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(SAEError, match="no position"):
        Corpus.of(tokens)[:0]
