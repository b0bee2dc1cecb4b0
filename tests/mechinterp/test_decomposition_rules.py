"""Each rule by hand, its parts against what the module makes of the whole, and with a known total against without."""

import math

import pytest
import torch

from mechinterp.decomposition import rules as by
from mechinterp.decomposition.rule_sets import RULE_SETS, Rules, rules_name, rules_named
from mechinterp.decomposition.split import Split, share
from mechinterp.errors import ModelError
from mechinterp.models.attention import Heads
from mechinterp.models.config import ModelConfig, Rotary
from mechinterp.models.transformer import ACTIVATIONS
from mechinterp.models.weights import Norm

BIAS, NORM, GATE = ("share", "irrelevant"), ("held", "own"), ("half", "irrelevant")
ATTENTION, ACTIVATION = ("relevant", "held", "irrelevant", "middle"), ("irrelevant", "relevant", "ratio", "middle")

ATTENTION_FACTS = (
    {"rotary": Rotary((1.0,)), "n_key_value_heads": 2},
    {"normalization": "rms_norm", "qk_norm": "head", "n_key_value_heads": 1},
    {"normalization": "rms_norm", "qk_norm": "all", "rotary": Rotary((1.0, 0.1), adjacent=True)},
    {"attention_soft_cap": 2.0, "window": 2, "local_layers": (0,)},
    {"alibi": True},
)


