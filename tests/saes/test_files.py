"""Autoencoders on disk: whole or not at all, equal when read back, and plain words for every broken folder."""

import errno
import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

import saes.files
from mechinterp.errors import SAEError
from saes.base import SparseAutoencoder
from saes.files import load, save
from saes.places import Place


def of(*places: str, **facts) -> SparseAutoencoder:
    return SparseAutoencoder.random([Place.parse(place) for place in places], d_in=4, d_sae=8, **facts)


@pytest.fixture
def heads() -> SparseAutoencoder:
    """In an order of their own, which must survive."""
    return of("z.1.h0", "z.0.h2", "z.0.h0", kind="topk", k=2, about={"model": "gpt2", "dead": [0, 3, 1]})


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(left: SparseAutoencoder, right: SparseAutoencoder):
    assert (left.places, left.kind, left.k, dict(left.about)) == (right.places, right.kind, right.k, dict(right.about))
    assert all(torch.equal(left.tensors[name], tensor) for name, tensor in right.tensors.items())


def test_one_group_is_one_folder(tmp_path):
    save(of("z.1"), tmp_path / "new" / "sae")
    assert names(tmp_path / "new") == ["sae"]
    assert names(tmp_path / "new" / "sae") == ["cfg.json", "sae_weights.safetensors"]
    modes = {path.stat().st_mode for path in (tmp_path / "new" / "sae").iterdir()}
    assert len(modes) == 1
    assert_same(load(tmp_path / "new" / "sae"), of("z.1"))


def test_several_groups_are_a_folder_for_each(heads, tmp_path):
    save(heads, tmp_path / "saes")
    assert names(tmp_path / "saes") == ["autoencoder.json", "z.0.h0", "z.0.h2", "z.1.h0"]
    assert_same(load(tmp_path / "saes"), heads)
    alone = replace(heads.group("z.0.h2"), about={"model": "gpt2"})
    assert_same(load(tmp_path / "saes" / "z.0.h2"), alone)


def test_places_that_sae_lens_has_no_name_for_are_kept(tmp_path):
    save(of("z_written.1"), tmp_path / "sae")
    assert_same(load(tmp_path / "sae"), of("z_written.1"))


def test_double_precision_is_written_in_single(tmp_path):
    save(of("z.1").to(dtype=torch.float64), tmp_path / "sae")
    assert_same(load(tmp_path / "sae"), of("z.1"))


def test_a_folder_that_exists_is_replaced_only_when_asked(heads, tmp_path):
    save(of("z.1"), tmp_path / "sae")
    with pytest.raises(SAEError, match="exists already.*overwrite=True"):
        save(heads, tmp_path / "sae")
    assert_same(load(tmp_path / "sae"), of("z.1"))
    save(heads, tmp_path / "sae", overwrite=True)
    assert_same(load(tmp_path / "sae"), heads)
    save(of("z.1"), tmp_path / "sae", overwrite=True)
    assert_same(load(tmp_path / "sae"), of("z.1"))
    assert names(tmp_path) == ["sae"]


