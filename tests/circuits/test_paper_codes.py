"""The published method against its formulas: counts by sets, pairs by loops, head outputs by TransformerLens."""

import json
import warnings

import numpy as np
import pytest
import torch

from circuits.code_statistics import information, permuted_labels
from circuits.discovery.paper_codes import paper_codes, score_of_codes, unique_pairs, written_as_published
from circuits.statistics import auroc
from mechinterp.errors import CircuitError, SAEError
from mechinterp.nodes import Node
from mechinterp.store import ActivationStore
from saes.code_rows import read_parts
from saes.paper_codes import PaperSettings, assign_paper_codes

QUICK = {"d_sae": 6, "steps": 20, "n_train": 4}


@pytest.fixture(scope="module")
def task(make_task, plain):
    return make_task(plain, n_prompts=8)


@pytest.fixture(scope="module")
def codes():
    rng = np.random.default_rng(0)
    return rng.integers(0, rng.integers(1, 9, 5), (30, 5)), np.arange(30) < 15


def of_heads(scores):
    return np.array(
        [value for writer, value in zip(scores.wiring.writers, scores.values, strict=True) if writer.kind == "head"]
    )


def pairs_by_loops(codes, positive, normalize):
    n_examples, n_heads = codes.shape
    found = np.zeros((n_heads, n_heads))
    for one in range(n_heads):
        for other in set(range(n_heads)) - {one}:
            seen = [{tuple(codes[e, [one, other]]) for e in range(n_examples) if positive[e] == kind} for kind in (True, False)]
            found[one, other] = len(seen[0] - seen[1]) / (len(seen[0]) + len(seen[1]) if normalize else 1)
    return found


