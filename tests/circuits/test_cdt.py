"""CD-T's scores against measured ablation, its edges, its table of all pairs, and the search from the output back."""

from dataclasses import replace
from importlib import import_module

import networkx as nx
import numpy as np
import pytest
import torch

from circuits.ablation import replacement_for
from circuits.agreement import ranking
from circuits.discovery import discover
from circuits.discovery.cdt import cdt, cdt_edges
from circuits.discovery.cdt_search import PAPER, cdt_search
from circuits.discovery.cdt_table import RELEVANCES, Part, relevance_table
from circuits.discovery.heads_alone import HeadsAlone
from circuits.discovery.nodes import patching
from circuits.discovery.relp import relp
from circuits.running import run_circuits
from circuits.solving import fitness
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.decomposition import RULE_SETS, Source
from mechinterp.decomposition.contributions import contributions
from mechinterp.errors import CircuitError, ModelError, TaskError
from mechinterp.models.compiled import COMPILED, indirect_object
from mechinterp.models.load import load
from mechinterp.nodes import Node
from mechinterp.sites import Site
from mechinterp.tasks import ioi

ABLATIONS = ["resample", "mean", "zero"]


@pytest.fixture(scope="module", params=["plain", "llama", "gemma2", "olmo2"])
def family(request, make_model):
    """The kinds of models that differ in what parts read and write."""
    return make_model(request.param)


@pytest.fixture(scope="module")
def builtin():
    return load("builtin")


# Scores of parts


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("metric", ["logit_diff", "logit_diff_max", "prob_diff"])
def test_exact_rules_are_ablation(model, make_task, metric, ablation):
    task = make_task(model, metric, n_prompts=6)
    found, expected = cdt(model, task, rules="exact", ablation=ablation), patching(model, task, ablation=ablation)
    np.testing.assert_allclose(found.values, expected.values, atol=1e-10)
    np.testing.assert_allclose(found.per_prompt, expected.per_prompt, atol=1e-6)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_linear_rules_are_relevance_patching(model, make_task, ablation):
    task = make_task(model, n_prompts=6)
    found = cdt(model, task, rules="linear", ablation=ablation)
    np.testing.assert_allclose(found.values, relp(model, task, attention_rule=True, ablation=ablation).nodes, atol=1e-10)


def test_a_batch_more_or_less_changes_nothing(plain, make_task):
    task = make_task(plain, n_prompts=6)
    for method in (cdt, cdt_edges):
        np.testing.assert_allclose(method(plain, task, batch_size=1).values, method(plain, task).values, atol=1e-12)


