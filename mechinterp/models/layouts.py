"""Where checkpoints keep what: the names of a family's tensors, and how queries, keys and values are packed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Packing = Literal["apart", "stacked", "by_head", "conv1d"]


@dataclass(frozen=True)
class Layout:
    """Tensor names: ``stem`` in front of all, ``block`` in front of a layer's.

    ``packing``: queries, keys and values in matrices of their own (``qkv`` with a place for the letter), in one as all
    queries, all keys, all values ("stacked"), head by head ("by_head", NeoX), or as GPT-2's Conv1D, in which every matrix is
    stored input by output ("conv1d"). ``gate_and_up``: both in one matrix. ``gains_less_one``: stored as ``w - 1`` (Gemma).
    """

    stem: str
    block: str
    embed: str
    final: str | None
    qkv: str
    out: str
    norms: Mapping[str, str]
    mlp: Mapping[str, str]
    packing: Packing = "apart"
    positions: str | None = None
    skipped_positions: int = 0
    gate_and_up: str | None = None
    gains_less_one: bool = False


GPT2 = Layout(
    stem="transformer.",
    block="h.{}.",
    embed="wte",
    positions="wpe",
    final="ln_f",
    packing="conv1d",
    qkv="attn.c_attn",
    out="attn.c_proj",
    norms={"ln1": "ln_1", "ln2": "ln_2"},
    mlp={"in": "mlp.c_fc", "out": "mlp.c_proj"},
)
LLAMA = Layout(
    stem="model.",
    block="layers.{}.",
    embed="embed_tokens",
    final="norm",
    qkv="self_attn.{}_proj",
    out="self_attn.o_proj",
    norms={"ln1": "input_layernorm", "ln2": "post_attention_layernorm"},
    mlp={"gate": "mlp.gate_proj", "in": "mlp.up_proj", "out": "mlp.down_proj"},
)
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
GEMMA2 = replace(
    LLAMA,
    norms={
        "ln1": "input_layernorm",
        "ln1_post": "post_attention_layernorm",
        "ln2": "pre_feedforward_layernorm",
        "ln2_post": "post_feedforward_layernorm",
    },
    gains_less_one=True,
)
NEOX = Layout(
    stem="gpt_neox.",
    block="layers.{}.",
    embed="embed_in",
    final="final_layer_norm",
    packing="by_head",
    qkv="attention.query_key_value",
    out="attention.dense",
    norms={"ln1": "input_layernorm", "ln2": "post_attention_layernorm"},
    mlp={"in": "mlp.dense_h_to_4h", "out": "mlp.dense_4h_to_h"},
)
GPTJ = replace(
    GPT2,
    packing="apart",
    positions=None,
    qkv="attn.{}_proj",
    out="attn.out_proj",
    norms={"ln1": "ln_1", "ln2": "ln_1"},  # heads and MLP read one normalisation of one stream
    mlp={"in": "mlp.fc_in", "out": "mlp.fc_out"},
)
PHI = replace(
    LLAMA,
    final="final_layernorm",
    out="self_attn.dense",
    norms={"ln1": "input_layernorm", "ln2": "input_layernorm"},
    mlp={"in": "mlp.fc1", "out": "mlp.fc2"},
)
OPT = Layout(
    stem="model.decoder.",
    block="layers.{}.",
    embed="embed_tokens",
    positions="embed_positions",
    skipped_positions=2,
    final="final_layer_norm",
    qkv="self_attn.{}_proj",
    out="self_attn.out_proj",
    norms={"ln1": "self_attn_layer_norm", "ln2": "final_layer_norm"},
    mlp={"in": "fc1", "out": "fc2"},
)
MPT = Layout(
    stem="transformer.",
    block="blocks.{}.",
    embed="wte",
    final="norm_f",
    packing="stacked",
    qkv="attn.Wqkv",
    out="attn.out_proj",
    norms={"ln1": "norm_1", "ln2": "norm_2"},
    mlp={"in": "ffn.up_proj", "out": "ffn.down_proj"},
)
OLMO2_NORMS = {"ln1_post": "post_attention_layernorm", "ln2_post": "post_feedforward_layernorm"}
