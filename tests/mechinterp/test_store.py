"""The activation store: computed once, found again, whole or absent, and never read when damaged."""

import json
import os
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from mechinterp.errors import StoreError, UnknownSite
from mechinterp.models.transformer import Transformer
from mechinterp.sites import Site, all_sites
from mechinterp.store import ActivationStore, _claim


@pytest.fixture
def store(tmp_path):
    return ActivationStore(tmp_path / "store")


@pytest.fixture
def forwards(monkeypatch):
    """The number of prompts of each forward pass since the test began."""
    counted, run = [], Transformer.run

    def counting(self, tokens, **settings):
        counted.append(len(tokens))
        return run(self, tokens, **settings)

    monkeypatch.setattr(Transformer, "run", counting)
    return counted


@pytest.fixture
def stored(store, plain, tokens):
    """The folder of an entry with one site, in two shards."""
    store.cached_run(plain, tokens, ["z.0"], batch_size=2, shard_bytes=1)
    return store.directory / store.key(plain, tokens, ["z.0"])


def test_what_is_stored_is_what_the_pass_computes_at_every_site(store, model, tokens):
    sites = all_sites(model.config)
    cache = store.cached_run(model, tokens, sites, batch_size=3, dtype=torch.float64)
    _, whole = model.run(tokens, record=sites)
    assert set(cache) == set(sites)
    for site in sites:
        assert_close(cache[site], whole[site], atol=1e-10, rtol=1e-10)


def test_the_second_call_runs_no_forward(store, plain, tokens, forwards):
    first = store.cached_run(plain, tokens, ["z"], batch_size=3)
    assert forwards == [3, 1]
    again = ActivationStore(store.directory).cached_run(plain, tokens, ["blocks.2.attn.hook_z", "z.1", "z.0"])
    assert forwards == [3, 1]
    assert all(torch.equal(first[site], again[site]) for site in first)


def test_the_cache_that_comes_back_knows_what_nodes_wrote(store, plain, tokens):
    cache = store.cached_run(plain, tokens, ["z", "mlp_out"], dtype=torch.float64)
    _, whole = plain.run(tokens, record=["z", "mlp_out"])
    assert_close(cache.output("a1.h2"), whole.output("a1.h2"))


def test_the_key_tells_weights_tokens_sites_and_dtype_apart(store, plain, make_model, tokens):
    key = store.key(plain, tokens, ["z.0", "z.1"])
    assert key == store.key(plain.to(dtype=torch.float64), tokens.int(), [Site("z", 1), "z.0", "z.0"])
    others = [
        store.key(make_model(seed=1), tokens, ["z.0", "z.1"]),
        store.key(plain, tokens.flip(0), ["z.0", "z.1"]),
        store.key(plain, tokens.reshape(7, 4), ["z.0", "z.1"]),
        store.key(plain, tokens, ["z.0"]),
        store.key(plain, tokens, ["z.0", "z.1"], torch.float16),
    ]
    assert len({key, *others}) == 6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_each_dtype_is_stored_to_its_own_precision(store, plain, tokens, dtype, bound):
    kept = store.cached_run(plain, tokens, ["resid_post.1"], dtype=dtype)["resid_post", 1]
    exact = plain.run(tokens, record=["resid_post.1"])[1]["resid_post", 1]
    assert kept.dtype == dtype
    assert_close(kept.double(), exact, atol=bound, rtol=bound)
    assert torch.equal(kept, exact.to(dtype))


def test_what_float16_cannot_hold_is_refused_and_infinite_scores_are_kept(store, plain, tokens):
    kept = store.cached_run(plain, tokens, ["attn_scores.0"], dtype=torch.float16)
    assert kept["attn_scores", 0].isneginf().any()
    huge = Transformer(replace(plain.weights, W_E=plain.weights.W_E * 1e6))
    with pytest.raises(StoreError, match=r"'embed' reaches .* float16 ends at 65504. Store bfloat16 or float32"):
        store.cached_run(huge, tokens, ["embed"], dtype=torch.float16)