def test_it_goes_on_where_it_was_interrupted(plain, make_task, tmp_path):
    task = make_task(plain, n_prompts=6)
    first = cdt(plain, task, batch_size=2, resume=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert cdt(plain, task, batch_size=2, resume=tmp_path) == first
    assert cdt(plain, task, rules="paper", batch_size=2, resume=tmp_path) != first


@pytest.mark.parametrize("name", COMPILED)
def test_the_tail_ranks_the_parts_of_a_circuit_set_by_hand_first_and_the_papers_rules_do_not(name):
    planted = COMPILED[name](n_prompts=16)
    areas = {
        rules: ranking(cdt(planted.model, planted.task, rules=rules), planted.circuit_edges).auroc
        for rules in ("tail", "paper")
    }
    assert areas["tail"] == 1
    assert areas["paper"] < 0.9


def test_on_the_built_in_model_the_tail_ranks_heads_as_mean_ablation_does(builtin):
    task = ioi(builtin, n_prompts=64, seed=0)
    wiring = Wiring.of(builtin.config)
    heads = [index for index, writer in enumerate(wiring.writers) if writer.kind == "head"]
    truth = patching(builtin, task, ablation="mean").values[heads]
    found = {rules: cdt(builtin, task, rules=rules, ablation="mean").values[heads] for rules in ("tail", "paper")}
    assert np.corrcoef(found["tail"], truth)[0, 1] > 0.99
    assert np.corrcoef(found["paper"], truth)[0, 1] < 0.7


# Edges


def test_under_linear_rules_what_flows_into_a_head_flows_on_as_its_own_score(make_model, make_task):
    """Attention-only, scales and patterns held, no biases, zero ablation: all that enters a value leaves by the head."""
    model = make_model("attention_only")
    named = {name: w * (not name.split(".")[-1].startswith("b")) for name, w in model.weights.named().items()}
    model = type(model)(type(model.weights).from_named(model.config, named))
    task = make_task(model, n_prompts=6)
    edges, wiring = cdt_edges(model, task, rules="linear", ablation="zero"), Wiring.of(model.config)
    direct = cdt(model, task, rules="linear", ablation="zero")
    into_logits = edges.values[[wiring.index(writer, Node.logits()) for writer in wiring.writers]]
    np.testing.assert_allclose(into_logits, direct.values, atol=1e-10)


def test_an_edge_is_what_arrives_by_any_path_times_what_it_is_worth(family, make_task):
    """Against the engine: the reader's change when the writer is replaced, times the metric's gradient there."""
    task, wiring = make_task(family, n_prompts=6), Wiring.of(family.config)
    scores, prompts = cdt_edges(family, task, rules="exact"), task.prompts
    sites = [Site(name, layer) for layer in range(3) for name in ("q", "k", "v", "mlp_out")]
    leaves, rows = {}, torch.arange(len(prompts))

    def leaf(value, _, site):
        leaves[site] = value.detach().requires_grad_()
        return value + leaves[site] - leaves[site].detach()

    logits, _ = family.run(prompts.clean, patch={site: (lambda v, c, site=site: leaf(v, c, site)) for site in sites})
    metric = task.metric(logits[rows, prompts.end], prompts)
    gradients = dict(zip(sites, torch.autograd.grad(metric.sum(), [leaves[site] for site in sites]), strict=True))
    _, clean = family.run(prompts.clean, record=sites)
    _, changed = family.run(prompts.clean, record=sites, patch=first_head_replaced(family, prompts))
    for reader in (node for node in wiring.readers if node.port and (node.layer or 0) > 0):
        site = Site(reader.port, reader.layer)
        change = ((clean[site] - changed[site]) * gradients[site])[:, :, reader.index]
        found = scores.values[wiring.index("a0.h0", reader)]
        np.testing.assert_allclose(found, change.sum((1, 2)).mean().item(), atol=1e-10)
    change = (clean["mlp_out", 1] - changed["mlp_out", 1]) * gradients[Site("mlp_out", 1)]
    np.testing.assert_allclose(scores.values[wiring.index("a0.h0", "m1")], change.sum((1, 2)).mean().item(), atol=1e-10)


def first_head_replaced(model, prompts) -> dict:
    """The patch by which ``a0.h0`` writes what it writes on corrupted prompts."""
    replaced = Writes.during(model, prompts.corrupted).z[0]
    return {Site(model.config.write_site, 0): lambda z, _: torch.cat([replaced[:, :, :1], z[:, :, 1:]], 2)}


@pytest.mark.parametrize("name", COMPILED)
def test_edges_of_the_circuits_rank_high_though_paths_are_not_told_from_edges(name):
    planted = COMPILED[name](n_prompts=16)
    found = ranking(cdt_edges(planted.model, planted.task), planted.circuit_edges)
    assert 0.95 < found.auroc < 1


# All pairs


@pytest.mark.parametrize("rules", RULE_SETS)
def test_the_output_column_of_the_table_is_the_scores(family, make_task, rules):
    task, wiring = make_task(family, n_prompts=6), Wiring.of(family.config)
    table, scores = relevance_table(family, task, rules=rules), cdt(family, task, rules=rules)
    heads = [wiring.writers.index(part.head) for part in table.parts]
    np.testing.assert_allclose(table.output, scores.values[heads], atol=1e-10)


def test_the_table_is_causal_and_its_shares_are_shares(plain, make_task):
    table = relevance_table(plain, make_task(plain, n_prompts=6), rules="paper")
    layers = np.array([part.head.layer for part in table.parts])
    later = layers[None, :] > layers[:, None]
    for relevance in RELEVANCES:
        between = table.between(relevance)
        assert not between[~later].any()
        assert between[later].any()
    share = table.between("share")
    assert share.min() >= 0
    assert share.max() <= 1
    ratio = table.between("ratio")
    np.testing.assert_allclose(share[later], (ratio / (1 + ratio))[later])


def test_a_projection_says_how_much_of_a_heads_deviation_is_due_to_a_source(family, make_task):
    """Under exact rules: the change of what heads do when the source is replaced, along what replacing them would change."""
    task, config = make_task(family, n_prompts=6), family.config
    prompts, site = task.prompts, Site(config.write_site, 2)
    table, replaced = relevance_table(family, task, rules="exact"), Writes.during(family, prompts.corrupted)
    _, clean = family.run(prompts.clean, record=[site])
    _, changed = family.run(prompts.clean, record=[site], patch=first_head_replaced(family, prompts))
    up_to_end = (torch.arange(7) <= prompts.end[:, None])[:, :, None]
    change, deviation = clean[site] - changed[site], clean[site] - replaced.z[2]
    along = ((change * deviation).sum(-1) * up_to_end).sum((0, 1)) / (deviation.square().sum(-1) * up_to_end).sum((0, 1))
    target = [table.parts.index(Part(Node.head(2, head))) for head in range(config.n_heads)]
    np.testing.assert_allclose(table.projection[0, target], along.numpy(), atol=1e-10)


@pytest.mark.parametrize("variant", ["plain", "gemma2"])
@pytest.mark.parametrize("positions", [None, ["X", "END"]])
@pytest.mark.parametrize("ablation", ["resample", "mean"])
def test_the_sums_of_the_table_are_those_of_each_pair_by_itself(
    make_model, make_task, monkeypatch, variant, positions, ablation
):
    """Also of what is irrelevant where nothing is carried; in stacks of any size."""
    model = make_model(variant)
    task, write_site = make_task(model, n_prompts=6), model.config.write_site
    at = {"X": torch.tensor([0, 1, 2, 3, 4, 5]), "END": task.prompts.end}
    task = replace(task, prompts=replace(task.prompts, positions=at))
    table = relevance_table(model, task, rules="paper", positions=positions, ablation=ablation)
    writes = replacement_for(model, task, ablation).writes
    reference = {Site(write_site, layer): z for layer, z in enumerate(writes.z)}
    sources = [Source((part.head,), part.at(task.prompts)) for part in table.parts]
    found = contributions(model, task.prompts.clean, sources, [write_site], rules="paper", reference=reference)
    for t, target in enumerate(table.parts):
        split = found[f"{write_site}.{target.head.layer}"].map(lambda part, head=target.head: part[..., head.index, :])
        here = torch.arange(7) <= task.prompts.end[:, None]
        here = here if positions is None else torch.arange(7) == at[target.position][:, None]
        for name, part in (("relevant", split.relevant), ("irrelevant", split.irrelevant)):
            expected = (part.abs().sum(-1) * here).sum((1, 2))
            later = [index for index, source in enumerate(table.parts) if source.head.layer < target.head.layer]
            np.testing.assert_allclose(getattr(table, name)[later, t], expected[later].numpy(), atol=1e-9)
    monkeypatch.setattr(import_module("mechinterp.decomposition.propagate"), "MEMORY", 1)
    again = relevance_table(model, task, rules="paper", positions=positions, ablation=ablation)
    np.testing.assert_allclose(again.irrelevant, table.irrelevant, atol=1e-9)


def test_positions_tell_a_head_apart():
    planted = indirect_object(n_prompts=8)
    table = relevance_table(planted.model, planted.task, positions=["S2", "END"])
    assert len(table.parts) == 2 * 4 * 4
    at = {str(part): index for index, part in enumerate(table.parts)}
    mover, duplicate = planted.roles["mover"], planted.roles["duplicate"]
    assert table.output[at[f"{mover}@END"]] > 1
    assert abs(table.output[at[f"{mover}@S2"]]) < 1e-4
    inhibit = planted.roles["inhibit_place"]
    assert table.relevant[at[f"{duplicate}@S2"], at[f"{inhibit}@END"]] > 0.1
    assert table.relevant[at[f"{duplicate}@END"], at[f"{inhibit}@END"]] < 1e-3


# Heads alone


def test_all_heads_are_the_model_and_some_are_what_their_edges_keep(family, make_task):
    task, wiring = make_task(family, n_prompts=6), Wiring.of(family.config)
    replaced = Writes.during(family, task.prompts.corrupted)
    alone = HeadsAlone(family, task, replaced)
    heads = [writer for writer in wiring.writers if writer.kind == "head"]
    some = [heads[0], heads[4], heads[8]]
    found = alone.metrics([[Part(head) for head in group] for group in (heads, some, [])])
    assert found[0] == pytest.approx(float(fitness(family, task, allow_unsolved=True).clean.mean()))
    for group, metric in zip((some, []), found[1:], strict=True):
        kept = np.array([writer.kind != "head" or writer in group for writer in wiring.writers])[wiring.edge_writer]
        logits = run_circuits(family, task.prompts, kept[None], replaced)[0]
        assert metric == pytest.approx(float(task.metric(logits, task.prompts).mean()))


def test_a_head_at_one_position_is_the_rest_of_it_replaced(family, make_task):
    task, config = make_task(family, n_prompts=6), family.config
    task = replace(task, prompts=replace(task.prompts, positions={"there": torch.tensor([1, 2, 3, 4, 5, 2])}))
    replaced = Writes.during(family, task.prompts.corrupted)
    there = torch.arange(7) == task.prompts.positions["there"][:, None]
    kept = there[..., None, None] & (torch.arange(config.n_heads) == 1)[:, None]
    nowhere = torch.zeros_like(kept)
    patch = {
        Site(config.write_site, layer): lambda z, _, layer=layer: torch.where(
            kept if layer == 1 else nowhere, z, replaced.z[layer]
        )
        for layer in range(3)
    }
    logits, _ = family.run(task.prompts.clean, patch=patch, logits_at=task.prompts.end)
    found = HeadsAlone(family, task, replaced).metrics([[Part(Node.head(1, 1), "there")]])
    assert found[0] == pytest.approx(float(task.metric(logits, task.prompts).mean()))


# The search


@pytest.mark.parametrize("name", COMPILED)
def test_the_search_finds_the_heads_set_by_hand(name):
    planted = COMPILED[name](n_prompts=8)
    found = cdt_search(planted.model, planted.task)
    assert {str(head) for head in found.heads} == set(planted.roles.values())
    assert found.faithfulness == pytest.approx(1, abs=1e-3)
    assert set(found.graph) == {*planted.roles.values(), "logits"}
    assert isinstance(found.graph, nx.DiGraph)
    assert Wiring.of(planted.model.config).mask(found.circuit).sum() == found.circuit.n_edges_kept


def test_the_search_goes_back_through_every_family(family, make_task):
    """Random heads do nothing that could be known, so all of them must be: kept, they are the model."""
    task = make_task(family, n_prompts=6)
    found = cdt_search(family, task, percentile=0.0, prune_by=None, allow_unsolved=True)
    assert len(found.heads) == family.config.n_layers * family.config.n_heads
    assert found.faithfulness == pytest.approx(1)
    wiring = Wiring.of(family.config)
    assert found.circuit.n_edges_kept == wiring.n_edges


def test_every_setting_of_the_paper_runs_and_is_written_down(builtin):
    task = ioi(builtin, n_prompts=64, seed=0)
    table = relevance_table(builtin, task, rules="paper", ablation="mean")
    sizes = []
    for percentile in (90.0, 97.0):
        found = cdt_search(builtin, task, **PAPER, percentile=percentile, table=table)
        sizes.append(len(found.rounds[0].taken))
        assert found.facts["rules"] == "paper"
        assert found.facts["percentile"] == percentile
        assert "into the output" in str(found)
    assert sizes[0] > sizes[1]


def test_a_table_of_something_else_is_refused(builtin):
    task, other = (ioi(builtin, n_prompts=16, seed=seed) for seed in (0, 1))
    table = relevance_table(builtin, task, rules="paper")
    assert cdt_search(builtin, task, rules="paper", table=table).parts
    for given, settings in ((task, {}), (other, {"rules": "paper"}), (task, {"rules": "paper", "positions": ["END"]})):
        with pytest.raises(CircuitError, match="this table was made with another"):
            cdt_search(builtin, given, table=table, **settings)


def test_later_rounds_look_upstream_of_what_was_found(builtin):
    task = ioi(builtin, n_prompts=64, seed=0)
    found = cdt_search(builtin, task, **PAPER, percentile=90.0)
    for step in found.rounds[1:]:
        assert max(part.head.layer for part in step.scores) < max(part.head.layer for part in step.targets)
        assert {target for source, target in found.edges if source in map(str, step.taken)} <= set(map(str, step.targets))


def test_dividing_by_the_layers_mean_makes_layers_alike(builtin):
    task = ioi(builtin, n_prompts=64, seed=0)
    first = cdt_search(builtin, task, per_layer=True, max_rounds=1).rounds[0]
    layers = {}
    for part, score in first.scores.items():
        layers.setdefault(part.head.layer, []).append(abs(score))
    assert [np.mean(scores) for scores in layers.values()] == pytest.approx([1] * builtin.config.n_layers)


# Errors


def test_a_task_that_the_model_does_not_do_is_not_searched(builtin):
    task = ioi(builtin, n_prompts=16, seed=0)
    turned = replace(task, prompts=replace(task.prompts, roles=-task.prompts.roles))
    with pytest.raises(TaskError, match="does not do"):
        cdt_search(builtin, turned)


def lonely(task):
    return replace(task, prompts=replace(task.prompts, groups=torch.arange(len(task))))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m, t: cdt(m, t, rules="papre"), ModelError, "no rule set 'papre'"),
        (
            lambda m, t: cdt(m, lonely(t), ablation="mean"),
            TaskError,
            "6 of 6 templates .* a mean over one prompt is that prompt",
        ),
        (lambda m, t: cdt_edges(m, lonely(t), ablation="mean"), TaskError, "a mean over one prompt"),
        (lambda m, t: relevance_table(m, lonely(t), ablation="mean"), TaskError, "a mean over one prompt"),
        (lambda m, t: relevance_table(m, t, positions=["END"]), TaskError, "has no position 'END'"),
        (lambda m, t: relevance_table(m, t, positions="END"), TaskError, "positions must be a list"),
        (lambda m, t: relevance_table(m, t, positions=[]), TaskError, "positions must be a list"),
        (lambda m, t: relevance_table(m, t).between("shares"), CircuitError, "no relevance 'shares'.*Did you mean 'share'"),
        (lambda m, t: cdt_search(m, t, percentile=101.0), CircuitError, "percentile=101"),
        (lambda m, t: cdt_search(m, t, n_per_round=0), CircuitError, "take nothing"),
        (lambda m, t: cdt_search(m, t, prune_by="lower"), CircuitError, "prune_by must be 'distance', 'higher' or None"),
        (lambda m, t: discover(m, t, "cdt", rule="tail", allow_unsolved=True), CircuitError, "no setting 'rule'.*'rules'"),
    ],
)
def test_what_cannot_be_is_said(plain, make_task, call, error, says):
    task = make_task(plain, n_prompts=6)
    with pytest.raises(error, match=says):
        call(plain, replace(task, prompts=replace(task.prompts, positions={})))
