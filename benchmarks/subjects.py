"""What the benchmarks run on: models of a known shape with random weights, and random prompts."""

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from mechinterp.metrics import logit_diff
from mechinterp.models.load import load
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import Task

GPT2_SMALL = {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_head": 64, "d_mlp": 3072}
FOUR_LAYERS = {"n_layers": 4, "n_heads": 8, "d_model": 512, "d_head": 64, "d_mlp": 2048}
D_VOCAB = 50257


def hooked(shape: dict[str, int], seed: int = 0) -> HookedTransformer:
    """A ``HookedTransformer`` as its users have it: LayerNorm folded, eager attention. Parameters frozen."""
    torch.manual_seed(seed)
    config = HookedTransformerConfig(
        **shape, n_ctx=64, d_vocab=D_VOCAB, act_fn="gelu_new", normalization_type="LNPre", device="cpu", seed=seed
    )
    model = HookedTransformer(config)
    for parameter in model.parameters():
        parameter.requires_grad_(False).normal_(std=0.05)
    return model.eval()


def ours(model: HookedTransformer) -> Transformer:
    """The same weights in our engine."""
    return load(model)


def random_task(shared_prefix: int = 0, n_prompts: int = 16, n_pos: int = 16, seed: int = 0) -> Task:
    """Random tokens; clean and corrupted prompts agree on exactly the first ``shared_prefix`` positions."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(D_VOCAB, (n_prompts, n_pos), generator=generator)
    corrupted = torch.randint(D_VOCAB, (n_prompts, n_pos), generator=generator)
    corrupted[:, :shared_prefix] = clean[:, :shared_prefix]
    prompts = PromptBatch(
        clean=clean,
        corrupted=corrupted,
        end=torch.full((n_prompts,), n_pos - 1),
        candidates=_two_tokens(n_prompts, generator),
        roles=torch.tensor([1, -1]).repeat(n_prompts, 1),
        groups=torch.zeros(n_prompts, dtype=torch.long),
        positions={},
    )
    return Task("random", prompts, logit_diff, "logit_diff", "random", ("random",), tokenizer=None)  # type: ignore[arg-type]


def _two_tokens(n_prompts: int, generator: torch.Generator) -> Tensor:
    first = torch.randint(D_VOCAB, (n_prompts,), generator=generator)
    return torch.stack([first, (first + 1) % D_VOCAB], dim=1)
