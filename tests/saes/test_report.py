"""Everything measured of an autoencoder in one value: it agrees with its parts, prints, and is read back equal."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from mechinterp.errors import SAEError
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.transformer import Transformer
from mechinterp.store import ActivationStore
from saes.base import SparseAutoencoder
from saes.fidelity import measure_fidelity
from saes.metrics import cosines, reconstruction
from saes.places import each_layer, places_named
from saes.positions import KeptRows, default_keep
from saes.report import SAEReport, evaluate


@pytest.fixture(scope="module")
def reader(plain):
    """A model whose tokenizer has a BOS (1) and padding (22)."""
    backend = Backend(WordLevel({"a": 0}, unk_token="a"))
    return Transformer(plain.weights, Tokenizer(backend, "toy", bos_id=1, pad_id=22))


@pytest.fixture(scope="module")
def texts():
    found = torch.randint(2, 22, (12, 7), generator=torch.Generator().manual_seed(3))
    found[:, 0], found[3, 5:] = 1, 22
    return found


@pytest.fixture(scope="module")
def layers(reader):
    places = each_layer(reader.config)
    return SparseAutoencoder.random(places, d_in=15, d_sae=40, kind="topk", k=4).to(dtype=torch.float64)


@pytest.fixture(scope="module")
def report(reader, layers, texts):
    return evaluate(reader, layers, texts)


def test_the_report_is_its_parts(report, reader, layers, texts):
    keep = default_keep(texts, reader.tokenizer)
    rebuilt = reconstruction(layers, KeptRows(reader, layers.places, texts, keep))
    behaved = measure_fidelity(reader, layers, texts)
    np.testing.assert_allclose(report.reconstruction.explained_variance, rebuilt.explained_variance)
    np.testing.assert_allclose(report.fidelity.ce["mean"], behaved.ce["mean"])
    np.testing.assert_allclose(report.cosines.nearest_decoder, cosines(layers).nearest_decoder)
    assert report.reconstruction.n_rows == report.fidelity.n_kept == 12 * 6 - 2


def test_rows_name_every_place_and_all(report):
    rows = report.rows()
    assert [row["place"] for row in rows] == ["z.0", "z.1", "z.2", "all"]
    assert [row["l0"] for row in rows] == pytest.approx([4, 4, 4, 4], abs=0.5)
    assert rows[1]["kl"] == report.fidelity.kl["sae"][1]
    assert rows[3]["kl_recovered_mean_low"] == pytest.approx(report.fidelity.kl_recovered["mean"].low[3], nan_ok=True)
    assert rows[3]["explained_variance"] == pytest.approx(np.mean([row["explained_variance"] for row in rows[:3]]))
    assert all(1 <= row["effective_heads"] <= 3 for row in rows)


def test_the_table_says_what_was_left_out(report):
    lines = str(report).splitlines()
    assert "70 positions of 12 prompts (BOS left out, 2 of padding left out)" in lines[0]
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["z.0", "z.1", "z.2", "all"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda keep: keep | True, "BOS kept, 2 of padding left out"),
        (lambda keep: keep & (torch.arange(7) != 3), "BOS left out, 2 of padding left out, 12 others left out"),
    ],
)
def test_positions_of_ones_own_are_told(reader, layers, texts, change, says):
    keep = change(default_keep(texts, reader.tokenizer))
    assert evaluate(reader, layers.group(0), texts, keep=keep, with_cosines=False).left_out == says


def test_a_model_without_tokenizer_cannot_tell_bos(plain, layers, texts):
    assert "no tokenizer to tell BOS by" in evaluate(plain, layers.group(0), texts).left_out


@pytest.mark.parametrize("names", [["z.1.h*"], ["q.1"]])
def test_heads_by_themselves_and_queries_share_with_none(reader, texts, names):
    places = places_named(reader.config, names)
    found = SparseAutoencoder.random(places, d_in=places[0].width(reader.config), d_sae=12).to(dtype=torch.float64)
    found = evaluate(reader, found, texts, with_cosines=False)
    assert found.effective_heads is None
    assert found.cosines is None
    assert "effective_heads" not in found.rows()[0]


def test_stored_activations_give_the_same(report, reader, layers, texts, tmp_path):
    stored = evaluate(reader, layers, texts, store=ActivationStore(tmp_path))
    assert len(ActivationStore(tmp_path).entries()) == 1
    np.testing.assert_allclose(stored.reconstruction.mse, report.reconstruction.mse, rtol=1e-5)
    np.testing.assert_allclose(stored.fidelity.kl["mean"], report.fidelity.kl["mean"], rtol=1e-5)


def test_what_is_saved_is_read_back(report, tmp_path):
    report.save(tmp_path / "report.json")
    again = SAEReport.load(tmp_path / "report.json")
    assert str(again) == str(report)
    for ours, theirs in zip(report.rows(), again.rows(), strict=True):
        assert theirs.pop("place") == ours.pop("place")
        np.testing.assert_array_equal(list(theirs.values()), list(ours.values()))
        assert list(theirs) == list(ours)
    np.testing.assert_array_equal(again.reconstruction.density, report.reconstruction.density)


def test_what_is_undefined_is_null(reader, layers, texts, tmp_path):
    last = torch.arange(7).expand(texts.shape) == 6
    alone = evaluate(reader, layers.group(1), texts, keep=last)  # changes nothing that is counted
    alone.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert saved["fidelity"]["ce_recovered"]["mean"]["value"] == [None, None]
    assert "undefined" in str(SAEReport.load(tmp_path / "report.json"))


def test_another_file_is_no_report(report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(SAEError, match="report.json' is not a mechinterp autoencoder report file"):
        SAEReport.load(path)
    report.save(path)
    document = json.loads(path.read_text(encoding="utf-8"))
    del document["fidelity"]["ce"]
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(SAEError, match="does not hold a usable report"):
        SAEReport.load(path)
