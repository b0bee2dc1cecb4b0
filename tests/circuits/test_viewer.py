"""The viewer in a real browser: it draws, filters, isolates, exports, is walked by keyboard, and asks nobody for anything."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from xml.etree import ElementTree

import networkx as nx
import numpy as np
import pytest

from circuits import Circuit, Scores, Wiring, explore, view
from circuits.viewer import page, script
from circuits.viewer_data import viewer_data
from circuits.viewer_evidence import record_evidence
from mechinterp.cli import main
from mechinterp.errors import CircuitError
from mechinterp.models.compiled import induction

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
NASTY = "</script><script>alert(1)</script>\"'<img src=x onerror=alert(2)>{{data}}\u2028"


def scored(n_edges: int, n_layers: int = 3, n_heads: int = 4, **facts) -> Circuit:
    wiring = Wiring(n_layers, n_heads, **facts)
    values = np.random.default_rng(0).normal(size=wiring.n_edges) ** 3
    return Scores(wiring, values, method="eap", unit="logit_diff", model="toy", task="ioi").top(n_edges)


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra 'test'")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no Chromium on the path; install one, or name it in the variable CHROMIUM")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, tmp_path):
    """``visit(circuit)``: the viewer of a circuit, opened. At the end nothing was complained of, and nothing fetched."""
    problems, pages = [], []

    def visit(circuit, model=None, task=None, **settings):
        path = view(circuit, model, task, tmp_path / "viewer.html")
        settings = {"viewport": {"width": 1300, "height": 850}, "accept_downloads": True} | settings
        pages.append(chromium.new_page(**settings))
        opened = pages[-1]
        opened.on("console", lambda said: problems.append(said.text))
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        opened.on("request", lambda asked: None if asked.url == path.as_uri() else problems.append(asked.url))
        opened.goto(path.as_uri())
        opened.wait_for_selector("[data-shown]")
        return opened

    yield visit
    for opened in pages:
        opened.close()
    assert problems == []


def n_shown(opened) -> int:
    return int(opened.get_attribute("main", "data-shown"))


def edges_drawn(opened) -> set[str]:
    return set(opened.eval_on_selector_all(".edges path:not([display])", "all => all.map((path) => path.dataset.edge)"))


def names(circuit) -> set[str]:
    return {f"{writer}->{reader}" for writer, reader in circuit.edges_kept}


def part(opened, name: str):
    return opened.locator(f'.part[data-part="{name}"]')


def focused(opened) -> str:
    return opened.evaluate("document.activeElement.dataset.part")


def test_every_part_and_edge_is_drawn(visit):
    circuit = scored(40)
    opened = visit(circuit)
    assert n_shown(opened) == 40
    assert edges_drawn(opened) == names(circuit)
    shown = opened.eval_on_selector_all(".part", "all => all.map((part) => part.dataset.part)")
    assert shown == sorted(map(str, circuit.components()), key=lambda name: shown.index(name))
    assert opened.locator("h1").text_content() == "ioi on toy by eap"


def test_the_threshold_and_the_sign_filter(visit):
    circuit = scored(40)
    weights = {f"{w}->{r}": circuit.edges[w, r]["weight"] for w, r in circuit.edges_kept}
    cut = sorted(map(abs, weights.values()))[-10]
    opened = visit(circuit)
    opened.fill("[name=least]", f"{cut * 0.9999:.6g}")
    assert edges_drawn(opened) == {name for name, weight in weights.items() if abs(weight) >= cut * 0.9999}
    opened.fill("[name=least]", "0")
    opened.locator("[name=rank]").press("End")
    opened.wait_for_selector("main[data-shown='1']")  # a function to wait for would be evaluated, which the page forbids
    opened.locator("[name=reset]").click()
    opened.check("[value=negative]")
    assert edges_drawn(opened) == {name for name, weight in weights.items() if weight < 0}
    opened.locator("[name=reset]").click()
    opened.uncheck("[name=q]")
    assert edges_drawn(opened) == {name for name in weights if not name.endswith(".q")}


def test_only_whole_paths_are_those_of_pruned(visit):
    circuit = scored(25)
    assert 0 < circuit.pruned().n_edges_kept < 25
    opened = visit(circuit)
    opened.check("[name=whole]")
    assert edges_drawn(opened) == names(circuit.pruned())


def test_a_click_isolates_ancestors_and_descendants(visit):
    circuit = scored(30)
    head = circuit.heads[len(circuit.heads) // 2]
    up, down = nx.descendants(circuit, head) | {head}, nx.ancestors(circuit, head) | {head}
    opened = visit(circuit)
    part(opened, str(head)).click()
    before = {f"{w}->{r}" for w, r in circuit.edges_kept if r in down}
    after = {f"{w}->{r}" for w, r in circuit.edges_kept if w in up}
    assert edges_drawn(opened) == before | after
    assert part(opened, str(head)).get_attribute("aria-pressed") == "true"
    opened.select_option("[name=around]", "down")
    assert edges_drawn(opened) == before
    opened.select_option("[name=around]", "up")
    assert edges_drawn(opened) == after
    opened.keyboard.press("Escape")
    assert n_shown(opened) == 30


def test_the_keyboard_walks_along_the_strongest_edges(visit):
    circuit = scored(40)
    by_strength = {edge: abs(circuit.edges[edge]["weight"]) for edge in circuit.edges_kept}
    opened = visit(circuit)
    parts = opened.eval_on_selector_all(".part:not(.away)", "all => all.map((part) => part.dataset.part)")
    part(opened, parts[0]).focus()
    for name in parts[1:4]:
        opened.keyboard.press("Tab")
        assert focused(opened) == name
    logits = part(opened, "logits")
    logits.focus()
    into = sorted((edge for edge in by_strength if str(edge[1]) == "logits"), key=lambda edge: -by_strength[edge])
    opened.keyboard.press("ArrowDown")
    assert focused(opened) == str(into[0][0])
    opened.keyboard.press("ArrowRight")
    assert focused(opened) == str(into[1][0])
    assert f"{into[1][0]} to logits" in opened.locator(".said").text_content()
    opened.keyboard.press("Enter")
    assert part(opened, str(into[1][0])).get_attribute("aria-pressed") == "true"
    opened.keyboard.press("Escape")
    assert opened.locator(".part[aria-pressed=true]").count() == 0


def test_parts_are_found_by_name(visit):
    circuit = scored(40)
    opened = visit(circuit)
    opened.fill("[name=query]", "M1")
    assert opened.eval_on_selector_all(".part.hit", "all => all.map((part) => part.dataset.part)") == ["m1"]
    opened.locator("[name=query]").press("Enter")
    assert part(opened, "m1").get_attribute("aria-pressed") == "true"


def test_showing_all_forgets_what_was_searched_for(visit):
    opened = visit(scored(40))
    opened.fill("[name=query]", "m1")
    opened.locator("[name=reset]").click()
    assert opened.locator(".part.hit").count() == 0
    assert opened.input_value("[name=query]") == ""


def test_a_score_of_zero_neither_helps_nor_hurts(visit):
    circuit = Circuit()
    circuit.keep("input", "logits", weight=0.0)
    opened = visit(circuit)
    part(opened, "logits").focus()
    opened.keyboard.press("ArrowDown")
    assert "score0" in opened.locator(".card").text_content()
    assert "helps" not in opened.locator(".card").text_content()


def test_a_sign_that_nobody_told_is_not_made_up(visit):
    circuit = Circuit(positive="not said by the file")
    circuit.keep("input", "logits", weight=-1.0)
    said = visit(circuit).locator(".controls").text_content()
    assert "negative: not said by the file" in said
    assert "hurts" not in said


def test_circuits_without_edges_and_of_neurons_are_shown(visit):
    assert "This circuit keeps no edge." in visit(Circuit()).locator(".controls").text_content()
    neurons = Circuit()
    neurons.keep("input", "m0.n5", weight=0.5)
    neurons.keep("m0.n5", "logits", weight=1.0)
    opened = visit(neurons)
    assert n_shown(opened) == 2
    part(opened, "m0.n5").hover()
    assert "neuron 5 of the MLP of layer 0" in opened.locator(".card").text_content()


def test_an_edge_under_the_pointer_is_told(visit):
    circuit = scored(1)
    (writer, reader), *_ = circuit.edges_kept
    opened = visit(circuit)
    place = opened.eval_on_selector(
        ".edges path",
        """path => { const at = path.getPointAtLength(path.getTotalLength() / 2).matrixTransform(path.getScreenCTM());
                     return [at.x, at.y]; }""",
    )
    opened.mouse.move(*place)
    assert opened.locator(".card h2").text_content() == f"{writer}->{reader}"
    assert "logit_diff" in opened.locator(".card").text_content()
    opened.mouse.click(*place)
    opened.mouse.move(5, 5)
    assert opened.locator(".card h2").text_content() == f"{writer}->{reader}", "a click keeps it"
    opened.fill("[name=least]", "1e9")
    assert opened.locator(".bright path").count() == opened.locator(".card h2").count() == 0, "unless it is filtered away"
    opened.fill("[name=least]", "0")
    opened.mouse.click(*place)
    opened.mouse.move(5, 5)
    opened.keyboard.press("Escape")
    assert opened.locator(".card h2").count() == 0


def test_the_table_lists_what_is_drawn(visit):
    circuit = scored(40)
    opened = visit(circuit)
    opened.locator("[data-view=table]").click()
    rows = opened.eval_on_selector_all("tbody tr", "all => all.map((row) => [...row.cells].map((cell) => cell.textContent))")
    assert len(rows) == 40
    assert {writer for writer, *_ in rows} == {str(writer) for writer, _ in circuit.edges_kept}
    magnitudes = [abs(float(score.replace("−", "-"))) for *_, score in rows]
    assert magnitudes == sorted(magnitudes, reverse=True)


def test_the_exported_svg_stands_alone_and_shows_what_is_shown(visit, tmp_path):
    circuit = scored(40)
    opened = visit(circuit)
    opened.check("[value=negative]")
    with opened.expect_download() as download:
        opened.locator("[data-act=svg]").click()
    assert download.value.suggested_filename == "ioi-on-toy-by-eap.svg"
    download.value.save_as(tmp_path / "saved.svg")
    text = (tmp_path / "saved.svg").read_text(encoding="utf-8")
    assert "var(" not in text
    assert not re.search(r"(href|src)=", text)
    drawn = {path.get("data-edge") for path in ElementTree.fromstring(text).iter() if path.get("data-edge")}
    assert drawn == {f"{w}->{r}" for w, r in circuit.edges_kept if circuit.edges[w, r]["weight"] < 0}


def test_dark_follows_the_system_and_the_button(visit):
    opened = visit(scored(5), color_scheme="dark")
    ground = "getComputedStyle(document.querySelector('main')).backgroundColor"
    dark = opened.evaluate(ground)
    opened.locator("[data-act=theme]").click()
    assert opened.evaluate(ground) == "rgb(255, 255, 255)" != dark


def test_thousands_of_edges_stay_usable(visit, monkeypatch):
    monkeypatch.setattr("circuits.viewer_data.N_ROUTED", 50)  # checked shapes make routes slow
    circuit = scored(5000, n_layers=12, n_heads=12)
    opened = visit(circuit)
    assert n_shown(opened) == 300, "the strongest are shown at first"
    opened.locator("[name=reset]").click()
    assert n_shown(opened) == 5000
    opened.wait_for_selector(".stage:not([aria-busy])", timeout=20_000)
    pixels = "canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data"
    assert opened.eval_on_selector("canvas", f"canvas => {pixels}.some(Boolean)")
    assert opened.locator(".edges path").count() == 0
    milliseconds = opened.evaluate(
        """() => { const times = [...document.querySelectorAll(".part")].slice(0, 40).map((part) => {
             const start = performance.now();
             part.dispatchEvent(new PointerEvent("pointermove", { bubbles: true, clientX: 500, clientY: 400 }));
             return performance.now() - start; });
           return times.sort((a, b) => a - b)[20]; }"""
    )
    assert milliseconds < 50, "the script's part of a frame"


def test_an_edge_into_a_shared_key_is_one_edge_to_every_head(visit):
    wiring = Wiring(2, 4, n_key_value_heads=2)
    kept = ["input->a0.g1.k", "a0.h2->logits", "a0.h3->logits", "a0.h3->a1.g0.v", "a1.h1->logits"]
    opened = visit(wiring.circuit(np.isin(wiring.edge_names, kept)))
    assert n_shown(opened) == 5
    assert opened.locator('.edges path[data-edge="input->a0.g1.k"]').count() == 2
    assert opened.locator('.part[data-part*=".g"]').count() == 0
    part(opened, "a0.h2").click()
    assert edges_drawn(opened) == {"input->a0.g1.k", "a0.h2->logits"}


def test_positions_are_filtered(visit):
    circuit = Circuit()
    circuit.keep("input@2", "m0@2", weight=1.0)
    circuit.keep("m0@2", "a1.h0.v@2", weight=2.0)
    circuit.keep("input@4", "m0@4", weight=-1.0)
    opened = visit(circuit)
    opened.select_option("[name=position]", "4")
    assert edges_drawn(opened) == {"input@4->m0@4"}


def test_evidence_is_shown_and_tokens_are_never_html(visit):
    planted = induction()
    circuit = Wiring.of(planted.model.config).circuit(np.ones(Wiring.of(planted.model.config).n_edges, dtype=bool))
    circuit.graph |= {"task": NASTY, "<b>": NASTY}
    tokenizer = planted.task.tokenizer

    class Nasty(type(tokenizer)):
        def strings(self, ids):
            return [NASTY for _ in ids]

    task = replace(planted.task, tokenizer=Nasty(**{name: getattr(tokenizer, name) for name in tokenizer.__match_args__}))
    opened = visit(circuit, planted.model, task)
    part(opened, "a0.h3").hover()
    card = opened.locator(".card")
    assert re.search(r"A1 → the one before [\d.]+, .*\(mean over prompts\)", card.text_content())
    assert re.search(r"from “.*” \(\w+\) \d+ % on “.*” \(\w+\)$", card.locator(".reading").text_content() or ""), "which"
    assert NASTY in card.locator("select").text_content()
    assert card.locator("rect").count() > 0
    assert opened.locator("img").count() == 0
    assert NASTY in opened.locator("h1").text_content()


def test_patterns_and_logits_are_the_models():
    planted = induction()
    wiring = Wiring.of(planted.model.config)
    circuit = wiring.circuit(np.ones(wiring.n_edges, dtype=bool))
    evidence = record_evidence(planted.model, planted.task, circuit, n_prompts=2)
    tokens, end = planted.task.prompts.clean[:2], int(planted.task.prompts.end[1])
    _, cache = planted.model.run(tokens, record=["pattern"])
    stored = np.frombuffer(base64.b64decode(evidence["patterns"]["a1.h3"][1]), dtype=np.uint8)
    expected = cache["pattern", 1][1, 3, : end + 1, : end + 1].numpy()
    np.testing.assert_allclose(stored.reshape(expected.shape) / 255, expected, atol=1 / 500)
    prompts = planted.task.prompts[:2]
    logits, _ = planted.model.run(prompts.clean, logits_at=prompts.end, logits_of=prompts.candidates)
    assert prompts.roles[0].tolist() == [1, -1]
    total = sum(effects[0] for effects in evidence["logits"].values())
    assert total == pytest.approx(float(logits[0, 0] - logits[0, 1]), abs=0.01), "the parts' effects sum to the whole"
    strongest = max(evidence["logits"], key=lambda name: abs(evidence["logits"][name][0]))
    assert strongest == "a1.h3", "the induction head writes the answer"
    with pytest.raises(CircuitError, match="'a2.h0' is not in planted-induction, which has 2 layers"):
        record_evidence(planted.model, planted.task, scored(300, n_layers=4))


def test_the_file_forbids_the_network_and_names_its_own_script_by_hash():
    text = page(viewer_data(scored(3)))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy[1]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|fetch\(|XMLHttp|innerHTML", text)
    assert page(viewer_data(scored(3))) == text, "equal circuits make equal files"


def test_every_file_of_the_script_is_short_and_in_it():
    files = {file.name: file.read_text(encoding="utf-8") for file in (resources.files("circuits") / "assets").iterdir()}
    parts = {name: text for name, text in files.items() if name.endswith(".js") and name != "widget.js"}
    assert script().count("\n") == sum(text.count("\n") + 1 for text in parts.values()) - 1
    assert all(text in script() for text in parts.values())
    assert max(text.count("\n") for text in files.values()) < 300


def test_the_data_are_plain_json_and_unscored_edges_stay_so():
    circuit = Circuit()
    circuit.keep("input", "m0")
    data = json.loads(json.dumps(viewer_data(circuit), allow_nan=False))
    assert [part["name"] for part in data["parts"]] == ["input", "m0", "logits"]
    assert data["edges"][0]["score"] is None
    assert viewer_data(Circuit())["edges"] == []


def test_the_widget_shows_the_same_and_tells_what_is_chosen(chromium):
    pytest.importorskip("anywidget")
    circuit = scored(20)
    widget = explore(circuit)
    assert widget.data == viewer_data(circuit)
    opened = chromium.new_page()
    opened.set_content("<div id='cell'></div>")
    opened.evaluate(
        """async ([script, data]) => {
             const module = await import(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
             const traits = { data, selected: "" }, hears = {};
             window.model = { get: (name) => traits[name], set: (name, value) => (traits[name] = value), save_changes() {},
                              on: (what, act) => (hears[what] = act), off: (what) => delete hears[what], traits, hears };
             window.stop = module.default.render({ model, el: document.getElementById("cell") }); }""",
        [widget._esm, viewer_data(circuit)],
    )
    head = str(circuit.heads[0])
    click = "part => part.dispatchEvent(new MouseEvent('click', { bubbles: true }))"
    opened.eval_on_selector(f'.part[data-part="{head}"]', click)
    assert opened.evaluate("model.traits.selected") == head
    opened.evaluate("() => { model.traits.selected = ''; model.hears['change:selected'](); }")
    assert opened.get_attribute("#cell", "data-shown") == "20"
    opened.evaluate("() => stop()")
    assert opened.evaluate("document.getElementById('cell').children.length + Object.keys(model.hears).length") == 0
    opened.close()


def test_a_page_is_opened_only_where_none_is_named(monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert view(scored(3), path=tmp_path / "a.html") == tmp_path / "a.html"
    assert opened == []
    assert view(scored(3)).as_uri() == opened[0]


def test_half_of_the_evidence_is_refused(tmp_path):
    with pytest.raises(CircuitError, match="a model without a task shows no attention"):
        view(scored(3), model=induction().model, path=tmp_path / "a.html")


def test_the_command_line_writes_the_page_beside_the_circuit(tmp_path, capsys):
    scored(10).save(tmp_path / "found.json")
    with pytest.raises(SystemExit) as end:
        main(["view", str(tmp_path / "found.json"), "--no-open"])
    assert not end.value.code
    assert "ioi on toy by eap" in (tmp_path / "found.html").read_text(encoding="utf-8")
    assert "found.html" in capsys.readouterr().out


def test_viewing_a_saved_circuit_loads_no_torch(tmp_path):
    scored(10).save(tmp_path / "found.json")
    code = (
        "import sys\nfrom circuits import Circuit, view\n"
        f"view(Circuit.load({str(tmp_path / 'found.json')!r}), path={str(tmp_path / 'a.html')!r})\n"
        "print([name for name in ('torch', 'matplotlib', 'transformers') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["[]"]
