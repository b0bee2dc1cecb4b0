"""Every method on models whose heads share keys, values and normalisations, beside the same models with nothing shared.

Written out, with a key and a value for each head, such a model computes what it did, by as many heads and MLPs. So whatever
a method says of these, and of the edges into queries, MLPs and logits, it must say of both; and what is linear says of a
shared key or value the sum of what it says of the copies.
"""

import numpy as np
import pytest
import torch

from circuits.discovery import ALGORITHMS, settings_of
from circuits.scores import Scores
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights
from mechinterp.nodes import Node

QUICK = {"steps": 3, "n_permutations": 5, "n_train": 4, "d_sae": 4, "batch_size": 6}
DEPENDS_ON_ALL_EDGES = {
    "acdc": "what it cut before decides what an edge costs",
    "hybrid": "a share of all edges is measured",
    "edge-pruning": "masks are learned together",
    "ugs": "masks are learned together",
    "mask-ig": "all edges are cut by shares together",
    "codes-edges": "a pair is held against all others",
}
LINEAR = {"eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "relp", "cdt-edges"}


def written_out(model: Transformer) -> Transformer:
    """The same function, with a key and a value for each head."""
    config, named = model.config, model.weights.named()
    a_group = config.n_heads // config.n_groups
    for name in [name for name in named if "._" in name]:
        named[name.replace("._", ".")] = named.pop(name).repeat_interleave(a_group, 0)
    for name in [name for name in named if name.endswith("k_norm.w")]:
        named[name] = named[name].unflatten(0, (-1, config.d_head)).repeat_interleave(a_group, 0).flatten()
    facts = {**vars(config), "n_key_value_heads": None}
    return Transformer(Weights.from_named(type(config)(**facts), named))


def copies_of(name: str, a_group: int) -> list[str]:
    """What an item is called where nothing is shared: of a group's key or value, once for each of its heads."""
    writer, arrow, reader = name.rpartition("->")
    node = Node.parse(reader)
    if node.kind != "group":
        return [name]
    heads = range(node.index * a_group, (node.index + 1) * a_group)
    return [f"{writer}{arrow}{Node.head(node.layer, head, node.port)}" for head in heads]


@pytest.mark.parametrize("variant", ["llama", "gemma2", "olmo2"])
def test_written_out_a_model_computes_what_it_did(make_model, tokens, variant):
    model = make_model(variant)
    torch.testing.assert_close(written_out(model).run(tokens)[0], model.run(tokens)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", ALGORITHMS)
@pytest.mark.parametrize("variant", ["llama", "gemma2", "olmo2"])
def test_sharing_changes_no_score_of_what_is_not_shared(make_model, make_task, tmp_path, variant, method):
    model = make_model(variant)
    task = make_task(model, n_prompts=6)
    known = set(settings_of(method)) - ({"steps"} if method.startswith("atp") else set())
    settings = {name: value for name, value in QUICK.items() if name in known}
    found = ALGORITHMS[method](model, task, **settings)
    found.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json") == found
    assert np.isfinite(found.values).all()
    if method not in DEPENDS_ON_ALL_EDGES:
        apart = written_out(model)
        other = ALGORITHMS[method](apart, make_task(apart, n_prompts=6), **settings)
        alike, expected = dict(zip(other.names, other.values, strict=True)), {}
        for name in found.names:
            copies = copies_of(name, model.config.n_heads // model.config.n_groups)
            if len(copies) == 1 or method in LINEAR:
                expected[name] = sum(alike[copy] for copy in copies)
        shared = dict(zip(found.names, found.values, strict=True))
        np.testing.assert_allclose([shared[name] for name in expected], list(expected.values()), atol=1e-6)
        assert any(expected.values())
