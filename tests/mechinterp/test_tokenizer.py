"""Text to tokens and back, with the facts that a tokenizer's file does not tell."""

import pytest
import tokenizers

from mechinterp.errors import ModelError
from mechinterp.models.tokenizer import Tokenizer

IDS = {"<bos>": 0, "<pad>": 1, "When": 2, " Mary": 3, " and": 4, " John": 5, "<unk>": 6}


@pytest.fixture(scope="module")
def backend():
    """Whole words with their leading space."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(IDS, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r" ?\w+"), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["<bos>", "<pad>"])
    return backend


@pytest.fixture(scope="module")
def tokenizer(backend):
    return Tokenizer(backend, "toy", bos_id=0, pad_id=1)


def test_text_comes_back(tokenizer):
    ids = tokenizer.encode("When Mary and John")
    assert ids == [2, 3, 4, 5]
    assert tokenizer.decode(ids) == "When Mary and John"
    assert tokenizer.strings(ids) == ["When", " Mary", " and", " John"]
    assert tokenizer.strings([0]) == ["<bos>"], "special tokens are shown, not dropped"


def test_bos_is_prepended_where_the_model_was_trained_with_it_or_where_asked(backend, tokenizer):
    trained_with = Tokenizer(backend, "toy", bos_id=0, prepends_bos=True)
    assert trained_with.encode("When") == [0, 2]
    assert trained_with.encode("When", bos=False) == [2]
    assert tokenizer.encode("When") == [2]
    assert tokenizer.encode("When", bos=True) == [0, 2]
    with pytest.raises(ModelError, match="'toy' has no BOS token. Encode with bos=False"):
        Tokenizer(backend, "toy").encode("When", bos=True)


def test_spans_are_the_characters_each_token_stands_for(tokenizer):
    ids, spans = tokenizer.spans("When Mary")
    assert (ids, spans) == ([2, 3], [(0, 4), (4, 9)])


def test_a_single_token_is_one_known_token_spelled_the_same(tokenizer):
    assert tokenizer.single(" Mary") == 3
    assert tokenizer.single("Mary") is None, "the leading space belongs to it"
    assert tokenizer.single(" Mary and") is None
    assert tokenizer.single(" Zoe") is None


def test_what_is_saved_is_read_back_without_padding_or_truncation(backend, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path, "toy")
    assert (again.bos_id, again.pad_id, again.prepends_bos) == (0, 1, False)
    strict = tokenizers.Tokenizer.from_str(backend.to_str())
    strict.enable_truncation(2)
    strict.enable_padding(length=9)
    strict.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_directory(tmp_path, "toy").encode("When Mary and John") == [2, 3, 4, 5]


def test_a_file_alone_tells_the_padding_by_its_usual_name(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    alone = Tokenizer.from_file(tmp_path / "tokenizer.json", "toy", bos="<bos>", prepends_bos=True)
    assert (alone.bos_id, alone.pad_id, alone.encode("When")) == (0, 1, [0, 2])
    with pytest.raises(ModelError, match="there is no tokenizer file at .*Save one there"):
        Tokenizer.from_file(tmp_path / "missing.json", "toy")


def test_a_fast_hugging_face_tokenizer_is_wrapped_and_a_slow_one_refused(backend):
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", pad_token="<pad>")
    wrapped = Tokenizer.from_transformers(fast, "toy")
    assert (wrapped.bos_id, wrapped.pad_id, wrapped.prepends_bos) == (0, 1, False)
    assert wrapped.encode("When Mary") == [2, 3]
    with pytest.raises(ModelError, match=r"object is a slow tokenizer. Load a fast one"):
        Tokenizer.from_transformers(object())


PIECES = ["▁", "M", "a", "r", "y", "▁M", "▁Ma", "▁Mar", "▁Mary", "n", "d", "▁a", "▁an", "▁and", "<0x0A>"]
MERGES = [("▁", "M"), ("▁M", "a"), ("▁Ma", "r"), ("▁Mar", "y"), ("▁", "a"), ("▁a", "n"), ("▁an", "d")]


@pytest.fixture(scope="module", params=["Llama", "Gemma"])
def sentence_piece(request):
    """A SentencePiece tokenizer as Hugging Face converts it: Llama's puts a space before every text, Gemma's does not."""
    transformers = pytest.importorskip("transformers")
    special = {"Llama": ["<unk>", "<s>", "</s>"], "Gemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]}[request.param]
    ids = {piece: i for i, piece in enumerate([*special, *PIECES])}
    make = getattr(transformers, f"{request.param}Tokenizer")
    return make(vocab=ids, merges=MERGES, add_bos_token=True)


def test_a_sentence_piece_tokenizer_gives_its_own_ids_and_adds_the_bos_it_was_trained_with(sentence_piece):
    ours = Tokenizer.from_transformers(sentence_piece, "small")
    for text in ("Mary and Mary", " Mary", "Mary\nand"):
        assert ours.encode(text) == sentence_piece(text).input_ids
        assert ours.decode(ours.encode(text, bos=False)).removeprefix(" ") == text.removeprefix(" ")
    assert ours.prepends_bos
    assert ours.encode("Mary")[0] == ours.bos_id == sentence_piece.bos_token_id


def test_a_sentence_piece_word_is_one_token_with_its_leading_space(sentence_piece):
    """Inside of a text, where tasks need it, whatever the tokenizer does to a text's beginning."""
    ours = Tokenizer.from_transformers(sentence_piece, "small")
    mary, conjunction = ours.single(" Mary"), ours.single(" and")
    assert ours.spans("a Mary and")[0][-2:] == [mary, conjunction]
    assert ours.spans("a Mary and")[1][-2:] == [(1, 6), (6, 10)]
    assert ours.strings([mary, conjunction, ours.bos_id]) == [" Mary", " and", ours.decode([ours.bos_id])]
    assert ours.single("Mary") is None
    assert ours.strings([ours.single("y")]) == ["y"]


def test_pieces_of_a_text_join_to_the_text_wherever_it_is_cut(sentence_piece, tokenizer):
    for some, text in ((Tokenizer.from_transformers(sentence_piece, "small"), "Mary and Mary"), (tokenizer, "to Mary")):
        ids = some.encode(text)
        for cut in range(len(ids) + 1):
            assert some.decode(ids[:cut]) + some.decode(ids[cut:], after=ids[:cut]) == some.decode(ids)


def test_padding_is_what_a_tokenizer_has_for_it(sentence_piece):
    """Its own token; else the end of a text, which in no prompt stands before anything."""
    wanted = sentence_piece.pad_token_id if sentence_piece.pad_token_id is not None else sentence_piece.eos_token_id
    assert Tokenizer.from_transformers(sentence_piece, "small").pad_id == wanted


def test_what_is_saved_of_a_sentence_piece_tokenizer_is_read_back(sentence_piece, tmp_path):
    ours = Tokenizer.from_transformers(sentence_piece, "small")
    ours.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path, "small")
    assert again.encode("Mary and") == ours.encode("Mary and")
    assert (again.single(" Mary"), again.pad_id) == (ours.single(" Mary"), ours.pad_id)
