"""``mechinterp repair``, on the built-in model."""

from pathlib import Path

import pytest

from circuits.repairs.report import Repair
from circuits.repairs.search import Proposal
from mechinterp.cli.repair import FILES, repair
from mechinterp.errors import CircuitError, TaskError

SMALL = {"prompts": 8, "random": 2}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_named_heads_are_edited_and_reported(here, capsys):
    repair("colored-objects", ["color1,color2,color3,-answer_color"], heads="a3.h1, a2.h0", **SMALL)
    printed = capsys.readouterr().out
    found = Repair.load(here / "mechinterp-repair-colored-objects" / "repair.json")
    assert found.edited.heads == ("a3.h1", "a2.h0")
    assert len(found.controls) == 2
    assert str(found) in printed
    assert {file.name for file in (here / "mechinterp-repair-colored-objects").iterdir()} == set(FILES) - {"proposal.json"}


def test_a_search_proposes_them_on_prompts_of_its_own(here, capsys):
    repair("ioi", ["IO", "S2"], most=1, out=here / "found", **SMALL)
    found, proposal = Repair.load(here / "found" / "repair.json"), Proposal.load(here / "found" / "proposal.json")
    assert {file.name for file in (here / "found").iterdir()} == set(FILES)
    assert found.edited.heads == tuple(head for heads in proposal.groups.values() for head in heads)
    assert found.facts["n_seen"] == 0
    assert "| step | head |" in capsys.readouterr().out


def test_a_failure_leaves_nothing_behind(here):
    with pytest.raises(TaskError, match="no position 'S3'"):
        repair("ioi", ["S3"], **SMALL)
    with pytest.raises(CircuitError, match="one --to"):
        repair("ioi", ["IO", "S2"], heads="a1.h0", **SMALL)
    assert list(here.iterdir()) == []


def test_a_small_file_is_not_searched_whole(here, capsys):
    scene = "Then, Mary and %s met at the park. "
    pair = f'{{"clean": "{scene}%s handed a ring to", "corrupted": "{scene}Mary handed a ring to", '
    pair += '"answers": [" Mary"], "foils": [" %s"]}'
    names = ("John", "Christine", "Bradley")
    (here / "few.jsonl").write_text("\n".join(pair % ((name,) * 4) for name in names))
    with pytest.raises(CircuitError, match=r"has \d usable prompts.*--prompts 1\)"):
        repair("few.jsonl", ["CHANGED"])
    repair("few.jsonl", ["CHANGED"], heads="a3.h2", random=0)
    assert "attend to CHANGED" in capsys.readouterr().out
