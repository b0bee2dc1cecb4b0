"""Offline before anything is imported, pictures without a screen, and small random models to hold identities against."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"  # these tensors are tiny: threads only wait for each other

import warnings

import pytest
import torch

from mechinterp.models.config import ModelConfig, Rotary
from mechinterp.models.rotary import angles
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights

VARIANTS = {
    "plain": {},
    "attention_only": {"d_mlp": None},
    "parallel": {"parallel": True},
    "no_norm": {"normalization": "none"},
    "folded": {},  # LayerNorm without gain and bias: TransformerLens' LNPre
}
_LLAMA = {
    "normalization": "rms_norm",
    "learned_positions": False,
    "rotary": Rotary((1.0, 0.1)),
    "gated": True,
    "activation": "silu",
    "n_heads": 4,
    "n_key_value_heads": 2,
}
_AFTER = _LLAMA | {"norms": "after", "qk_norm": "all"}
# What families are made of: every fact of the engine, in the company in which it is met. Identities hold on all of them.
VARIANTS |= {
    "llama": _LLAMA,
    "qwen3": _LLAMA | {"qk_norm": "head"},
    "olmo2": _AFTER,
    "gemma2": _LLAMA
    | {
        "norms": "both",
        "activation": "gelu_new",
        "attention_soft_cap": 3.0,
        "logit_soft_cap": 4.0,
        "embed_scale": 3.5,
        "window": 3,
        "local_layers": (0, 2),
        "local_rotary": Rotary((0.7, 0.05)),
        "attention_scale": 0.4,
    },
    "gptj": {"learned_positions": False, "rotary": Rotary((1.0, 0.1), adjacent=True), "parallel": True},
    "mpt": {"learned_positions": False, "alibi": True},
}


def random_named(config: ModelConfig, norms: bool, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A state dict in TransformerLens' names, every tensor random: a bias or gain left out would show."""
    L, H, G, D, M, F, V = (
        getattr(config, n) for n in ("n_layers", "n_heads", "n_groups", "d_head", "d_model", "d_mlp", "d_vocab")
    )
    mark, after = "_" if config.is_grouped else "", config.has_norms_after
    ports = (("Q", H), (f"{mark}K", G), (f"{mark}V", G))
    shapes = {"embed.W_E": (V, M)} | ({"pos_embed.W_pos": (config.n_ctx, M)} if config.learned_positions else {})
    shapes |= {"unembed.W_U": (M, V), "unembed.b_U": (V,)}
    for at in (f"blocks.{layer}." for layer in range(L)):
        shapes |= {f"{at}attn.{port[:-1]}W_{port[-1]}": (n, M, D) for port, n in ports}
        shapes |= {f"{at}attn.{port[:-1]}b_{port[-1]}": (n, D) for port, n in ports}
        shapes |= {f"{at}attn.W_O": (H, D, M)} | ({} if after else {f"{at}attn.b_O": (M,)})
        if F:
            shapes |= {f"{at}mlp.W_in": (M, F), f"{at}mlp.b_in": (F,), f"{at}mlp.W_out": (F, M), f"{at}mlp.b_out": (M,)}
            shapes |= {f"{at}mlp.W_gate": (M, F), f"{at}mlp.b_gate": (F,)} if config.gated else {}
        if config.qk_norm != "none":
            wide = config.qk_norm == "all"
            shapes |= {f"{at}attn.{p}_norm.w": (n * D if wide else D,) for p, n in (("q", H), ("k", G))}
    if norms:
        before = ["ln1", "ln2"] * config.has_norms_before + ["ln1_post", "ln2_post"] * after
        places = ["ln_final", *(f"blocks.{i}.{ln}" for i in range(L) for ln in before if F or "ln1" in ln)]
        shapes |= {f"{place}.{part}": (M,) for place in places for part in ("wb" if config.centred else "w")}
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
        config, named = model.config, model.weights.named()
        about = _hooked_facts(model) | {f"use_{what}": split for what in ("split_qkv_input", "attn_result", "hook_mlp_in")}
        named["embed.W_E"] = named["embed.W_E"] * (config.embed_scale or 1.0)  # there it is part of the matrix
        named["unembed.W_U"] = model.weights.W_U
        assert not any(tensor.any() for name, tensor in named.items() if name.endswith("b_gate")), "it has no such bias"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hooked = lens.HookedTransformer(lens.HookedTransformerConfig(**(about | facts)))
            known = {_hooked_name(name, config): tensor for name, tensor in named.items() if not name.endswith("b_gate")}
            missing, unexpected = hooked.load_state_dict(known, strict=False)
        assert not unexpected
        unused = ("pos_embed.W_pos",) if config.alibi else ()
        assert all(name.endswith(("mask", "IGNORE", "rotary_sin", "rotary_cos", *unused)) for name in missing)
        if config.rotary and "rotary_base" not in facts:
            for layer, block in enumerate(hooked.blocks):  # frequencies of our own are none that a base gives
                cos, sin = angles(torch.arange(config.n_ctx)[None], config.rotary_of(layer), "cpu")
                block.attn.rotary_cos, block.attn.rotary_sin = cos[0, :, 0], sin[0, :, 0]
        return hooked.requires_grad_(False)

    return make