def test_nothing_is_read_until_it_is_used_and_writing_leaves_the_file_alone(store, plain, tokens):
    first = store.cached_run(plain, tokens, ["z.0"])["z", 0]
    before = first.clone()
    first.zero_()
    again = store.cached_run(plain, tokens, ["z.0"])["z", 0]
    assert torch.equal(again, before)
    rows = again.flatten(0, 1)
    assert rows.data_ptr() == again.data_ptr(), "positions of all prompts in one axis, without a copy"
    store.verify(store.key(plain, tokens, ["z.0"]))


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_harvest_goes_on_with_its_next_shard(store, plain, tokens, monkeypatch, after):
    run, ran = Transformer.run, []

    def interrupted(self, batch, **settings):
        if len(ran) == after:
            raise KeyboardInterrupt
        ran.append(len(batch))
        return run(self, batch, **settings)

    key = store.key(plain, tokens, ["z", "mlp_out.1"])
    monkeypatch.setattr(Transformer, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.cached_run(plain, tokens, ["z", "mlp_out.1"], batch_size=1, shard_bytes=3000)  # a shard is two prompts
    assert store.entries() == []
    assert store.size > 0
    monkeypatch.setattr(Transformer, "run", run)
    resumed = count_calls(monkeypatch)
    cache = store.cached_run(plain, tokens, ["z", "mlp_out.1"], batch_size=1, shard_bytes=3000, dtype=torch.float32)
    assert sum(resumed) == 4 - after // 2 * 2, "what was sealed is not computed again, what was not sealed is"
    whole = plain.run(tokens, record=["z", "mlp_out.1"])[1]
    assert all(
        torch.equal(cache[site], whole[site].float()) or (cache[site] - whole[site]).abs().max() < 1e-6 for site in cache
    )
    store.verify(key)
    assert [path.name for path in store.directory.iterdir()] == [key], "nothing is left beside"


def count_calls(monkeypatch):
    counted, run = [], Transformer.run
    monkeypatch.setattr(Transformer, "run", lambda self, tokens, **kw: counted.append(len(tokens)) or run(self, tokens, **kw))
    return counted


def test_a_harvest_interrupted_after_its_last_shard_is_only_renamed(store, plain, tokens, stored, forwards):
    stored.rename(store.directory / f".{stored.name}.0.partial")
    store.cached_run(plain, tokens, ["z.0"])
    assert forwards == []


def test_two_harvests_of_one_key_do_not_disturb_each_other(store, plain, tokens):
    """The other one holds its folder while we finish: ours is the entry. Then it finds ours and sweeps its own."""
    key = store.key(plain, tokens, ["z.0"])
    with _claim(store.directory, key) as theirs:
        (theirs / "z.0.npy").write_bytes(b"half a harvest")
        cache = store.cached_run(plain, tokens, ["z.0"])
        assert theirs.is_dir(), "a folder that somebody writes is not swept"
    assert_close(cache["z", 0].double(), plain.run(tokens, record=["z.0"])[1]["z", 0], atol=1e-6, rtol=1e-6)
    store._sweep(key)
    assert [path.name for path in store.directory.iterdir()] == [key]


def test_many_threads_asking_at_once_get_the_same_entry(store, plain, tokens):
    found, failed = [], []

    def ask():
        try:
            found.append(store.cached_run(plain, tokens, ["z", "mlp_out"], batch_size=1, shard_bytes=1))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(torch.equal(cache[site], found[0][site]) for cache in found for site in cache)
    assert len(store.entries()) == 1
    store.verify(store.key(plain, tokens, ["z", "mlp_out"]))


def test_entries_say_what_is_stored(store, plain, tokens, stored):
    (entry,) = store.entries()
    assert (entry.key, entry.model, entry.fingerprint) == (stored.name, "plain", plain.weights.fingerprint)
    assert (entry.sites, entry.n_prompts, entry.n_positions, entry.dtype) == ((Site("z", 0),), 4, 7, torch.float32)
    assert 4 * 7 * 3 * 5 * 4 < entry.size < store.size


def test_removing_an_entry_leaves_the_others(store, plain, tokens, stored):
    store.cached_run(plain, tokens, ["z.1"])
    store.remove(stored.name)
    assert [entry.sites for entry in store.entries()] == [(Site("z", 1),)]
    with pytest.raises(StoreError, match=f"no entry '{stored.name}'; it has 1"):
        store.remove(stored.name)
    with pytest.raises(StoreError, match="Did you mean"):
        store.verify(store.entries()[0].key[:-1])


def flip(path, at):
    """Change one byte, as a failing disk or another program would."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


DAMAGES = {
    "truncated": (
        lambda f: os.truncate(f / "z.0.npy", 300),
        r"z.0.npy has 300 bytes and should have .*: it is truncated",
    ),
    "longer": (lambda f: os.truncate(f / "z.0.npy", 5000), r"z.0.npy has 5,000 bytes .*: it is another file"),
    "missing": (lambda f: (f / "z.0.npy").unlink(), "z.0.npy is missing"),
    "changed": (
        lambda f: flip(f / "z.0.npy", -1 % (f / "z.0.npy").stat().st_size),
        "z.0.npy was changed .* shard 2 of 2",
    ),
    "header": (lambda f: flip(f / "z.0.npy", 70), "z.0.npy was changed .* shard 1 of 2"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda f: os.truncate(f / "manifest.json", 50), "manifest.json.* is not JSON or is truncated"),
    "foreign manifest": (
        lambda f: (f / "manifest.json").write_text("{}"),
        "manifest.json.*is not a mechinterp-activations file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_named_and_kept_and_never_read(store, plain, tokens, stored, forwards, damage):
    spoil, message = DAMAGES[damage]
    spoil(stored)
    left = sorted(path.name for path in stored.iterdir())
    with pytest.raises(StoreError, match=message):
        store.cached_run(plain, tokens, ["z.0"])
    assert sorted(path.name for path in stored.iterdir()) == left
    assert forwards == []
    store.remove(stored.name)
    store.cached_run(plain, tokens, ["z.0"])


def test_the_message_says_what_to_do(store, plain, tokens, stored):
    (stored / "z.0.npy").unlink()
    with pytest.raises(StoreError, match=rf"Nothing was deleted. Put the right file back .*\.remove\('{stored.name}'\)"):
        store.cached_run(plain, tokens, ["z.0"])


def test_an_entry_under_another_key_is_foreign(store, plain, tokens, stored):
    other = store.key(plain, tokens, ["z.1"])
    shutil.copytree(stored, store.directory / other)
    with pytest.raises(StoreError, match=f"belongs to another entry, '{stored.name}'"):
        store.cached_run(plain, tokens, ["z.1"])


def test_a_pickle_in_the_place_of_an_array_is_never_loaded(store, plain, tokens, stored):
    import numpy as np

    path, bomb = stored / "z.0.npy", np.array([{"a": 1}], dtype=object)
    np.save(path, bomb, allow_pickle=True)
    manifest = json.loads((stored / "manifest.json").read_text())
    status = path.stat()
    manifest["sites"]["z.0"] |= {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    (stored / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="z.0.npy is no array that we wrote"):
        store.cached_run(plain, tokens, ["z.0"])


def test_a_copied_store_is_read_and_compared_once_more(store, plain, tokens, stored, tmp_path, forwards):
    shutil.copytree(store.directory, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy" / stored.name / "z.0.npy", ns=(1, 1))
    ActivationStore(tmp_path / "copy").cached_run(plain, tokens, ["z.0"])
    assert forwards == []


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"record": ["zz.0"]}, UnknownSite, "names no site"),
        ({"record": []}, StoreError, "nothing to store"),
        ({"record": ["z"], "dtype": torch.int8}, StoreError, "stored as float32, float64, float16, bfloat16, not as"),
    ],
)
def test_what_cannot_be_stored_is_refused(store, plain, tokens, settings, error, message):
    with pytest.raises(error, match=message):
        store.cached_run(plain, tokens, **settings)
    assert not store.directory.exists()
