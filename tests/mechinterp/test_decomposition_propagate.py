"""Relevance through whole models: sums, ablation, one backward pass, and every saving against the slow way."""

from dataclasses import replace

import pytest
import torch

from mechinterp.decomposition import RULE_SETS, Source, Totals, both_parts, mean_reference, parse_sources, propagate
from mechinterp.decomposition.contributions import contributions
from mechinterp.decomposition.propagate import TARGETS
from mechinterp.decomposition.rules import SLOPE_AT_ZERO
from mechinterp.decomposition.sources import INPUT, site_of
from mechinterp.errors import ModelError, TaskError, UnknownNode, UnknownSite
from mechinterp.models.transformer import ACTIVATIONS, Transformer
from mechinterp.models.weights import Weights
from mechinterp.sites import Site, all_sites
from mechinterp.store import ActivationStore

FAMILIES = ("plain", "attention_only", "parallel", "no_norm", "folded", "bidirectional", "relu")
LOGITS = Site("logits")


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, make_model) -> Transformer:
    """Every kind of model that the engine runs, random, all biases non-zero."""
    special = {"bidirectional": {"causal": False}, "relu": {"activation": "relu"}}
    facts = special.get(request.param, {})
    return make_model("plain" if facts else request.param, **facts)


@pytest.fixture(scope="session")
def others() -> torch.Tensor:
    """Reference prompts."""
    return torch.randint(23, (5, 7), generator=torch.Generator().manual_seed(2))


def some_sources(model: Transformer) -> list:
    """Heads, at a position or everywhere, sets over layers, tokens, and MLPs where there are any."""
    named = ["a0.h1", "a0.h2@3", ["a0.h1", "a1.h2"], "input@2", "a2.h1", "a1.h0@6", ["input@0", "a1.h1@4"]]
    return named + (["m0", "m1@2", ["m0", "a2.h0"]] if model.config.has_mlp else [])


def targets_of(model: Transformer) -> list[Site]:
    return [site for site in all_sites(model.config) if site.name in TARGETS]


def relevant(model, tokens, sources, targets, rules, reference, **settings) -> dict[Site, torch.Tensor]:
    """The fast way's relevant parts, with zeros before each source's first position."""
    found = contributions(model, tokens, sources, targets, rules=rules, reference=reference, **settings)
    return {Site.parse(name): split.relevant for name, split in found.items()}


