"""The engine against Hugging Face and TransformerLens on GPT-2's own shape: the same logits, and what a cache costs.

    python -m benchmarks.engine

A checkpoint of GPT-2 small's shape with random weights is written by Hugging Face and read by us. 16 x 16 tokens, one thread.
"""

import tempfile

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import measure
from benchmarks.subjects import D_VOCAB, GPT2_SMALL, random_task
from mechinterp.models.load import load
from mechinterp.models.transformer import Transformer

RECORDED = ("z", "attn_out", "mlp_out", "resid_pre")


def main() -> None:
    torch.set_num_threads(1)
    theirs = hugging_face()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        model = load(directory)
    facts: dict = {}
    with torch.no_grad():
        rows = [*equality(theirs, model, facts), *speed(theirs, model, facts)]
    measure.save("engine", facts)
    print(measure.table(rows))


def hugging_face() -> GPT2LMHeadModel:
    """GPT-2 small with weights large enough that attention and logits are far from uniform."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa")).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).add_(torch.randn_like(parameter), alpha=0.05)
    return model


def equality(theirs: GPT2LMHeadModel, model: Transformer, facts: dict) -> list[tuple[str, str, str]]:
    tokens = random_task().prompts.clean
    logits = model.run(tokens)[0]
    others = {
        "Hugging Face": theirs(tokens).logits,
        "HookedTransformer": _hooked(model)(tokens),
        "TransformerBridge": _bridge(theirs)(tokens),
    }
    differences = {name: float((logits - other).abs().max()) for name, other in others.items()}
    facts |= {"largest_logit": float(logits.abs().max()), "logit_difference": differences}
    largest = f"of logits to {facts['largest_logit']:.1f}"
    return [(f"logits, ours - {name}", "≤ 1e-4", f"{difference:.1e} {largest}") for name, difference in differences.items()]


def speed(theirs: GPT2LMHeadModel, model: Transformer, facts: dict) -> list[tuple[str, str, str]]:
    tokens = random_task().prompts.clean
    times = measure.interleave(
        {
            "Hugging Face": lambda: theirs(tokens, use_cache=False).logits,
            "cached": lambda: model.run(tokens, record=RECORDED),
            "cached, last": lambda: model.run(tokens, record=RECORDED, logits_at="last"),
            "plain": lambda: model.run(tokens),
            "plain, last": lambda: model.run(tokens, logits_at="last"),
        },
        rounds=9,
    )
    names = {
        "cached": ("cached forward, all logits : Hugging Face (SDPA)", "≤ 1.1"),
        "cached, last": ("cached forward, last logits : the same", "≤ 0.8"),
        "plain": ("plain forward, all logits : the same", ""),
        "plain, last": ("plain forward, last logits : the same", ""),
    }
    ratios = {name: times[name].per(times["Hugging Face"]) for name in names}
    facts |= times | {"ratio": ratios}
    return [
        (what, goal, f"{ratios[name]['cpu']:.2f} CPU, {ratios[name]['wall']:.2f} wall") for name, (what, goal) in names.items()
    ]


def _hooked(model: Transformer) -> HookedTransformer:
    config = HookedTransformerConfig(
        **GPT2_SMALL, n_ctx=1024, d_vocab=D_VOCAB, act_fn="gelu_new", normalization_type="LN", device="cpu", eps=1e-5
    )
    hooked = HookedTransformer(config)
    hooked.load_state_dict(hooked.state_dict() | model.weights.named())
    return hooked


def _bridge(theirs: GPT2LMHeadModel):
    return build_bridge_from_module(
        theirs,
        architecture="GPT2LMHeadModel",
        hf_config=theirs.config,
        tokenizer=None,
        dtype=torch.float32,
        device="cpu",
        model_name="gpt2",
    )


if __name__ == "__main__":
    main()
