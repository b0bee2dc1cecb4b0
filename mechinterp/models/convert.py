"""Other people's checkpoints in our names: one function per source, each giving a ``ModelConfig`` and named tensors.

Every function refuses, by name and with the reason, what the engine would not run exactly. TransformerLens' own state
dict is the common tongue (``Weights.from_named``).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mechinterp.errors import ModelError
from mechinterp.models.config import ModelConfig

Named = dict[str, Tensor]

# TransformerLens settings under which its forward pass is not the one we run, with the value at which they are off.
_UNSUPPORTED: dict[str, Any] = {
    "gated_mlp": False,
    "use_qk_norm": False,
    "use_local_attn": False,
    "use_attention_sinks": False,
    "use_normalization_before_and_after": False,
    "scale_attn_by_inverse_layer_idx": False,
    "attention_dir": "causal",
    "use_logn_attn": False,
    "post_embedding_ln": False,
    "final_rms": False,
    "attn_scores_soft_cap": -1.0,
    "output_logits_soft_cap": -1.0,
    "num_experts": None,
    "clip_qkv": None,
}
_NORMALIZATIONS = {"LN": "layer_norm", "LNPre": "layer_norm", None: "none"}


def from_hooked_transformer(model: Any) -> tuple[ModelConfig, Named]:
    """A TransformerLens ``HookedTransformer`` (versions before 4), processed or not: what it computes, we compute."""
    named = dict(model.state_dict())
    return _lens_config(model.cfg, has_mlp=not model.cfg.attn_only), named


def from_bridge(model: Any) -> tuple[ModelConfig, Named]:
    """A TransformerLens ``TransformerBridge``, raw or in compatibility mode.

    Its state dict keeps each family's own layout (Linear here, Conv1D there); its per-layer ``W_Q``, ``W_in``, ... do not.
    """
    config = _lens_config(model.cfg, has_mlp=hasattr(model.blocks[0], "mlp"))
    named = {"embed.W_E": model.embed.weight, "pos_embed.W_pos": model.pos_embed.weight}
    named |= {"unembed.W_U": model.W_U, "unembed.b_U": model.b_U}
    named |= {"ln_final.w": model.ln_final.weight, "ln_final.b": model.ln_final.bias}
    for layer, block in enumerate(model.blocks):
        ours = f"blocks.{layer}."
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
            named[f"{ours}attn.{name}"] = getattr(block.attn, name)
        for norm in ("ln1", "ln2"):
            part = getattr(block, norm, None)
            named |= {f"{ours}{norm}.w": part.weight, f"{ours}{norm}.b": part.bias} if part is not None else {}
        if config.has_mlp:
            named |= {f"{ours}mlp.{name}": getattr(block.mlp, name) for name in ("W_in", "b_in", "W_out", "b_out")}
    return config, {name: tensor for name, tensor in named.items() if tensor is not None}


def from_hugging_face(directory: Path) -> tuple[ModelConfig, Named]:
    """A local Hugging Face GPT-2 directory (``config.json`` + safetensors), read without building the model."""
    facts = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if facts.get("model_type") != "gpt2":
        raise ModelError(
            f"{directory} holds a {facts.get('model_type')!r} model; the engine runs 'gpt2' so far. "
            "Nothing was loaded, since another layout would compute something else."
        )
    refused = {"scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "add_cross_attention": False}
    for name, supported in refused.items():
        if facts.get(name, supported) != supported:
            raise ModelError(f"{directory}: {name}={facts[name]!r} changes the forward pass and the engine does not do it.")
    stored = read_safetensors(directory)
    if facts.get("tie_word_embeddings", True) is False and "lm_head.weight" not in stored:
        raise ModelError(f"{directory} lacks 'lm_head.weight', though its unembedding is not tied. It is incomplete.")
    d_model, n_heads = facts["n_embd"], facts["n_head"]
    activation = facts.get("activation_function", "gelu_new")
    config = ModelConfig(
        name=facts.get("_name_or_path") or directory.name,
        n_layers=facts["n_layer"],
        n_heads=n_heads,
        d_model=d_model,
        d_head=d_model // n_heads,
        d_mlp=facts.get("n_inner") or 4 * d_model,
        d_vocab=facts["vocab_size"],
        n_ctx=facts.get("n_positions", 1024),
        activation="gelu_new" if activation == "gelu_pytorch_tanh" else activation,
        norm_eps=facts.get("layer_norm_epsilon", 1e-5),
    )
    return config, _rename_gpt2(stored, config)


def read_safetensors(directory: Path) -> Named:
    """All tensors of a directory, sharded or not, memory-mapped."""
    from safetensors.torch import load_file

    index = directory / "model.safetensors.index.json"
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise ModelError(
            f"{directory} lacks {', '.join(missing)}. We read safetensors only, never pickles: "
            "convert with `model.save_pretrained(directory, safe_serialization=True)`."
        )
    named: Named = {}
    for shard in shards:
        try:
            named |= load_file(directory / shard)
        except Exception as error:
            raise ModelError(f"{directory / shard} cannot be read as safetensors ({error}). Download it again.") from error
    return named


def _lens_config(cfg: Any, has_mlp: bool) -> ModelConfig:
    """TransformerLens' configuration, refused where it asks for what the engine does not do."""
    name = cfg.model_name or "model"
    for fact, off in _UNSUPPORTED.items():
        if getattr(cfg, fact, off) not in (off, None, False):
            given = getattr(cfg, fact)
            raise ModelError(f"{name}: {fact}={given!r} changes the forward pass and the engine does not do it yet.")
    if cfg.positional_embedding_type != "standard":
        raise ModelError(f"{name}: the engine has learned positions, not {cfg.positional_embedding_type!r}.")
    if cfg.normalization_type not in _NORMALIZATIONS:
        raise ModelError(f"{name}: the engine has LayerNorm or none, not {cfg.normalization_type!r}.")
    if getattr(cfg, "n_key_value_heads", None) not in (None, cfg.n_heads):
        raise ModelError(f"{name}: grouped keys ({cfg.n_key_value_heads} for {cfg.n_heads} heads) are not supported yet.")
    use_scale = getattr(cfg, "use_attn_scale", True)
    given = float(getattr(cfg, "attn_scale", -1.0) or -1.0)
    return ModelConfig(
        name=name,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp if has_mlp else None,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        activation=cfg.act_fn if has_mlp else "gelu_new",
        normalization=_NORMALIZATIONS[cfg.normalization_type],
        norm_eps=cfg.eps,
        attention_scale=1.0 if not use_scale else (1 / given if given > 0 else None),
        parallel=bool(getattr(cfg, "parallel_attn_mlp", False)),
    )