# Sums


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rules", RULE_SETS)
def test_the_parts_add_up_to_the_forward_pass_after_every_module(family, tokens, others, rules, dtype, tolerance):
    """Both parts carried from the embedding on: the irrelevant one is nobody's difference."""
    model = family.to(dtype=dtype)
    reference, targets = mean_reference(model, others), targets_of(model)
    sources = parse_sources(model.config, some_sources(model), *tokens.shape)
    found = both_parts(model, tokens, sources, targets, RULE_SETS[rules], reference=reference)
    _, cache = model.run(tokens, record=targets)
    for site in targets:
        total, scale = found[site].relevant + found[site].irrelevant, float(cache[site].abs().max())
        torch.testing.assert_close(total, cache[site].expand_as(total), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("rules", RULE_SETS)
def test_relevance_alone_within_a_known_pass_is_what_both_parts_give(family, tokens, others, rules):
    reference, targets, named = mean_reference(family, others), targets_of(family), some_sources(family)
    sources = parse_sources(family.config, named, *tokens.shape)
    expected = both_parts(family, tokens, sources, targets, RULE_SETS[rules], reference=reference)
    for memory in (1, 40_000, None):  # one source at a time, some, all
        found = relevant(family, tokens, named, targets, rules, reference, memory=memory)
        for site in targets:
            scale = max(1.0, float(expected[site].relevant.abs().max()))
            torch.testing.assert_close(found[site], expected[site].relevant, rtol=0, atol=1e-11 * scale)


# Ablation


def ablated(model: Transformer, tokens, source: Source, reference, held: list[Site]) -> torch.Tensor:
    """Logits with the source's parts replaced through the engine's patches, and the sites in ``held`` as in the clean run."""
    _, clean = model.run(tokens, record=held)
    patch = {site: (lambda value, _, site=site: clean[site]) for site in held}
    for node in source.nodes:
        site, before = site_of(node), patch.get(site_of(node))

        def replaced(value, cache, node=node, site=site, before=before):
            value = (value if before is None else before(value, cache)).clone()
            where = source.where(node, *tokens.shape).unsqueeze(-1)
            if node.kind == "head":
                value[:, :, node.index] = torch.where(where, reference[site][:, :, node.index], value[:, :, node.index])
                return value
            return torch.where(where, reference[site], value)

        patch[site] = replaced
    return model.run(tokens, patch=patch)[0]


@pytest.mark.parametrize(("rules", "held"), [("exact", ()), ("tail", ("scale",)), ("held", ("scale", "pattern"))])
def test_it_is_the_effect_of_mean_ablation_with_what_the_rules_hold_held(family, tokens, others, rules, held):
    reference, named = mean_reference(family, others), some_sources(family)
    sites = [site for site in all_sites(family.config) if site.name.endswith(tuple(held))] if held else []
    clean, _ = family.run(tokens)
    found = relevant(family, tokens, named, [LOGITS], rules, reference)[LOGITS]
    for row, source in zip(found, parse_sources(family.config, named, *tokens.shape), strict=True):
        expected = clean - ablated(family, tokens, source, reference, sites)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-10)


def test_linear_rules_are_one_backward_pass_with_detaches(family, tokens):
    """Gradient times deviation, scales, patterns and slopes held: relevance patching."""
    config, heads = family.config, [f"a{layer}.h{head}" for layer in range(3) for head in range(3)]
    held = [site for site in all_sites(config) if site.name.endswith(("scale", "pattern"))]
    _, clean = family.run(tokens, record=[*held, "z", *(["mlp_pre"] if config.has_mlp else [])])
    slopes = {"gelu_new": 0.5, "relu": 0.0}
    f = ACTIVATIONS[config.activation]

    def chord(_, cache, layer):
        pre = cache[Site("mlp_pre", layer)]
        return pre * torch.where(pre == 0, slopes[config.activation], f(pre) / pre).detach()

    patch = {site: (lambda value, _: value.detach()) for site in held}
    patch |= {Site("mlp_post", n): (lambda value, cache, n=n: chord(value, cache, n)) for n in range(3) if config.has_mlp}
    leaves = {Site("z", layer): clean["z", layer].clone().requires_grad_() for layer in range(3)}
    shift = {site: (lambda value, _, site=site: value + leaves[site] - leaves[site].detach()) for site in leaves}
    record = ["mlp_pre"] if config.has_mlp else []
    logits, _ = family.run(tokens, patch=patch | shift, record=record)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    gradients = torch.autograd.grad((logits * weights).sum(), list(leaves.values()))
    expected = [(g * leaves[site]).sum((0, 1, 3)) for site, g in zip(leaves, gradients, strict=True)]
    found = relevant(family, tokens, heads, [LOGITS], "linear", None)[LOGITS]
    torch.testing.assert_close((found * weights).sum((1, 2, 3)), torch.cat(expected).detach(), rtol=0, atol=1e-10)


# Nothing in, all in, additive and not


@pytest.mark.parametrize("rules", RULE_SETS)
def test_nothing_is_relevant_before_the_source_acts(plain, tokens, others, rules):
    """Both parts carried: exactly zero, not as a difference of large numbers."""
    reference, targets = mean_reference(plain, others), targets_of(plain)
    sources = parse_sources(plain.config, ["a1.h2@4", "input"], *tokens.shape)
    found = both_parts(plain, tokens, sources, targets, RULE_SETS[rules], reference=reference)
    for site in targets:
        early = site.layer is not None and (site.layer < 1 or (site.layer == 1 and site.name in ("resid_pre", "q", "k", "v")))
        dead = found[site].relevant[0] if early else found[site].relevant[0, :, :4]
        assert dead.abs().max() < 1e-13


