"""TransformerLens' objects in our names: whatever one computes, processed or raw, we compute.

A ``HookedTransformer`` says all of it itself: its configuration, its state dict and, by its own function, the angles by
which its heads turn. A ``TransformerBridge`` wraps a Hugging Face model, whose configuration is read as a directory's is
(``convert.config_of``); its tensors are those that its parts multiply by at this moment, whoever processed them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import ModelError
from mechinterp.models.config import ModelConfig, Rotary
from mechinterp.models.convert import config_of, gain_of
from mechinterp.models.families import FAMILIES, activation_of

Named = dict[str, Tensor]

# TransformerLens settings under which its forward pass is not one that we run, with the value at which they are off.
_UNSUPPORTED: dict[str, Any] = {
    "use_attention_sinks": False,
    "scale_attn_by_inverse_layer_idx": False,
    "post_embedding_ln": False,
    "num_experts": None,
    "clip_qkv": None,
    "load_in_4bit": False,
}
_BEYOND_TRAINING = ("use_logn_attn", "use_dynamic_ntk_rope")  # Qwen-1's, off up to the length that it was trained at
_NORMALIZATIONS = {"LN": "layer_norm", "LNPre": "layer_norm", "RMS": "rms_norm", "RMSPre": "rms_norm", None: "none"}
_POSITIONS = ("standard", "rotary", "alibi")
_NORMS_AFTER = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")  # TransformerLens knows them by name; no setting says it
_TRAINED_WITH_BOS = ("Llama", "Mistral", "Gemma", "OPT")


class Given(Named):
    """Tensors that are given away: each is held until another one is asked for, and from then on by its taker alone."""

    _last: str | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._last not in (None, name):
            self.pop(self._last, None)
        self._last = name
        return super().__getitem__(name)


def from_hooked_transformer(model: Any) -> tuple[ModelConfig, Named]:
    """A ``HookedTransformer`` (TransformerLens before 4) of any family that it has, or one of your own making."""
    config, named = _lens_config(model), dict(model.state_dict())
    if not config.is_grouped:  # "grouped" in groups of one head
        named = {name.replace("attn._", "attn."): tensor for name, tensor in named.items()}
    if config.norms == "after":
        named = {name.replace("ln1.", "ln1_post.").replace("ln2.", "ln2_post."): tensor for name, tensor in named.items()}
    if config.gated:
        named |= _without_bias_behind_the_gate(named, config)
    return config, named


def from_bridge(model: Any) -> tuple[ModelConfig, Named]:
    """A ``TransformerBridge``, raw or in compatibility mode."""
    theirs = getattr(model.original_model, "config", None)
    if theirs is None:  # made by `boot_native`, out of a configuration of TransformerLens
        config = _lens_config(model)
        return config, dict(_bridge_tensors(model, config, skipped_positions=0, less_one=False))
    config = config_of(theirs, model.cfg.model_name or theirs.model_type)
    layout = FAMILIES[theirs.model_type].layout
    return config, dict(_bridge_tensors(model, config, layout.skipped_positions, layout.gains_less_one))


def give_away(model: Any, named: Named) -> Given:
    """The tensors of a bridge that nobody needs any more: from here on it holds none of them."""
    given = Given({name: tensor.detach() for name, tensor in named.items()})
    for parameter in model.original_model.parameters():
        parameter.data = parameter.new_empty(0)
    return given


def prepends_bos(model: Any) -> bool:
    """Whether the model was trained with BOS in front of every text.

    TransformerLens makes *every* tokenizer add BOS, so that an object's tokenizer does not tell. We go by the families that
    were, and leave out those of their kin whose BOS is the end of a text (SmolLM): a tokenizer of GPT-2's kind.
    """
    cfg, tokenizer = model.cfg, model.tokenizer
    family = getattr(cfg, "architecture", None) or getattr(cfg, "original_architecture", None) or ""
    own_token = tokenizer.bos_token_id not in (None, tokenizer.eos_token_id)
    return family.startswith(_TRAINED_WITH_BOS) and (own_token or family.startswith("OPT"))


def _bridge_tensors(model: Any, config: ModelConfig, skipped_positions: int, less_one: bool) -> Iterator[tuple[str, Tensor]]:
    """Each in our layout, as a view. A bridge knows its tensors by the same names whatever the family."""

    def norms(ours: str, part: Any) -> Iterator[tuple[str, Tensor]]:
        w, b = getattr(part, "weight", None), getattr(part, "bias", None)
        if w is not None:
            yield f"{ours}.w", gain_of(w) if less_one else w
        if b is not None:
            yield f"{ours}.b", b

    def parts(ours: str, part: Any, names: str) -> Iterator[tuple[str, Tensor]]:
        found = ((name, getattr(part, name, None)) for name in names.split())
        yield from ((f"{ours}.{_grouped(name, config)}", tensor) for name, tensor in found if tensor is not None)

    embed, unembed = model.embed.weight, model.unembed.weight
    yield "embed.W_E", embed
    if config.learned_positions:
        yield "pos_embed.W_pos", model.pos_embed.weight[skipped_positions:]
    if unembed.data_ptr() != embed.data_ptr():
        yield "unembed.W_U", unembed.T
    if model.b_U.any():
        yield "unembed.b_U", model.b_U
    yield from norms("ln_final", getattr(model, "ln_final", None))
    for layer, block in enumerate(model.blocks):
        at = f"blocks.{layer}"
        yield from parts(f"{at}.attn", block.attn, "W_Q W_K W_V W_O b_Q b_K b_V b_O")
        yield from (pair for n in ("q_norm", "k_norm") for pair in norms(f"{at}.attn.{n}", getattr(block.attn, n, None)))
        if config.has_mlp:
            yield from parts(f"{at}.mlp", block.mlp, "W_in b_in W_gate b_gate W_out b_out")
        before = {"ln1": getattr(block, "ln1", None)}
        before["ln2"] = getattr(block, "ln2", before["ln1"])  # GPT-J, Phi: heads and MLP read one normalisation
        for name, norm in before.items():
            yield from norms(f"{at}.{name}" if config.norms != "after" else f"{at}.{name}_post", norm)
        if config.norms == "both":
            yield from (pair for n in ("ln1_post", "ln2_post") for pair in norms(f"{at}.{n}", getattr(block, n)))


def _grouped(name: str, config: ModelConfig) -> str:
    return f"_{name}" if config.is_grouped and name[-1] in "KV" else name


def _without_bias_behind_the_gate(named: Named, config: ModelConfig) -> Named:
    """TransformerLens adds a gated MLP's ``b_in`` behind the product, where it is a constant that ``W_out`` writes."""
    changed: Named = {}
    for at in (f"blocks.{layer}.mlp." for layer in range(config.n_layers)):
        if (b_in := named.get(f"{at}b_in")) is not None and b_in.any():
            changed |= {f"{at}b_out": named[f"{at}b_out"] + b_in @ named[f"{at}W_out"], f"{at}b_in": torch.zeros_like(b_in)}
    return changed


