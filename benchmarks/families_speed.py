"""A forward pass of two shapes beside Hugging Face's own (SDPA): GPT-2's layout and Llama's, with and without recording.

    python -m benchmarks.families_speed

Random weights, written by Hugging Face and read by us; both run the same tokens in one process, in turns, with two threads.
"Recorded" keeps what circuits and autoencoders are made from: z, mlp_out and the whole residual stream of every layer.
Writes results/families_speed.md and .json.
"""

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks import measure
from mechinterp.models.load import load
from mechinterp.models.transformer import Transformer

THREADS, ROUNDS = 2, 15
D_VOCAB = 50257
TOKENS = {"16 x 16": (16, 16), "4 x 128": (4, 128)}
RECORDED = ("z", "mlp_out", "resid_pre", "resid_mid", "resid_post")
LLAMA = {
    "vocab_size": D_VOCAB,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
SUBJECTS = {
    "GPT-2 (12 layers, 768, 12 heads)": lambda: GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa")),
    "Llama (12 layers, 768, 12 heads, 4 keys)": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, attn_implementation="sdpa")),
}


def main() -> None:
    torch.set_num_threads(THREADS)
    facts: dict = {"rounds": ROUNDS, "threads": THREADS, "torch": torch.__version__}
    lines = [INTRODUCTION, HEAD]
    for name, build in SUBJECTS.items():
        torch.manual_seed(0)
        theirs = build().eval().requires_grad_(False)
        model = as_ours(theirs)
        for what, shape in TOKENS.items():
            tokens = torch.randint(D_VOCAB, shape, generator=torch.Generator().manual_seed(0))
            facts[f"{name}, {what}"] = found = compared(theirs, model, tokens)
            lines.append(row(name, what, found))
    measure.RESULTS.joinpath("families_speed.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    measure.RESULTS.joinpath("families_speed.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def as_ours(theirs: PreTrainedModel) -> Transformer:
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        return load(Path(directory))


@torch.no_grad()
def compared(theirs: PreTrainedModel, model: Transformer, tokens: Tensor) -> dict:
    """How far the logits are apart, and how long both take."""
    cases = {
        "Hugging Face": lambda: theirs(tokens, use_cache=False).logits,
        "plain": lambda: model.run(tokens),
        "recorded": lambda: model.run(tokens, record=RECORDED),
    }
    difference = float((cases["Hugging Face"]() - cases["plain"]()[0]).abs().max())
    times = measure.interleave(cases, rounds=ROUNDS)
    return {
        "logit_difference": difference,
        "seconds": {name: {"cpu": min(timing.cpu), "wall": min(timing.wall)} for name, timing in times.items()},
        "plain : Hugging Face": times["plain"].per(times["Hugging Face"]),
        "recorded : plain": times["recorded"].per(times["plain"]),
    }


INTRODUCTION = f"""# The forward pass beside Hugging Face's

`python -m benchmarks.families_speed`: random weights, float32, {THREADS} threads, {ROUNDS} rounds in which all cases take
turns. A ratio is the median of the rounds' (CPU time, wall time) and that of the fastest rounds (CPU time). Targets: plain at
most 1.0 of Hugging Face with SDPA, recorded (z, mlp_out and the residual stream of all layers) at most 1.1 of plain.
"""
HEAD = """| model | tokens | logits differ by | Hugging Face, CPU s | plain : Hugging Face | recorded : plain |
| --- | --- | --- | --- | --- | --- |"""


def row(name: str, what: str, found: dict) -> str:
    ratios = (
        f"{r['cpu']:.2f} CPU, {r['wall']:.2f} wall, {r['cpu_of_minima']:.2f} fastest"
        for r in (found["plain : Hugging Face"], found["recorded : plain"])
    )
    seconds = found["seconds"]["Hugging Face"]["cpu"]
    return f"| {name} | {what} | {found['logit_difference']:.0e} | {seconds:.2f} | {' | '.join(ratios)} |"


if __name__ == "__main__":
    main()
