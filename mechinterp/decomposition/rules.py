"""The rules of contextual decomposition: how relevant and irrelevant parts go through each kind of module.

With ``x = β + γ`` an activation (β relevant, γ irrelevant), every rule gives ``β'`` and ``γ'`` that add up to what the
module makes of ``x``. What a nonlinear module makes of a *sum* cannot be told apart without a choice, and the choices are
the rules. CD-T is Hsu et al. 2024/2025 (arXiv:2407.00886); its code is ``adelaidehsu/CD_Circuit``.

Each rule takes the module's known output as ``total``, if there is a clean run: then the irrelevant part is the rest of
it and costs nothing. Without one (``total=None``) both parts are computed, as the paper writes it. Both ways give the same.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.decomposition.split import Split, share
from mechinterp.models.attention import mix

Bias = Literal["share", "irrelevant"]
NormRule = Literal["held", "own"]
AttentionRule = Literal["relevant", "held", "irrelevant", "middle"]
ActivationRule = Literal["irrelevant", "relevant", "ratio", "middle"]
GateRule = Literal["half", "irrelevant"]

SLOPE_AT_ZERO = {"gelu_new": 0.5, "gelu": 0.5, "relu": 0.0, "silu": 0.5}  # of f(x) / x; ReLU's as its derivative is set

Heads = Float[Tensor, "*source batch pos head_index d_head"]


def linear(
    x: Split,
    W: Float[Tensor, "d_in d_out"],
    b: Float[Tensor, "d_out"] | None,
    bias: Bias = "share",
    total: Float[Tensor, "batch pos d_out"] | None = None,
) -> Split:
    """``x W + b``. The product splits by itself; the question is whose the bias is.

    * ``"share"`` (paper, eq. 4 and 5; Singh et al. 2019): ``β' = βW + b |βW| / (|βW| + |γW|)``, element by element.
    * ``"irrelevant"``: ``β' = βW``. A constant is nobody's doing, and removing a source does not remove it.
    """
    relevant = _product(x.relevant, W)
    irrelevant = _product(x.irrelevant, W) if total is None else None
    if b is not None and bias == "share":
        if irrelevant is None:
            assert total is not None
            given = share(relevant, (total - b) - relevant, overwrite=True).mul_(b)
        else:
            given = share(relevant, irrelevant).mul_(b)
        relevant += given
        irrelevant = None if irrelevant is None else irrelevant + (b - given)
    elif b is not None and irrelevant is not None:
        irrelevant += b
    return Split(relevant, irrelevant, total)


def normalize(
    x: Split,
    w: Float[Tensor, "d"] | None,
    b: Float[Tensor, "d"] | None,
    eps: float,
    rule: NormRule = "held",
    bias: Bias = "share",
    *,
    centred: bool = True,
) -> Split:
    """LayerNorm, or RMSNorm with ``centred=False``. ``w`` and ``b`` are None where they are folded into what follows.

    * ``"held"`` (the published code; the paper gives no formula): the scale σ of the whole ``x`` is a constant for both
      parts, ``β' = w (β - mean β) / σ``. The bias goes by ``bias``, in shares of the norm's *input*.
    * ``"own"``: ``γ' = LN(γ)``, each part by its own scale, and β' the rest: what the norm would do without the source.

    (Agglomerative CD normalises *both* parts by their own scale; those do not add up to the whole.)
    """

    def scaled(part: Tensor, by: Tensor) -> Tensor:
        part = (part - part.mean(-1, keepdim=True) if centred else part) / by
        return part if w is None else part.mul_(w)

    sigma = _scale(x.total, eps, centred)
    whole = scaled(x.total, sigma)
    whole = whole if b is None else whole + b
    if rule == "own":
        irrelevant = scaled(x.irrelevant, _scale(x.irrelevant, eps, centred))
        irrelevant = irrelevant if b is None else irrelevant + b
        return Split(whole - irrelevant, irrelevant) if x.carries_both else Split.within(whole, whole - irrelevant)
    relevant = scaled(x.relevant, sigma)
    given = share(x.relevant, x.irrelevant) * b if b is not None and bias == "share" else None
    relevant = relevant if given is None else relevant.add_(given)
    if not x.carries_both:
        return Split.within(whole, relevant)
    irrelevant = scaled(x.irrelevant, sigma)
    return Split(relevant, irrelevant if b is None else irrelevant + (b if given is None else b - given))


def attend(
    q: Split,
    k: Split,
    v: Split,
    scale: float,
    seen: Bool[Tensor, "#batch 1 query_pos key_pos"] | None,
    rule: AttentionRule = "irrelevant",
    total: Float[Tensor, "batch query_pos head_index d_head"] | None = None,
) -> Split:
    """``z = softmax(q k^T * scale) v``, under the mask ``seen`` (None: every key is seen).

    * ``"relevant"`` (paper, eq. 6 to 15, and the code since September 2024): ``β' = softmax(β_q β_k) β_v``. All cross
      terms, also what a relevant value does under the real pattern, are irrelevant. A source at a single position has
      no relevant query where it is read, so that its pattern is *uniform* whatever the real one is.
    * ``"held"`` (the code before): ``β' = P β_v`` with the real pattern P (where it is known, ``gather`` is all it takes).
    * ``"irrelevant"``: ``γ' = softmax(γ_q γ_k) γ_v``, what the head would do without the source, and β' the rest of z.
    * ``"middle"``: the mean of the first and the third.
    """
    if rule == "held":
        return gather(_pattern(q.total, k.total, scale, seen), v, total)
    whole = mix(q.total, k.total, v.total, scale, seen) if total is None else total
    found = []
    if rule in ("relevant", "middle"):
        found.append(mix(q.relevant, k.relevant, v.relevant, scale, seen))
    if rule in ("irrelevant", "middle"):
        found.append(whole - mix(q.irrelevant, k.irrelevant, v.irrelevant, scale, seen))
    relevant = found[0] if len(found) == 1 else (found[0] + found[1]) / 2
    return Split(relevant, whole - relevant if total is None else None, total)


def gather(
    pattern: Float[Tensor, "*source batch head_index query_pos key_pos"],
    v: Split,
    total: Float[Tensor, "batch query_pos head_index d_head"] | None = None,
) -> Split:
    """``z = P v`` with the attention pattern P a constant: linear, as a weight matrix is."""
    mixed = [
        torch.einsum("...hqk,...khd->...qhd", pattern, part)
        for part in (v.relevant, *([v.irrelevant] if total is None else []))
    ]
    return Split(mixed[0], mixed[1] if total is None else None, total)


def activate(
    x: Split,
    f: Callable[[Tensor], Tensor],
    rule: ActivationRule = "irrelevant",
    slope_at_zero: float = 0.5,
    total: Tensor | None = None,
) -> Split:
    """An element-wise nonlinearity ``f``: GELU, SiLU, ReLU, or a soft-cap.

    * ``"irrelevant"`` (the published code): ``γ' = f(γ)`` and ``β' = f(β + γ) - f(γ)``.
    * ``"relevant"`` (what the paper's principle says, and Singh et al.'s ReLU): ``β' = f(β) - f(0)``.
    * ``"middle"`` (Murdoch et al. 2018 for tanh): the mean of the two.
    * ``"ratio"``: ``β' = β f(x) / x``, the slope of the chord through 0, which is ``slope_at_zero`` at 0 (LRP's identity
      rule; Jafari et al. 2025).
    """
    whole = f(x.total) if total is None else total
    if rule == "ratio":
        slope = torch.where(x.total == 0, slope_at_zero, whole / x.total)
        return Split(x.relevant * slope, x.irrelevant * slope if total is None else None, total)
    found = []
    if rule in ("irrelevant", "middle"):
        found.append(whole - f(x.irrelevant))
    if rule in ("relevant", "middle"):
        found.append(f(x.relevant) - f(x.relevant.new_zeros(())))
    relevant = found[0] if len(found) == 1 else (found[0] + found[1]) / 2
    return Split(relevant, whole - relevant if total is None else None, total)


def gate(a: Split, u: Split, rule: GateRule = "irrelevant", total: Tensor | None = None) -> Split:
    """The product ``a u`` of a gated MLP, with ``a`` the activated gate.

    * ``"half"``: each factor's relevant part times the other factor, half each: ``β' = (β_a u + a β_u) / 2``.
    * ``"irrelevant"``: ``γ' = γ_a γ_u``, and β' the rest.
    """
    whole = a.total * u.total if total is None else total
    relevant = (a.relevant * u.total + a.total * u.relevant) / 2 if rule == "half" else whole - a.irrelevant * u.irrelevant
    return Split(relevant, whole - relevant if total is None else None, total)


def soft_cap(x: Split, cap: float, rule: ActivationRule = "irrelevant", total: Tensor | None = None) -> Split:
    """``cap * tanh(x / cap)``, as Gemma-2 caps its logits: an activation like any other, of slope 1 at 0."""
    return activate(x, lambda part: cap * torch.tanh(part / cap), rule, 1.0, total)


def by_sign(x: Split) -> Split:
    """The paper's third heuristic (appendix B.1): where the parts pull against each other, the larger has everything.

    If ``β γ < 0``, the part of larger magnitude becomes ``β + γ`` and the other 0. Case by case that is no more than
    holding each part between 0 and the total. (The published code writes into its inputs; nothing is changed here.)
    """
    low, high = x.total.clamp(max=0), x.total.clamp(min=0)
    relevant = x.relevant.clamp(low, high)
    return Split(relevant, x.irrelevant.clamp(low, high)) if x.carries_both else Split.within(x.total, relevant)


def _product(x: Float[Tensor, "*axes d_in"], W: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "*axes d_out"]:
    return (x.reshape(-1, x.shape[-1]) @ W).unflatten(0, x.shape[:-1])


def _scale(x: Tensor, eps: float, centred: bool) -> Tensor:
    """Centred first: E[x²] - E[x]² loses everything in single precision where the mean is large."""
    x = x - x.mean(-1, keepdim=True) if centred else x
    return (x.square().mean(-1, keepdim=True) + eps).sqrt_()


def _pattern(q: Heads, k: Heads, scale: float, seen: Tensor | None) -> Tensor:
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) * scale
    return (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1)
