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
from mechinterp.models.normalization import scale_of
from mechinterp.models.rotary import rotate
from mechinterp.models.transformer import ACTIVATIONS, Transformer
from mechinterp.models.weights import Weights
from mechinterp.sites import Site, all_sites
from mechinterp.store import ActivationStore

FAMILIES = (
    *("plain", "attention_only", "parallel", "no_norm", "folded", "bidirectional", "relu"),
    *("llama", "qwen3", "olmo2", "gemma2", "gptj", "mpt"),
)
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
    found = relevant(family, tokens, named, targets, rules, reference)
    for site in targets:
        scale = max(1.0, float(expected[site].relevant.abs().max()))
        torch.testing.assert_close(found[site], expected[site].relevant, rtol=0, atol=1e-11 * scale)


# Ablation


def ablated(model: Transformer, tokens, source: Source, reference, held: tuple[str, ...]) -> torch.Tensor:
    """Logits with the source's parts replaced through the engine's patches, and what ``held`` names as in the clean run."""
    sites = [site for site in all_sites(model.config) if held and site.name.endswith(held)]
    _, clean = model.run(tokens, record=[*sites, "q", "k"])
    patch = {site: (lambda value, _, site=site: clean[site]) for site in sites}
    if held and model.config.qk_norm != "none":
        meet = [Site(name, layer) for layer in range(model.config.n_layers) for name in ("rot_q", "rot_k")]
        patch |= {site: (lambda _, cache, site=site: by_clean_scale(model, site, cache, clean)) for site in meet}
    for node in source.nodes:
        site = site_of(model.config, node)
        before = patch.get(site)

        def replaced(value, cache, node=node, site=site, before=before):
            value = (value if before is None else before(value, cache)).clone()
            where = source.where(node, *tokens.shape).unsqueeze(-1)
            if node.kind == "head":
                value[:, :, node.index] = torch.where(where, reference[site][:, :, node.index], value[:, :, node.index])
                return value
            return torch.where(where, reference[site], value)

        patch[site] = replaced
    return model.run(tokens, patch=patch, record=["q", "k"])[0]


def by_clean_scale(model: Transformer, site: Site, cache, clean) -> torch.Tensor:
    """Queries or keys of this pass, divided by the scale that the clean pass has in their normalisation, and turned."""
    port, config = site.name[-1], model.config
    norm = getattr(model.weights.blocks[site.layer], f"{port}_norm")
    of, whole = (run[port, site.layer].flatten(-2 if config.qk_norm == "all" else -1) for run in (cache, clean))
    normed = of / scale_of(whole, config) * norm.w
    return rotate(normed.view(cache[port, site.layer].shape), torch.arange(of.shape[1])[None], config.rotary_of(site.layer))


@pytest.mark.parametrize(("rules", "held"), [("exact", ()), ("tail", ("scale",)), ("held", ("scale", "pattern"))])
def test_it_is_the_effect_of_mean_ablation_with_what_the_rules_hold_held(family, tokens, others, rules, held):
    reference, named = mean_reference(family, others), some_sources(family)
    clean, _ = family.run(tokens)
    found = relevant(family, tokens, named, [LOGITS], rules, reference)[LOGITS]
    for row, source in zip(found, parse_sources(family.config, named, *tokens.shape), strict=True):
        expected = clean - ablated(family, tokens, source, reference, held)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-10)


def test_linear_rules_are_one_backward_pass_with_detaches(family, tokens):
    """Gradient times deviation, scales, patterns and slopes held, half of a product to each factor: relevance patching."""
    config, heads = family.config, [f"a{layer}.h{head}" for layer in range(3) for head in range(family.config.n_heads)]
    held = [site for site in all_sites(config) if site.name.endswith(("scale", "pattern"))]
    hidden = [site for site in all_sites(config) if site.name in ("mlp_pre", "mlp_pre_linear")]
    leaves = {Site(config.write_site, layer): None for layer in range(3)}
    _, clean = family.run(tokens, record=leaves)
    leaves = {site: clean[site].clone().requires_grad_() for site in leaves}

    def chord(pre, post, slope_at_zero):
        return pre * torch.where(pre == 0, slope_at_zero, post / pre).detach()

    def mlp_rule(_, cache, layer):
        pre = cache["mlp_pre", layer]
        a = chord(pre, ACTIVATIONS[config.activation](pre), SLOPE_AT_ZERO[config.activation])
        u = cache["mlp_pre_linear", layer] if config.gated else None
        return a if u is None else (a * u.detach() + a.detach() * u) / 2

    patch = {site: (lambda value, _: value.detach()) for site in held}
    patch |= {Site("mlp_post", n): (lambda value, cache, n=n: mlp_rule(value, cache, n)) for n in range(3) if config.has_mlp}
    shift = {site: (lambda value, _, site=site: value + leaves[site] - leaves[site].detach()) for site in leaves}
    uncapped = Transformer(replace(family.weights, config=replace(config, logit_soft_cap=None)))
    logits, _ = uncapped.run(tokens, patch=patch | shift, record=hidden)
    logits = chord(logits, family.capped(logits), 1.0)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    gradients = torch.autograd.grad((logits * weights).sum(), list(leaves.values()))
    expected = [(g * leaf).sum((0, 1, 3)) for leaf, g in zip(leaves.values(), gradients, strict=True)]
    found = relevant(family, tokens, heads, [LOGITS], "linear", None)[LOGITS]
    torch.testing.assert_close((found * weights).sum((1, 2, 3)), torch.cat(expected).detach(), rtol=0, atol=1e-10)


