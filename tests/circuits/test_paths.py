"""Path patching against its definition: two whole runs of the model for every sender, and what follows from it."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch

from circuits.ablation import ABLATIONS
from circuits.discovery.exact import exact
from circuits.discovery.paths import open_to, parse_receivers, path_links, path_patching
from circuits.discovery.stages import staged, staged_circuit
from circuits.edges import edge_name
from circuits.wiring import Wiring
from circuits.writes import sites
from mechinterp.errors import CircuitError, TaskError, UnknownNode
from mechinterp.models.compiled import indirect_object
from mechinterp.nodes import PORTS, Node
from mechinterp.sites import Site, resolve

LAST = Site("resid_post", 2)
RECEIVERS = {
    "logits": ["logits"],
    "queries of one layer": ["a2.h0.q", "a2.h2.q"],
    "queries of several layers": ["a1.h0.q", "a1.h2.q", "a2.h1.q"],
    "keys and values": ["a1.h1.k", "a1.h1.v", "a2.h0.v"],
    "a head of the first layer": ["a0.h1"],
    "an MLP": ["m1"],
    "MLPs and heads": ["m0", "a1.h0.v", "m2"],
    "a head and the MLP of its layer": ["a1.h1.q", "m1", "a2.h2.k"],
}


@pytest.fixture(scope="session")
def spread_task(make_task):
    """Prompts that end, and have a place ``S``, at different positions."""

    def make(model, **facts):
        task = make_task(model, **facts)
        places = torch.arange(len(task)) % 3
        return replace(task, prompts=replace(task.prompts, positions={"S": 2 + places, "T": 4 - places % 2}))

    return make


def two_runs_a_sender(model, task, receivers, senders=None, mlps="recomputed", positions=None, ablation="resample"):
    """The definition, sender by sender, nothing shared and nothing left out."""
    prompts, wiring = task.prompts, Wiring.of(model.config)
    replaced = ABLATIONS[ablation](model, prompts)
    here = torch.ones_like(prompts.clean, dtype=torch.bool)
    if positions is not None:
        here = torch.zeros_like(here)
        for name in positions:
            here[torch.arange(len(prompts)), prompts.end if name == "END" else prompts.positions[name]] = True
    readers = [Node.parse(name) for name in receivers]
    readers = [port for node in readers for port in ([node] if node.kind != "head" or node.port else _ports(model, node))]
    logits, clean = model.run(prompts.clean, record=sites(model), logits_at=prompts.end)
    scores = np.zeros(len(wiring.writers))
    for index, sender in enumerate(wiring.writers):
        if senders is None or str(sender) in senders:
            patch = frozen(model, clean, mlps) | sent(model, sender, clean, replaced, here)
            recorded = model.run(prompts.clean, patch=patch, record=[site_of(reader) for reader in readers])[1]
            patched = model.run(prompts.clean, patch=received(readers, recorded, here), logits_at=prompts.end)[0]
            scores[index] = (task.metric(logits, prompts) - task.metric(patched, prompts)).mean()
    return scores


def _ports(model, head: Node) -> list[Node]:
    return [_port(model, head.layer, head.index, port) for port in PORTS]


def _port(model, layer: int, head: int, port: str) -> Node:
    """As the model has it: a key or value may be its group's."""
    shared = model.config.is_grouped and port != "q"
    return Node.group(layer, model.config.group_of(head), port) if shared else Node.head(layer, head, port)


def site_of(reader: Node) -> Site:
    if reader.kind == "logits":
        return LAST
    return Site(reader.port, reader.layer) if reader.port else Site("mlp_in", reader.layer)


def frozen(model, clean, mlps: str) -> dict:
    names = [model.config.write_site] + ["mlp_out"] * (mlps == "frozen" and model.config.has_mlp)
    return {site: lambda _, __, site=site: clean[site] for site in resolve(model.config, names)}


