"""README's code runs, and its lists name what there is."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


LEFT = {"ioi.json": "100 ", "sae.html": "CE rec. (mean)"}  # what each block writes, and part of what it prints


@pytest.mark.parametrize(("code", "written"), list(zip(BLOCKS, LEFT, strict=True)))
def test_the_code_runs(code, written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert LEFT[written] in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == [written]


def test_the_lists_name_every_task_and_method():
    from circuits import ALGORITHMS
    from mechinterp.tasks import TASKS
    from saes.objectives import OBJECTIVES

    for name in [*TASKS, *ALGORITHMS, *OBJECTIVES]:
        assert f"| `{name}` |" in README


def test_the_picture_is_there():
    assert all((Path(__file__).parent.parent / path).is_file() for path in re.findall(r"!\[.*?\]\((.*?)\)", README))


def test_the_first_block_is_short():
    assert len(BLOCKS[0].strip().splitlines()) <= 12