def _lens_config(model: Any) -> ModelConfig:
    """TransformerLens' configuration, refused where it asks for what the engine does not do."""
    cfg = model.cfg
    name, n_heads = cfg.model_name or "model", cfg.n_heads
    _refuse_unsupported(cfg, name)
    has_mlp = not getattr(cfg, "attn_only", False)
    after = getattr(cfg, "original_architecture", None) in _NORMS_AFTER
    both, by_head = getattr(cfg, "use_normalization_before_and_after", False), getattr(cfg, "use_qk_norm", False)
    return ModelConfig(
        name=name,
        n_layers=cfg.n_layers,
        n_heads=n_heads,
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp if has_mlp else None,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        activation=activation_of(cfg.act_fn) if has_mlp else "gelu_new",
        normalization=_NORMALIZATIONS[cfg.normalization_type],
        norm_eps=cfg.eps,
        attention_scale=_scale(cfg),
        parallel=bool(getattr(cfg, "parallel_attn_mlp", False)),
        causal=getattr(cfg, "attention_dir", "causal") == "causal",
        n_key_value_heads=None if cfg.n_key_value_heads == n_heads else cfg.n_key_value_heads,
        learned_positions=cfg.positional_embedding_type == "standard",
        alibi=cfg.positional_embedding_type == "alibi",
        norms="after" if after else "both" if both else "before",
        qk_norm="all" if after else "head" if by_head else "none",
        gated=bool(cfg.gated_mlp),
        attention_soft_cap=_cap(cfg, "attn_scores_soft_cap"),
        logit_soft_cap=_cap(cfg, "output_logits_soft_cap"),
        **_turning_and_windows(model, name),
    )


