"""What each family of models is: the facts that its configuration states, and where its checkpoints keep what.

A family is a row of ``FAMILIES``: which facts its Hugging Face configuration states (a function), which parts have a bias,
which settings change the forward pass in a way that the engine does not do (each refused by name), and its ``Layout`` of
tensor names (``layouts.py``). A family reads those settings alone that its Hugging Face model reads: published files carry
others along (a ``sliding_window`` for Llama), which nobody heeds.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mechinterp.errors import ModelError
from mechinterp.models.layouts import (
    GEMMA2,
    GPT2,
    GPTJ,
    LLAMA,
    MPT,
    NEOX,
    OLMO2_NORMS,
    OPT,
    PHI,
    QK_NORMS,
    Layout,
)
from mechinterp.models.rotary import rotary_from

Facts = dict[str, Any]

_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}  # other names of the same


@dataclass(frozen=True)
class Family:
    layout: Layout
    facts: Callable[[Any], Facts]
    biases: Callable[[Any], Collection[str]]  # of "qkv", "out", "mlp", "norm", "unembed": those that have one
    refused: Mapping[str, Any] = field(default_factory=dict)


def activation_of(name: str) -> str:
    return _ACTIVATIONS.get(name, name)


def _rms(c: Any, activation: str | None = None) -> Facts:
    """Llama and what came after it."""
    d_head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return {
        "n_layers": c.num_hidden_layers,
        "n_heads": c.num_attention_heads,
        "d_model": c.hidden_size,
        "d_head": d_head,
        "d_mlp": c.intermediate_size,
        "n_ctx": c.max_position_embeddings,
        "activation": activation_of(activation or c.hidden_act),
        "normalization": "rms_norm",
        "norm_eps": getattr(c, "rms_norm_eps", 1e-5),
        "gated": True,
        "n_key_value_heads": c.num_key_value_heads,
        "learned_positions": False,
        **_turning(c, d_head),
    }


def _turning(c: Any, d_head: int, *, in_part: bool = False) -> Facts:
    """Rotary positions: one set, or one for layers that see all and one for those that see a window (Gemma-3)."""

    def rotary(settings: Mapping[str, Any]):
        dim = int(d_head * settings.get("partial_rotary_factor", 1.0)) if in_part else d_head
        return rotary_from(dim, settings, c.max_position_embeddings, c.model_type)

    settings = c.rope_parameters
    if "rope_theta" in settings:
        return {"rotary": rotary(settings)}
    whole, local = settings.get("full_attention"), settings.get("sliding_attention")
    return {"rotary": rotary(whole or local), "local_rotary": rotary(local) if local else None}


def _windowed(c: Any, kinds: list[str] | None = None, activation: str | None = None) -> Facts:
    """As ``_rms``; layers of the kind "sliding_attention", or all if there are no kinds, see a window if there is one."""
    every = kinds or ["sliding_attention"] * c.num_hidden_layers
    local = tuple(i for i, kind in enumerate(every) if kind == "sliding_attention") if c.sliding_window else ()
    return _rms(c, activation) | ({"window": c.sliding_window, "local_layers": local} if local else {})


def _phi3(c: Any) -> Facts:
    facts = _windowed(c)
    return facts | _turning(c, facts["d_head"], in_part=True)


def _gemma(c: Any) -> Facts:
    return _rms(c) | {"embed_scale": float(c.hidden_size) ** 0.5}


def _gemma2(c: Any) -> Facts:
    """Gemma 2 and 3, which call the activation otherwise."""
    return _windowed(c, c.layer_types, c.hidden_activation) | {
        "embed_scale": float(c.hidden_size) ** 0.5,
        "attention_scale": c.query_pre_attn_scalar**-0.5,
        "norms": "both",
        "attention_soft_cap": c.attn_logit_softcapping,
        "logit_soft_cap": c.final_logit_softcapping,
    }


def _olmo(c: Any) -> Facts:
    """OLMo's LayerNorm has neither gain nor bias, and one fixed epsilon."""
    return _rms(c) | {"normalization": "layer_norm", "norm_eps": 1e-5}


def _layer_norm(c: Any, d_mlp: int, eps: float, activation: str, n_ctx: int, **more: Any) -> Facts:
    """GPT-2 and its time: what was then called by many names."""
    n_heads = more.pop("n_heads", None) or c.num_attention_heads
    return {
        "n_layers": c.num_hidden_layers,
        "n_heads": n_heads,
        "d_model": c.hidden_size,
        "d_head": more.pop("d_head", None) or c.hidden_size // n_heads,
        "d_mlp": d_mlp,
        "n_ctx": n_ctx,
        "activation": activation_of(activation),
        "norm_eps": eps,
        **more,
    }


def _gpt2(c: Any) -> Facts:
    return _layer_norm(c, c.n_inner or 4 * c.n_embd, c.layer_norm_epsilon, c.activation_function, c.n_positions)


def _gpt_neo(c: Any) -> Facts:
    local = tuple(i for i, kind in enumerate(c.attention_layers) if kind == "local")
    return _layer_norm(
        c,
        c.intermediate_size or 4 * c.hidden_size,
        c.layer_norm_epsilon,
        c.activation_function,
        c.max_position_embeddings,
        attention_scale=1.0,
        **({"window": c.window_size, "local_layers": local} if local else {}),
    )


