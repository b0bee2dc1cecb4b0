"""Pictures: everything that should be in them is, and no more."""

import subprocess
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest

from circuits import Circuit, Scores, Wiring, draw
from circuits.edges import fold_ports
from circuits.layout import BOX, GAP, Layout, arrange, crossing_count, route
from circuits.picture import PORT_COLOURS
from mechinterp.errors import CircuitError
from mechinterp.nodes import Node

matplotlib.use("Agg")


@pytest.fixture
def circuit() -> Circuit:
    wiring = Wiring(3, 4)
    values = np.random.default_rng(0).normal(size=wiring.n_edges) ** 3
    return Scores(wiring, values, method="eap", unit="logit_diff", model="toy", task="ioi").top(40)


def texts(figure) -> list[str]:
    legend = figure.axes[0].get_legend()
    return [text.get_text() for text in [*figure.texts, *figure.axes[0].texts, *legend.get_texts(), legend.get_title()]]


def curves(figure) -> dict:
    return {patch.get_gid(): patch for patch in figure.axes[0].patches if patch.get_gid() and "->" in patch.get_gid()}


def test_every_edge_and_every_part_is_drawn_once(circuit):
    figure = draw(circuit)
    assert sorted(curves(figure)) == sorted(f"{writer}->{reader}" for writer, reader in circuit.edges_kept)
    names = texts(figure)
    for node in {node.with_port(None) for node in circuit.nodes}:
        assert names.count(str(node)) == 1


def test_an_edge_into_what_heads_share_is_drawn_to_each_head_of_the_circuit_and_counted_once():
    wiring = Wiring(2, 4, n_key_value_heads=2)
    names = ["input->a0.g1.k", "a0.h2->logits", "a0.h3->logits", "a0.h3->a1.g0.v", "a1.h1->logits"]
    figure = draw(wiring.circuit(np.isin(wiring.edge_names, names)))
    shared = {f"input->a0.g1.k->a0.h{head}" for head in (2, 3)}
    assert set(curves(figure)) == shared | {name for name in names if name != "input->a0.g1.k"}
    assert any(f"5 of {wiring.n_edges} edges · 3 heads" in text for text in texts(figure))
    assert {"a0.h2", "a0.h3", "a1.h1"} <= set(texts(figure))


def test_sign_is_dashed_width_is_magnitude_and_colour_is_port(circuit):
    drawn = curves(draw(circuit))
    weights = {f"{w}->{r}": circuit.edges[w, r]["weight"] for w, r in circuit.edges_kept}
    by_width = sorted(weights, key=lambda name: drawn[name].get_linewidth())
    assert by_width == sorted(weights, key=lambda name: abs(weights[name]))
    for (writer, reader), name in zip(circuit.edges_kept, weights, strict=True):
        assert (drawn[name].get_linestyle() != "solid") == (weights[name] < 0), writer
        assert matplotlib.colors.to_hex(drawn[name].get_edgecolor()).upper() == PORT_COLOURS[reader.port]


def test_title_and_legend_say_what_is_shown(circuit):
    circuit.graph["faithfulness"] = 0.8731
    words = texts(draw(circuit))
    assert "ioi on toy by eap" in words
    assert any("40 of 262 edges" in text and "faithfulness 0.873" in text for text in words)
    assert {"score: logit_diff", "read as query (left)", "negative: hurts"} <= set(words)


def test_edges_that_are_no_effects_are_not_said_to_help_or_hurt(circuit):
    circuit.graph["method"] = "codes-edges"
    words = texts(draw(circuit))
    assert "negative: less than each alone" in words
    assert not any("hurts" in text for text in words)


def test_a_large_circuit_is_cut_to_its_strongest_edges_and_says_so(circuit):
    figure = draw(circuit, max_edges=10)
    assert any("the strongest 10 of 40 edges" in text for text in texts(figure))
    weights = sorted((abs(circuit.edges[edge]["weight"]) for edge in circuit.edges_kept), reverse=True)
    shown = [edge for edge in circuit.edges_kept if "->".join(map(str, edge)) in curves(figure)]
    assert min(abs(circuit.edges[edge]["weight"]) for edge in shown) == weights[9]


