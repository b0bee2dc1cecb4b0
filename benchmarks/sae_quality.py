"""What autoencoders on attention outputs keep: every architecture on every layer's z, and every head of two trained models.

    python -m benchmarks.sae_quality builtin                              # half an hour on one core
    python -m benchmarks.sae_quality stories260K text.jsonl               # a directory with a Llama, and its text

Writes results/sae-<model>.md and .json. Trained and measured on different prompts; BOS and padding are left out of both. CE
recovered is ``1 - (CE_spliced - CE_clean) / (CE_ablated - CE_clean)`` with its 95 % interval over prompts, each place spliced
in alone; "-" where ablating it does not raise cross-entropy beyond its own noise: there KL tells. Dead: not active on any of
the last tenth of the rows trained on. Silent: not active on any of the measured positions, which are fewer.
"""

import argparse
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RESULTS
from mechinterp import load
from mechinterp.sites import Site
from mechinterp.tasks import TASKS
from saes import Corpus, Place, TrainSettings, corpus_of_tasks, corpus_of_texts, evaluate, of_rows, read_texts, train
from saes.logs import means
from saes.positions import KeptRows

FRESH = 1_000_003
# At these weights L0 comes out near 16, which the counting architectures are told.
LAYERS = {
    "topk": {"k": 16},
    "batchtopk": {"k": 15},  # its mean over other prompts is not quite k
    "matryoshka": {"k": 15},
    "jumprelu": {"sparsity": 0.5, "threshold": 0.5},
    "gated": {"sparsity": 3.0},
    "relu": {"sparsity": 3.0},
}
HEADS = {"topk": {"k": 4}, "batchtopk": {"k": 4}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="builtin, or a directory with a model of the Llama family")
    parser.add_argument("text", nargs="?", help=".jsonl, .json or .txt, for a directory")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--d-sae", type=int, default=512, help="of a layer; a head has a quarter of it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, training, measured = builtin() if given.model == "builtin" else stories(Path(given.model), given.text)
    reports: dict[str, dict[str, Any]] = {}
    for label, places, d_sae, architectures in subjects(model, given.d_sae):
        rows = KeptRows(model, places, training.tokens, training.keep, batch_size=32)
        activations = of_rows(torch.cat([window.transpose(0, 1) for window in rows]), places)
        for architecture, facts in architectures.items():
            settings = TrainSettings(architecture, d_sae=d_sae, n_rows=given.rows, lr=3e-3, warm_up=0.1, **facts)
            began = time.process_time()
            log: list[Any] = []
            autoencoder = train(activations, settings, callbacks=[log.append], progress=False)
            seconds = time.process_time() - began
            report = evaluate(model, autoencoder, measured.tokens, keep=measured.keep, with_cosines=False)
            reports[f"{label}, {architecture}"] = {
                "settings": settings.to_dict(),
                "cpu_seconds": round(seconds, 1),
                "idle_rows": settings.idle_rows,
                "dead": [*log[-1]["dead"], means(log[-1])["dead"]],
                "about": str(report).splitlines()[0],
                "rows": [{name: value if value == value else None for name, value in row.items()} for row in report.rows()],
            }
            print(f"{label}, {architecture}: {seconds:.0f} s\n{report}\n", flush=True)
    name = model.config.name
    content = {"model": name, "n_training_rows": training.n_kept, "reports": reports}
    (RESULTS / f"sae-{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"sae-{name}.md").write_text(_text(name, training, reports), encoding="utf-8")


def builtin() -> tuple[Any, Corpus, Corpus]:
    """The prompts that the built-in model was made for, and others."""
    model = load("builtin")
    made = (
        corpus_of_tasks(*[make(model, n_prompts=n, seed=seed) for make in TASKS.values()])
        for n, seed in ((3000, 0), (100, FRESH))
    )
    return model, *made


def stories(directory: Path, text: str) -> tuple[Any, Corpus, Corpus]:
    """A directory's model on text: nine documents in ten to train on, the rest (15,360 tokens of it) to measure on."""
    model, texts = load(directory), list(read_texts(text))
    cut = len(texts) * 9 // 10
    training, measured = (
        corpus_of_texts(model, some, context=256, name=Path(text).stem) for some in (texts[:cut], texts[cut:])
    )
    return model, training, measured[:60]


def subjects(model: Any, d_sae: int) -> Iterator[tuple[str, tuple[Place, ...], int, dict[str, dict]]]:
    sites = [Site("z", layer) for layer in range(model.config.n_layers)]
    yield "every layer", tuple(map(Place, sites)), d_sae, LAYERS
    yield "every head", tuple(Place(site, head) for site in sites for head in range(model.config.n_heads)), d_sae // 4, HEADS


def _text(name: str, training: Corpus, reports: dict[str, dict[str, Any]]) -> str:
    about = f"Written by `python -m benchmarks.sae_quality` on {datetime.now(UTC):%Y-%m-%d}.\n\n"
    about += (__doc__ or "").partition(".json. ")[2].strip()
    parts = [f"# Autoencoders on the attention outputs of {name}", about]
    columns = (
        "place",
        "L0",
        "dead",
        "silent",
        "variance explained",
        "CE recovered (mean)",
        "CE recovered (zero)",
        "KL recovered (mean)",
    )
    for label, found in reports.items():
        settings = found["settings"]
        told = f"{settings['n_rows']:,} rows of {training.n_kept:,}, {found['cpu_seconds']:.0f} CPU seconds for all places"
        lines = [f"## {label}", "", f"{found['about']} Trained on {told}.", "", f"| {' | '.join(columns)} |"]
        lines.append("| --- |" + " ---: |" * (len(columns) - 1))
        for row, dead in zip(found["rows"], found["dead"], strict=True):
            shares = [
                _share(row, f"{kind}_recovered_{baseline}")
                for kind, baseline in (("ce", "mean"), ("ce", "zero"), ("kl", "mean"))
            ]
            cells = [f"{row['l0']:.1f}", f"{dead:.1%}", f"{row['dead_share']:.1%}", f"{row['explained_variance']:.3f}", *shares]
            lines.append(f"| {row['place']} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _share(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return "-"
    return f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"


if __name__ == "__main__":
    main()