def random_split(*shape: int, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return Split(draw(), 3 * draw())


def known(x: Split) -> Split:
    """The same split, as a pass with a known total has it."""
    return Split.within(x.total, x.relevant)


def heads_at(n_pos: int, n_heads: int, d_head: int, **facts) -> Heads:
    """How heads of some family compare queries and keys at the first ``n_pos`` positions."""
    sizes = {"n_layers": 1, "d_model": 8, "d_mlp": None, "d_vocab": 5, "n_ctx": 9}
    config = ModelConfig("some", n_heads=n_heads, d_head=d_head, **(sizes | facts))
    gain = torch.linspace(0.5, 2, n_heads * d_head, dtype=torch.float64)
    together = config.qk_norm == "all"
    norms = [Norm(gain[: n * d_head if together else d_head], None) for n in (n_heads, config.n_groups)]
    return Heads(config, 0, torch.arange(n_pos)[None], *(norms if config.qk_norm != "none" else ()))


def agree(found: Split, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.relevant + found.irrelevant, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=1e-12)


# By hand


def test_a_bias_is_shared_by_magnitude():
    x, W, b = Split(torch.tensor([[[1.0]]]), torch.tensor([[[-3.0]]])), torch.ones(1, 1), torch.tensor([4.0])
    found = by.linear(x, W, b, "share")
    assert (found.relevant.item(), found.irrelevant.item()) == (2, 0)
    found = by.linear(x, W, b, "irrelevant")
    assert (found.relevant.item(), found.irrelevant.item()) == (1, 1)


def test_what_is_nothing_has_no_share():
    zero = torch.zeros(3)
    assert share(zero, zero).tolist() == [0, 0, 0]
    tiny = torch.full((3,), 1e-8)  # where the published 1e-8 loses half of the bias
    torch.testing.assert_close(share(tiny, tiny), torch.full((3,), 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shares_stay_finite_in_half_precision(dtype):
    x = torch.tensor([0.0, 6e-8, 1e-6, 1.0, 1e4], dtype=dtype)
    assert share(*torch.meshgrid(x, x, indexing="ij")).isfinite().all()


def test_an_activation_by_each_rule():
    x = Split(torch.tensor([3.0]), torch.tensor([-1.0]))
    expected = {"irrelevant": (2, 0), "relevant": (3, -1), "middle": (2.5, -0.5), "ratio": (3, -1)}
    for rule, parts in expected.items():
        found = by.activate(x, torch.relu, rule, slope_at_zero=0.0)  # type: ignore[arg-type]
        assert (found.relevant.item(), found.irrelevant.item()) == parts


def test_the_larger_part_takes_all_where_they_pull_apart():
    x = Split(torch.tensor([3.0, -1, 2, 0, 1]), torch.tensor([-1.0, 4, 5, -2, -1]))
    for given in (x, known(x)):
        found = by.by_sign(given)
        assert found.relevant.tolist() == [2, 0, 2, 0, 0]
        assert found.irrelevant.tolist() == [0, 3, 5, -2, 0]


def test_between_zero_and_the_total_is_the_published_sign_rule():
    x = random_split(1000)
    against, larger = x.relevant * x.irrelevant < 0, x.relevant.abs() > x.irrelevant.abs()
    relevant = torch.where(against, torch.where(larger, x.total, 0), x.relevant)
    torch.testing.assert_close(by.by_sign(x).relevant, relevant, rtol=0, atol=0)
    torch.testing.assert_close(by.by_sign(x).irrelevant, x.total - relevant)


def test_the_papers_attention_reads_a_single_position_uniformly():
    """The reference page's 1.3.5: source at 0, destination 1, so a half of the relevant value, whatever the pattern."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(1, 2, 1, 3, generator=generator) for _ in range(3))
    at_zero = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    splits = [Split.within(x, x * at_zero) for x in (q, k, v)]
    heads = heads_at(2, 1, 3, attention_scale=1.0)
    relevant = by.attend(*splits, heads, "relevant").relevant
    torch.testing.assert_close(relevant[0, 1], v[0, 0] / 2)
    P = (q[0, :, 0] @ k[0, :, 0].T).masked_fill(torch.ones(2, 2).triu(1).bool(), -math.inf).softmax(-1)
    assert abs(P[1, 0] - 0.5) > 0.1
    held = by.attend(*splits, heads, "held").relevant
    torch.testing.assert_close(held[0, 1], P[1, 0] * v[0, 0])


# Parts add up to what the module does, computed both ways


@pytest.mark.parametrize("bias", BIAS)
def test_linear(bias):
    x, W, b = random_split(2, 3, 4), torch.randn(4, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    found, expected = by.linear(x, W, b, bias), x.total @ W + b
    agree(found, expected)
    torch.testing.assert_close(by.linear(known(x), W, b, bias, expected).relevant, found.relevant)
    agree(by.linear(x, W, None, bias), x.total @ W)


@pytest.mark.parametrize("bias", BIAS)
@pytest.mark.parametrize("rule", NORM)
@pytest.mark.parametrize("centred", [True, False])
def test_normalization(rule, bias, centred):
    x, w, b = random_split(2, 3, 8), *torch.randn(2, 8, dtype=torch.float64)
    centre = x.total - x.total.mean(-1, keepdim=True) if centred else x.total
    expected = centre / (centre.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w + b
    found = by.normalize(x, w, b, 1e-5, rule, bias, centred=centred)
    agree(found, expected)
    torch.testing.assert_close(by.normalize(known(x), w, b, 1e-5, rule, bias, centred=centred).relevant, found.relevant)
    plain = by.normalize(x, None, None, 1e-5, rule, bias, centred=centred)
    agree(plain, (expected - b) / w)


def test_normalization_centres_before_it_squares():
    """E[x²] - E[x]² is zero or negative here in single precision."""
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
    found = by.normalize(Split(torch.zeros_like(x), x + 3000), None, None, 1e-5)
    expected = by.normalize(Split(torch.zeros_like(x), x), None, None, 1e-5)
    torch.testing.assert_close(found.irrelevant, expected.irrelevant, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rule", ATTENTION)
@pytest.mark.parametrize("causal", [True, False])
def test_attention(rule, causal):
    q, k, v = (random_split(2, 5, 3, 4, seed=seed) for seed in range(3))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.total, k.total) * 0.5
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1) & causal
    pattern = scores.masked_fill(hidden, -math.inf).softmax(-1)
    agree_on_attention(q, k, v, heads_at(5, 3, 4, attention_scale=0.5, causal=causal), rule, "held", pattern)


@pytest.mark.parametrize("facts", ATTENTION_FACTS, ids=lambda facts: "-".join(facts))
@pytest.mark.parametrize("rule", ATTENTION)
@pytest.mark.parametrize("norm", NORM)
def test_attention_of_every_family(facts, rule, norm):
    heads = heads_at(5, 4, 4, **facts)
    q, k, v = (random_split(2, 5, n, 4, seed=n) for n in (4, heads.config.n_groups, heads.config.n_groups))
    pattern = heads.scores(heads.turn_q(q.total), heads.turn_k(k.total)).softmax(-1)
    agree_on_attention(q, k, v, heads, rule, norm, pattern)


def agree_on_attention(q: Split, k: Split, v: Split, heads: Heads, rule, norm, pattern: torch.Tensor) -> None:
    """The parts add up to what the pattern gathers; with a known total they are the same; if held, the pattern is all."""
    expected = torch.einsum("bhqk,bkhd->bqhd", pattern, heads.for_every_head(v.total))
    found = by.attend(q, k, v, heads, rule, norm)
    agree(found, expected)
    again = by.attend(known(q), known(k), known(v), heads, rule, norm, expected)
    torch.testing.assert_close(again.relevant, found.relevant)
    if rule == "held":
        gathered = by.gather(pattern, known(v).map(heads.for_every_head), expected)
        torch.testing.assert_close(gathered.relevant, found.relevant)


@pytest.mark.parametrize("rule", NORM)
def test_what_heads_write_together_has_one_scale(rule):
    """The norm rules of the sum that they write, told apart by heads."""
    z, W_O = random_split(2, 3, 4, 5), random_split(20, 8).relevant
    found, joined = by.written(z, W_O, 1e-5, rule), lambda part: part.flatten(-2) @ W_O
    agree(found, z.total / ((joined(z.total).square().mean(-1)[..., None, None] + 1e-5).sqrt()))
    expected = by.normalize(z.map(joined), None, None, 1e-5, rule, centred=False)
    torch.testing.assert_close(found.map(joined).relevant, expected.relevant)
    torch.testing.assert_close(by.written(known(z), W_O, 1e-5, rule).relevant, found.relevant)


@pytest.mark.parametrize("rule", ACTIVATION)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(rule, name):
    x, f = random_split(2, 3, 6), ACTIVATIONS[name]
    found = by.activate(x, f, rule)
    agree(found, f(x.total))
    torch.testing.assert_close(by.activate(known(x), f, rule, 0.5, f(x.total)).relevant, found.relevant)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_chord_at_zero_is_the_slope_of_the_limit(name):
    slope = {"gelu_new": 0.5, "gelu": 0.5, "relu": 0.0, "silu": 0.5}[name]
    found = by.activate(Split(torch.tensor([2.0]), torch.tensor([-2.0])), ACTIVATIONS[name], "ratio", slope)
    assert found.relevant.item() == 2 * slope


@pytest.mark.parametrize("rule", GATE)
def test_gated_products(rule):
    a, u = random_split(2, 3, 6), random_split(2, 3, 6, seed=1)
    found = by.gate(a, u, rule)
    agree(found, a.total * u.total)
    torch.testing.assert_close(by.gate(known(a), known(u), rule, a.total * u.total).relevant, found.relevant)


@pytest.mark.parametrize("rule", ACTIVATION)
def test_soft_caps(rule):
    x = random_split(2, 3, 6)
    agree(by.soft_cap(x, 2.0, rule), 2 * torch.tanh(x.total / 2))


def test_a_gated_mlp_from_the_irrelevant_part_is_its_ablation():
    """exact's rules, one after the other: RMSNorm, SiLU gate, soft-cap."""
    x = random_split(1, 4, 8)
    gate, up, down = (torch.randn(8, 8, dtype=torch.float64) for _ in range(3))

    def module(stream):
        read = stream / (stream.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return 3 * torch.tanh((torch.nn.functional.silu(read @ gate) * (read @ up)) @ down / 3)

    read = by.normalize(x, None, None, 1e-6, "own", "irrelevant", centred=False)
    a = by.activate(by.linear(read, gate, None), torch.nn.functional.silu, "irrelevant")
    hidden = by.gate(a, by.linear(read, up, None), "irrelevant")
    found = by.soft_cap(by.linear(hidden, down, None), 3.0, "irrelevant")
    torch.testing.assert_close(found.relevant, module(x.total) - module(x.irrelevant))


@pytest.mark.parametrize("bias", BIAS)
def test_no_rule_writes_into_what_it_is_given(bias):
    x = random_split(2, 3, 4)
    before, W, b = (x.relevant.clone(), x.irrelevant.clone()), torch.randn(4, 4).double(), torch.randn(4).double()
    for given in (x, known(x)):
        by.linear(given, W, b, bias, None if given is x else given.total @ W + b)
        for centred in (True, False):
            by.normalize(given, b, b, 1e-5, "held", bias, centred=centred)
        by.activate(given, torch.relu, "middle")
        by.by_sign(given)
        torch.testing.assert_close((x.relevant, x.irrelevant), before, rtol=0, atol=0)


# Names


def test_rule_sets_are_found_by_name_and_named_again():
    assert rules_named("paper") == RULE_SETS["paper"]
    assert rules_name(RULE_SETS["frozen"]) == rules_name("frozen") == "frozen"
    own = Rules(attention="middle")
    assert rules_named(own) is own
    assert "attention=middle" in rules_name(own)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: rules_named("papre"), "no rule set 'papre'; there are tail, paper.*Did you mean 'paper'"),
        (lambda: Rules(attention="frozen"), "no attention rule 'frozen'; there are relevant, held, irrelevant, middle"),
        (lambda: Rules(linear="shares"), "no linear rule 'shares'.*Did you mean 'share'"),
    ],
)
def test_an_unknown_rule_is_named_with_those_there_are(make, says):
    with pytest.raises(ModelError, match=says):
        make()
