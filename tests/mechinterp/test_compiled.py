"""The circuits set by hand are what they say: shown by cutting every edge, one by one and all at once."""

from collections import defaultdict
from functools import cache

import pytest
import torch

from mechinterp.metrics import is_top
from mechinterp.models.compiled import COMPILED, indirect_object, induction
from mechinterp.models.load import load, save
from mechinterp.nodes import Node
from mechinterp.sites import Site

WRITES = ("embed", "pos_embed", "z", "mlp_out")
CASES = [(name, seed) for name in COMPILED for seed in (0, 1)]


@cache
def planted_by(name, seed):
    return COMPILED[name](seed, n_prompts=4)


def all_edges(config):
    """Every (writer, reader) pair of the model, written as plainly as can be."""
    edges, writers = [], ["input"]
    for layer in range(config.n_layers):
        heads = [f"a{layer}.h{head}" for head in range(config.n_heads)]
        edges += [(writer, f"{head}.{port}") for writer in writers for head in heads for port in "qkv"]
        writers += heads
        edges += [(writer, f"m{layer}") for writer in writers]
        writers.append(f"m{layer}")
    return edges + [(writer, "logits") for writer in writers]


def corrupted_writes(planted):
    return planted.model.run(planted.task.prompts.corrupted, record=WRITES)[1]


def when_cut(planted, edges, corrupted):
    """The metric of each prompt when these edges carry what they carry in the corrupted run; all else is recomputed."""
    prompts, model = planted.task.prompts, planted.model
    cuts = defaultdict(list)
    for writer, reader in edges:
        site, head = input_of(Node.parse(reader), model.config.n_layers - 1)
        cuts[site].append((writer, head))

    def patch(site):
        def replace(value, now):
            value = value.clone()
            for writer, head in cuts[site]:
                (value if head is None else value[:, :, head]).add_(corrupted.output(writer) - now.output(writer))
            return value

        return replace

    patches = {site: patch(site) for site in cuts}
    logits, _ = model.run(prompts.clean, record=WRITES, patch=patches, logits_at=prompts.end)
    return planted.task.metric(logits, prompts)


def input_of(reader, last):
    """Where this reader's own input is patched, and which head's slice of it (None: there is but one reader)."""
    if reader.kind == "logits":
        return Site("resid_post", last), None
    if reader.kind == "mlp":
        return Site("mlp_in", reader.layer), None
    return Site(f"{reader.port}_input", reader.layer), reader.index


def clean_and_corrupted(planted):
    prompts = planted.task.prompts
    both = (planted.model.run(tokens, logits_at=prompts.end)[0] for tokens in (prompts.clean, prompts.corrupted))
    return tuple(planted.task.metric(logits, prompts) for logits in both)


def pattern(planted, role, query, key):
    """How much attention this head pays at position ``query`` of each prompt to position ``key``."""
    node, prompts = Node.parse(planted.roles[role]), planted.task.prompts
    _, cache = planted.model.run(prompts.clean, record=[Site("pattern", node.layer)])
    rows = torch.arange(len(prompts))
    return cache["pattern", node.layer][rows, node.index, prompts.positions[query], prompts.positions[key]]


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_cutting_an_edge_matters_exactly_if_it_is_in_the_circuit(name, seed):
    planted = planted_by(name, seed)
    clean, corrupted = clean_and_corrupted(planted)[0], corrupted_writes(planted)
    effects = {
        f"{writer}->{reader}": (clean - when_cut(planted, [(writer, reader)], corrupted)).mean().abs().item()
        for writer, reader in all_edges(planted.model.config)
    }
    assert planted.circuit_edges == {edge for edge, effect in effects.items() if effect > 0.5}
    assert max(effect for edge, effect in effects.items() if edge not in planted.circuit_edges) < 1e-4


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_the_circuit_alone_does_the_task(name, seed):
    planted = planted_by(name, seed)
    others = [edge for edge in all_edges(planted.model.config) if "->".join(edge) not in planted.circuit_edges]
    clean, _ = clean_and_corrupted(planted)
    assert torch.allclose(when_cut(planted, others, corrupted_writes(planted)), clean, atol=1e-3)


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_without_any_edge_the_model_is_the_corrupted_run(name, seed):
    planted = planted_by(name, seed)
    every_edge, (_, corrupted) = all_edges(planted.model.config), clean_and_corrupted(planted)
    assert torch.allclose(when_cut(planted, every_edge, corrupted_writes(planted)), corrupted, atol=1e-3)


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_the_model_does_its_task_and_not_on_corrupted_prompts(name, seed):
    planted = planted_by(name, seed)
    prompts = planted.task.prompts
    clean, corrupted = clean_and_corrupted(planted)
    assert is_top(planted.model.run(prompts.clean, logits_at=prompts.end)[0], prompts).all()
    assert (clean > 4).all()
    assert (corrupted < 0.01).all()