def sent(model, sender: Node, clean, replaced, here) -> dict:
    here = here.unsqueeze(-1)
    if sender.kind == "input":
        input = torch.where(here, replaced.input, clean.embedded)
        return {Site("resid_pre", 0): lambda _, __: input}
    if sender.kind == "mlp":
        site, new = Site("mlp_out", sender.layer), replaced.mlp_out[sender.layer]
        return {site: lambda x, _: torch.where(here, new, x)}
    site = Site(model.config.write_site, sender.layer)
    z = clean[site].clone()
    z[:, :, sender.index] = torch.where(here, replaced.z[sender.layer][:, :, sender.index], z[:, :, sender.index])
    return {site: lambda _, __: z}


def received(readers, recorded, here) -> dict:
    """One patch a site, as two ports of a layer's heads may share one."""
    heads: dict[Site, list[int]] = {}
    for reader in readers:
        heads.setdefault(site_of(reader), []).append(reader.index)

    def patch(value, _, site):
        if site.name in PORTS:
            value = value.clone()
            old, new = value[:, :, heads[site]], recorded[site][:, :, heads[site]]
            value[:, :, heads[site]] = torch.where(here[:, :, None, None], new, old)
            return value
        return torch.where(here.unsqueeze(-1), recorded[site], value)

    return {site: lambda value, cache, site=site: patch(value, cache, site) for site in heads}


def agree(model, task, receivers, **settings) -> None:
    """On a sender of each kind, before, between and after the receivers."""
    able = open_to(model, parse_receivers(model, receivers))
    senders = [str(node) for node in able if str(node) in ("input", "a0.h1", "m0", "a1.h2", "m1", "a2.h0")]
    found = path_patching(model, task, receivers=receivers, senders=senders, **settings)
    np.testing.assert_allclose(found.values, two_runs_a_sender(model, task, receivers, senders, **settings), atol=1e-12)


def present(model, receivers) -> list[str]:
    """Those that the model has, as it names them."""
    nodes = [Node.parse(name) for name in receivers if model.config.has_mlp or not name.startswith("m")]
    return [str(_port(model, node.layer, node.index, node.port) if node.port else node) for node in nodes]


@pytest.mark.parametrize("receivers", RECEIVERS.values(), ids=RECEIVERS)
def test_scores_are_what_two_whole_runs_a_sender_measure(model, make_task, receivers):
    if not (receivers := present(model, receivers)):
        pytest.skip("no MLPs")
    agree(model, make_task(model), receivers)


@pytest.mark.parametrize("positions", [("S",), ("END",), ("T", "S")], ids=str)
@pytest.mark.parametrize("variant", ["plain", "parallel", "gemma2", "olmo2"])
def test_at_named_positions_too(make_model, spread_task, variant, positions):
    model = make_model(variant)
    task = spread_task(model)
    agree(model, task, RECEIVERS["queries of several layers"], positions=positions)
    agree(model, task, present(model, RECEIVERS["MLPs and heads"]), positions=positions)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_under_other_ablations_too(plain, make_task, ablation):
    task = make_task(plain)
    agree(plain, task, ["logits"], ablation=ablation)
    agree(plain, task, RECEIVERS["a head and the MLP of its layer"], ablation=ablation, mlps="frozen")


def test_every_writer_sends_unless_told_otherwise(plain, make_task):
    task = make_task(plain)
    everyone = path_patching(plain, task, receivers="a2.h0.q")
    np.testing.assert_allclose(everyone.values, two_runs_a_sender(plain, task, ["a2.h0.q"]), atol=1e-12)
    assert everyone.settings["senders"] == "all"
    heads = path_patching(plain, task, receivers="a2.h0.q", senders="heads")
    sent = np.array([writer.kind == "head" for writer in heads.wiring.writers])
    np.testing.assert_allclose(heads.values, np.where(sent, everyone.values, 0), atol=1e-12)
    assert heads.settings["senders"] == "heads"