@pytest.mark.parametrize("foreign", ["thesis.tex", "z.0.h0/trainer_state.pt", "papers/one.pdf"])
def test_overwriting_never_takes_anything_else_with_it(heads, foreign, tmp_path):
    save(heads, tmp_path / "saes")
    (tmp_path / "saes" / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / "saes" / foreign).write_text("mine")
    with pytest.raises(SAEError, match=f"also holds {foreign.split('/')[0]}"):
        save(heads, tmp_path / "saes", overwrite=True)
    assert (tmp_path / "saes" / foreign).read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SAEError, match="is a file"):
        save(heads, tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O (os error 28)")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_things_as_they_were(heads, problem, overwrite, tmp_path, monkeypatch):
    if overwrite:
        save(of("z.1"), tmp_path / "saes")
    written = []

    def until_full(tensors, path):
        if len(written) == 2:
            raise problem
        written.append(path)
        path.write_bytes(b"")

    monkeypatch.setattr(saes.files, "save_file", until_full)
    with pytest.raises(OSError, match="Errno 28|os error 28") as raised:
        save(heads, tmp_path / "saes", overwrite=overwrite)
    assert raised.value.errno == errno.ENOSPC
    assert names(tmp_path) == (["saes"] if overwrite else [])
    if overwrite:
        assert_same(load(tmp_path / "saes"), of("z.1"))


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are POSIX'")
def test_a_write_that_the_system_really_refuses_leaves_nothing(tmp_path):
    script = (
        "import resource, signal, sys; from saes.base import SparseAutoencoder; from saes.files import save\n"
        "from saes.places import Place; big = SparseAutoencoder.random([Place.parse('z.0')], d_in=64, d_sae=256)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try:\n    save(big, sys.argv[1])\nexcept OSError as problem:\n    sys.exit(problem.errno)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "sae")], check=False)
    assert done.returncode == errno.EFBIG
    assert names(tmp_path) == []


def test_the_old_one_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    save(of("z.1"), tmp_path / "sae")
    rename = type(tmp_path).rename

    def refused(path, target):
        if path.name.startswith(".sae.") and not path.name.endswith(".old"):
            raise PermissionError("not now")
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", refused)
    with pytest.raises(PermissionError):
        save(of("z.0"), tmp_path / "sae", overwrite=True)
    assert names(tmp_path) == ["sae"]
    assert_same(load(tmp_path / "sae"), of("z.1"))


@pytest.mark.parametrize("fact", [math.nan, math.inf, torch.zeros(1), {1, 2}])
def test_facts_that_json_cannot_keep_are_refused_before_anything_is_written(fact, tmp_path):
    with pytest.raises(SAEError, match="`about` holds what JSON cannot keep"):
        save(of("z.1", about={"loss": fact}), tmp_path / "sae")
    assert names(tmp_path) == []


def test_a_link_stays_a_link(tmp_path):
    save(of("z.1"), tmp_path / "sae")
    os.symlink(tmp_path / "sae", tmp_path / "latest")
    save(of("z.0"), tmp_path / "latest", overwrite=True)
    assert (tmp_path / "latest").is_symlink()
    assert_same(load(tmp_path / "sae"), of("z.0"))


def test_nothing_there_says_where_autoencoders_come_from(tmp_path):
    with pytest.raises(SAEError, match=r"does not exist.*from_pretrained"):
        load(tmp_path / "gpt2-small-hook-z-kk")
    (tmp_path / "file").write_text("")
    with pytest.raises(SAEError, match="is a file"):
        load(tmp_path / "file")
    with pytest.raises(SAEError, match="holds no cfg.json"):
        load(tmp_path)


def test_pickles_are_named_and_never_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "sae_weights.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(SAEError, match=r"sae_weights.pt: pickles, which are never read.*safetensors"):
        load(tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").write_text("{}")
    with pytest.raises(SAEError, match="no sae_weights.safetensors.*pickles"):
        load(tmp_path / "sae")
    assert names(tmp_path) == ["sae"]


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_weights_are_named(keep, tmp_path):
    save(of("z.1"), tmp_path / "sae")
    weights = tmp_path / "sae" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(SAEError, match=r"sae_weights.safetensors' cannot be read as safetensors.*Copy or download"):
        load(tmp_path / "sae")
    weights.unlink()
    with pytest.raises(SAEError, match="and no sae_weights.safetensors"):
        load(tmp_path / "sae")


@pytest.mark.parametrize("text", ["", '{"d_in": 4', "[1]", "\x00", "[" * 100_000])
def test_a_broken_configuration_is_named(text, tmp_path):
    save(of("z.1"), tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").write_text(text)
    with pytest.raises(SAEError, match="cfg.json'"):
        load(tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").write_bytes(b"\xff\xfe")
    with pytest.raises(SAEError, match="cfg.json' is not JSON"):
        load(tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").unlink()
    with pytest.raises(SAEError, match="no cfg.json, which says what the weights mean"):
        load(tmp_path / "sae")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"places": ["z.0.h0", "z.9.h9"]}, "lacks z.9.h9"),
        ({"places": ["../z.0.h0"]}, "does not list places"),
        ({"places": None}, "does not list places"),
        ({"format": "something else"}, "something else"),
        ({"version": 99}, "version 99"),
    ],
)
def test_a_broken_index_is_explained(heads, change, says, tmp_path):
    save(heads, tmp_path / "saes")
    index = tmp_path / "saes" / "autoencoder.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(SAEError, match=says):
        load(tmp_path / "saes")


def test_a_renamed_folder_and_one_place_for_many_are_refused(heads, tmp_path):
    save(heads, tmp_path / "saes")
    with pytest.raises(SAEError, match="3 autoencoders and not one"):
        load(tmp_path / "saes", place="z.0.h0")
    (tmp_path / "saes" / "z.0.h0").rename(tmp_path / "away")
    (tmp_path / "saes" / "z.0.h2").rename(tmp_path / "saes" / "z.0.h0")
    (tmp_path / "away").rename(tmp_path / "saes" / "z.0.h2")
    with pytest.raises(SAEError, match="Was the folder renamed"):
        load(tmp_path / "saes")


def test_groups_of_different_counts_are_refused(tmp_path):
    save(of("z.0", kind="topk", k=2), tmp_path / "saes" / "a")
    save(of("z.1", kind="topk", k=3), tmp_path / "saes" / "b")
    with pytest.raises(SAEError, match=r"saes/b' has k=3 and .*saes/a' k=2"):
        load(tmp_path / "saes")