def appearances_by_loops(pairs):
    n_heads = len(pairs)
    ranked = sorted(((pairs[one, other], one, other) for one in range(n_heads) for other in range(n_heads)), reverse=True)
    heads = [head for _, *pair in ranked for head in pair][: n_heads**2 // 2]
    return np.array([heads.count(head) for head in range(n_heads)])


@pytest.mark.parametrize("normalize", [False, True])
def test_nodes_are_counted_as_sets_are(codes, normalize):
    values, positive = codes
    found = score_of_codes(values, positive, normalize=normalize)
    for head, column in enumerate(values.T):
        positives, negatives = set(column[positive]), set(column[~positive])
        assert found[head] == len(positives - negatives) / (len(positives | negatives) if normalize else 1)


@pytest.mark.parametrize("normalize", [False, True])
def test_edges_are_counted_as_three_loops_do(codes, normalize):
    values, positive = codes
    pairs = pairs_by_loops(values, positive, normalize)
    np.testing.assert_array_equal(unique_pairs(values, positive, normalize=normalize), pairs)
    found = score_of_codes(values, positive, level="edge", normalize=normalize)
    np.testing.assert_array_equal(found, appearances_by_loops(pairs))
    assert found.sum() == 25 // 2


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("has_signal", [False, True])
def test_the_count_follows_variance_and_not_the_label(has_signal, seed):
    """Known answers: every other head varies four times as much; a third of all heads write something else on positives."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    n_heads, half, d_model = 36, 60, 64
    varies = torch.arange(n_heads) % 2 == 0
    tells = torch.arange(n_heads) % 6 < 2  # as many of those that vary much as of the others
    noise = torch.einsum("ehk,hkd->ehd", normal(2 * half, n_heads, 8), normal(n_heads, 8, d_model)) / 8**0.5
    rows = 0.75 * normal(n_heads, d_model) + noise * torch.where(varies, 1.5, 0.375).unsqueeze(1)
    if has_signal:
        rows[:half, tells] += 1.5 * normal(int(tells.sum()), d_model)
    positive = np.arange(2 * half) < half
    codes = assign_paper_codes(rows, torch.randperm(2 * half, generator=draw)[:10], PaperSettings(d_sae=60)).values
    count = score_of_codes(codes, positive)
    assert auroc(count, varies.numpy()) > 0.75
    assert auroc(count, tells.numpy()) < 0.65
    labels = positive.astype(int)
    draws = np.concatenate([labels[None], permuted_labels(labels, 60, 0)])
    told = information(codes, draws)
    if has_signal:  # the codes have it; counting throws it away
        assert auroc(told[0] - told[1:].mean(0), tells.numpy()) > 0.9


def test_softmax_is_over_all_heads_or_over_layers_or_left_out(plain, task):
    counts, everything, layers = (paper_codes(plain, task, softmax=over, **QUICK) for over in (None, "all", "layer"))
    raised = np.exp(of_heads(counts))
    np.testing.assert_allclose(of_heads(everything), raised / raised.sum())
    by_layer = raised.reshape(3, 3)
    np.testing.assert_allclose(of_heads(layers).reshape(3, 3), by_layer / by_layer.sum(0))
    assert [found.unit for found in (counts, everything)] == ["codes", "softmax of codes"]
    assert paper_codes(plain, task, softmax=None, normalize=True, **QUICK).unit == "share of codes"


def test_only_heads_are_scored_by_codes_of_what_they_write(plain, task):
    """The whole method in lines of its own."""
    found = paper_codes(plain, task, softmax=None, seed=3, **QUICK)
    assert (found.items, found.method) == ("node", "codes-paper")
    tokens = torch.cat([task.prompts.clean, task.prompts.corrupted])
    cache = plain.run(tokens, record=[f"z.{layer}" for layer in range(3)])[1]
    until = task.prompts.end.repeat(2)
    z = torch.stack(
        [torch.stack([cache[f"z.{layer}"][row, : end + 1].mean(0) for layer in range(3)]) for row, end in enumerate(until)]
    )
    rows = written_as_published(plain, z.flatten(1, 2).float())
    training = torch.randperm(16, generator=torch.Generator().manual_seed(3))[:4]
    codes = assign_paper_codes(rows, training, PaperSettings(4, 6, 20, seed=3))
    np.testing.assert_array_equal(of_heads(found), score_of_codes(codes.values, np.arange(16) < 8))
    others = [value for writer, value in zip(found.wiring.writers, found.values, strict=True) if writer.kind != "head"]
    assert others == [0.0] * 4


def test_what_must_stand_beside_a_result_does(plain, task):
    found = paper_codes(plain, task, softmax=None, **QUICK)
    settings = json.loads(json.dumps(found.settings))
    assert settings["n_counted"] == 16
    assert 0 <= settings["silent"] <= 1
    assert 0 <= settings["l0"] <= 6
    assert 1 <= settings["codes_a_part"] <= 6
    assert "ablation" not in settings
    control = paper_codes(plain, task, softmax=None, trained=False, **QUICK)
    assert "untrained" not in control.settings
    assert settings["untrained"]["values"][str(Node("head", 2, 1))] == of_heads(control)[7]
    assert settings["untrained"]["silent"] == control.settings["silent"]


def test_the_edge_level_scores_heads(plain, task):
    found = paper_codes(plain, task, level="edge", softmax=None, **QUICK)
    assert (found.items, found.method, found.unit) == ("node", "codes-paper-edge", "appearances")
    assert found.values.sum() == 81 // 2
    assert paper_codes(plain, task, level="edge", **QUICK).unit == "softmax of appearances"


def test_a_store_gives_the_same(plain, task, tmp_path):
    store = ActivationStore(tmp_path)
    assert paper_codes(plain, task, store=store, **QUICK) == paper_codes(plain, task, **QUICK)


def test_heads_write_what_transformer_lens_says(lens, make_hooked, expressible, tokens):
    if expressible.config.norms == "after":
        pytest.skip("TransformerLens' processing folds OLMo 2's norms, which come after attention, into what comes before it")
    hooked = make_hooked(expressible)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that RMSNorm is not centred, which we know
        hooked.load_and_process_state_dict(hooked.state_dict())  # as from_pretrained does
    _, cache = hooked.run_with_cache(tokens)
    theirs = cache.stack_head_results()
    weights = torch.full((1, *tokens.shape), 1 / tokens.shape[1])
    ours = written_as_published(expressible, read_parts(expressible, tokens, weights, mlps=False).heads[0])
    torch.testing.assert_close(ours, theirs.mean(2).transpose(0, 1).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"level": "edges"}, CircuitError, "Did you mean 'edge'"),
        ({"softmax": "head"}, CircuitError, "there are all, layer, and None"),
        ({"positions": "last"}, SAEError, "there is no position 'last'"),
        ({"positions": ("END", "mean")}, SAEError, "read at one position, and END, mean are given"),
        ({"positions": ()}, SAEError, "none are given"),
        ({"n_train": 17}, SAEError, "cannot be drawn from 8 positives and 8 negatives"),
        ({"steps": 0}, SAEError, "steps=0 trains nothing"),
    ],
)
def test_what_cannot_be_scored_is_said(plain, task, given, error, message):
    with pytest.raises(error, match=message):
        paper_codes(plain, task, **given)


def test_one_position_may_be_named_alone_or_in_a_list(plain, task):
    assert paper_codes(plain, task, positions=("END",), **QUICK) == paper_codes(plain, task, positions="END", **QUICK)


def test_prompts_that_differ_nowhere_are_refused(plain, make_task):
    one = make_task(plain, n_prompts=1, changed=())
    with pytest.raises(SAEError, match="no head writes anything different"):
        paper_codes(plain, one, n_train=2)