@pytest.mark.parametrize("rules", ["paper", "frozen"])
def test_where_everything_is_relevant_nothing_is_left_of_the_rest(plain, tokens, rules):
    found = both_parts(
        plain, tokens, parse_sources(plain.config, ["input"], *tokens.shape), targets_of(plain), RULE_SETS[rules], reference={}
    )
    for split in found.values():
        assert split.irrelevant.abs().max() < 1e-12


def test_held_attention_adds_over_tokens_and_recomputed_attention_does_not(make_model, tokens):
    model = make_model("attention_only")
    singles = [f"input@{at}" for at in range(7)]
    for rules, adds in (("held", True), ("tail", False)):
        found = relevant(model, tokens, [*singles, singles], [LOGITS], rules, None)[LOGITS]
        difference = (found[:-1].sum(0) - found[-1]).abs().max()
        assert (difference < 1e-12) == adds
        assert adds or difference > 0.1


@pytest.mark.parametrize("rules", ["tail", "exact", "held", "linear"])
def test_folding_the_norms_gains_into_the_weights_changes_nothing_without_shares(plain, tokens, others, rules):
    folded, heads = fold_gains(plain), ["a0.h1", "a1.h2@3"]
    torch.testing.assert_close(folded.run(tokens)[0], plain.run(tokens)[0])
    found = [relevant(m, tokens, heads, [LOGITS], rules, mean_reference(m, others))[LOGITS] for m in (plain, folded)]
    torch.testing.assert_close(*found)


def test_with_shares_it_does_and_so_the_processing_must_be_said(plain, tokens, others):
    folded, heads = fold_gains(plain), ["a0.h1", "a1.h2@3"]
    found = [relevant(m, tokens, heads, [LOGITS], "paper", mean_reference(m, others))[LOGITS] for m in (plain, folded)]
    assert (found[0] - found[1]).abs().max() > 0.1


def fold_gains(model: Transformer) -> Transformer:
    """The gains and biases of all norms moved into the weights that read them."""
    named = dict(model.weights.named())
    for layer in range(model.config.n_layers):
        at = f"blocks.{layer}."
        w, b = named.pop(f"{at}ln1.w"), named.pop(f"{at}ln1.b")
        for port in "QKV":
            named[f"{at}attn.b_{port}"] = named[f"{at}attn.b_{port}"] + torch.einsum(
                "m,hmd->hd", b, named[f"{at}attn.W_{port}"]
            )
            named[f"{at}attn.W_{port}"] = w[:, None] * named[f"{at}attn.W_{port}"]
        w, b = named.pop(f"{at}ln2.w"), named.pop(f"{at}ln2.b")
        named[f"{at}mlp.b_in"] = named[f"{at}mlp.b_in"] + b @ named[f"{at}mlp.W_in"]
        named[f"{at}mlp.W_in"] = w[:, None] * named[f"{at}mlp.W_in"]
    w, b = named.pop("ln_final.w"), named.pop("ln_final.b")
    named["unembed.b_U"] = named["unembed.b_U"] + b @ named["unembed.W_U"]
    named["unembed.W_U"] = w[:, None] * named["unembed.W_U"]
    return Transformer(Weights.from_named(model.config, named))


# Savings