# Nothing in, all in, additive and not


@pytest.mark.parametrize("rules", RULE_SETS)
def test_nothing_is_relevant_before_the_source_acts(model, tokens, others, rules):
    """Both parts carried: exactly zero, not as a difference of large numbers."""
    reference, targets, acts = mean_reference(model, others), targets_of(model), Site(model.config.write_site, 1)
    sources = parse_sources(model.config, ["a1.h2@4", "input"], *tokens.shape)
    found = both_parts(model, tokens, sources, targets, RULE_SETS[rules], reference=reference)
    for site in targets:
        early = site.order < acts.order
        dead = found[site].relevant[0] if early else found[site].relevant[0, :, :4]
        assert dead.abs().max() < 1e-13


@pytest.mark.parametrize("rules", ["paper", "frozen"])
def test_where_everything_is_relevant_nothing_is_left_of_the_rest(model, tokens, rules):
    sources = parse_sources(model.config, ["input"], *tokens.shape)
    found = both_parts(model, tokens, sources, targets_of(model), RULE_SETS[rules], reference={})
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


def test_under_linear_rules_tokens_add_up(model, tokens):
    singles = [f"input@{at}" for at in range(7)]
    found = relevant(model, tokens, [*singles, singles], [LOGITS], "linear", None)[LOGITS]
    torch.testing.assert_close(found[:-1].sum(0), found[-1], rtol=0, atol=1e-11)


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


@pytest.mark.parametrize("memory", [1, 40_000])
@pytest.mark.parametrize("rules", RULE_SETS)
def test_how_many_sources_stand_side_by_side_changes_nothing(plain, tokens, others, rules, memory):
    reference, targets, named = mean_reference(plain, others), targets_of(plain), some_sources(plain)
    found, expected = (relevant(plain, tokens, named, targets, rules, reference, memory=m) for m in (memory, None))
    for site in targets:
        torch.testing.assert_close(found[site], expected[site], rtol=0, atol=1e-11)


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


@pytest.mark.parametrize("variant", ["plain", "gemma2"])
def test_a_shared_prefix_that_nothing_deviates_in_need_not_be_carried(make_model, tokens, variant):
    """The reference is another prompt with the same first three tokens."""
    model, corrupted = make_model(variant), torch.cat([tokens[:, :3], (tokens[:, 3:] + 1) % 23], dim=1)
    _, cache = model.run(corrupted, record=[model.config.write_site, "mlp_out", "resid_pre.0"])
    reference, sources = dict(cache), parse_sources(model.config, ["a0.h1", "m0", "a1.h2", "input"], *tokens.shape)
    for rules in RULE_SETS.values():
        totals = Totals.of(model, tokens, patterns=True, ends=torch.tensor([6, 5, 3, 4]))
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


def test_keys_that_heads_share_are_asked_for_by_group(make_model, tokens):
    model, sources = make_model("llama"), ["input@1"]
    found = contributions(model, tokens, sources, ["a1.g1.k", "a1.g0.v", "a1.h3.q", "k.1", "v.1", "q.1"])
    for name, site, index in (("a1.g1.k", "k.1", 1), ("a1.g0.v", "v.1", 0), ("a1.h3.q", "q.1", 3)):
        torch.testing.assert_close(found[name].relevant, found[site].relevant[..., index, :])
    for target, says in {
        "a1.h2.k": "whose heads share keys and values. Ask for 'a1.g1.k'",
        "a1.g2.k": "whose groups run 0..1",
        "a1.g1": "cannot be a target",
    }.items():
        with pytest.raises(UnknownNode, match=says):
            contributions(model, tokens, sources, target)
    with pytest.raises(UnknownNode, match="have keys and values of their own. Ask for 'a1.h1.v'"):
        contributions(make_model("plain"), tokens, sources, "a1.g1.v")


def test_where_what_heads_write_is_normalised_they_are_sources_behind_that(make_model, tokens, others):
    """What a head gathers can be read, and is no source's doing in the source's own layer; references are of what it writes."""
    model = make_model("gemma2")
    found = contributions(model, tokens, ["a1.h2"], ["z_written.1", "a2.h0"], rules="exact")
    _, clean = model.run(tokens, record=["z_written.1"])
    expected = torch.zeros_like(clean["z_written", 1])
    expected[:, :, 2] = clean["z_written", 1][:, :, 2]
    torch.testing.assert_close(found["z_written.1"].relevant[0], expected)
    assert found["a2.h0"].relevant.abs().max() > 0.01
    with pytest.raises(ModelError, match="'z.1' is computed before every source .the first is 'a1.h2'"):
        contributions(model, tokens, ["a1.h2"], ["a1.h0"])
    with pytest.raises(ModelError, match="no source is set at 'z.1'. References for gemma2 are of .*z_written and mlp_out"):
        contributions(model, tokens, ["a1.h2"], reference={"z.1": torch.zeros(1, 7, 4, 5)})


def test_what_a_token_costs_in_memory_is_what_a_pass_keeps_of_it(model, tokens):
    kept = Totals.of(model, tokens).cache.values()
    size = sum(value.numel() * value.element_size() for value in kept)
    assert Totals.size_of_a_token(model) * tokens.numel() == size


@pytest.mark.parametrize("rules", RULE_SETS)
@pytest.mark.parametrize("variant", ["plain", "gemma2", "olmo2"])
def test_half_precision_stays_finite(make_model, tokens, others, variant, rules):
    model = make_model(variant).to(dtype=torch.bfloat16)
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
