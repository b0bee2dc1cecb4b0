"""A file is there whole or not at all, and the message says why not."""

import os

import pytest

from mechinterp.errors import CircuitError
from mechinterp.files import read_document, to_document, write_beside, write_text_atomically


def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "notes.txt"
    write_text_atomically(path, "old")

    def interrupted():
        with write_beside(path) as beside:
            beside.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_beside_has_the_same_suffix_and_folder(tmp_path):
    with write_beside(tmp_path / "picture.svg") as beside:
        assert (beside.suffix, beside.parent) == (".svg", tmp_path.resolve())
        beside.touch()


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write_text_atomically(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_text_atomically(tmp_path / "nowhere" / "x.json", "")
    with pytest.raises(NotADirectoryError, match="is a file, not a folder"):
        write_text_atomically(tmp_path / "file" / "x.json", "")
    with pytest.raises(IsADirectoryError, match="Add a file name"):
        write_text_atomically(tmp_path, "")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="read-only for this user"):
        write_text_atomically(tmp_path / "x.json", "")


def test_a_document_is_read_back_and_has_one_entry_a_line(tmp_path):
    content = {"facts": {}, "edges": {"a": [1, {"b": None}], "c": 0.1}, "rows": [[1, 2], [3]], "name": "ü"}
    write_text_atomically(tmp_path / "x.json", to_document("recipe", 2, content))
    assert read_document(tmp_path / "x.json", "recipe", 2, CircuitError) == {"format": "recipe", "version": 2, **content}
    assert '  "c": 0.1' in (tmp_path / "x.json").read_text().splitlines()


@pytest.mark.parametrize("value", [float("nan"), {"a": float("inf")}, [[float("nan")]]])
def test_a_document_is_strict_json(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_document("recipe", 1, {"value": value})
