"""Trains the built-in model on one CPU core, with the engine's own forward pass.

    python -m mechinterp.models.builtin.train --out DIR

1. build the tokenizer from the corpus          3. train at a constant rate until every gate is passed
2. draw the initial weights                     4. let the rate fall to zero, measure again, and save
"""

import argparse
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from mechinterp.models.builtin import gates
from mechinterp.models.builtin.batches import KINDS, Batch, Sampler
from mechinterp.models.builtin.document import vocabulary_texts
from mechinterp.models.builtin.muon import Muon
from mechinterp.models.builtin.vocabulary import build_tokenizer
from mechinterp.models.config import ModelConfig
from mechinterp.models.load import load, save
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights
from mechinterp.sites import Site


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the corpus."""

    seed: int = 0
    n_layers: int = 4
    n_heads: int = 8
    d_model: int = 128
    d_mlp: int = 256
    n_ctx: int = 96
    n_documents: int = 32
    lr_matrices: float = 0.02
    lr_rest: float = 0.003
    weight_decay: float = 0.01
    warmup: int = 100
    decay: int = 800
    max_steps: int = 20_000
    measure_every: int = 250
    n_held_out: int = 2000


def train(out: Path, recipe: Recipe, start: Path | None = None) -> dict[str, float]:
    """Train, write model, tokenizer and log to ``out``, and return the held-out figures of ``gates.measure``.

    ``start`` is a directory with a model to go on from. Each measurement leaves a model beside ``out``.
    """
    backend = build_tokenizer(vocabulary_texts())
    tokenizer = Tokenizer(backend, "builtin", bos_id=1, pad_id=0, prepends_bos=True)
    weights = load(start).weights if start else initial_weights(recipe, backend.get_vocab_size())
    for parameter in weights.parameters():
        parameter.requires_grad_(True)
    model = Transformer(weights, tokenizer)
    encode = cache(lambda text: tokenizer.encode(text, bos=False))
    sampler = Sampler(encode, model.config.d_vocab, recipe.n_ctx, Random(recipe.seed))
    log = []
    stacked = [pair for b in weights.blocks for pair in ((b.W_QKV, 3), (b.W_O, 1), (b.W_in, 1), (b.W_out, 1))]
    matrices = [(matrix, n) for matrix, n in stacked if matrix is not None]
    muon = Muon(matrices, weight_decay=recipe.weight_decay)
    rest = [p for p in weights.parameters() if all(p is not matrix for matrix, _ in matrices)]
    adam = torch.optim.AdamW(rest, lr=recipe.lr_rest, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    seen, started = hashlib.sha256(), time.monotonic()
    decays_from = recipe.max_steps - recipe.decay
    step = 0
    while step < min(recipe.max_steps, decays_from + recipe.decay):
        batch = sampler.batch(recipe.n_documents)
        seen.update(batch.tokens.numpy().tobytes())
        loss, is_right = loss_of(model, batch)
        adam.zero_grad()
        for matrix, _ in matrices:
            matrix.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        rate = min(1.0, (step + 1) / recipe.warmup, max(0.0, (decays_from + recipe.decay - step) / recipe.decay))
        adam.param_groups[0]["lr"] = rate * recipe.lr_rest
        muon.step(rate * recipe.lr_matrices)
        adam.step()
        sampler.learn_from(batch.kind, is_right)
        step += 1
        if step % recipe.measure_every == 0:
            figures = gates.measure(model, n_prompts=240, seed=recipe.seed + step)
            log.append(_row(step, started, loss, sampler, figures))
            print(json.dumps(log[-1]), flush=True)
            save(model, out.with_name(f"{out.name}-{step}"))
            if not gates.failures(figures):
                decays_from = min(decays_from, step)
    for parameter in weights.parameters():
        parameter.requires_grad_(False)
    figures = gates.measure(model, recipe.n_held_out)
    save(model, out)
    log.append({"recipe": asdict(recipe), "corpus_sha256": seen.hexdigest(), "held_out": figures})
    (out / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return figures


def loss_of(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """The weighted cross-entropy of the batch's predictions, in nats, and which of them a top token got right."""
    last = Site("resid_post", model.config.n_layers - 1)
    _, cache = model.run(batch.tokens, record=[last], logits_at="last")
    resid, norm, weights = cache[last].flatten(0, 1)[batch.at], model.weights.ln_final, model.weights
    assert norm is not None
    assert weights.b_U is not None
    normalized = layer_norm(resid, resid.shape[-1:], norm.w, norm.b, model.config.norm_eps)
    logits = torch.addmm(weights.b_U, normalized, weights.W_U)
    weight = torch.tensor(list(KINDS.values()))[batch.kind]
    cross_entropy = -(batch.target * logits.log_softmax(-1)).sum(-1)
    is_right = batch.target.gather(1, logits.argmax(-1, keepdim=True))[:, 0] > 0
    return (cross_entropy * weight).sum() / weight.sum(), is_right


def initial_weights(recipe: Recipe, d_vocab: int) -> Weights:
    """Normal weights of unit gain, small where they write to the stream; positions start as sines and cosines."""
    rng = torch.Generator().manual_seed(recipe.seed)
    M, H, D, L = recipe.d_model, recipe.n_heads, recipe.d_model // recipe.n_heads, recipe.d_mlp

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=rng) * std

    config = ModelConfig("builtin", recipe.n_layers, H, M, D, L, d_vocab, recipe.n_ctx)
    angle = torch.arange(recipe.n_ctx)[:, None] * torch.exp(torch.arange(0, M, 2) * (-math.log(200.0) / M))
    named = {
        "embed.W_E": normal(d_vocab, M, std=0.5),
        "pos_embed.W_pos": 0.5 * torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1),
        "unembed.W_U": normal(M, d_vocab, std=0.02),
        "unembed.b_U": torch.zeros(d_vocab),
    }
    norms = ["ln_final"]
    for layer in range(recipe.n_layers):
        block = f"blocks.{layer}"
        norms += [f"{block}.ln1", f"{block}.ln2"]
        named |= {f"{block}.attn.W_{port}": normal(H, M, D, std=M**-0.5) for port in "QKV"}
        named[f"{block}.attn.W_O"] = normal(H, D, M, std=0.3 * M**-0.5)
        named |= {f"{block}.mlp.W_in": normal(M, L, std=M**-0.5), f"{block}.mlp.W_out": normal(L, M, std=0.3 * L**-0.5)}
    for norm in norms:
        named |= {f"{norm}.w": torch.ones(M), f"{norm}.b": torch.zeros(M)}
    return Weights.from_named(config, named)


def _row(step: int, started: float, loss: Tensor, sampler: Sampler, figures: dict[str, float]) -> dict:
    return {
        "step": step,
        "minutes": round((time.monotonic() - started) / 60, 2),
        "loss": round(loss.item(), 3),
        "train_accuracy": {kind: round(value, 3) for kind, value in sampler.accuracy.items()},
        "held_out": {name: round(figure, 3) for name, figure in figures.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a directory that does not exist yet")
    parser.add_argument("--start", type=Path, help="a directory with a model to go on from")
    parser.add_argument("--threads", type=int, default=1)
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    asked = vars(parser.parse_args())
    torch.set_num_threads(asked.pop("threads"))
    figures = train(asked.pop("out"), start=asked.pop("start"), recipe=Recipe(**asked))
    print(json.dumps(figures, indent=2))
    print("\n".join(gates.failures(figures)) or "every gate is passed")


if __name__ == "__main__":
    main()
