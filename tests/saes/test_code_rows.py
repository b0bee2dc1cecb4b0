"""Rows for codes: the model's own activations at the right positions, however they are read."""

import pytest
import torch

from mechinterp.errors import SAEError
from mechinterp.prompts import PromptBatch
from mechinterp.sites import Site
from mechinterp.store import ActivationStore
from saes.code_rows import read_parts, weights_of

BOS = 22


@pytest.fixture
def prompts(tokens) -> PromptBatch:
    """Four prompts of seven tokens, the second and the fourth one token shorter, all with BOS in front."""
    clean = tokens.clamp(max=21)
    clean[:, 0] = BOS
    return PromptBatch(
        clean=clean,
        corrupted=clean.roll(1, 0),
        end=torch.tensor([6, 5, 6, 5]),
        candidates=torch.ones(4, 1, dtype=torch.int64),
        roles=torch.ones(4, 1, dtype=torch.int64),
        groups=torch.zeros(4, dtype=torch.int64),
        positions={"S": torch.tensor([2, 1, 3, 4])},
    )


def test_a_named_position_is_what_stands_there(model, prompts):
    written = read_parts(model, prompts.clean, weights_of(prompts, ["S", "END"], BOS), batch_size=3)
    sites = [Site("z", layer) for layer in range(3)]
    _, cache = model.run(prompts.clean, record=sites)
    rows = torch.arange(4)
    for place, at in enumerate((prompts.positions["S"], prompts.end)):
        expected = torch.stack([cache[site][rows, at] for site in sites], 1).flatten(1, 2).float()
        torch.testing.assert_close(written.heads[place], expected)


def test_a_mean_leaves_out_padding_and_bos(plain, prompts):
    mean, with_bos = read_parts(plain, prompts.clean, weights_of(prompts, ["mean", "mean-with-bos"], BOS)).heads
    z = plain.run(prompts.clean, record=["z"])[1]["z", 1]
    torch.testing.assert_close(mean[1, 3], z[1, 1:6, 0].mean(0).float())
    torch.testing.assert_close(with_bos[1, 3], z[1, :6, 0].mean(0).float())


def test_without_a_bos_token_nothing_is_left_out(prompts):
    mean, with_bos = weights_of(prompts, ["mean", "mean-with-bos"], None)
    assert torch.equal(mean, with_bos)
    assert torch.equal(mean.sum(1), torch.ones(4))


def test_mlps_come_with_heads_where_there_are_any(make_model, prompts):
    weights = weights_of(prompts, ["END"], BOS)
    assert read_parts(make_model("attention_only"), prompts.clean, weights).mlps is None
    assert read_parts(make_model("plain"), prompts.clean, weights, mlps=False).mlps is None
    found = read_parts(make_model("plain"), prompts.clean, weights).mlps
    _, cache = make_model("plain").run(prompts.clean, record=["mlp_out"])
    torch.testing.assert_close(found[0, 0, 2], cache["mlp_out", 2][0, 6].float())


def test_a_store_gives_the_same_rows_and_runs_nothing_twice(plain, prompts, tmp_path, monkeypatch):
    weights, store = weights_of(prompts, ["END", "mean"], BOS), ActivationStore(tmp_path)
    direct, stored = read_parts(plain, prompts.clean, weights), read_parts(plain, prompts.clean, weights, store=store)
    torch.testing.assert_close(direct.heads, stored.heads)
    torch.testing.assert_close(direct.mlps, stored.mlps)
    monkeypatch.setattr(type(plain), "run", None)
    torch.testing.assert_close(read_parts(plain, prompts.clean, weights, store=store).heads, stored.heads)


def test_unknown_positions_are_named_with_those_there_are(prompts):
    with pytest.raises(SAEError, match=r"no position 'S1'; there are S, END, mean, mean-with-bos"):
        weights_of(prompts, ["S1"], BOS)
    with pytest.raises(SAEError, match="no position is named"):
        weights_of(prompts, [], BOS)