def test_too_many_edges_without_scores_are_thinned_out_evenly(circuit):
    for edge in circuit.edges_kept:
        del circuit.edges[edge]["weight"]
    figure = draw(circuit, max_edges=10)
    assert any("10 of 40 edges, evenly chosen" in text for text in texts(figure))
    shown = [name in curves(figure) for name in ("->".join(map(str, edge)) for edge in circuit.edges_kept)]
    assert [at for at, is_shown in enumerate(shown) if is_shown] == list(range(0, 40, 4))


def test_circuits_without_scores_or_edges_or_with_positions_can_be_drawn():
    named = Circuit()
    named.keep("input@2", "a0.h1.v@2")
    named.keep("a0.h1@2", "f1.77@4")
    assert "a0.h1@2" in texts(draw(named))
    assert not any("score" in text for text in texts(draw(named)))
    assert "logits" in texts(draw(Circuit()))


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_decides_the_kind_of_picture(circuit, tmp_path, suffix, start):
    draw(circuit, tmp_path / f"circuit{suffix}")
    assert (tmp_path / f"circuit{suffix}").read_bytes().startswith(start)


def test_svg_names_its_edges(circuit, tmp_path):
    circuit.save(tmp_path / "circuit.svg")
    writer, reader = circuit.edges_kept[0]
    assert f'id="{writer}-&gt;{reader}"' in (tmp_path / "circuit.svg").read_text()


def test_another_suffix_is_refused(circuit, tmp_path):
    with pytest.raises(CircuitError, match=r"pictures are written as \.png, \.svg, \.pdf"):
        draw(circuit, tmp_path / "circuit.jpg")


def test_parts_never_overlap_and_what_is_computed_later_is_higher(circuit):
    layout = arranged(circuit)
    places = sorted((y, x) for node, (x, y) in layout.places.items())
    for (y, x), (next_y, next_x) in pairwise(places):
        assert next_y - y > BOX[1] or next_x - x >= GAP - 1e-9
    for writer, reader in circuit.edges_kept:
        assert layout.places[writer][1] < layout.places[reader.with_port(None)][1]
    assert all(abs(x) + BOX[0] / 2 <= layout.half_width for x, _ in layout.places.values())


def test_two_crossed_pairs_are_uncrossed():
    crossed = Circuit()
    for head, other in ((0, 3), (1, 2), (2, 1), (3, 0)):
        crossed.keep(Node.head(0, head), Node.head(1, other, "v"), weight=1.0)
    layout = arranged(crossed)
    assert crossing_count(layout, fold_ports(crossed)) == 0
    by_head = {node: (float(node.index), float(node.layer)) for node in crossed.heads}
    assert crossing_count(Layout(by_head, 4.0, 1.0), fold_ports(crossed)) == 6


def test_barycentres_reduce_crossings(circuit):
    nodes = {node.with_port(None) for node in circuit.nodes}
    as_numbered = arrange(nodes, strengths(circuit), n_sweeps=0)
    assert crossing_count(arranged(circuit), fold_ports(circuit)) < crossing_count(as_numbered, fold_ports(circuit))


def test_an_edge_bends_around_a_part_in_its_way():
    writer, between, reader = Node.head(0, 0), Node.head(1, 0), Node.head(2, 0, "k")
    free = Layout({writer: (0.0, 0.0), reader.with_port(None): (0.0, 4.0)}, 3.0, 4.0)
    blocked = Layout(free.places | {between: (0.0, 2.0)}, 3.0, 4.0)
    assert np.ptp(route(free, (writer, reader))[:, 0]) == 0
    middle = route(blocked, (writer, reader)).T @ [0.125, 0.375, 0.375, 0.125]
    assert abs(middle[0]) > BOX[0] / 2


def test_viewing_and_exporting_import_neither_torch_nor_matplotlib():
    heavy = "sys.exit(bool({'torch', 'matplotlib', 'transformer_lens'} & set(sys.modules)))"
    code = f"from circuits import Circuit, Scores, Wiring, draw; import sys; {heavy}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def strengths(circuit) -> dict:
    return {edge: abs(circuit.edges[edge]["weight"]) for edge in circuit.edges_kept}


def arranged(circuit) -> Layout:
    return arrange({node.with_port(None) for node in circuit.nodes}, strengths(circuit))
