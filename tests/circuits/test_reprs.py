"""What notebooks show of scores, circuits, reports and comparisons."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from circuits import Circuit, Comparison, Scores, Wiring, draw_effects
from circuits.comparison import Row
from circuits.curves import Curve
from circuits.effects import panels_of
from circuits.repairs.report import Condition, Mean, Repair
from circuits.reuse.report import Reuse, Transfer
from mechinterp.errors import CircuitError

SIGNED = re.compile(r"[-+]\d*\.\d+")


def made(items="edge", wiring=None, values=None, **facts):
    wiring = wiring or Wiring(2, 3)
    n = {"edge": wiring.n_edges, "node": len(wiring.writers), "port": sum(bool(r.port) for r in wiring.readers), "neuron": 8}
    values = np.random.default_rng(0).normal(size=n[items]) if values is None else values
    about = {"method": "eap", "unit": "logit_diff", "model": "toy", "task": "<t>"}
    return Scores(wiring, values, items=items, **(about | facts))


def parsed(html: str) -> ElementTree.Element:
    """The representation as a tree: well formed, and without script."""
    tree = ElementTree.fromstring(f"<div>{html.replace('&nbsp;', ' ')}</div>".replace("<br>", "<br/>"))
    assert not [element for element in tree.iter() if element.tag.endswith("script")]
    return tree


def svgs(tree):
    return [element for element in tree.iter() if element.tag.endswith("svg")]


@pytest.mark.parametrize("wiring", [Wiring(2, 3), Wiring(2, 4, n_key_value_heads=2), Wiring(2, 2, has_mlp=False)], ids=repr)
@pytest.mark.parametrize("items", ["edge", "node", "port"])
def test_the_map_holds_every_part_once_with_its_score(items, wiring):
    scores = made(items, wiring)
    panels = panels_of(scores.wiring, scores.items, scores.values, scores.settings)
    cells = {
        name: v for p in panels for row, vs in zip(p.names, p.values, strict=True) for name, v in zip(row, vs, strict=True)
    }
    if items == "port":
        wanted = dict(zip(scores.names, scores.values, strict=True))
    else:
        wanted = dict(zip(map(str, wiring.writers), scores.nodes, strict=True))
        wanted.pop("input")
    assert cells == pytest.approx(wanted)
    hints = [cell.get("title", "") for cell in parsed(scores._repr_html_()).iter("td") if cell.get("title")]
    assert sorted(hints) == sorted(f"{name}: {value:+.4g} logit_diff" for name, value in wanted.items())


def test_parts_that_were_not_judged_are_left_out():
    scores = made("node", settings={"judged": ["head"]})
    assert [p.title for p in panels_of(scores.wiring, scores.items, scores.values, scores.settings)] == ["heads"]


def test_scores_of_neurons_show_their_strongest_and_no_map():
    page = made("neuron")._repr_html_()
    assert "strongest" in page
    assert "<caption" not in page
    with pytest.raises(CircuitError, match="these are neuron scores"):
        draw_effects(made("neuron"))


def test_names_from_outside_are_escaped():
    assert "<t>" not in made()._repr_html_()
    assert "&lt;t&gt;" in made().top(5)._repr_html_()


def test_the_effect_map_is_centred_on_zero_and_readable(tmp_path):
    scores = made("node")
    figure = draw_effects(scores, tmp_path / "effects.svg")
    heads, mlps, bar = figure.axes
    assert np.array_equal(heads.images[0].get_array(), scores.values[[1, 2, 3, 5, 6, 7]].reshape(2, 3))
    low, high = heads.images[0].get_clim()
    assert -low == high == np.abs(scores.values[1:]).max()
    assert bar.get_ylabel() == "logit_diff"
    assert len(heads.texts) == 6
    assert all(np.sign(float(t.get_text())) == np.sign(v) for t, v in zip(mlps.texts, scores.values[[4, 8]], strict=True))
    assert (tmp_path / "effects.svg").stat().st_size > 0


def test_large_maps_mark_negative_cells_without_numbers():
    wiring = Wiring(20, 24)
    scores = made("node", wiring)
    heads = draw_effects(scores).axes[0]
    drawn = np.asarray(heads.images[0].get_array())
    marked = [text.get_text() == "–" for text in heads.texts]
    assert np.array_equal(np.array(marked).reshape(drawn.shape), drawn < -0.05 * np.abs(scores.values[1:]).max())


def test_the_interactive_map_holds_the_same_numbers():
    pytest.importorskip("plotly")
    scores = made("edge")
    figure = draw_effects(scores, interactive=True)
    assert np.allclose(np.asarray(figure.data[0].z), scores.nodes[[1, 2, 3, 5, 6, 7]].reshape(2, 3))
    assert figure.data[0].zmin == -figure.data[0].zmax
    with pytest.raises(CircuitError, match="write_html"):
        draw_effects(scores, "map.png", interactive=True)


@pytest.mark.parametrize("wiring", [Wiring(2, 3), Wiring(2, 4, n_key_value_heads=2)], ids=repr)
def test_a_circuit_draws_every_edge_and_part_and_can_be_read_aloud(wiring):
    circuit = made(wiring=wiring).top(20)
    tree = parsed(circuit._repr_html_())
    (svg,) = svgs(tree)
    titles = {element.text for element in svg.iter() if element.tag.endswith("title")}
    for writer, reader in circuit.edges_kept:
        assert f"{writer}->{reader}: {circuit.edges[writer, reader]['weight']:+.4g} logit_diff" in titles
    assert {str(node) for node in circuit.components()} <= titles
    assert svg.get("role") == "img"
    assert svg.get("aria-label") == " ".join(circuit.describe().split())
    dashed = [element for element in svg.iter() if element.get("stroke-dasharray")]
    assert len(dashed) >= sum(circuit.edges[edge]["weight"] < 0 for edge in circuit.edges_kept)


def test_a_large_circuit_says_how_much_is_drawn():
    circuit = made(wiring=Wiring(4, 6)).top(500)
    page = circuit._repr_html_()
    assert "The strongest 200 of 500 edges are drawn" in page
    assert page.count("<path") == 200


def test_an_empty_circuit_is_shown_too():
    assert svgs(parsed(Circuit()._repr_html_()))


def test_a_report_shows_its_numbers_and_its_curve(report):
    tree = parsed(report._repr_html_())
    words = " ".join(tree.itertext())
    assert "0.812" in words
    assert "[0.700, 0.900]" in words
    (drawing, _key) = svgs(tree)
    titles = [element.text for element in drawing.iter() if element.tag.endswith("title")]
    assert titles == [
        "largest magnitudes, 10 edges: 0.400 [0.300, 0.500]",
        "largest magnitudes, 200 edges: 1.000 [1.000, 1.000]",
        "random, 40 edges: 0.050 [0.000, 0.100]",
        "this circuit, 40 edges: 0.812 [0.700, 0.900]",
    ]
    assert {"whole model", "every edge cut"} <= {element.text for element in drawing.iter()}


def test_a_report_without_a_curve_shows_its_one_point(report):
    titles = re.findall("<title>(.*?)</title>", replace(report, curve=None, random=())._repr_html_())
    assert titles == ["this circuit, 40 edges: 0.812 [0.700, 0.900]"]


def test_a_circuit_carries_how_its_faithfulness_was_measured(report):
    circuit = made().top(40)
    circuit.graph |= {"model": "toy", "task": "t"}
    told = circuit.describe(report)
    circuit.graph.update(report.facts)
    assert circuit.describe() == told
    assert "The ablation was resample (corruption: abc)" in told
    assert "Of 2 random circuits of the same size 100% were less faithful, and the best reached 0.1." in told


def test_a_comparison_lines_up_and_draws_every_method():
    curve = Curve((5, 50), (0.2, 1.0), (0.1, 1.0), (0.3, 1.0), (0.1, 1.0), (5, 50))
    rows = (Row("eap", 0.5, "edge", curve, curve, 50, 0.7), Row("acdc", refused="too | slow"))
    found = Comparison("toy", "t", "abc", "logit_diff", "resample", 4, 4, 50, 3.0, 0.0, rows, curve, 0)
    head, body = found.table()
    assert {len(row) for row in body} == {len(head)}
    null = dict(zip(head, body[-1], strict=True))
    assert (null["method"], null["CMD"], null["edges for 0.9"]) == ("random circuits", f"{curve.cmd:.3f}", "50")
    titles = re.findall("<title>(.*?)</title>", found._repr_html_())
    assert [title.split(",")[0] for title in titles] == ["eap"] * 2 + ["random circuits"] * 2


def test_reuse_shows_its_tables():
    both, twice = ("ioi", "<t>"), (4, 4)
    transfers = [Transfer(one, other, 0.1, 12, None) for one in both for other in both]
    transfers[1] = Transfer("ioi", "<t>", 0.1, 12, 0.625, 0.5, 0.75)
    facts = (twice, twice, ("abc", "abc"), ("logit_diff",) * 2, (3.0, 3.0), (0.0, 0.0))
    found = Reuse("toy", both, "eap", "edge", "resample", 2, 3, True, *facts, (), (), tuple(transfers), ())
    words = list(parsed(found._repr_html_()).itertext())
    assert {"circuit of", "0.62 [0.50, 0.75]", "undefined", "<t>"} <= set(words)


def test_a_repair_shows_its_conditions():
    mean = Mean(0.5, 0.25, 0.75)
    conditions = tuple(Condition(name, ("a0.h1",), mean, mean, mean, 3, 1, {}) for name in ("unedited", "<all>"))
    facts = {"task": "t", "model": "toy", "n_prompts": 8, "at": "END", "attention": {"all": "IO"}, "share": 1, "metric": "m"}
    words = list(parsed(Repair(facts, conditions, (), ())._repr_html_()).itertext())
    assert {"<all>", "50.0 [25.0, 75.0]", "0.500 [0.250, 0.750]"} <= set(words)
