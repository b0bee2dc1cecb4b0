"""The rules of contextual decomposition: how relevant and irrelevant parts go through each kind of module.

With ``x = β + γ`` an activation (β relevant, γ irrelevant), every rule gives ``β'`` and ``γ'`` that add up to what the
module makes of ``x``. What a nonlinear module makes of a *sum* cannot be told apart without a choice, and the choices are
the rules. CD-T is Hsu et al. 2024/2025 (arXiv:2407.00886); its code is ``adelaidehsu/CD_Circuit``.

Each rule takes the module's known output as ``total``, if there is a clean run: then the irrelevant part is the rest of
it and costs nothing. Without one (``total=None``) both parts are computed, as the paper writes it. Both ways give the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.decomposition.split import Split, share
from mechinterp.models import attention
from mechinterp.models.attention import Heads, mix
from mechinterp.models.rotary import rotate
from mechinterp.models.weights import Norm

Bias = Literal["share", "irrelevant"]
NormRule = Literal["held", "own"]
AttentionRule = Literal["relevant", "held", "irrelevant", "middle"]
ActivationRule = Literal["irrelevant", "relevant", "ratio", "middle"]
GateRule = Literal["half", "irrelevant"]

SLOPE_AT_ZERO = {"gelu_new": 0.5, "gelu": 0.5, "relu": 0.0, "silu": 0.5}  # of f(x) / x; ReLU's as its derivative is set


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


def written(z: Split, W_O: Float[Tensor, "z d_model"], eps: float, rule: NormRule = "held") -> Split:
    """What heads gathered as they write it, where their sum ``z W_O`` is RMS-normalised: divided by its scale.

    The norm rules of ``normalize``, with one scale for all heads of a layer: ``"held"`` takes that of the whole ``z`` for
    a constant, with ``"own"`` the irrelevant part has the scale of what it would write alone.
    """

    def scale(part: Tensor) -> Tensor:
        return _scale(_product(part.flatten(-2), W_O), eps, centred=False).unsqueeze(-1)

    sigma = scale(z.total)
    if rule == "held":
        return z.map(lambda part: part / sigma)
    whole, irrelevant = z.total / sigma, z.irrelevant / scale(z.irrelevant)
    return Split(whole - irrelevant, irrelevant) if z.carries_both else Split.within(whole, whole - irrelevant)


def attend(
    q: Split,
    k: Split,
    v: Split,
    heads: Heads,
    rule: AttentionRule = "irrelevant",
    norm: NormRule = "held",
    total: Float[Tensor, "batch query_pos head_index d_head"] | None = None,
) -> Split:
    """``z = softmax(scores) v``, from queries, keys and values as they are projected.

    Queries and keys that the model normalises go by the rule ``norm``, in which a constant scale leaves them linear as
    turning is. What else ``heads`` says of the scores (a soft cap, distances, a window) holds in every softmax. A key or
    value that heads share is split once, for all of them.

    * ``"relevant"`` (paper, eq. 6 to 15, and the code since September 2024): ``β' = softmax(β_q β_k) β_v``. All cross
      terms, also what a relevant value does under the real pattern, are irrelevant. A source at a single position has
      no relevant query where it is read, so that its pattern is *uniform* whatever the real one is.
    * ``"held"`` (the code before): ``β' = P β_v`` with the real pattern P (where it is known, ``gather`` is all it takes).
    * ``"irrelevant"``: ``γ' = softmax(γ_q γ_k) γ_v``, what the head would do without the source, and β' the rest of z.
    * ``"middle"``: the mean of the first and the third.
    """
    if rule == "held":
        pattern = heads.scores(heads.turn_q(q.total), heads.turn_k(k.total)).softmax(-1)
        return gather(pattern, v.map(heads.for_every_head), total)
    is_triangle = q.total.shape[-3] == k.total.shape[-3]
    q = _comparable(q, heads.q_norm, heads.queries, heads, norm)
    k = _comparable(k, heads.k_norm, torch.arange(k.total.shape[-3], device=heads.queries.device)[None], heads, norm)
    whole = mix(q.total, k.total, v.total, heads, is_triangle=is_triangle) if total is None else total
    found = []
    if rule in ("relevant", "middle"):
        found.append(mix(q.relevant, k.relevant, v.relevant, heads, is_triangle=is_triangle))
    if rule in ("irrelevant", "middle"):
        found.append(whole - mix(q.irrelevant, k.irrelevant, v.irrelevant, heads, is_triangle=is_triangle))
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
    return activate(x, partial(attention.soft_cap, cap=cap), rule, 1.0, total)


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


def _comparable(x: Split, norm: Norm | None, positions: Int[Tensor, "#batch pos"], heads: Heads, rule: NormRule) -> Split:
    """Queries or keys as they meet: normalised, a head at a time or all together, and turned by their positions."""
    config = heads.config
    if norm is not None:
        n_heads, together = x.relevant.shape[-2], config.qk_norm == "all"
        x = x.map(lambda part: part.flatten(-2)) if together else x
        x = normalize(x, norm.w, None, config.norm_eps, rule, centred=False)
        x = x.map(lambda part: part.unflatten(-1, (n_heads, -1))) if together else x
    rotary = config.rotary_of(heads.layer)
    return x if rotary is None else x.map(lambda part: rotate(part, positions, rotary))
