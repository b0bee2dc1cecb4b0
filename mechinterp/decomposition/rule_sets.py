"""The rules of a whole pass, by name: one alternative for each kind of module.

What the relevant part of the logits then is:

* ``"tail"``, the default: the effect of replacing the source **with the clean run's norm scales held** (exactly so).
* ``"paper"``: Hsu et al.'s equations (arXiv:2407.00886v3), with their code's choices where the paper makes none.
* ``"frozen"``: the same with the real attention pattern held, the rule that their code had until September 2024.
* ``"exact"``: the effect of replacing the source, nothing held. It *is* ablation, and the yardstick of the others.
* ``"held"``: that effect with norm scales and attention patterns held.
* ``"linear"``: relevance patching (Jafari et al. 2025): scales, patterns and slopes held and half of a gated product
  given to each factor, so that sources add up.

What families are made of, and the rule that it goes by. In every family the parts of every set add up to the forward pass,
and ``"exact"`` is ablation:

* *LayerNorm, RMSNorm*: ``norm``. So are normalised queries and keys, by head or all together (Qwen3, OLMo-2), and what
  heads or an MLP write (Gemma-2, OLMo-2), where the heads of a layer have one scale.
* *Rotary positions, a scale of the embedding, keys and values that heads share*: linear, so both parts go through.
* *Windows, ALiBi, soft-capped scores*: as the causal mask, in every softmax that ``attention`` takes.
* *Gated MLPs*: ``activation`` for the gate, ``gate`` for its product with the other factor.
* *Soft-capped logits*: ``activation``, as any other nonlinearity.

Which is best: on the built-in model's four tasks, head scores by ``"tail"`` correlate with the total effect of mean
ablation by .90 to 1.00 (Pearson; Spearman .76 to .95), by ``"frozen"`` .45 to .89 (.44 to .91), and by ``"paper"`` .43 to
.69 (.39 to .76): those follow what a head writes to the logits *directly* (.67 to .93). On random models of sharp attention
``"tail"`` keeps .92 and more where all others, gradients too, fall to .72 and below. It is not best everywhere: on docstring
``"held"`` ranks better (Spearman .87 against .76), and where attention is soft edge attribution patching does as well.
``benchmarks/results/decomposition.md`` has all of it, from one command.
"""

from dataclasses import dataclass, fields
from typing import get_args

from mechinterp.decomposition.rules import SLOPE_AT_ZERO, ActivationRule, AttentionRule, Bias, GateRule, NormRule
from mechinterp.errors import ModelError, nearest
from mechinterp.models.config import ModelConfig


@dataclass(frozen=True)
class Rules:
    """Which alternative each rule takes: see ``rules.py``. ``sign``: whether ``by_sign`` follows the MLP's two products
    (of a gated MLP: three) and the layer's sum, as in the published code (whose attention-only model has no such rule, so
    neither has ours). ``gate`` is for gated MLPs.

    ``ModelError`` for an alternative that there is not.
    """

    linear: str = "irrelevant"
    norm: str = "held"
    attention: str = "irrelevant"
    activation: str = "irrelevant"
    gate: str = "irrelevant"
    sign: bool = False

    def __post_init__(self):
        for field in fields(self):
            known, given = _ALTERNATIVES.get(field.name), getattr(self, field.name)
            if known is not None and given not in known:
                hint = nearest(str(given), known)
                raise ModelError(f"there is no {field.name} rule {given!r}; there are {', '.join(known)}.{hint}")


_ALTERNATIVES = {
    "linear": get_args(Bias),
    "norm": get_args(NormRule),
    "attention": get_args(AttentionRule),
    "activation": get_args(ActivationRule),
    "gate": get_args(GateRule),
}

RULE_SETS: dict[str, Rules] = {
    "tail": Rules(),
    "paper": Rules(linear="share", attention="relevant", gate="half", sign=True),
    "frozen": Rules(linear="share", attention="held", gate="half", sign=True),
    "exact": Rules(norm="own"),
    "held": Rules(attention="held"),
    "linear": Rules(attention="held", activation="ratio", gate="half"),
}


def check_rules(rules: Rules, config: ModelConfig) -> None:
    """``ModelError`` for a rule that this family of models cannot use."""
    if config.has_mlp and rules.activation == "ratio" and config.activation not in SLOPE_AT_ZERO:
        raise ModelError(
            f"the activation rule 'ratio' needs the slope of {config.activation!r} at 0, which is known for "
            f"{', '.join(SLOPE_AT_ZERO)}. Use another activation rule for {config.name}, such as 'irrelevant'."
        )


def rules_named(rules: str | Rules) -> Rules:
    """A rule set by name, or one of your own as it is. ``ModelError`` names those that there are."""
    if isinstance(rules, Rules):
        return rules
    if rules not in RULE_SETS:
        known = ", ".join(RULE_SETS)
        raise ModelError(f"there is no rule set {rules!r}; there are {known}, or give Rules(...).{nearest(rules, RULE_SETS)}")
    return RULE_SETS[rules]


def rules_name(rules: str | Rules) -> str:
    """How results call a rule set: by its name, or by its alternatives."""
    if isinstance(rules, str):
        return rules
    known = next((name for name, other in RULE_SETS.items() if other == rules), None)
    return known or ",".join(f"{field.name}={getattr(rules, field.name)}" for field in fields(rules))
