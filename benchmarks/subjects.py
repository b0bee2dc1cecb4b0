"""What the benchmarks run on: models of a known shape with random weights, and random prompts."""

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from mechinterp.metrics import logit_diff
from mechinterp.models.config import ModelConfig
from mechinterp.models.load import load
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights
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


def sharpened(sharpness: float, seed: int, bias: float = 0.3) -> Transformer:
    """A random model of four layers of eight heads whose queries and keys are ``sharpness`` times as large as usual."""
    L, H, D, M, F, V = 4, 8, 8, 64, 256, 64
    config = ModelConfig("random", L, H, M, D, F, V, n_ctx=16)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float) -> Tensor:
        return std * torch.randn(shape, generator=generator)

    named = {"embed.W_E": draw(V, M, std=1.0), "pos_embed.W_pos": draw(16, M, std=0.3), "unembed.W_U": draw(M, V, std=M**-0.5)}
    for at in (f"blocks.{layer}." for layer in range(L)):
        for port, gain in (("Q", sharpness), ("K", sharpness), ("V", 1.0)):
            named[f"{at}attn.W_{port}"] = draw(H, M, D, std=gain * M**-0.5)
            named[f"{at}attn.b_{port}"] = draw(H, D, std=bias)
        named |= {f"{at}attn.W_O": draw(H, D, M, std=M**-0.5), f"{at}attn.b_O": draw(M, std=bias)}
        named |= {f"{at}mlp.W_in": draw(M, F, std=M**-0.5), f"{at}mlp.b_in": draw(F, std=bias)}
        named |= {f"{at}mlp.W_out": draw(F, M, std=F**-0.5), f"{at}mlp.b_out": draw(M, std=bias)}
    for place in ("ln_final", *(f"blocks.{layer}.{norm}" for layer in range(L) for norm in ("ln1", "ln2"))):
        named |= {f"{place}.w": 1 + draw(M, std=bias), f"{place}.b": draw(M, std=bias)}
    return Transformer(Weights.from_named(config, named))


def random_task(shared_prefix: int = 0, n_prompts: int = 16, n_pos: int = 16, seed: int = 0, d_vocab: int = D_VOCAB) -> Task:
    """Random tokens; clean and corrupted prompts agree on exactly the first ``shared_prefix`` positions."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(d_vocab, (n_prompts, n_pos), generator=generator)
    corrupted = torch.randint(d_vocab, (n_prompts, n_pos), generator=generator)
    corrupted[:, :shared_prefix] = clean[:, :shared_prefix]
    prompts = PromptBatch(
        clean=clean,
        corrupted=corrupted,
        end=torch.full((n_prompts,), n_pos - 1),
        candidates=_two_tokens(n_prompts, generator, d_vocab),
        roles=torch.tensor([1, -1]).repeat(n_prompts, 1),
        groups=torch.zeros(n_prompts, dtype=torch.long),
        positions={},
    )
    return Task("random", prompts, logit_diff, "logit_diff", "random", ("random",), tokenizer=None)  # type: ignore[arg-type]


def _two_tokens(n_prompts: int, generator: torch.Generator, d_vocab: int) -> Tensor:
    first = torch.randint(d_vocab, (n_prompts,), generator=generator)
    return torch.stack([first, (first + 1) % d_vocab], dim=1)