def test_a_frozen_path_is_an_edge(model, make_task):
    """All edges of the model, one by one, are what ``exact`` measures."""
    task, readers = make_task(model), Wiring.of(model.config).readers
    links = path_links(model, task, receivers=readers, mlps="frozen")
    np.testing.assert_allclose(links.values, exact(model, task).values, atol=1e-12)


def test_a_link_is_path_patching_into_one_receiver(plain, make_task):
    task = make_task(plain, changed=(2, 5, 6))  # END among them, or the input would have nothing to send to the logits
    links = path_links(plain, task, receivers=["a1.h0", "m1", "logits"], senders=["input", "a0.h1", "m0"])
    assert len(np.flatnonzero(links.values)) == 5 * 3
    for reader in ("a1.h0.k", "m1", "logits"):
        alone = path_patching(plain, task, receivers=reader, senders=["input", "a0.h1", "m0"])
        np.testing.assert_allclose(
            links.wiring.grid(links.values)[:, links.wiring.readers.index(Node.parse(reader))], alone.values
        )


def test_without_normalisation_direct_paths_to_the_logits_sum_to_the_whole_effect(make_model, make_task):
    model = make_model("no_norm")
    task = make_task(model)
    clean, corrupted = (
        task.metric(model.run(tokens, logits_at=task.prompts.end)[0], task.prompts)
        for tokens in (task.prompts.clean, task.prompts.corrupted)
    )
    scores = path_patching(model, task, mlps="frozen", keep_prompts=True)
    np.testing.assert_allclose(scores.per_prompt.sum(1), clean - corrupted, atol=1e-12)


def test_the_logits_hear_end_alone(plain, make_task):
    task = make_task(plain)
    np.testing.assert_array_equal(path_patching(plain, task).values, path_patching(plain, task, positions="END").values)


def test_where_heads_share_keys_a_whole_head_receives_what_its_group_does(make_model, make_task):
    model = make_model("llama")
    task = make_task(model)
    assert parse_receivers(model, "a1.h3") == tuple(map(Node.parse, ("a1.g1.k", "a1.g1.v", "a1.h3.q")))
    alone = path_patching(model, task, receivers=["a1.h3.q", "a1.g1.k", "a1.g1.v"])
    np.testing.assert_array_equal(path_patching(model, task, receivers="a1.h3").values, alone.values)
    with pytest.raises(UnknownNode, match=r"a1\.g1\.k"):
        path_patching(model, task, receivers="a1.h3.k")


def test_senders_above_the_first_receiver_reach_the_others(plain, make_task):
    """The released code leaves them out."""
    task = make_task(plain)
    scores = path_patching(plain, task, receivers=["a0.h0.q", "a2.h1.q"], senders=["a1.h1", "a1.h2"])
    alone = path_patching(plain, task, receivers="a2.h1.q", senders=["a1.h1", "a1.h2"])
    np.testing.assert_allclose(scores.values, alone.values, atol=1e-12)
    assert (scores.values != 0).sum() == 2


def test_neither_batches_nor_stacking_change_a_score(plain, spread_task, monkeypatch):
    task, settings = spread_task(plain), {"receivers": ["a1.h0.v", "m1"], "senders": ["input", "a0.h1", "m0"]}
    for more in ({}, {"positions": ["S"]}):
        whole = path_patching(plain, task, **settings, **more)
        with monkeypatch.context() as patched:
            patched.setattr(import_module("circuits.discovery.suffix"), "TOKENS_AT_ONCE", 1)
            pieces = path_patching(plain, task, batch_size=2, **settings, **more)
        np.testing.assert_allclose(pieces.per_prompt, whole.per_prompt, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"receivers": "a7.h0.q"}, UnknownNode, "Did you mean 'a2.h0.q'"),
        ({"receivers": []}, CircuitError, "needs a receiver"),
        ({"receivers": ["a1.h0.q", "logits"]}, CircuitError, "no other receiver can matter.*call of their own"),
        ({"receivers": "m0", "senders": ["a1.h1", "m1"]}, CircuitError, "a1.h1, m1 cannot send to m0.*Leave them out"),
        ({"receivers": "a0.h1", "senders": "heads"}, CircuitError, "nobody is to send to a0.h1.q, a0.h1.k, a0.h1.v"),
        ({"senders": "a0.h0.q"}, UnknownNode, "Did you mean 'a0.h0'"),
        ({"receivers": "m0", "positions": "S3"}, TaskError, "no position 'S3', but S, T, END.*Did you mean 'S'"),
        ({"receivers": "m0", "positions": ()}, TaskError, "Name at least one"),
        ({"positions": "S"}, CircuitError, "logits read END alone: nothing reaches them at S"),
    ],
)
def test_what_cannot_be_patched_is_refused_with_a_remedy(plain, spread_task, settings, error, message):
    with pytest.raises(error, match=message):
        path_patching(plain, spread_task(plain), **settings)


