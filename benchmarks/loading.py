"""What loading a checkpoint of half a gigabyte costs in memory, as a ratio of the model's weights.

    python -m benchmarks.loading      # two minutes on one core; writes results/loading.md

Hugging Face writes random models of GPT-2 small's shape (one tied embedding of a third of it) and of a small Llama's (gates,
grouped keys, untied), in one file and in shards of 100 MB, in float32. Each is then loaded in a fresh process, as stored and
in bfloat16. Memory is the highest resident set while loading less the resident set before, libraries imported: what is
loaded and all that it took, and the pages of mapped files, which an operating system counts too. Linux only.
"""

import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from benchmarks import measure
from mechinterp.models.load import load
from mechinterp.models.transformer import Transformer

TARGET = 1.2
SHAPES: dict[str, PretrainedConfig] = {
    "GPT-2": GPT2Config(),
    "Llama": LlamaConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=2048,
        vocab_size=32000,
    ),
}
SHARDS = {"one file": "10GB", "shards": "100MB"}
DTYPES = {"as stored": "float32", "to bfloat16": "bfloat16"}


def main() -> None:
    rows = []
    for shape, config in SHAPES.items():
        for storage, size in SHARDS.items():
            with tempfile.TemporaryDirectory() as directory:
                torch.manual_seed(0)
                AutoModelForCausalLM.from_config(config).save_pretrained(directory, max_shard_size=size)
                stored = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors")) / 2**20
                rows += [_row(f"{shape}, {stored:.0f} MiB in {storage}, {how}", directory, d) for how, d in DTYPES.items()]
    table = measure.table(rows)
    page = measure.RESULTS / "loading.md"
    about = (__doc__ or "").split("\n\n", 2)[2]
    head = f"# Loading: memory\n\nWritten by `python -m benchmarks.loading` on {datetime.now(UTC):%Y-%m-%d}.\n\n"
    page.write_text(f"{head}{about}\n{table}\n", encoding="utf-8")
    print(table)


def _row(case: str, directory: str, dtype: str) -> tuple[str, str, str]:
    peak, weights = map(float, measure.in_a_process("benchmarks.loading", directory, dtype).split())
    return f"{case}: peak, weights = 1", f"≤ {TARGET}", f"{peak / weights:.2f} ({peak:.0f} of {weights:.0f} MiB)"


def peak_of(directory: str, dtype: str) -> str:
    """MiB at the peak and MiB of weights: what a process of its own prints."""
    AutoConfig.from_pretrained(directory)  # so that the library's own memory is not counted
    loaded: list[Transformer] = []
    peak = measure.peak_above(lambda: loaded.append(load(directory, dtype=getattr(torch, dtype))))
    return f"{1024 * peak} {bytes_of(loaded[0].weights.parameters()) / 2**20}"


def bytes_of(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


if __name__ == "__main__":
    print(peak_of(*sys.argv[1:])) if sys.argv[1:] else main()