def test_the_induction_heads_look_where_they_should():
    planted = planted_by("induction", 0)
    assert (pattern(planted, "previous", "B", "A1") > 0.9).all()
    assert (pattern(planted, "induction", "END", "B") > 0.9).all()


def test_the_heads_of_indirect_object_look_where_they_should():
    planted = planted_by("indirect-object", 0)
    assert set(planted.task.prompts.groups.tolist()) == {0, 1}
    assert (pattern(planted, "duplicate", "S2", "S1") > 0.9).all()
    for role in ("inhibit_name", "inhibit_place"):
        assert (pattern(planted, role, "END", "S2") > 0.8).all()
    for role in ("mover", "late_mover"):
        assert (pattern(planted, role, "END", "IO") > 0.7).all()


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_distractors_are_louder_than_the_circuit_and_hear_the_corruption(name, seed):
    planted = planted_by(name, seed)
    clean, corrupted = planted.model.run(planted.task.prompts.clean, record=WRITES)[1], corrupted_writes(planted)
    writers = {writer for writer, _ in all_edges(planted.model.config)} - {"input"}
    circuit = set(planted.roles.values())

    def quietest_and_loudest(among, size):
        sizes = [size(writer).norm(dim=-1).mean().item() for writer in among]
        return min(sizes), max(sizes)

    for size in (clean.output, lambda writer: clean.output(writer) - corrupted.output(writer)):
        assert quietest_and_loudest(writers - circuit, size)[0] > quietest_and_loudest(circuit, size)[1]


@pytest.mark.parametrize("name", COMPILED)
def test_rotating_the_stream_changes_no_logit(name):
    rotated, along_the_axes = (COMPILED[name](0, 4, rotate=rotate) for rotate in (True, False))
    tokens = rotated.task.prompts.clean
    assert torch.equal(tokens, along_the_axes.task.prompts.clean)
    assert torch.allclose(rotated.model.run(tokens)[0], along_the_axes.model.run(tokens)[0], atol=1e-4)
    assert (rotated.model.weights.W_E != 0).all()


@pytest.mark.parametrize("name", COMPILED)
def test_a_seed_gives_the_same_model_again_and_another_seed_another(name):
    first, again, other = (COMPILED[name](seed, 4) for seed in (3, 3, 4))
    assert first.model.weights.fingerprint == again.model.weights.fingerprint != other.model.weights.fingerprint
    assert first.circuit_edges == again.circuit_edges
    assert len(first.circuit_edges) == len(other.circuit_edges)
    assert len({COMPILED[name](seed, 1).circuit_edges for seed in range(8)}) > 1


def test_saturated_attention_has_the_same_truth():
    planted = induction(n_prompts=8, sharpness=20.0)
    clean, corrupted = clean_and_corrupted(planted)[0], corrupted_writes(planted)
    for edge in planted.circuit_edges:
        assert (clean - when_cut(planted, [tuple(edge.split("->"))], corrupted)).mean() > 4


def test_a_planted_model_is_saved_and_loaded_equal(tmp_path):
    planted = indirect_object(n_prompts=2)
    save(planted.model, tmp_path / "planted")
    loaded = load(str(tmp_path / "planted"))
    assert loaded.weights.fingerprint == planted.model.weights.fingerprint
    assert loaded.tokenizer.encode(planted.task.text(0)) == planted.task.prompts.clean[0].tolist()