def _gptj(c: Any) -> Facts:
    d_head = c.n_embd // c.n_head
    rotary = rotary_from(c.rotary_dim or d_head, {"rope_theta": 10000.0}, c.n_positions, c.model_type, adjacent=True)
    more = {"parallel": True, "learned_positions": False, "rotary": rotary}
    return _layer_norm(c, c.n_inner or 4 * c.n_embd, c.layer_norm_epsilon, c.activation_function, c.n_positions, **more)


def _rotary_layer_norm(c: Any, d_head: int, **more: Any) -> Facts:
    more |= {"d_head": d_head, "learned_positions": False, **_turning(c, d_head, in_part=True)}
    return _layer_norm(c, c.intermediate_size, c.layer_norm_eps, c.hidden_act, c.max_position_embeddings, **more)


def _gpt_neox(c: Any) -> Facts:
    return _rotary_layer_norm(c, c.hidden_size // c.num_attention_heads, parallel=c.use_parallel_residual)


def _phi(c: Any) -> Facts:
    d_head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return _rotary_layer_norm(c, d_head, parallel=True, n_key_value_heads=c.num_key_value_heads)


def _opt(c: Any) -> Facts:
    if c.word_embed_proj_dim != c.hidden_size:
        raise ModelError(
            f"this OPT embeds tokens in {c.word_embed_proj_dim} dimensions (word_embed_proj_dim) and projects them to "
            f"{c.hidden_size}; the engine has no such projection. Every other size of OPT runs."
        )
    return _layer_norm(c, c.ffn_dim, 1e-5, c.activation_function, c.max_position_embeddings)


def _mpt(c: Any) -> Facts:
    more = {"learned_positions": False, "alibi": True, "attention_scale": c.attn_config.softmax_scale, "n_heads": c.n_heads}
    return _layer_norm(c, 4 * c.d_model, c.layer_norm_epsilon, "gelu", c.max_seq_len, **more)


def _biased(*parts: str) -> Callable[[Any], Collection[str]]:
    return lambda c: parts


def _attention_biased(c: Any) -> Collection[str]:
    """Llama and most of its kin say it themselves."""
    return ("qkv", "out") if c.attention_bias else ()


# By Hugging Face's `model_type`: layout, facts, biases, and settings with the one value at which our pass is the model's.
FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        GPT2,
        _gpt2,
        _biased("qkv", "out", "mlp", "norm"),
        {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "add_cross_attention": False},
    ),
    "gpt_neo": Family(
        replace(
            GPT2,
            packing="apart",
            qkv="attn.attention.{}_proj",
            out="attn.attention.out_proj",
            mlp={"in": "mlp.c_fc", "out": "mlp.c_proj"},
        ),
        _gpt_neo,
        _biased("out", "mlp", "norm"),
    ),
    "gpt_neox": Family(NEOX, _gpt_neox, lambda c: ("mlp", "norm", *_attention_biased(c))),
    "gptj": Family(GPTJ, _gptj, _biased("mlp", "norm", "unembed")),
    "opt": Family(
        OPT,
        _opt,
        lambda c: ("qkv", "out", "mlp", "norm") if c.enable_bias else ("norm",),
        {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
    ),
    "llama": Family(LLAMA, _rms, lambda c: (*_attention_biased(c), *(("mlp",) if c.mlp_bias else ()))),
    "mistral": Family(LLAMA, _windowed, _biased()),
    "qwen2": Family(LLAMA, lambda c: _windowed(c, c.layer_types), _biased("qkv")),
    "qwen3": Family(
        replace(LLAMA, norms=LLAMA.norms | QK_NORMS),  # type: ignore[operator]
        lambda c: _windowed(c, c.layer_types) | {"qk_norm": "head"},
        _attention_biased,
    ),
    "gemma": Family(replace(LLAMA, gains_less_one=True), _gemma, _attention_biased, {"use_bidirectional_attention": None}),
    "gemma2": Family(GEMMA2, _gemma2, _attention_biased, {"use_bidirectional_attention": None}),
    "gemma3_text": Family(
        replace(GEMMA2, norms=GEMMA2.norms | QK_NORMS),  # type: ignore[operator]
        lambda c: _gemma2(c) | {"qk_norm": "head"},
        _attention_biased,
        {"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    ),
    "phi": Family(PHI, _phi, _biased("qkv", "out", "mlp", "norm", "unembed"), {"qk_layernorm": False}),
    "phi3": Family(
        replace(
            LLAMA, packing="stacked", qkv="self_attn.qkv_proj", gate_and_up="mlp.gate_up_proj", mlp={"out": "mlp.down_proj"}
        ),
        _phi3,
        _biased(),
    ),
    "olmo": Family(replace(LLAMA, norms={}, final=None), _olmo, _attention_biased, {"clip_qkv": None}),
    "olmo2": Family(
        replace(LLAMA, norms=OLMO2_NORMS | QK_NORMS),
        lambda c: _rms(c) | {"norms": "after", "qk_norm": "all"},
        _attention_biased,
    ),
    "mpt": Family(
        MPT,
        _mpt,
        _biased(),
        {"logit_scale": None, "attn_config.alibi": True, "attn_config.clip_qkv": None, "attn_config.qk_ln": False}
        | {"attn_config.prefix_lm": False, "attn_config.alibi_bias_max": 8},
    ),
}