@pytest.mark.parametrize("rules", RULE_SETS)
def test_logits_at_each_prompts_end_of_its_own_tokens(family, tokens, others, rules):
    """Also where a source begins behind some prompt's END: nothing of it arrives there."""
    reference, named = mean_reference(family, others), [*some_sources(family), "a0.h0@6"]
    ends = torch.tensor([6, 5, 2, 4])
    wanted = torch.randint(23, (4, 3), generator=torch.Generator().manual_seed(3))
    everything = relevant(family, tokens, named, [LOGITS], rules, reference)[LOGITS]
    expected = everything[:, torch.arange(4), ends].gather(-1, wanted.expand(len(named), -1, -1))
    found = contributions(family, tokens, named, ["logits"], rules=rules, reference=reference, ends=ends, logits_of=wanted)[
        "logits"
    ]
    torch.testing.assert_close(found.relevant, expected, rtol=0, atol=1e-11)
    clean = family.run(tokens)[0][torch.arange(4), ends].gather(-1, wanted)
    torch.testing.assert_close(found.total, clean)
    if family.config.causal:
        assert found.relevant[-1, 1:].abs().max() < 1e-12


@pytest.mark.parametrize("also", [["z.2"], ["q.2"], ["mlp_out.2"], ["k.2"], ["resid_post.2", "z.1"]])
def test_what_else_is_asked_of_the_last_layer_changes_no_logit(plain, tokens, others, also):
    reference, named = mean_reference(plain, others), some_sources(plain)
    settings = {"reference": reference, "ends": torch.tensor([6, 5, 2, 4])}
    alone = contributions(plain, tokens, named, ["logits"], **settings)["logits"].relevant
    found = contributions(plain, tokens, named, ["logits", *also], **settings)
    torch.testing.assert_close(found["logits"].relevant, alone)
    without = contributions(plain, tokens, named, also, reference=reference)
    for name in also:
        torch.testing.assert_close(found[name].relevant, without[name].relevant)


def test_sources_come_back_in_the_order_given(plain, tokens, others):
    reference, named = mean_reference(plain, others), some_sources(plain)
    there = relevant(plain, tokens, named, [LOGITS], "tail", reference)[LOGITS]
    back = relevant(plain, tokens, named[::-1], [LOGITS], "tail", reference)[LOGITS]
    torch.testing.assert_close(there, back.flip(0))


def test_a_shared_prefix_that_nothing_deviates_in_need_not_be_carried(plain, tokens):
    """The reference is another prompt with the same first three tokens."""
    corrupted = torch.cat([tokens[:, :3], (tokens[:, 3:] + 1) % 23], dim=1)
    _, cache = plain.run(corrupted, record=["z", "mlp_out", "resid_pre.0"])
    reference, sources = dict(cache), parse_sources(plain.config, ["a0.h1", "m0", "a1.h2", "input"], *tokens.shape)
    for rules in RULE_SETS.values():
        totals = Totals.of(plain, tokens, patterns=True, ends=torch.tensor([6, 5, 3, 4]))
        found = [
            {
                i: row
                for some, _, splits in propagate(totals, sources, [LOGITS], rules, reference=reference, first=first)
                for i, row in zip(some, splits[LOGITS].relevant, strict=True)
            }
            for first in (0, 3)
        ]
        for index in range(len(sources)):
            torch.testing.assert_close(found[0][index], found[1][index], rtol=0, atol=1e-10)


def test_a_clean_pass_is_found_in_the_store_that_all_share(plain, tokens, others, tmp_path):
    store, reference = ActivationStore(tmp_path), mean_reference(plain, others)
    expected = contributions(plain, tokens, ["a0.h1", "m1"], ["logits", "q.2"], rules="frozen", reference=reference)
    for _ in range(2):
        found = contributions(
            plain, tokens, ["a0.h1", "m1"], ["logits", "q.2"], rules="frozen", reference=reference, store=store
        )
        for name, split in expected.items():
            torch.testing.assert_close(found[name].relevant, split.relevant)
    assert len(store.entries()) == 1


