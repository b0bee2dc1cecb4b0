"""The cache of one pass: four spellings of a key, what a node wrote, and errors that say what was recorded."""

import pytest
import torch
from torch.testing import assert_close

from mechinterp.errors import UnknownNode, UnknownSite
from mechinterp.nodes import Node
from mechinterp.sites import Site


@pytest.fixture(scope="module")
def cache(plain, tokens):
    return plain.run(tokens, record=["embed", "pos_embed", "z", "mlp_out", "attn_out", "resid_post"])[1]


@pytest.mark.parametrize("key", [Site("z", 1), "z.1", "blocks.1.attn.hook_z", ("z", 1)])
def test_a_site_is_found_under_each_spelling(cache, key):
    assert cache[key] is cache[Site("z", 1)]
    assert key in cache


@pytest.mark.parametrize("key", [Site("q", 1), "q.1", "no site", ("z", 9), ("z", 1, 2), 7])
def test_what_was_not_recorded_is_not_in_the_cache(cache, key):
    assert key not in cache


def test_a_missing_site_names_what_was_recorded(plain, tokens, cache):
    with pytest.raises(UnknownSite, match=r"did not record 'q.1'; it recorded .*z.0.*Add it to `record`"):
        cache["q", 1]
    with pytest.raises(UnknownSite, match="it recorded nothing"):
        plain.run(tokens)[1]["z", 0]


def test_the_cache_is_read_only(cache):
    with pytest.raises(TypeError):
        cache["z", 1] = torch.zeros(1)


def test_what_all_writers_wrote_is_the_residual_stream(model, tokens):
    """Heads, whatever normalises what they write together, MLPs, the input and the biases of attention."""
    config = model.config
    record = ["embed", *["pos_embed"] * config.learned_positions, config.write_site, *["mlp_out"] * config.has_mlp]
    _, cache = model.run(tokens, record=[*record, "resid_post"])
    writers = [Node.input(), *(Node.head(layer, head) for layer in range(3) for head in range(config.n_heads))]
    writers += [Node.mlp(layer) for layer in range(3 * config.has_mlp)]
    biases = sum(block.b_O for block in model.weights.blocks)
    assert_close(sum(cache.output(node) for node in writers) + biases, cache["resid_post", 2])
    assert torch.equal(cache.output("a1.h2"), cache.output(Node.head(1, 2)))


def test_what_transformer_lens_does_not_have_is_left_out_under_its_names(make_model, tokens):
    _, cache = make_model("gemma2").run(tokens, record=["z", "z_written", "logits"])
    assert set(cache.to_transformer_lens()) == {f"blocks.{layer}.attn.hook_z" for layer in range(3)}


@pytest.mark.parametrize("node", ["logits", "f0.3", "a0.h1.q"])
def test_what_writes_nothing_is_refused(cache, node):
    with pytest.raises(UnknownNode, match="writes nothing to the residual stream"):
        cache.output(node)


@pytest.mark.parametrize("node", ["a3.h0", "a0.h3"])
def test_a_head_outside_the_model_is_refused_with_what_there_is(cache, node):
    with pytest.raises(UnknownNode, match=rf"'{node}' is not in plain, which has layers 0\.\.2 of heads 0\.\.2"):
        cache.output(node)


def test_the_output_at_one_position_is_asked_for_by_slicing(cache):
    with pytest.raises(UnknownNode, match=r"output\('a1.h2'\)\[:, 3\]"):
        cache.output("a1.h2@3")
