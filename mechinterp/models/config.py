"""Every fact that decides the forward pass. What is not here, the engine does not do; nothing is guessed."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

from mechinterp.errors import ModelError, nearest

Activation = Literal["gelu_new", "gelu", "relu", "silu"]
Normalization = Literal["layer_norm", "rms_norm", "none"]
Norms = Literal["before", "after", "both"]
QKNorm = Literal["none", "head", "all"]


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): a head's query and key turn by an angle for each position.

    ``frequencies[i]`` is by how much pair ``i`` turns a position, in radians, so that twice as many of a head's first
    numbers turn and the others stay. ``adjacent``: the pairs are (0, 1), (2, 3), ... (GPT-J); otherwise the first half of
    them with the second (NeoX, Llama). ``magnitude`` multiplies what was turned (YaRN).
    """

    frequencies: tuple[float, ...]
    adjacent: bool = False
    magnitude: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the kind of a transformer.

    ``d_mlp=None`` is an attention-only model. ``parallel=True``: a block's MLP reads the same stream as its heads
    (GPT-J, Pythia), so the heads of a layer do not feed its MLP. ``attention_scale`` multiplies the products of queries and
    keys; None is the usual ``1 / sqrt(d_head)``. ``causal=False``: every position sees every other, padding included.

    * ``n_key_value_heads``: how many heads keys and values have; each serves as many query heads, in order (Ainslie et al.
      2023, arXiv:2305.13245). None: each query head has its own.
    * ``learned_positions``, ``rotary``, ``alibi``: how a head knows where it is; any of them, or none.
    * ``window`` and ``local_layers``: in those layers a query sees its own position and the ``window - 1`` before it.
      ``local_rotary`` is theirs, if they turn differently (Gemma-3).
    * ``norms``: where a block normalises: what its heads and its MLP read ("before"), what they write ("after", OLMo-2),
      or "both" (Gemma-2 and 3).
    * ``qk_norm``: whether queries and keys are RMS-normalised before they turn, a head at a time ("head", Qwen3) or all
      heads of a position together ("all", OLMo-2).
    * ``gated``: the MLP's hidden layer is ``f(x W_gate) * (x W_in)``.
    * ``attention_soft_cap``, ``logit_soft_cap``: ``cap * tanh(x / cap)`` of attention scores, of logits (Gemma-2).
    * ``embed_scale``: what token embeddings are multiplied by as they enter the stream (Gemma: ``sqrt(d_model)``).
    """

    name: str
    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_mlp: int | None
    d_vocab: int
    n_ctx: int
    activation: str = "gelu_new"  # an Activation; checked here, because it comes out of files
    normalization: str = "layer_norm"  # a Normalization
    norm_eps: float = 1e-5
    attention_scale: float | None = None
    parallel: bool = False
    causal: bool = True
    n_key_value_heads: int | None = None
    learned_positions: bool = True
    rotary: Rotary | None = None
    alibi: bool = False
    window: int | None = None
    local_layers: tuple[int, ...] = ()
    local_rotary: Rotary | None = None
    norms: str = "before"  # a Norms
    qk_norm: str = "none"  # a QKNorm
    gated: bool = False
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    embed_scale: float | None = None

    def __post_init__(self):
        choices = {"activation": Activation, "normalization": Normalization, "norms": Norms, "qk_norm": QKNorm}
        for field, known in ((name, get_args(choice)) for name, choice in choices.items()):
            given = getattr(self, field)
            if given not in known:
                raise ModelError(
                    f"{self.name}: the engine has no {field} {given!r}; it has {', '.join(known)}.{nearest(str(given), known)}"
                )
        for field in ("n_layers", "n_heads", "d_model", "d_head", "d_vocab", "n_ctx"):
            if getattr(self, field) < 1:
                raise ModelError(f"{self.name}: {field} must be at least 1, not {getattr(self, field)}.")
        if self.n_groups < 1 or self.n_heads % self.n_groups:
            raise ModelError(
                f"{self.name}: {self.n_heads} heads cannot share {self.n_groups} heads of keys and values evenly; "
                "n_key_value_heads must divide n_heads."
            )
        for rotary in filter(None, (self.rotary, self.local_rotary)):
            if 2 * len(rotary.frequencies) > self.d_head:
                raise ModelError(
                    f"{self.name}: {2 * len(rotary.frequencies)} numbers of a query cannot turn; it has {self.d_head} (d_head)."
                )
        if self.local_layers and (self.window is None or self.window < 1 or max(self.local_layers) >= self.n_layers):
            raise ModelError(
                f"{self.name}: local_layers {list(self.local_layers)} need a window of at least 1 (it is {self.window}) and "
                f"must be layers of the model, 0..{self.n_layers - 1}."
            )
        if self.norms != "before" and self.normalization != "rms_norm":
            raise ModelError(
                f"{self.name}: norms={self.norms!r} with {self.normalization!r}. What heads write can be told apart after an "
                "RMSNorm alone, which is linear but for its scale; use normalization='rms_norm' or norms='before'."
            )

    @property
    def n_groups(self) -> int:
        """How many heads keys and values have."""
        return self.n_heads if self.n_key_value_heads is None else self.n_key_value_heads

    @property
    def is_grouped(self) -> bool:
        """Whether query heads share keys and values."""
        return self.n_groups != self.n_heads

    def group_of(self, head: int) -> int:
        """The head of keys and values that a query head reads with."""
        return head * self.n_groups // self.n_heads

    @property
    def has_norms_before(self) -> bool:
        return self.normalization != "none" and self.norms != "after"

    @property
    def has_norms_after(self) -> bool:
        """Whether what heads and MLP write is normalised on its way into the stream."""
        return self.norms != "before"

    @property
    def has_joint_heads(self) -> bool:
        """Whether the heads of a layer share a normalisation, so that what one gathers changes what the others do."""
        return self.has_norms_after or self.qk_norm == "all"

    @property
    def write_site(self) -> str:
        """The site at which a head's write is linear: ``z``, or under a normalisation after attention ``z_written``."""
        return "z_written" if self.has_norms_after else "z"

    @property
    def centred(self) -> bool:
        """Whether a normalisation takes off the mean: LayerNorm does, RMSNorm does not."""
        return self.normalization == "layer_norm"

    def rotary_of(self, layer: int) -> Rotary | None:
        return self.local_rotary if self.local_rotary is not None and layer in self.local_layers else self.rotary

    def window_of(self, layer: int) -> int | None:
        """How many positions a query of this layer sees, its own included; None: all up to its own."""
        return self.window if layer in self.local_layers else None

    @property
    def scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return self.d_head**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def has_mlp(self) -> bool:
        return self.d_mlp is not None

    def to_json(self) -> str:
        """Facts added since version 1 are written where they are not at their default, so that old files stay the same."""
        facts, known = asdict(self), [field.name for field in fields(self)]
        for field in fields(self)[known.index("causal") + 1 :]:
            if facts[field.name] == field.default:
                del facts[field.name]
        return json.dumps({"format": "mechinterp-model", "version": 1, **facts}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        facts = json.loads(text)
        if facts.get("format") != "mechinterp-model" or facts.get("version") != 1:
            raise ModelError("this config.json is not one of ours (format 'mechinterp-model', version 1).")
        known = {field.name for field in fields(cls)}
        unknown = set(facts) - known - {"format", "version"}
        if unknown:
            raise ModelError(f"config.json names facts that this engine does not know: {', '.join(sorted(unknown))}.")
        facts = {name: value for name, value in facts.items() if name in known}
        for name in {"rotary", "local_rotary"} & set(facts):
            facts[name] = Rotary(**{**facts[name], "frequencies": tuple(facts[name]["frequencies"])})
        if "local_layers" in facts:
            facts["local_layers"] = tuple(facts["local_layers"])
        return cls(**facts)