def _hooked_facts(model: Transformer) -> dict:
    """Our configuration in TransformerLens' words."""
    config, norm = model.config, model.weights.ln_final
    kind = {"layer_norm": "LN", "rms_norm": "RMS", "none": None}[config.normalization]
    facts = {name: getattr(config, name) for name in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx")}
    facts |= {
        "act_fn": config.activation,
        "attn_only": not config.has_mlp,
        "parallel_attn_mlp": config.parallel,
        "normalization_type": kind if kind is None or norm.w is not None else f"{kind}Pre",
        "eps": config.norm_eps,
        "attn_scale": 1 / config.scale,
        "gated_mlp": config.gated,
        "n_key_value_heads": config.n_key_value_heads,
        "use_qk_norm": config.qk_norm == "head",
        "use_normalization_before_and_after": config.norms == "both",
        "original_architecture": "Olmo2ForCausalLM" if config.norms == "after" else None,
        "attn_scores_soft_cap": config.attention_soft_cap or -1.0,
        "output_logits_soft_cap": config.logit_soft_cap or -1.0,
        "dtype": model.dtype,
        "device": "cpu",
    }
    if config.local_layers:
        kinds = ["local" if layer in config.local_layers else "global" for layer in range(config.n_layers)]
        facts |= {"use_local_attn": True, "window_size": config.window, "attn_types": kinds}
    if (rotary := config.rotary) is not None:
        facts |= {"positional_embedding_type": "rotary", "rotary_dim": 2 * len(rotary.frequencies)}
        facts |= {"rotary_adjacent_pairs": rotary.adjacent}
    return facts | ({"positional_embedding_type": "alibi"} if config.alibi else {})


def _hooked_name(name: str, config: ModelConfig) -> str:
    """OLMo-2's normalisations after heads and MLP are called as others' before them, groups of one head as of several."""
    if config.n_key_value_heads and not config.is_grouped and name[-2:] in ("_K", "_V"):
        name = name.replace("attn.", "attn._")
    return name.replace("_post.", ".") if config.norms == "after" else name


@pytest.fixture(scope="session")
def expressible(model, make_model) -> Transformer:
    """The model as far as TransformerLens can say it.

    It has no biases in a gated MLP's first layer, slopes of ALiBi for powers of two alone, and norms OLMo-2's queries over
    as many numbers as the stream has.
    """
    model = make_model(model.config.name, **{"mpt": {"n_heads": 4}, "olmo2": {"d_model": 20}}.get(model.config.name, {}))
    absent = ("b_gate", "b_in") if model.config.gated else ()
    return Transformer(
        Weights.from_named(model.config, {n: t for n, t in model.weights.named().items() if not n.endswith(absent)})
    )


_TURNING = {"rope_theta": 100.0, "rope_type": "default"}
_PART = {"rope_parameters": _TURNING | {"partial_rotary_factor": 0.67}}  # 4 numbers of 6 turn
_ENDS = {"bos_token_id": 0, "eos_token_id": 0}
_SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "rope_parameters": _TURNING,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
} | _ENDS
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_WIDE = _GROUPED | {"head_dim": 8}
_GEMMA = _WIDE | {"tie_word_embeddings": True}
_GEMMA2 = _GEMMA | {"sliding_window": 3, "query_pre_attn_scalar": 5, "layer_types": ["sliding_attention", "full_attention"]}
_OLD = {"n_embd": 24, "n_head": 3, "n_layer": 2, "vocab_size": 40, "n_positions": 32} | _ENDS

# Hugging Face's `model_type`: its configuration's class, and facts in which something would show if it were left out.
HUGGING_FACE = {
    "gpt2": ("GPT2Config", _OLD),
    "gpt_neo": (
        "GPTNeoConfig",
        {"hidden_size": 24, "num_layers": 2, "num_heads": 3, "attention_types": [[["global", "local"], 1]], "window_size": 3}
        | {"vocab_size": 40, "max_position_embeddings": 32}
        | _ENDS,
    ),
    "gpt_neox": ("GPTNeoXConfig", _SIZES | _PART),
    "gptj": ("GPTJConfig", _OLD | {"rotary_dim": 4, "tie_word_embeddings": False}),
    "opt": (
        "OPTConfig",
        {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "ffn_dim": 20, "word_embed_proj_dim": 24}
        | {"vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 1}
        | _ENDS,
    ),
    "llama": ("LlamaConfig", _WIDE),
    "mistral": ("MistralConfig", _WIDE | {"sliding_window": 4}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _WIDE),
    "gemma": ("GemmaConfig", _GEMMA),
    "gemma2": ("Gemma2Config", _GEMMA2 | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}),
    "gemma3_text": (
        "Gemma3TextConfig",
        _GEMMA2
        | {"rope_parameters": {"full_attention": _TURNING, "sliding_attention": {"rope_theta": 50.0, "rope_type": "default"}}},
    ),
    "phi": ("PhiConfig", _SIZES | _PART),
    "phi3": ("Phi3Config", _GROUPED),
    "olmo": ("OlmoConfig", _GROUPED),
    "olmo2": ("Olmo2Config", _GROUPED),
    "mpt": (
        "MptConfig",
        {"d_model": 24, "n_heads": 3, "n_layers": 2, "vocab_size": 40, "max_seq_len": 32, "expansion_ratio": 4},
    ),
}


@pytest.fixture(scope="session")
def make_hugging_face():
    """``make_hugging_face("llama", head_dim=6)``: that family's own model, any fact changed, norms and biases random too."""
    transformers = pytest.importorskip("transformers")

    def make(family: str, **facts):
        kind, known = HUGGING_FACE[family]
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = getattr(transformers, kind)(**(known | facts))
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
        return model.requires_grad_(False)

    return make


@pytest.fixture(scope="session", params=HUGGING_FACE)
def family(request) -> str:
    """Hugging Face's name of every family that the engine runs."""
    return request.param
