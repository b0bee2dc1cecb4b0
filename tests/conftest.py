"""Offline before anything is imported, pictures without a screen, and small random models to hold identities against."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"  # these tensors are tiny: threads only wait for each other

import warnings

import pytest
import torch

from mechinterp.models.config import ModelConfig
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights

VARIANTS = {
    "plain": {},
    "attention_only": {"d_mlp": None},
    "parallel": {"parallel": True},
    "no_norm": {"normalization": "none"},
    "folded": {},  # LayerNorm without gain and bias: TransformerLens' LNPre
}


def random_named(config: ModelConfig, norms: bool, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A state dict in TransformerLens' names, every tensor random: a bias or gain left out would show."""
    L, H, D, M, F, V = config.n_layers, config.n_heads, config.d_head, config.d_model, config.d_mlp, config.d_vocab
    shapes = {"embed.W_E": (V, M), "pos_embed.W_pos": (config.n_ctx, M), "unembed.W_U": (M, V), "unembed.b_U": (V,)}
    for at in (f"blocks.{layer}." for layer in range(L)):
        shapes |= {f"{at}attn.{W}": (H, M, D) for W in ("W_Q", "W_K", "W_V")}
        shapes |= {f"{at}attn.{b}": (H, D) for b in ("b_Q", "b_K", "b_V")}
        shapes |= {f"{at}attn.W_O": (H, D, M), f"{at}attn.b_O": (M,)}
        if F:
            shapes |= {f"{at}mlp.W_in": (M, F), f"{at}mlp.b_in": (F,), f"{at}mlp.W_out": (F, M), f"{at}mlp.b_out": (M,)}
    if norms:
        places = ["ln_final", *(f"blocks.{i}.{ln}" for i in range(L) for ln in (("ln1", "ln2") if F else ("ln1",)))]
        shapes |= {f"{place}.{part}": (M,) for place in places for part in "wb"}
    return {
        name: 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) + name.endswith(".w")
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="session")
def make_model():
    """``make_model("parallel", seed=1, n_layers=2)``: a random model of a variant, with any fact changed."""

    def make(variant: str = "plain", seed: int = 0, **facts) -> Transformer:
        sizes = {"n_layers": 3, "n_heads": 3, "d_model": 12, "d_head": 5, "d_mlp": 20, "d_vocab": 23, "n_ctx": 9}
        config = ModelConfig(**(sizes | {"name": variant} | VARIANTS[variant] | facts))
        norms = config.normalization != "none" and variant != "folded"
        named = random_named(config, norms, torch.Generator().manual_seed(seed))
        return Transformer(Weights.from_named(config, named))

    return make


@pytest.fixture(scope="session", params=VARIANTS)
def model(request, make_model) -> Transformer:
    return make_model(request.param)


@pytest.fixture(scope="session")
def plain(make_model) -> Transformer:
    return make_model()


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.randint(23, (4, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def lens():
    """TransformerLens before version 4, imported once (9 s) and without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = pytest.importorskip("transformer_lens")
        if not hasattr(package, "HookedTransformer"):
            pytest.skip("HookedTransformer is gone since TransformerLens 4")
        return package


@pytest.fixture(scope="session")
def make_hooked(lens):
    """``make_hooked(model, split=True)``: the same model as a ``HookedTransformer``."""

    def make(model: Transformer, split: bool = False, **facts):
        config = model.config
        norm = model.weights.ln_final
        about = {
            "n_layers": config.n_layers,
            "n_heads": config.n_heads,
            "d_model": config.d_model,
            "d_head": config.d_head,
            "d_mlp": config.d_mlp,
            "d_vocab": config.d_vocab,
            "n_ctx": config.n_ctx,
            "act_fn": config.activation,
            "attn_only": not config.has_mlp,
            "parallel_attn_mlp": config.parallel,
            "normalization_type": None if norm is None else "LNPre" if norm.w is None else "LN",
            "eps": config.norm_eps,
            "dtype": model.dtype,
            "device": "cpu",
            "use_split_qkv_input": split,
            "use_attn_result": split,
            "use_hook_mlp_in": split,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hooked = lens.HookedTransformer(lens.HookedTransformerConfig(**(about | facts)))
            missing, unexpected = hooked.load_state_dict(model.weights.named(), strict=False)
        assert not unexpected
        assert all(name.endswith(("mask", "IGNORE")) for name in missing)
        return hooked.requires_grad_(False)

    return make
