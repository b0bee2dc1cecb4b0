"""What codes cost once activations are stored: random weights of a GPT-2-small shape, 200 + 200 prompts of 16 tokens.

    python -m benchmarks.codes_cost          # a few minutes; writes results/<date>-codes-cost.json

Each method in a process of its own, on one thread and on two, with as many permutations as is its default, and with its
control where it has one (the same with autoencoders that were never trained). GiB are above the loaded model, pages of the
stored files among them.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.subjects import GPT2_SMALL, random_task
from circuits.discovery.code_edges import codes_edges
from circuits.discovery.codes import codes
from circuits.discovery.paper_codes import paper_codes
from circuits.discovery.probes import probe
from circuits.scores import Scores
from mechinterp.models.compiled import induction
from mechinterp.models.config import ModelConfig
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights
from mechinterp.store import ActivationStore
from mechinterp.tasks.base import Task

N_PROMPTS, D_VOCAB, THREADS = 200, 1000, (1, 2)
TARGETS = {"codes": "≤ 10 s, ≤ 2 GiB"}
METHODS: dict[str, Callable[..., Scores]] = {
    "codes": codes,
    "codes_edges": codes_edges,
    "paper_codes": paper_codes,
    "probe": probe,
}


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["one"]:
        name, threads, folder = arguments[1:]
        torch.set_num_threads(int(threads))
        print(json.dumps(_one(name, folder)))
        return
    found, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        model, task = subject()
        probe(model, task, n_permutations=1, store=ActivationStore(folder))  # these two store all that the others read
        paper_codes(model, task, d_sae=1, steps=1, store=ActivationStore(folder))
        for name in METHODS:
            for threads in THREADS:
                one = json.loads(measure.in_a_process("benchmarks.codes_cost", "one", name, str(threads), folder))
                found[f"{name}, {threads} threads"] = one
                reached = f"{one['wall']:.1f} s, {one['cpu']:.1f} CPU s, {one['GiB']:.2f} GiB"
                rows.append((f"{name}, {threads} threads", TARGETS.get(name, ""), reached))
    measure.save("codes-cost", {"prompts": 2 * N_PROMPTS, "methods": found})
    print(measure.table(rows))


def subject() -> tuple[Transformer, Task]:
    generator = torch.Generator().manual_seed(0)
    L, H, M, D, F = GPT2_SMALL.values()
    config = ModelConfig("random", L, H, M, D, F, D_VOCAB, n_ctx=16)

    def draw(*shape: int) -> Tensor:
        return 0.05 * torch.randn(shape, generator=generator)

    named = {"embed.W_E": draw(D_VOCAB, M), "pos_embed.W_pos": draw(16, M), "unembed.W_U": draw(M, D_VOCAB)}
    for at in (f"blocks.{layer}." for layer in range(L)):
        named |= {f"{at}attn.{W}": draw(H, M, D) for W in ("W_Q", "W_K", "W_V")}
        named |= {f"{at}attn.{b}": draw(H, D) for b in ("b_Q", "b_K", "b_V")}
        named |= {f"{at}attn.W_O": draw(H, D, M), f"{at}attn.b_O": draw(M)}
        named |= {
            f"{at}mlp.W_in": draw(M, F),
            f"{at}mlp.b_in": draw(F),
            f"{at}mlp.W_out": draw(F, M),
            f"{at}mlp.b_out": draw(M),
        }
    for place in ("ln_final", *(f"blocks.{layer}.{norm}" for layer in range(L) for norm in ("ln1", "ln2"))):
        named |= {f"{place}.w": 1 + draw(M), f"{place}.b": draw(M)}
    task = random_task(n_prompts=N_PROMPTS, d_vocab=D_VOCAB)
    return Transformer(Weights.from_named(config, named)), replace(task, tokenizer=induction(n_prompts=2).task.tokenizer)


def _one(name: str, folder: str) -> dict[str, float]:
    """The first call, as a user makes it; memory is looked at in the same call."""
    model, task = subject()
    assert model.weights.fingerprint  # computed once a model and kept: no part of a method
    began: list[tuple[float, float]] = []
    spent: dict[str, float] = {}

    def job() -> None:
        began.append((time.perf_counter(), time.process_time()))
        METHODS[name](model, task, store=ActivationStore(folder))
        spent["wall"], spent["cpu"] = time.perf_counter() - began[0][0], time.process_time() - began[0][1]

    return {"GiB": measure.peak_above(job)} | spent


if __name__ == "__main__":
    main(sys.argv[1:])