@pytest.fixture(scope="module")
def planted():
    return indirect_object(n_prompts=8)


def test_stages_find_movers_then_inhibition_then_the_duplicate(planted):
    stages = staged(planted.model, planted.task, stages=("q@END", "kv"), threshold=0.1)
    role = {head: role for role, head in planted.roles.items()}
    found = [{role[str(head)] for head in stage.kept} for stage in stages]
    assert found == [{"mover", "late_mover"}, {"inhibit_name", "inhibit_place"}, {"duplicate"}]
    assert [stage.position for stage in stages] == [None, "END", None]
    assert stages[1].receivers == tuple(head.with_port("q") for head in sorted(stages[0].kept))
    drawn = staged_circuit(stages, threshold=0.1)
    assert names(drawn) == {edge for edge in planted.circuit_edges if not edge.startswith("input")}
    assert drawn.edges[stages[0].kept[0], Node.logits()]["weight"] == pytest.approx(stages[0].scores.values.max())


def test_stages_through_every_port_find_every_edge_of_the_truth(planted):
    stages = staged(planted.model, planted.task, stages=("qkv",) * 9, senders=None, threshold=0.1)
    assert len(stages) == 4  # the last found the input alone, into which nothing flows
    assert stages[-1].kept == (Node.input(),)
    assert names(staged_circuit(stages, threshold=0.1)) == planted.circuit_edges


def names(circuit) -> set[str]:
    return {edge_name(*edge) for edge in circuit.edges_kept}


def test_a_kept_mlp_receives_in_the_next_stage(plain, make_task):
    stages = staged(plain, make_task(plain), start="a2.h0.q", stages=("kv",), senders=["m1", "a1.h0", "m0"], n_per_stage=2)
    heads = {head.with_port(port) for head in stages[0].kept for port in "kv" if head.kind == "head"}
    assert set(stages[1].receivers) == heads | {node for node in stages[0].kept if node.kind == "mlp"}
    assert len(stages[0].kept) == 2


def test_kept_heads_receive_by_the_keys_and_values_of_their_groups(make_model, make_task):
    model = make_model("llama")
    stages = staged(model, make_task(model), stages=("qv",), senders=["a0.h1", "a1.h3"], n_per_stage=2)
    heads = stages[0].kept
    groups = {Node.group(head.layer, model.config.group_of(head.index), "v") for head in heads}
    assert set(stages[1].receivers) == {head.with_port("q") for head in heads} | groups


def test_a_threshold_that_nothing_reaches_ends_the_trace(plain, make_task):
    stages = staged(plain, make_task(plain), threshold=1e9)
    assert [stage.kept for stage in stages] == [()]
    with pytest.raises(CircuitError, match="Lower the threshold"):
        staged_circuit(stages)


@pytest.mark.parametrize("step", ["", "Q", "@END", "q@@END", "qk v"])
def test_a_stage_that_is_none_is_refused(plain, make_task, step):
    with pytest.raises((CircuitError, TaskError), match="is no stage|has no position '@END'"):
        staged(plain, make_task(plain), stages=[step])
