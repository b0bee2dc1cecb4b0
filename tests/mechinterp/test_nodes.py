"""Names of nodes: read and written alike, sorted as a forward pass computes, the same in every process."""

import pickle
import random
import subprocess
import sys

import pytest

from mechinterp.errors import UnknownNode
from mechinterp.nodes import PORTS, Node

# As a pass computes them: what a head reads, the head, latents of the attention output, the MLP's neurons, the MLP.
COMPUTED = ["input", "a0.h0.q", "a0.h0.k", "a0.h0.v", "a0.g0.k", "a0.g0.v", "a0.h1.q", "a0.g1.k", "a0.h0", "a0.h1"]
COMPUTED += ["f0.3", "f0.12", "f0.error"]
COMPUTED += ["m0.n0", "m0.n3", "m0.n12", "m0", "a1.h0.v", "a1.h0", "a1.h10", "m1", "a11.h0", "logits"]

NAMES_OF_NOTHING = ["", "a9", "a9.h", "a9.h6.x", "m", "a9.h6@", "a9.h6@x", "A9.H6", " m4", "a-1.h0", "m4.q", "m4.n", "m4.123"]
NAMES_OF_NOTHING += ["m.n1", "f5", "f5.e", "f.error", "f5.errors", "a9.g1.q", "a9.g", "a9.g1.h1"]


AT_POSITIONS = ["a9.h6@14", "a9.h6.q@0", "a9.g1.k@3", "input@3", "logits@2", "m4@7", "m4.n123@7", "f5.1234@1", "f5.error@1"]


@pytest.mark.parametrize("name", [*COMPUTED, *AT_POSITIONS, "a9.g1"])
def test_parse_and_str_are_inverse(name):
    node = Node.parse(name)
    assert str(node) == name
    assert Node.parse(str(node)) == node
    assert repr(node) == f"Node({name!r})"


def test_constructors_make_what_parse_reads():
    assert Node.input() == Node.parse("input")
    assert Node.head(9, 6, "q").at(14) == Node.parse("a9.h6.q@14")
    assert Node.parse("a9.h6.q").with_port(None) == Node.head(9, 6)
    assert Node.parse("m4@3").at(None) == Node.mlp(4)
    assert Node.group(9, 1, "k") == Node.parse("a9.g1").with_port("k")
    assert Node.neuron(4, 123) == Node.parse("m4.n123")
    assert Node.latent(5, 1234) == Node.parse("f5.1234")
    assert Node.error(5) == Node.parse("f5.error")
    assert [Node.head(0, 0, port).port for port in PORTS] == ["q", "k", "v"]


def test_nodes_sort_in_the_order_of_computation():
    nodes = [Node.parse(name) for name in COMPUTED]
    shuffled = random.Random(0).sample(nodes, len(nodes))
    assert sorted(shuffled) == nodes


def test_positions_sort_within_their_node():
    names = ["a0.h0", "a0.h0@0", "a0.h0@2", "a0.h0@10", "a0.h1"]
    assert [str(node) for node in sorted(map(Node.parse, reversed(names)))] == names


@pytest.mark.parametrize("text", NAMES_OF_NOTHING)
def test_other_texts_are_refused_with_examples(text):
    with pytest.raises(UnknownNode, match=r"Names look like 'input', 'a9.h6'"):
        Node.parse(text)


def test_a_near_miss_is_suggested():
    with pytest.raises(UnknownNode, match="Did you mean 'logits'"):
        Node.parse("logit")


def test_equal_nodes_hash_alike_however_they_were_made():
    assert len({Node.parse("a1.h2"), Node.head(1, 2), Node.head(1, 2, "q").with_port(None)}) == 1
    assert len({Node.parse("f5.error"), Node.error(5), Node.error(5).at(3).at(None), Node.latent(5, 0)}) == 2


def test_a_node_from_another_process_is_found_in_a_set_of_this_one():
    """Processes hash strings differently, so a pickled node must not bring its hash along."""
    code = (
        "import pickle, sys; from mechinterp.nodes import Node; node = Node.parse('a1.h2.q'); hash(node); "
        "sys.stdout.buffer.write(pickle.dumps(node))"
    )
    pickled = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env={"PYTHONHASHSEED": "7"}).stdout
    assert pickle.loads(pickled) in {Node.parse("a1.h2.q")}