def test_a_position_of_its_own_for_every_prompt(plain, tokens, others):
    reference, at = mean_reference(plain, others), torch.tensor([1, 4, 2, 6])
    nodes = parse_sources(plain.config, ["a1.h1"], *tokens.shape)[0].nodes
    together = contributions(plain, tokens, [Source(nodes, at)], reference=reference)["logits"].relevant[0]
    for row, position in enumerate(at.tolist()):
        alone = contributions(plain, tokens[row : row + 1], [f"a1.h1@{position}"], reference=reference)["logits"].relevant[0]
        torch.testing.assert_close(together[row], alone[0])


def test_heads_ports_and_mlps_can_be_asked_for_by_name(plain, tokens):
    found = contributions(plain, tokens, ["input@1"], ["a1.h2", "a1.h2.k", "m0", "z.1", "k"])
    torch.testing.assert_close(found["a1.h2"].relevant, found["z.1"].relevant[..., 2, :])
    torch.testing.assert_close(found["a1.h2.k"].relevant, found["k.1"].relevant[..., 2, :])
    assert set(found) == {"a1.h2", "a1.h2.k", "m0", "z.1", "k.0", "k.1", "k.2"}
    for split in found.values():
        torch.testing.assert_close(split.relevant + split.irrelevant, split.total.expand_as(split.relevant))


@pytest.mark.parametrize("rules", RULE_SETS)
def test_half_precision_stays_finite(plain, tokens, others, rules):
    model = plain.to(dtype=torch.bfloat16)
    found = contributions(model, tokens, ["a0.h1", "input@2"], rules=rules, reference=mean_reference(model, others))
    assert found["logits"].relevant.isfinite().all()


# Errors


def test_a_chord_through_a_slope_that_nobody_knows_is_refused(plain, tokens, monkeypatch):
    monkeypatch.delitem(SLOPE_AT_ZERO, "gelu_new")
    with pytest.raises(ModelError, match="'ratio' needs the slope of 'gelu_new' at 0, which is known for gelu, relu, silu"):
        contributions(plain, tokens, ["a0.h1"], rules="linear")


@pytest.mark.parametrize(
    ("sources", "targets", "error", "says"),
    [
        (["a3.h0"], ["logits"], UnknownNode, "'a3.h0' is not in plain, which has layers 0..2 of heads 0..2"),
        (["a0.h3"], ["logits"], UnknownNode, "Did you mean 'a0.h"),
        (["a0.h1@7"], ["logits"], UnknownNode, "position 7; the prompts have 7, 0..6"),
        (["a0.h1.q"], ["logits"], UnknownNode, "'a0.h1.q' cannot be a source"),
        (["logits"], ["z"], UnknownNode, "'logits' cannot be a source"),
        ([], ["logits"], UnknownNode, "must be a list of parts"),
        ([Source(())], ["logits"], UnknownNode, "without parts"),
        (["a0.h1"], [], ModelError, "1 sources and 0 targets leave nothing to compute"),
        ("a0.h1", ["logits"], UnknownNode, "must be a list of parts"),
        ([[]], ["logits"], UnknownNode, "without parts"),
        (["a0.h1"], ["pattern.1"], ModelError, "'pattern.1' cannot be a target. Targets are"),
        (["a0.h1"], ["z.3"], UnknownSite, "layers of plain run 0..2"),
        (["a0.h1"], ["a1.h5"], UnknownNode, "heads run 0..2"),
        (["a0.h1"], ["a1.h1@3"], UnknownNode, "cannot be a target"),
        (["a1.h1", "m2"], ["q.1"], ModelError, "'q.1' is computed before every source .the first is 'a1.h1'"),
        (["m1"], ["z.1"], ModelError, "computed before every source"),
    ],
)
def test_what_is_not_there_is_named(plain, tokens, sources, targets, error, says):
    with pytest.raises(error, match=says):
        contributions(plain, tokens, sources, targets)


def test_no_mlp_where_there_is_none(make_model, tokens):
    with pytest.raises(UnknownNode, match="and no MLPs"):
        contributions(make_model("attention_only"), tokens, ["m0"])


