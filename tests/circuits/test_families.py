"""Every family on a checkpoint of its own configuration class, random in every weight: the table in docs/families.md.

Each row is measured here and nowhere else. ``WRITE_TABLE=1 pytest tests/circuits/test_families.py`` writes the page anew.
"""

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from circuits.ablation import replacement_for
from circuits.discovery.eap import eap
from circuits.masked import run_edge_mask
from circuits.running import run_circuits
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.decomposition.contributions import contributions
from mechinterp.models.load import load
from mechinterp.models.transformer import Transformer
from mechinterp.sites import all_sites

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
SAME = {"atol": 1e-9, "rtol": 1e-7}  # in float64


def _scaled(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0, **settings}}


@dataclass(frozen=True)
class Row:
    """A family, Hugging Face's name of it, what is special about it, and facts beside those of `tests/conftest.py`."""

    family: str
    model_type: str
    special: str
    facts: dict[str, Any] = field(default_factory=dict)


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_TWO_ROTARIES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
}
ROWS = [
    Row("GPT-2", "gpt2", "learned positions, LayerNorm"),
    Row("GPT-Neo", "gpt_neo", "local layers, unscaled scores"),
    Row("GPT-NeoX, Pythia", "gpt_neox", "parallel, rotary in part"),
    Row("GPT-NeoX, sequential", "gpt_neox", "rotary in part", {"use_parallel_residual": False}),
    Row("GPT-J", "gptj", "parallel, rotary in adjacent pairs"),
    Row("OPT", "opt", "learned positions, ReLU"),
    Row("Llama, Llama 2", "llama", "RMSNorm, rotary, gated, grouped keys"),
    Row(
        "Llama 3",
        "llama",
        "and scaled rotary, biases",
        {"attention_bias": True, "mlp_bias": True} | _scaled("llama3", **_LLAMA3),
    ),
    Row("Llama, linear", "llama", "and scaled rotary, tied", {"tie_word_embeddings": True} | _scaled("linear")),
    Row("Llama, YaRN", "llama", "and scaled rotary", _scaled("yarn", original_max_position_embeddings=16)),
    Row("Mistral", "mistral", "as Llama, with a window"),
    Row(
        "Qwen2, Qwen2.5",
        "qwen2",
        "as Llama, with biases and windows",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    Row("Qwen3", "qwen3", "as Llama, queries and keys normalised"),
    Row("Gemma", "gemma", "as Llama, scaled embedding"),
    Row("Gemma 2", "gemma2", "norms before and after, soft caps, windows"),
    Row(
        "Gemma 3 (text)",
        "gemma3_text",
        "norms before and after and in heads, two rotaries",
        {"rope_parameters": _TWO_ROTARIES},
    ),
    Row("Phi", "phi", "parallel, rotary in part"),
    Row("Phi-3", "phi3", "as Llama, packed, with a window", {"sliding_window": 5}),
    Row("OLMo", "olmo", "LayerNorm without gain"),
    Row("OLMo 2", "olmo2", "norms after and over all heads"),
    Row("MPT", "mpt", "ALiBi"),
]


@dataclass(frozen=True)
class Checkpoint:
    directory: Path
    tokens: torch.Tensor
    logits: torch.Tensor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_hugging_face) -> Callable[[Row], Checkpoint]:
    """Hugging Face's own model of a row, saved, and what it makes of some tokens."""
    made: dict[str, Checkpoint] = {}

    def make(row: Row) -> Checkpoint:
        if row.family not in made:
            model = make_hugging_face(row.model_type, **row.facts)
            tokens = torch.randint(40, (3, 20), generator=torch.Generator().manual_seed(0))
            directory = tmp_path_factory.mktemp("family") / re.sub(r"\W+", "-", row.family)
            model.save_pretrained(directory)
            made[row.family] = Checkpoint(directory, tokens, model(tokens, use_cache=False).logits)
        return made[row.family]

    return make


@pytest.fixture(scope="module")
def exact_model(checkpoint) -> Callable[[Row], Transformer]:
    """The same in float64, in which identities are told from accidents."""
    return lambda row: load(checkpoint(row).directory, dtype=torch.float64)


def logits_equal(row: Row, checkpoint, **_) -> str:
    """The largest difference of any logit from Hugging Face's, in float32, as the power of ten above it."""
    made = checkpoint(row)
    difference = float((load(made.directory).run(made.tokens)[0] - made.logits).abs().max())
    assert difference <= 1e-4
    return f"1e{int(np.ceil(np.log10(max(difference, 1e-5))))}"