def _refuse_unsupported(cfg: Any, name: str) -> None:
    def refuse(fact: str, why: str = "changes the forward pass and the engine does not do it") -> ModelError:
        return ModelError(f"{name}: {fact}={getattr(cfg, fact)!r} {why}.")

    for fact, off in _UNSUPPORTED.items():
        if getattr(cfg, fact, off) not in (off, None, False):
            raise refuse(fact)
    for fact in _BEYOND_TRAINING:
        if getattr(cfg, fact, False) and cfg.n_ctx > (getattr(cfg, "train_seq_length", None) or cfg.n_ctx):
            raise refuse(
                fact, f"changes what prompts longer than train_seq_length ({cfg.train_seq_length}) mean; shorten n_ctx"
            )
    if cfg.positional_embedding_type not in _POSITIONS:
        raise refuse("positional_embedding_type", f"is none of the engine's positions: {', '.join(_POSITIONS)}")
    if cfg.normalization_type not in _NORMALIZATIONS:
        raise refuse("normalization_type", f"is none of the engine's: {', '.join(map(str, _NORMALIZATIONS))}")
    if getattr(cfg, "final_rms", False) and _NORMALIZATIONS[cfg.normalization_type] == "layer_norm":
        raise refuse("final_rms", "asks for another normalisation at the end than in the blocks, and the engine has one kind")
    is_usual = cfg.n_heads & (cfg.n_heads - 1) == 0 and getattr(cfg, "attention_dir", "causal") == "causal"
    if cfg.positional_embedding_type == "alibi" and not is_usual:
        raise refuse(
            "n_heads", "with ALiBi is run by TransformerLens in its own way, unless they are a power of two and causal"
        )


def _scale(cfg: Any) -> float | None:
    given = float(getattr(cfg, "attn_scale", -1.0) or -1.0)
    return 1.0 if not getattr(cfg, "use_attn_scale", True) else 1 / given if given > 0 else None


def _cap(cfg: Any, fact: str) -> float | None:
    cap = getattr(cfg, fact, None)
    return cap if cap is not None and cap > 0 else None


def _turning_and_windows(model: Any, name: str) -> dict[str, Any]:
    cfg = model.cfg
    kinds = cfg.attn_types[: cfg.n_layers] if getattr(cfg, "use_local_attn", False) else ["global"] * cfg.n_layers
    local = tuple(layer for layer, kind in enumerate(kinds) if kind == "local")
    facts: dict[str, Any] = {"window": cfg.window_size, "local_layers": local} if local else {}
    if cfg.positional_embedding_type != "rotary":
        return facts
    if not hasattr(model.blocks[0].attn, "calculate_sin_cos_rotary"):
        raise ModelError(
            f"{name}: a bridge made by `boot_native` does not say by which angles it turns. Build a HookedTransformer or a "
            "Hugging Face model of the same settings, and load that."
        )
    rotaries = {kind: _rotary(cfg, model.blocks[kinds.index(kind)].attn, kind) for kind in dict.fromkeys(kinds)}
    whole = rotaries.get("global", rotaries[kinds[0]])
    return facts | {"rotary": whole} | ({"local_rotary": rotaries["local"]} if rotaries.get("local", whole) != whole else {})


def _rotary(cfg: Any, attention: Any, kind: str) -> Rotary:
    """By what a head turns from one position to the next, read off TransformerLens' own table, whatever scaling made it."""
    local = getattr(cfg, "rotary_base_local", None) if kind == "local" else None
    sin, cos = attention.calculate_sin_cos_rotary(cfg.rotary_dim, 2, base=local or cfg.rotary_base, dtype=torch.float64)
    pairs = slice(0, None, 2) if cfg.rotary_adjacent_pairs else slice(0, cfg.rotary_dim // 2)
    sin, cos = sin[1, pairs], cos[1, pairs]
    frequencies = torch.atan2(sin, cos).tolist()
    return Rotary(tuple(frequencies), bool(cfg.rotary_adjacent_pairs), magnitude=float(torch.hypot(sin, cos)[0]))
