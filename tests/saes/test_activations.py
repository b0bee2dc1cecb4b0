"""Activations in batches: the same from a store, from the model and from memory; each row once an epoch; bounded windows."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from mechinterp.errors import SAEError, StoreError
from mechinterp.models.transformer import Transformer
from mechinterp.store import ActivationStore
from saes.activations import Activations, harvest, of_rows, stream
from saes.corpus import Corpus
from saes.places import Place, each_head, each_layer

ROW_BYTES = 4 * 2 * 3


def numbered(n: int = 50, prompts: int | None = None) -> Activations:
    """Rows that hold their own number, at two places; prompts of 0, 1, 2, 3, 0, ... rows if ``prompts``."""
    rows = torch.arange(n, dtype=torch.float32).view(n, 1, 1).expand(n, 2, 3) + torch.tensor([0.0, 1000.0]).view(1, 2, 1)
    if prompts is None:
        return of_rows(rows, ["z.0", "z.1"])
    counts = torch.arange(prompts) % 4
    ends = counts.cumsum(0)

    def read(some):
        return torch.cat([rows[ends[prompt] - counts[prompt] : ends[prompt]] for prompt in some.tolist()])

    return Activations((Place.parse("z.0"), Place.parse("z.1")), 3, counts, read)


def numbers(batch: torch.Tensor) -> list[int]:
    """Which rows a batch holds; both places hold the same."""
    assert torch.equal(batch[0] + 1000, batch[1])
    return batch[0, :, 0].long().tolist()


@pytest.fixture
def corpus(tokens):
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, 0] = False
    keep[1, 4:] = False
    keep[2] = False
    return Corpus(tokens, keep, "drawn")


@pytest.fixture
def forwards(monkeypatch):
    """The number of prompts of each forward pass since the test began."""
    counted, run = [], Transformer.run

    def counting(self, tokens, **settings):
        counted.append(len(tokens))
        return run(self, tokens, **settings)

    monkeypatch.setattr(Transformer, "run", counting)
    return counted


@pytest.mark.parametrize(
    "names", [["z"], ["z.*.h*"], ["z.2", "z.0"], ["resid_post"], ["z.1.h2", "z.0.h0"], ["ln_final_normalized"]]
)
def test_store_model_and_memory_give_the_same_rows(plain, corpus, tmp_path, names):
    stored = harvest(plain, corpus, names, ActivationStore(tmp_path), batch_size=3)
    streamed = stream(plain, corpus, names, batch_size=3)
    sites = [str(place.site) for place in stored.places]
    _, cache = plain.run(corpus.tokens, record=sites)
    at_hand = torch.stack([place.read(cache)[corpus.keep] for place in stored.places], 1).float()
    memory = of_rows(at_hand, stored.places)
    whole = [torch.cat(list(some.windows()), 1) for some in (stored, streamed, memory)]
    assert whole[0].shape == (len(stored.places), corpus.n_kept, stored.d_in)
    assert all(torch.equal(other, whole[0]) or torch.allclose(other, whole[0], atol=1e-6) for other in whole[1:])
    assert (stored.n_rows, streamed.n_rows, memory.n_rows) == (corpus.n_kept,) * 3
    batches = [list(itertools.islice(some.batches(5, seed=3), 9)) for some in (stored, streamed)]
    assert_close(*batches, atol=1e-6, rtol=1e-6)
    assert stored.about == streamed.about
    assert stored.about["corpus_fingerprint"] == corpus.fingerprint


@pytest.mark.parametrize("window_bytes", [1, 3 * ROW_BYTES, 7 * ROW_BYTES, 1 << 29])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 33, 120])
@pytest.mark.parametrize("prompts", [None, 33])
def test_every_row_comes_once_an_epoch(window_bytes, batch_size, prompts):
    activations = numbered(48, prompts)
    assert activations.n_rows == 48
    batches = itertools.islice(activations.batches(batch_size, window_bytes=window_bytes), 480 // batch_size)
    found = [row for batch in batches for row in numbers(batch)]
    epochs = [found[at : at + 48] for at in range(0, len(found) - 47, 48)]
    assert len(epochs) >= 9
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "each epoch in another order"


@pytest.mark.parametrize("window_bytes", [3 * ROW_BYTES, 1 << 29])
@pytest.mark.parametrize("prompts", [None, 33])
def test_starting_later_is_skipping(window_bytes, prompts):
    activations = numbered(48, prompts)
    whole = list(itertools.islice(activations.batches(7, seed=2, window_bytes=window_bytes), 40))
    for start in (0, 1, 6, 7, 14, 33):
        late = list(itertools.islice(activations.batches(7, seed=2, start=start, window_bytes=window_bytes), 40 - start))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(late, whole[start:], strict=True))


def test_what_is_skipped_is_not_read():
    read, activations = [], numbered(48)
    counted = replace(activations, read=lambda some: read.append(len(some)) or activations.read(some))
    next(counted.batches(4, start=1000, window_bytes=10 * ROW_BYTES))
    assert len(read) == 1


def test_the_order_is_the_seeds_and_the_rows_are_shuffled():
    orders = [numbers(next(numbered().batches(50, seed=seed))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    first = [numbers(batch) for batch in itertools.islice(numbered(48, 33).batches(8, window_bytes=24 * ROW_BYTES), 3)]
    assert any(max(batch) - min(batch) > 24 for batch in first), "a window takes prompts from everywhere"


@pytest.mark.parametrize("rows_a_window", [1, 3, 5, 1000])
def test_windows_hold_what_fits_and_at_most_one_prompt_more(rows_a_window):
    activations = numbered(48, 33)
    windows = list(activations.windows(rows_a_window * ROW_BYTES))
    assert [row for window in windows for row in numbers(window)] == list(range(48))
    assert all(0 < window.shape[1] <= rows_a_window + 3 for window in windows)
    assert len(windows) <= 2 * (48 // rows_a_window) + 1
    order = torch.arange(33).flip(0)
    turned = [row for window in activations.windows(5 * ROW_BYTES, order) for row in numbers(window)]
    assert turned == [
        row for prompt in order.tolist() for row in numbers(activations.read(torch.tensor([prompt])).transpose(0, 1))
    ]


def test_changing_a_batch_changes_no_other():
    activations = numbered(20)
    for batch in itertools.islice(activations.batches(3), 20):
        batch.mul_(-1)
    assert numbers(torch.cat(list(activations.windows()), 1)) == list(range(20))


def test_heads_and_layers_share_one_record_and_one_pass(plain, corpus, tmp_path, forwards):
    store = ActivationStore(tmp_path)
    layers = harvest(plain, corpus, each_layer(plain.config), store, batch_size=3)
    assert forwards == [3, 1]
    heads = harvest(plain, corpus, each_head(plain.config), store, batch_size=3)
    again = harvest(plain, corpus, ["z"], ActivationStore(tmp_path))
    whole, by_head, once_more = (next(some.windows()) for some in (layers, heads, again))
    assert forwards == [3, 1]
    assert len(store.entries()) == 1
    assert torch.equal(by_head.unflatten(0, (3, 3)).transpose(1, 2).flatten(2), whole)
    assert torch.equal(once_more, whole)


def test_streaming_runs_the_prompts_of_a_window_and_no_others(plain, corpus, forwards):
    streamed = stream(plain, corpus, ["z"], batch_size=2)
    next(streamed.batches(2, window_bytes=1))
    assert sum(forwards) == 1
    forwards.clear()
    list(streamed.windows())
    assert forwards == [2, 2]


def test_stored_in_half_precision_they_are_read_in_single(plain, corpus, tmp_path):
    exact = next(stream(plain, corpus, ["z"]).windows())
    rounded = next(harvest(plain, corpus, ["z"], ActivationStore(tmp_path), dtype=torch.bfloat16).windows())
    assert rounded.dtype == torch.float32
    assert_close(rounded, exact, atol=0, rtol=2**-8)


def test_a_truncated_record_is_refused(plain, corpus, tmp_path):
    store = ActivationStore(tmp_path)
    harvest(plain, corpus, ["z"], store)
    file = next(tmp_path.glob("*/z.1.npy"))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(StoreError, match="z.1.npy has .* bytes and should have .*: it is truncated"):
        harvest(plain, corpus, ["z.*.h*"], store)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named_with_its_place(bad):
    rows = torch.zeros(20, 2, 3)
    rows[[4, 7], 1, 2] = bad
    with pytest.raises(
        SAEError, match="the activations at 'z.1' are not finite in 2 of 20 rows. Look at the model's precision"
    ):
        next(of_rows(rows, ["z.0", "z.1"]).batches(4))
    with pytest.raises(SAEError, match="'z.1' are not finite"):
        list(of_rows(rows, ["z.0", "z.1"]).windows())


def test_large_but_finite_rows_pass():
    rows = torch.full((20, 2, 3), 3e38)
    assert next(of_rows(rows, ["z.0", "z.1"]).batches(4)).isfinite().all()


def test_rows_at_hand_are_told_apart_and_made_single_precision():
    rows = torch.randn(9, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    some = of_rows(rows, ["z.0", "z.1"])
    assert next(some.batches(4)).dtype == torch.float32
    other = rows.clone()
    other[8, 1, 2] += 1e-12
    assert of_rows(other, ["z.0", "z.1"]).about != some.about == of_rows(rows.clone(), ["z.0", "z.1"]).about
    assert of_rows(rows.bfloat16(), ["z.0", "z.1"]).about["rows"] == 9


def test_wrong_places_and_empty_rows_are_refused(plain, corpus):
    with pytest.raises(SAEError, match="1 places are named for rows of 2 groups"):
        of_rows(torch.zeros(4, 2, 3), ["z.0"])
    with pytest.raises(SAEError, match="the place 'z.0' is named twice"):
        of_rows(torch.zeros(4, 2, 3), ["z.0", "z.0"])
    with pytest.raises(SAEError, match="there are no activations to train on"):
        next(of_rows(torch.zeros(0, 1, 3), ["z.0"]).batches(4))
    with pytest.raises(SAEError, match="'z.7' is not in plain|z.7"):
        stream(plain, corpus, ["z.7.h*"])