def every_site(row: Row, checkpoint, exact_model, **_) -> str:
    """Recorded; written as it is, nothing changes; written otherwise, the logits do."""
    model, tokens = exact_model(row), checkpoint(row).tokens
    plain, sites = model.run(tokens)[0], all_sites(model.config)
    for site in sites:
        again, cache = model.run(tokens, record=[site], patch={site: lambda x, _: x})
        assert_close(again, plain, **SAME)
        noise = torch.randn(cache[site].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        moved = model.run(tokens, patch={site: lambda x, _, noise=noise: x + noise.abs()})[0]
        assert float((moved - plain).abs().max()) > 1e-3, f"writing at {site} changed nothing"
    return str(len(sites))


def patching_all(row: Row, checkpoint, exact_model, **_) -> str:
    """Everything that is written replaced by another run's writes: the other run. Replaced by its own: itself."""
    model, tokens = exact_model(row), checkpoint(row).tokens
    other = (tokens + 7) % 40
    names = ["embed", model.config.write_site, "mlp_out"] + ["pos_embed"] * model.config.learned_positions
    sites = [site for site in all_sites(model.config) if site.name in names]
    for source in (tokens, other):
        logits, cache = model.run(source, record=sites)
        patched = model.run(tokens, patch={site: lambda _, __, value=cache[site]: value for site in sites})[0]
        assert_close(patched, logits, **SAME)
    return "yes"


def residual_sum(row: Row, checkpoint, exact_model, **_) -> str:
    """Input, every head, every MLP and the attention biases sum to the stream that the logits read."""
    model, tokens = exact_model(row), checkpoint(row).tokens
    config = model.config
    names = ["embed", config.write_site, "mlp_out", "resid_post"] + ["pos_embed"] * config.learned_positions
    _, cache = model.run(tokens, record=[site for site in all_sites(config) if site.name in names])
    wrote = sum(cache.output(writer) for writer in Wiring.of(config).writers)
    biases = sum(block.b_O for block in model.weights.blocks)
    assert_close(wrote + biases, cache["resid_post", config.n_layers - 1], **SAME)
    assert_close(Writes.during(model, tokens).total(), cache["resid_post", config.n_layers - 1], **SAME)
    return f"{len(Wiring.of(config).writers)} writers"


def decomposes(row: Row, checkpoint, exact_model, **_) -> str:
    """Relevant and irrelevant part sum to the forward pass, after every layer and at the logits."""
    model, tokens = exact_model(row), checkpoint(row).tokens
    layers, logits = range(model.config.n_layers), model.run(tokens)[0]
    _, cache = model.run(tokens, record=["resid_post"])
    for rules in ("tail", "paper", "linear"):
        found = contributions(model, tokens, ["a0.h1"], [*(f"resid_post.{i}" for i in layers), "logits"], rules=rules)
        for layer in layers:
            assert_close(found[f"resid_post.{layer}"].total, cache["resid_post", layer], **SAME)
        assert_close(found["logits"].relevant[0] + found["logits"].irrelevant[0], logits, **SAME)
        assert float(found["logits"].relevant.abs().max()) > 1e-3
    return "yes"


def circuits_run(row: Row, exact_model, make_task, **_) -> str:
    """A circuit of all edges is the clean run, one of none the corrupted run."""
    model = exact_model(row)
    task, wiring = make_task(model), Wiring.of(model.config)
    kept = np.stack([np.ones(wiring.n_edges, dtype=bool), np.zeros(wiring.n_edges, dtype=bool)])
    logits = run_circuits(model, task.prompts, kept, replacement_for(model, task, "resample").writes)
    for found, tokens in zip(logits, (task.prompts.clean, task.prompts.corrupted), strict=True):
        assert_close(found, model.run(tokens, logits_at=task.prompts.end)[0], **SAME)
    return f"{wiring.n_edges} edges"


def eap_works(row: Row, exact_model, make_task, **_) -> str:
    """EAP is the gradient of the edge mask, with its sign, for every edge."""
    model = exact_model(row)
    task, wiring = make_task(model), Wiring.of(model.config)
    mask = torch.ones(1, wiring.n_edges, dtype=torch.float64, requires_grad=True)
    replacement = replacement_for(model, task, "resample").writes
    logits = run_edge_mask(model, task.prompts, mask, replacement)
    (gradient,) = torch.autograd.grad(task.metric(logits, task.prompts).mean(), mask)
    scores = eap(model, task)
    assert_close(torch.as_tensor(scores.values), gradient[0], atol=1e-6, rtol=1e-5, check_dtype=False)
    assert float(gradient.abs().max()) > 1e-4
    return "yes"


COLUMNS: dict[str, Callable[..., str]] = {
    "logits as Hugging Face's, within": logits_equal,
    "sites read and written": every_site,
    "patching all is the other run": patching_all,
    "residual stream is the sum of its": residual_sum,
    "decomposes exactly": decomposes,
    "circuits: all is clean, none corrupted": circuits_run,
    "EAP is the mask's gradient": eap_works,
}
_MEASURED: dict[tuple[str, str], str] = {}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.family)
def test_the_family_runs_exactly(row, column, checkpoint, exact_model, make_task):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Hugging Face's, about configurations as small as these
        measured = COLUMNS[column](row, checkpoint=checkpoint, exact_model=exact_model, make_task=make_task)
    _MEASURED[row.family, column] = measured


def test_the_table_in_the_docs_is_what_was_measured():
    if len(_MEASURED) < len(ROWS) * len(COLUMNS):
        pytest.skip("only some families were measured in this run")
    lines = [f"| {' | '.join(['family', 'what is special', *COLUMNS])} |", "| --- " * (2 + len(COLUMNS)) + "|"]
    lines += [f"| {' | '.join([r.family, r.special, *(_MEASURED[r.family, c] for c in COLUMNS)])} |" for r in ROWS]
    table, page = "\n".join(lines), PAGE.read_text(encoding="utf-8") if PAGE.is_file() else "TABLE"
    if os.environ.get("WRITE_TABLE"):
        start, stop = page.find("| family |"), page.rfind("|\n") + 2
        page = page[:start] + table + "\n" + page[stop:] if start >= 0 else table + "\n"
        PAGE.write_text(page, encoding="utf-8")
    table, page = (re.sub(r"1e-\d", "1e", text) for text in (table, page))  # how far below 1e-4 is this machine's matter
    assert table in page, "docs/families.md differs from what was measured; write it with WRITE_TABLE=1"
