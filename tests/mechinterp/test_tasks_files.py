"""Prompt files: every published form on a small example, the real files where they are, and errors that help."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from mechinterp.errors import TaskError
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.tasks.files import from_file
from mechinterp.tasks.published import FORMATS

YEARS = [f"{year:02d}" for year in range(100)]
WORDS = [
    *["<bos>", "Then", "When", ",", ".", " and", " met", " thanked", " to", " the", " capital", " of", " other", " is", " are"],
    *[" Mary", " John", " Anna", " Paul", " Kabul", " Rome", " Afghanistan", " Italy", " dogs", " roses", " animals"],
    *[" flowers", " dog", " sings", " sing", " Blue", " Red", " war", " 17", " A", " B", " he", " she", " poet", " nun", "The"],
]
OWN = {
    "clean": "Then Mary and John met. John thanked",
    "corrupted": "Then Mary and John met. Mary thanked",
    "answers": [" Mary"],
    "foils": " John",
}
IOI = {"clean": OWN["clean"], "corrupted": OWN["corrupted"], "corrupted_hard": "Then Mary and John met. Paul thanked"}


@pytest.fixture(scope="module")
def model():
    """Stands for a model: a tokenizer of whole words, each with its leading space."""
    ids = {word: index for index, word in enumerate([*WORDS, *YEARS])}
    backend = tokenizers.Tokenizer(WordLevel(ids, unk_token="<bos>"))
    backend.pre_tokenizer = Split(tokenizers.Regex(r"\d\d| ?[A-Za-z]+| \d\d|[.,]"), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return SimpleNamespace(tokenizer=Tokenizer(backend, "toy", bos_id=0))


@pytest.fixture
def example(tmp_path, model):
    """How to write a small file of each format: ``example(format) -> its path``."""
    ids = {word: model.tokenizer.single(f" {word}") for word in ("Mary", "John", "he", "she", "Afghanistan", "Italy")}
    verbs, minimal = [{"idx": "_", "sing": "sings", "plur": "sing"}], [[OWN["corrupted"], " Red"]]
    auto = {"clean": OWN["clean"], "corrupt": OWN["corrupted"], "answers": [" Mary"], "wrong_answers": [" John", " Paul"]}
    years = {"clean": "The war 1732 to 17", "corrupted": "The war 1701 to 17"}
    gender = {"clean": "The poet is", "corrupted": "The nun is"}
    kabul = {"clean": " Kabul, the capital of", "capital": "Kabul", "country": "Afghanistan"}
    rome = {"corrupted": " Rome, the capital of", "corrupted_capital": "Rome", "corrupted_country": "Italy"}
    dogs = {"clean": ", dogs and other", "answers": "['animals', 'dogs']", "answers_idx": "[1, 2]"}
    roses = {"corrupted": ", roses and other", "corrupted_answers": "['flowers']", "corrupted_answers_idx": "[3]"}
    names = {"metadata": {"indirect_object": "Mary", "subject": "John", "random_c": "Paul"}}
    contents = {
        "own": [OWN],
        "auto-circuit": {"prompts": [auto]},
        "circuit-reuse": [[OWN["clean"], " Blue"]],
        "mib": [{"prompt": OWN["clean"], **names, "s2_io_flip_counterfactual": {"prompt": OWN["corrupted"]}}],
        "eap-ig-two-ids": [{"": 826, **IOI, "correct_idx": ids["Mary"], "incorrect_idx": ids["John"]}],
        "gender-bias": [gender | {"clean_answer_idx": ids["he"], "corrupted_answer_idx": ids["she"], "label": 1}],
        "fact-retrieval": [{**kabul, "country_idx": ids["Afghanistan"], **rome, "corrupted_country_idx": ids["Italy"]}],
        "hypernymy": [dogs | roses],
        "subject-verb": [{"clean": "The dog", "corrupted": "The dogs", "group": "simple", "plural": 0}],
        "eap-ig-greater-than": [years | {"label": 32}],
        "eap-ig-greater-than-idx": [years | {"correct_idx": 32}],
    }

    def write(format: str) -> Path:
        write_csv(tmp_path / "combined_verb_list.csv", verbs)
        write_json(tmp_path / "cobjs_mindiff_data_1.json", minimal)
        if format in ("auto-circuit", "circuit-reuse"):
            return write_json(tmp_path / "cobjs_data_1.json", contents[format])
        if format in ("own", "mib"):
            return write_lines(tmp_path / "prompts.jsonl", contents[format])
        return write_csv(tmp_path / "prompts.csv", contents[format])

    return write


COMPARED = {
    "own": ([" Mary"], [" John"]),
    "auto-circuit": ([" Mary"], [" John", " Paul"]),
    "circuit-reuse": ([" Blue"], [" Red"]),
    "mib": ([" Mary"], [" John"]),
    "eap-ig-two-ids": ([" Mary"], [" John"]),
    "gender-bias": ([" he"], [" she"]),
    "fact-retrieval": ([" Afghanistan"], [" Italy"]),
    "hypernymy": ([" animals", " dogs"], [" flowers"]),
    "subject-verb": ([" sings"], [" sing"]),
    "eap-ig-greater-than": (YEARS[33:], YEARS[:33]),
    "eap-ig-greater-than-idx": (YEARS[33:], YEARS[:33]),
}


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_of_each_format_is_recognised_and_read(model, example, format):
    task = from_file(model, example(format), trust_ids=format == "gender-bias")
    assert task.notes["format"] == format
    assert compared(model, task) == COMPARED[format]
    assert task.metric_name == FORMATS[format].metric
    assert task.metric(torch.zeros(len(task), 200), task.prompts).shape == (len(task),)
    assert (task.prompts.clean != task.prompts.corrupted).any()


def test_the_corruption_can_be_chosen_among_those_in_the_file(model, example):
    path = example("eap-ig-two-ids")
    assert " Paul" in from_file(model, path, corruption="corrupted_hard").text(0, corrupted=True)
    with pytest.raises(TaskError, match="no corruption 'harder'; it has corrupted, corrupted_hard"):
        from_file(model, path, corruption="harder")


def test_a_corruption_that_the_file_does_not_have_is_refused(model, example):
    with pytest.raises(TaskError, match=r"one way, 'from file', and not by 'typo'"):
        from_file(model, example("own"), corruption="typo")


def test_token_ids_of_another_tokenizer_are_refused(model, tmp_path):
    wrong = {name: model.tokenizer.single(word) + 1 for name, word in (("correct_idx", " Mary"), ("incorrect_idx", " John"))}
    path = write_csv(tmp_path / "ioi.csv", [IOI | wrong])
    with pytest.raises(TaskError, match=r"does not look like 'toy'.*trust_ids=True"):
        from_file(model, path)
    assert compared(model, from_file(model, path, trust_ids=True)) == ([" John"], [" Anna"])


def test_ids_without_words_to_check_need_the_users_word(model, example):
    with pytest.raises(TaskError, match="trust_ids=True"):
        from_file(model, example("gender-bias"))


def test_unequal_pairs_and_words_of_several_tokens_are_dropped_and_counted(model, tmp_path):
    rows = [
        OWN,
        OWN | {"corrupted": OWN["corrupted"] + " to"},
        OWN | {"corrupted": OWN["clean"]},
        OWN | {"answers": " Mary Mary"},
        OWN | {"foils": [" Mary"]},
    ]
    task = from_file(model, write_lines(tmp_path / "mine.jsonl", rows))
    assert len(task) == 1
    assert task.notes["rows"] == 5
    assert task.notes["dropped"] == {
        "clean and corrupted differ in length": 1,
        "clean and corrupted are the same": 1,
        "no answer or no foil is a single token": 1,
        "a token is both answer and foil": 1,
        "words of several tokens": 1,
    }


def test_a_file_of_which_nothing_survives_says_why(model, tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", [OWN | {"answers": [" Zebedee"]}])
    with pytest.raises(TaskError, match=r"none of the 1 pairs in mine.jsonl .* 'toy' .*leading space"):
        from_file(model, path)


def test_prompts_are_drawn_by_seed_and_at_most_as_many_as_there_are(model, tmp_path):
    names = [" Mary", " John", " Anna", " Paul"]
    rows = [OWN | {"clean": f"Then{a} and{b} met", "corrupted": f"Then{b} and{a} met"} for a in names for b in names if a != b]
    path = write_lines(tmp_path / "mine.jsonl", rows)
    drawn = [from_file(model, path, n_prompts=5, seed=seed).prompts.clean for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert len(from_file(model, path, n_prompts=999)) == len(rows)
    with pytest.raises(TaskError, match="n_prompts=0"):
        from_file(model, path, n_prompts=0)


def test_prompts_of_different_length_are_padded_and_grouped(model, tmp_path):
    short = OWN | {"clean": "Then Mary thanked", "corrupted": "Then John thanked"}
    task = from_file(model, write_lines(tmp_path / "mine.jsonl", [OWN, short]), bos=True)
    assert task.group_names == ("4 tokens", "9 tokens")
    assert task.prompts.groups.tolist() == [1, 0]
    assert task.prompts.end.tolist() == [8, 3]
    assert task.prompts.positions["CHANGED"].tolist() == [7, 2]
    assert task.prompts.clean[:, 0].tolist() == [0, 0]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("counted_bos", [0, 1])
@pytest.mark.parametrize("told_by", ["starts", "end"])
def test_auto_circuits_positions_are_right_with_and_without_bos(model, tmp_path, bos, counted_bos, told_by):
    prompt = {"clean": OWN["clean"], "corrupt": OWN["corrupted"], "answers": [" Mary"], "wrong_answers": [" John"]}
    index = {"S2": 6 + counted_bos, "end": 7 + counted_bos} | ({"starts": counted_bos} if told_by == "starts" else {})
    task = from_file(model, write_json(tmp_path / "ac.json", {"prompts": [prompt], "word_idxs": index}), bos=bos)
    assert words(model, task.prompts.clean[0, task.prompts.positions["S2"]]) == [" John"]


@pytest.mark.parametrize("index", [{"S2": 6, "end": 12, "starts": 0}, {"S2": 6, "end": 12}, {"S2": 40}])
def test_positions_of_another_tokenizer_are_left_out_and_counted(model, tmp_path, index):
    prompt = {"clean": OWN["clean"], "corrupt": OWN["corrupted"], "answers": [" Mary"], "wrong_answers": [" John"]}
    task = from_file(model, write_json(tmp_path / "ac.json", {"prompts": [prompt], "word_idxs": index}))
    assert set(task.prompts.positions) == {"END", "CHANGED"}
    assert task.notes["dropped"] == {"named positions that do not fit these tokens": len(index)}


def test_prompts_as_token_ids_need_the_users_word(model, tmp_path):
    clean, corrupted = (model.tokenizer.encode(OWN[name], bos=False) for name in ("clean", "corrupted"))
    prompt = {"clean": clean, "corrupt": corrupted, "answers": [clean[1]], "wrong_answers": [clean[3]]}
    path = write_json(tmp_path / "tracr.json", {"prompts": [prompt]})
    with pytest.raises(TaskError, match="token ids"):
        from_file(model, path)
    assert from_file(model, path, trust_ids=True).prompts.clean[0].tolist() == clean


@pytest.mark.parametrize("change", [{"clean": [[0.5, 1.0]], "corrupt": [[0.5, 0.0]]}, {"answers": [[1, 2]]}])
def test_vectors_and_answers_at_several_positions_are_refused(model, tmp_path, change):
    prompt = {"clean": OWN["clean"], "corrupt": OWN["corrupted"], "answers": [" Mary"], "wrong_answers": [" John"]} | change
    with pytest.raises(TaskError, match="vectors, or answers at several positions"):
        from_file(model, write_json(tmp_path / "micro.json", {"prompts": [prompt]}), trust_ids=True)


def test_unknown_columns_are_named_with_what_would_do(model, tmp_path):
    path = write_csv(tmp_path / "x.csv", [{"sentence": "a", "target": "b"}])
    with pytest.raises(TaskError, match=r"columns sentence, target.*own: answers, clean, corrupted, foils"):
        from_file(model, path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.jsonl", None, "there is no prompt file"),
        ("empty.jsonl", "", "holds no rows"),
        ("half.jsonl", '{"clean": "a', "cannot be read as .jsonl"),
        ("ragged.jsonl", json.dumps(OWN) + '\n{"clean": "a"}', "row 2 lacks 'corrupted', 'answers', 'foils'"),
        ("alone_data_1.json", '[["a", " b"]]', "minimal pairs.*companion="),
        ("year.csv", "clean,corrupted,label\nThe war 1732 to 17,The war 1701 to 17,33\n", "line 2: label = 33 should be"),
        ("list.csv", "clean,corrupted,answers,corrupted_answers\na,b,f(),[]\n", "cannot be read as 'hypernymy'"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(model, tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(TaskError, match=message):
        from_file(model, tmp_path / name)


def test_unknown_format_and_metric_suggest_the_nearest(model, example):
    with pytest.raises(TaskError, match="Did you mean 'auto-circuit'"):
        from_file(model, example("own"), format="autocircuit")
    with pytest.raises(TaskError, match="Did you mean 'logit_diff'"):
        from_file(model, example("own"), metric="logit_dif")


DATA = Path(__file__).parents[3] / "shared" / "data"
real_files = pytest.mark.skipif(not (DATA / "tasks").is_dir(), reason="the published files are not beside this checkout")


@pytest.fixture(scope="module")
def gpt2():
    tokenizer = Tokenizer.from_file(DATA / "gpt2_tokenizer" / "tokenizer.json", "gpt2", bos="<|endoftext|>")
    return SimpleNamespace(tokenizer=tokenizer)


@real_files
def test_the_published_greater_than_file(gpt2):
    task = from_file(gpt2, DATA / "tasks" / "eapig_greater_than_data.csv")
    assert task.notes["rows"] == 1000
    assert len(task) + sum(task.notes["dropped"].values()) == 1000
    assert task.prompts.clean.shape[1] == 12
    changed = task.prompts.corrupted.gather(1, task.prompts.positions["CHANGED"][:, None])
    assert set(changed.flatten().tolist()) == {486}  # "01"
    assert task.text(0) == "The contract lasted from the year 1352 to the year 13"


@real_files
def test_the_published_colored_objects_files(gpt2):
    task = from_file(gpt2, DATA / "tasks" / "merullo_cobjs_data_42.json")
    assert len(task) == 1000
    assert set(task.prompts.end.tolist()) == {61}
    assert set(task.prompts.positions["CHANGED"].tolist()) == {57}
    assert compared(gpt2, task) == ([" Blue"], [" Black"])


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def words(model, tokens) -> list[str]:
    return model.tokenizer.strings(tokens.tolist())


def compared(model, task, row=0) -> tuple[list[str], list[str]]:
    """The answers and the foils of a prompt, as text."""
    tokens, roles = task.prompts.candidates[row], task.prompts.roles[row]
    return words(model, tokens[roles > 0]), words(model, tokens[roles < 0])