def test_a_mean_needs_prompts_that_mean_the_same(plain, tokens):
    with pytest.raises(TaskError, match="a mean over 1 prompt is that prompt"):
        mean_reference(plain, tokens[:1])
    with pytest.raises(TaskError, match="end at positions 5 to 6"):
        mean_reference(plain, tokens, torch.tensor([6, 5, 6, 6]))
    with pytest.raises(ModelError, match="reference at 'resid_pre.0' has shape .* it must be .4, 7, 12., or 1 for all"):
        contributions(plain, tokens, ["a0.h1"], reference=mean_reference(plain, tokens[:, :5]))
    with pytest.raises(TaskError, match="prompts end at positions 2 to 6, so a mean over other prompts"):
        contributions(plain, tokens, ["a0.h1"], reference=tokens, ends=torch.tensor([6, 5, 2, 4]))
    with pytest.raises(UnknownNode, match="one position for each of 4 prompts"):
        contributions(
            plain, tokens, [replace(Source(parse_sources(plain.config, ["a0.h1"], 4, 7)[0].nodes), at=torch.tensor([1]))]
        )


@pytest.mark.parametrize(
    ("reference", "error", "says"),
    [
        ({"z.3": torch.zeros(1, 7, 3, 5)}, UnknownSite, "layers of plain run 0..2"),
        ({"q.0": torch.zeros(1, 7, 3, 5)}, ModelError, "no source is set at 'q.0'"),
        ({"z.0": torch.zeros(4, 7, 1, 5)}, ModelError, "it must be .4, 7, 3, 5."),
        ({"z.1": torch.zeros(1, 7, 3, 5)}, ModelError, "no value at 'z.0' for the source 'a0.h1'"),
    ],
)
def test_a_reference_that_would_be_read_as_something_else_is_refused(plain, tokens, reference, error, says):
    with pytest.raises(error, match=says):
        contributions(plain, tokens, ["a0.h1"], reference=reference)


def test_a_reference_goes_by_names_and_takes_the_models_precision(plain, tokens, others):
    by_site = mean_reference(plain, others)
    by_name = {str(site): value.float() for site, value in by_site.items()}
    found = [contributions(plain, tokens, ["a0.h1"], reference=each)["logits"].relevant for each in (by_site, by_name)]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], contributions(plain, tokens, ["a0.h1"])["logits"].relevant, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ends": torch.tensor([-1] * 4)}, "one position for each of 4 prompts, 0 to 6"),
        ({"logits_of": torch.tensor([[23]] * 4)}, "token ids from 0 to 22"),
    ],
)
def test_logits_are_of_positions_and_tokens_that_there_are(plain, tokens, settings, says):
    with pytest.raises(ModelError, match=says):
        contributions(plain, tokens, ["a0.h1"], **settings)


def test_patterns_that_were_not_recorded_cannot_be_held(plain, tokens):
    sources = parse_sources(plain.config, ["input"], *tokens.shape)
    with pytest.raises(ModelError, match="patterns=True"):
        list(propagate(Totals.of(plain, tokens), sources, [LOGITS], RULE_SETS["held"]))


def test_gradients_are_as_they_were_between_stacks(plain, tokens):
    sources = parse_sources(plain.config, ["a0.h1", "a1.h1"], *tokens.shape)
    for _ in propagate(Totals.of(plain, tokens), sources, [LOGITS], RULE_SETS["tail"], memory=1):
        assert torch.is_grad_enabled()


def test_a_token_is_its_embedding(plain, tokens):
    found = contributions(plain, tokens, ["input@3"], ["resid_pre.0"])["resid_pre.0"].relevant[0]
    expected = torch.zeros_like(found)
    expected[:, 3] = plain.embed(tokens)[:, 3]
    torch.testing.assert_close(found, expected)
    assert Site("resid_pre", 0) == INPUT