def _rename_gpt2(stored: Mapping[str, Tensor], config: ModelConfig) -> Named:
    """Hugging Face's GPT-2 names in TransformerLens'. Conv1D stores ``[d_in, d_out]``, as we do."""
    stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    H, D = config.n_heads, config.d_head
    named = {"embed.W_E": _get(stored, "wte.weight"), "pos_embed.W_pos": _get(stored, "wpe.weight")}
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}.", f"h.{layer}."
        W = _get(stored, f"{theirs}attn.c_attn.weight").unflatten(1, (3, H, D)).permute(1, 2, 0, 3)
        b = _get(stored, f"{theirs}attn.c_attn.bias").unflatten(0, (3, H, D))
        for i, port in enumerate("QKV"):
            named |= {f"{ours}attn.W_{port}": W[i], f"{ours}attn.b_{port}": b[i]}
        named[f"{ours}attn.W_O"] = _get(stored, f"{theirs}attn.c_proj.weight").unflatten(0, (H, D))
        named[f"{ours}attn.b_O"] = _get(stored, f"{theirs}attn.c_proj.bias")
        for here, there in (("in", "c_fc"), ("out", "c_proj")):
            named[f"{ours}mlp.W_{here}"] = _get(stored, f"{theirs}mlp.{there}.weight")
            named[f"{ours}mlp.b_{here}"] = _get(stored, f"{theirs}mlp.{there}.bias")
        for here, there in (("ln1", "ln_1"), ("ln2", "ln_2")):
            named[f"{ours}{here}.w"] = _get(stored, f"{theirs}{there}.weight")
            named[f"{ours}{here}.b"] = _get(stored, f"{theirs}{there}.bias")
    named |= {"ln_final.w": _get(stored, "ln_f.weight"), "ln_final.b": _get(stored, "ln_f.bias")}
    named["unembed.W_U"] = stored.get("lm_head.weight", named["embed.W_E"]).T  # tied unless stored
    return named


def _get(stored: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in stored:
        raise ModelError(f"the checkpoint lacks {name!r}, which every GPT-2 has. It is incomplete or another architecture.")
    return stored[name]
