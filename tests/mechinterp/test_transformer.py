"""The engine: every site is read and written, and however a pass is cut up, it is the same pass."""

import pytest
import torch
from torch.testing import assert_close

from mechinterp.errors import ModelError, UnknownSite
from mechinterp.models.attention import Prefix
from mechinterp.models.transformer import ACTIVATIONS, ResidualStart
from mechinterp.models.weights import Weights
from mechinterp.sites import Site, all_sites

# Here the axis of positions is the queries'.
GRIDS = ("attn_scores", "pattern")
SAME = {"atol": 1e-10, "rtol": 1e-10}
WIDE_LOGITS = ("logits", "ln_final_scale", "ln_final_normalized")


def noise(value, seed=0):
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=value.dtype)


def nudge(value, cache):
    return value + noise(value)


def each_site(config):
    """Every site of the first and the last layer, and of none: a layer between them is the same code."""
    return [site for site in all_sites(config) if site.layer in (None, 0, config.n_layers - 1)]


def positions_last(site, value):
    """A view whose second axis is the position."""
    return value.transpose(1, 2) if site.name in GRIDS else value


def changed(one, other):
    """At which positions two logits differ in any prompt."""
    return (one - other).abs().amax((0, 2)) > 1e-9


def test_recording_every_site_at_once_changes_nothing(model, tokens):
    sites = all_sites(model.config)
    logits, cache = model.run(tokens, record=sites)
    assert set(cache) == set(sites)
    assert_close(logits, model.run(tokens)[0], **SAME)


def test_each_site_alone_reads_the_same_and_an_identity_changes_nothing(model, tokens):
    plain, whole = model.run(tokens, record=all_sites(model.config))
    for site in each_site(model.config):
        seen = []
        logits, cache = model.run(tokens, record=[site], patch={site: lambda x, c, seen=seen: seen.append(x) or x.clone()})
        assert_close(logits, plain, **SAME)
        assert_close(cache[site], whole[site], **SAME)
        assert len(seen) == 1, f"the patch at {site} ran {len(seen)} times"
        assert seen[0].ndim == len(site.axes.split())


def test_writing_at_each_site_changes_the_logits_there_and_none_before(model, tokens):
    plain, at = model.run(tokens)[0], 3

    for site in each_site(model.config):

        def write(value, cache, site=site):
            value = value.clone()
            positions_last(site, value)[:, at] += noise(positions_last(site, value)[:, at])
            return value

        logits, cache = model.run(tokens, record=[site], patch={site: write})
        moved = changed(logits, plain)
        assert not moved[:at].any(), f"{site} at {at} reached an earlier position"
        assert moved[at], f"{site} at {at} changed nothing"
        assert changed_only_at(site, cache[site], model.run(tokens, record=[site])[1][site]) == {at}


def changed_only_at(site, one, other):
    """What is recorded at a patched site is the patched value."""
    difference = positions_last(site, (one - other).nan_to_num().abs())
    return set(difference.flatten(2).amax((0, 2)).nonzero().flatten().tolist())


def test_what_is_recorded_obeys_the_equations(model, tokens):
    """Residual additions, normalisation, projections, attention, activation: every site in terms of those before it."""
    config, W = model.config, model.weights
    logits, c = model.run(tokens, record=[site for site in all_sites(config) if site.name != "z_written"])

    def norm(x, norm, dims=1):
        if norm is None:
            return x
        flat = x.flatten(-dims)
        centred = flat - flat.mean(-1, keepdim=True) if config.normalization == "layer_norm" else flat
        flat = centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        flat = flat if norm.w is None else flat * norm.w
        return (flat if norm.b is None else flat + norm.b).reshape(x.shape)

    def turned(x, name, rotary):
        """Pair by pair, as complex numbers."""
        own = getattr(block, f"{name}_norm")
        x = norm(x, own, dims=2 if config.qk_norm == "all" else 1).clone()
        if rotary is None:
            return x
        n, pairs = len(rotary.frequencies), []
        for i in range(n):
            pairs.append((2 * i, 2 * i + 1) if rotary.adjacent else (i, n + i))
        for (a, b), frequency in zip(pairs, rotary.frequencies, strict=True):
            angle = (torch.arange(7, dtype=torch.float32) * torch.tensor(frequency)).double()
            circle = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones(7).double(), angle)[None, :, None]
            x[..., a], x[..., b] = circle.real, circle.imag
        return x

    def capped(x, cap):
        return x if cap is None else cap * torch.tanh(x / cap)

    groups, f = config.n_heads // config.n_groups, ACTIVATIONS[config.activation]
    resid = c["embed"] + c["pos_embed"] if config.learned_positions else c["embed"]
    for layer, block in enumerate(W.blocks):
        assert_close(c["resid_pre", layer], resid, **SAME)
        reads = norm(resid, block.ln1)
        for port, matrix in (("q", W.W_Q), ("k", W.W_K), ("v", W.W_V)):
            n, bias = len(matrix(layer)), [W.port(layer, i, port)[1] for i in range(config.n_heads)]
            assert_close(c[f"{port}_input", layer], resid[:, :, None].expand(-1, -1, n, -1), **SAME)
            projected = torch.einsum("bpm,hmd->bphd", reads, matrix(layer))
            assert_close(c[port, layer], projected + torch.stack(bias)[:: config.n_heads // n], **SAME)
        q, k = (turned(c[port, layer], port, config.rotary_of(layer)) for port in "qk")
        if config.rotary is not None:
            assert_close(c["rot_q", layer], q, atol=1e-6, rtol=0)  # angles are computed in single precision
            assert_close(c["rot_k", layer], k, atol=1e-6, rtol=0)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(groups, 2)) * config.scale
        scores, distance = capped(scores, config.attention_soft_cap), torch.arange(7) - torch.arange(7)[:, None]
        if config.alibi:
            scores = scores + distance * torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]).double()[:, None, None]
        unseen = (distance > 0) | (distance <= -(config.window_of(layer) or 99))
        assert_close(c["attn_scores", layer], scores.masked_fill(unseen, -torch.inf), atol=1e-6, rtol=0)
        assert_close(c["pattern", layer], c["attn_scores", layer].softmax(-1), **SAME)
        v = c["v", layer].repeat_interleave(groups, 2)
        assert_close(c["z", layer], torch.einsum("bhqk,bkhd->bqhd", c["pattern", layer], v), **SAME)
        raw = block.W_O.unflatten(0, (config.n_heads, config.d_head))
        assert_close(c["result", layer], torch.einsum("bphd,hdm->bphm", c["z", layer], raw), **SAME)
        assert_close(c["attn_out", layer], norm(c["result", layer].sum(2) + block.b_O, block.ln1_post), **SAME)
        after_attention = resid + c["attn_out", layer]
        if config.has_mlp:
            reads = resid if config.parallel else after_attention
            if not config.parallel:
                assert_close(c["resid_mid", layer], after_attention, **SAME)
            assert_close(c["mlp_in", layer], reads, **SAME)
            read = norm(reads, block.ln2)
            hidden = read @ block.W_in + block.b_in
            assert_close(c["mlp_pre", layer], read @ block.W_gate + block.b_gate if config.gated else hidden, **SAME)
            made = f(c["mlp_pre", layer]) * (c["mlp_pre_linear", layer] if config.gated else 1)
            assert_close(c["mlp_post", layer], made, **SAME)
            if config.gated:
                assert_close(c["mlp_pre_linear", layer], hidden, **SAME)
            assert_close(c["mlp_out", layer], norm(c["mlp_post", layer] @ block.W_out + block.b_out, block.ln2_post), **SAME)
            after_attention = after_attention + c["mlp_out", layer]
        resid = after_attention
        assert_close(c["resid_post", layer], resid, **SAME)
    assert_close(logits, capped(norm(resid, W.ln_final) @ W.W_U + W.b_U, config.logit_soft_cap), **SAME)
    assert_close(c["logits"], logits, **SAME)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu"])
def test_every_activation_is_the_one_it_is_called(make_model, tokens, activation):
    _, cache = make_model(activation=activation).run(tokens, record=["mlp_pre", "mlp_post"])
    x = cache["mlp_pre", 1]
    cdf = {
        "gelu_new": 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "gelu": 0.5 * (1 + torch.erf(x / 2**0.5)),
        "relu": (x > 0).double(),
        "silu": torch.sigmoid(x),
    }
    assert_close(cache["mlp_post", 1], x * cdf[activation])


def served_by(config, port, index):
    """The heads that gather something else when this head's query, or this group's key or value, changes."""
    if config.qk_norm == "all" and port != "v":
        return set(range(config.n_heads))
    return {index} if port == "q" else {head for head in range(config.n_heads) if config.group_of(head) == index}


@pytest.mark.parametrize("port", ["q", "k", "v"])
def test_writing_what_one_head_reads_reaches_that_head_and_port_alone(model, tokens, port):
    """Where heads share keys and values, what one group reads reaches the heads that it serves."""

    def write(value, cache):
        value = value.clone()
        value[:, :, 1] += noise(value[:, :, 1])
        return value

    watched = ["q", "k", "v", "z", "resid_pre"]
    _, before = model.run(tokens, record=watched)
    _, after = model.run(tokens, record=watched, patch={Site(f"{port}_input", 1): write})
    for site in before:
        difference = (after[site] - before[site]).abs() > 1e-9
        if site.layer == 0 or site == Site("resid_pre", 1):
            assert not difference.any()
        elif site.layer == 1:
            reached = {"z": served_by(model.config, port, 1), port: {1}}.get(site.name, set())
            assert set(difference.any(-1).any(0).any(0).nonzero().flatten().tolist()) == reached, str(site)


def test_writing_what_an_mlp_reads_reaches_the_mlp_alone(make_model, tokens):
    for model in (make_model(), make_model("parallel")):
        _, before = model.run(tokens, record=["attn_out", "mlp_out", "resid_post"])
        _, after = model.run(tokens, record=["attn_out", "mlp_out", "resid_post"], patch={"mlp_in.1": nudge})
        assert torch.equal(after["attn_out", 1], before["attn_out", 1])
        by_mlp = after["mlp_out", 1] - before["mlp_out", 1]
        assert by_mlp.abs().max() > 0.1
        assert_close(after["resid_post", 1] - before["resid_post", 1], by_mlp)


def test_writing_the_middle_of_a_block_reaches_the_mlp_and_the_stream(plain, tokens):
    _, before = plain.run(tokens, record=["resid_mid", "mlp_out", "resid_post"])
    _, after = plain.run(tokens, record=["resid_mid", "mlp_out", "resid_post"], patch={"resid_mid.1": nudge})
    by_mlp = after["mlp_out", 1] - before["mlp_out", 1]
    assert by_mlp.abs().max() > 0.1
    assert_close(after["resid_post", 1] - before["resid_post", 1], noise(before["resid_mid", 1]) + by_mlp)


def test_writing_a_heads_output_adds_its_image_to_the_stream(model, tokens):
    """At the site that is linear; ``result`` is too, unless its sum is normalised."""
    config, W_O = model.config, model.weights.W_O(1)
    _, before = model.run(tokens, record=["attn_out"])
    images = {config.write_site: lambda d: torch.einsum("bphd,hdm->bpm", d, W_O)}
    images |= {} if config.has_norms_after else {"result": lambda d: d.sum(2)}
    for name, image in images.items():
        seen = {}

        def write(value, cache, seen=seen):
            seen["delta"] = noise(value)
            return value + seen["delta"]

        _, after = model.run(tokens, record=["attn_out"], patch={Site(name, 1): write})
        assert_close(after["attn_out", 1] - before["attn_out", 1], image(seen["delta"]))


def test_what_heads_write_is_what_they_gather_over_the_scale_of_all_together(model, tokens):
    config, normalised = model.config, model.config.has_norms_after
    _, cache = model.run(tokens, record=["z", "attn_out", *["z_written", "ln1_post_scale"] * normalised])
    for layer, block in enumerate(model.weights.blocks):
        z, written = cache["z", layer], cache[config.write_site, layer]
        assert_close(model.written(layer, z), written, **SAME)
        by_head = torch.einsum("bphd,hdm->bphm", written, model.weights.W_O(layer))
        assert_close(by_head.sum(2) + block.b_O, cache["attn_out", layer], **SAME)
        if normalised:
            assert_close(written * cache["ln1_post_scale", layer].unsqueeze(-1), z, **SAME)
            once_more = model.run(tokens, record=["attn_out"], patch={Site("z_written", layer): lambda x, c: x.clone()})[1]
            assert_close(once_more["attn_out", layer], cache["attn_out", layer], **SAME)


def test_a_patch_sees_what_the_pass_has_recorded_so_far(plain, tokens):
    def copy_first_layer(value, cache):
        assert Site("z", 2) not in cache
        return cache["z", 0]

    _, cache = plain.run(tokens, record=["z"], patch={"z.1": copy_first_layer})
    assert torch.equal(cache["z", 1], cache["z", 0])


def test_the_gradient_of_what_an_mlp_reads_is_the_mlps_alone(plain, tokens):
    def leaf(value, cache):
        return value.detach().requires_grad_()

    logits, cache = plain.run(tokens, record=["resid_mid.1", "mlp_in.1", "mlp_out.1"], patch={"resid_mid.1": leaf})
    whole, mlp, out = torch.autograd.grad(logits.sum(), [cache["resid_mid", 1], cache["mlp_in", 1], cache["mlp_out", 1]])
    assert_close(whole, mlp + out, msg="the stream goes through the MLP and past it")


# --- against TransformerLens ----------------------------------------------------------------------------------------


def by_lens(hooked, tokens, hook_name, edit, weight):
    """Value and gradient at a hook, and the logits under an edit there, by ``HookedTransformer``."""
    met = []

    def keep(value, hook):
        met.append(value.detach().requires_grad_())
        return edit(met[-1])

    logits = hooked.run_with_hooks(tokens, fwd_hooks=[(hook_name, keep)])
    # It calls ln1 three times, for queries, keys and values: the same value, and each call has a share of the gradient.
    gradients = torch.autograd.grad((logits * weight).sum(), met)
    return met[0].detach(), sum(gradients), logits.detach()


def by_engine(model, tokens, site, edit, weight):
    kept = {}

    def keep(value, cache):
        kept["value"] = value.detach().requires_grad_()
        return edit(kept["value"])

    logits, _ = model.run(tokens, patch={site: keep})
    (gradient,) = torch.autograd.grad((logits * weight).sum(), kept["value"])
    return kept["value"].detach(), gradient, logits.detach()


def hook_name(site, config):
    """TransformerLens calls OLMo-2's normalisations after heads and MLP as others' before them."""
    return site.hook_name.replace("_post.", ".") if config.norms == "after" else site.hook_name


def hooked_sites(model):
    """Those that TransformerLens has too; its logits are those before a soft cap."""
    capped = {"logits"} if model.config.logit_soft_cap else set()
    return [site for site in each_site(model.config) if site.hook_name and site.name not in capped]


def test_every_site_is_transformer_lens_hook_in_value_effect_and_gradient(expressible, tokens, make_hooked):
    model = expressible
    whole, split = make_hooked(model), make_hooked(model, split=True)
    weight = noise(model.run(tokens)[0], seed=5)
    for site in hooked_sites(model):
        # With split inputs TransformerLens normalises three times a head and the hooks in ln1 take another shape.
        hooked = whole if site.name.startswith("ln1") else split
        name = hook_name(site, model.config)
        ours = by_engine(model, tokens, site, lambda x: 1.25 * x + 0.5 * noise(x), weight)
        theirs = by_lens(hooked, tokens, name, lambda x: 1.25 * x + 0.5 * noise(x), weight)
        for what, mine, yours in zip(("value", "gradient", "logits"), ours, theirs, strict=True):
            assert_close(mine, yours, atol=1e-9, rtol=1e-9, msg=lambda m, s=site, w=what: f"{w} at {s}: {m}")


def test_the_cache_under_transformer_lens_names_is_transformer_lens_cache(expressible, tokens, make_hooked):
    model = expressible
    _, ours = model.run(tokens, record=[s for s in all_sites(model.config) if not s.name.startswith("ln1_")])
    _, theirs = make_hooked(model, split=True).run_with_cache(tokens)
    renamed = ours.to_transformer_lens()
    assert len(renamed) == len(ours) - sum(site.name == "z_written" for site in ours) - bool(model.config.logit_soft_cap)
    for name, value in renamed.items():
        assert_close(value, theirs[name], **SAME)


# --- one pass, however it is cut up ---------------------------------------------------------------------------------


def test_a_batch_is_its_prompts(model, tokens):
    alone = torch.cat([model.run(row[None])[0] for row in tokens])
    assert_close(model.run(tokens)[0], alone, **SAME)


def test_padding_on_the_right_changes_nothing_before_it(model, tokens):
    short = tokens[:, :4]
    for pad in (0, 11):
        padded = torch.nn.functional.pad(short, (0, 5), value=pad)
        logits, cache = model.run(padded, record=["z"])
        plain, bare = model.run(short, record=["z"])
        assert_close(logits[:, :4], plain, **SAME)
        assert_close(cache["z", 2][:, :4], bare["z", 2], **SAME)


def entrances(config):
    names = {"resid_pre", "resid_mid", "resid_post"} & {site.name for site in all_sites(config)}
    return [Site(name, layer) for layer in range(config.n_layers) for name in sorted(names)]


@pytest.mark.parametrize("ends", ["all", "last", "each"])
def test_a_pass_resumed_at_any_entrance_is_the_whole_pass(model, tokens, ends):
    at = torch.tensor([6, 3, 0, 5]) if ends == "each" else ends
    whole, cache = model.run(tokens, record=["resid_pre", "resid_post", *(s for s in entrances(model.config))], logits_at=at)
    for site in entrances(model.config):
        logits, _ = model.run(None, start=ResidualStart(site, cache[site]), logits_at=at)
        assert_close(logits, whole, **SAME)


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("ends", ["all", "last", "each"])
def test_a_pass_over_a_prefix_computed_before_is_the_whole_pass(model, tokens, length, ends):
    at = torch.tensor([6, 4, 5, 6]) if ends == "each" else ends
    _, cache = model.run(tokens, record=["k", "v", "pattern", *entrances(model.config)])
    wanted = model.run(tokens, logits_at=at)[0]
    prefix = Prefix.of(cache, model.config.n_layers, length)
    for site in entrances(model.config):
        start = ResidualStart(site, cache[site][:, length:], prefix)
        logits, _ = model.run(None, start=start, logits_at=at)
        assert_close(logits, wanted[:, length:] if ends == "all" else wanted, **SAME)
    start = ResidualStart(Site("resid_pre", 0), cache["resid_pre", 0][:, length:], prefix)
    _, resumed = model.run(None, start=start, record=["pattern"])
    assert_close(resumed["pattern", 2], cache["pattern", 2][:, :, length:], **SAME)


def test_variants_of_a_batch_stacked_over_one_prefix_each_attend_to_it(plain, tokens):
    _, cache = plain.run(tokens, record=["k", "v", "resid_pre"])
    prefix = Prefix.of(cache, 3, 4)
    after = cache["resid_pre", 1][:, 4:]
    variants = torch.cat([after, after + noise(after)])
    stacked, _ = plain.run(None, start=ResidualStart(Site("resid_pre", 1), variants, prefix))
    apart = [plain.run(None, start=ResidualStart(Site("resid_pre", 1), x, prefix))[0] for x in variants.split(4)]
    assert_close(stacked, torch.cat(apart), **SAME)


@pytest.mark.parametrize("watching", ["nothing", "keys", "everything", "last layer"])
def test_logits_at_some_positions_are_a_slice_of_all(model, tokens, watching):
    record = {
        "nothing": [],
        "keys": ["k", "v", "resid_pre"],
        "everything": [s for s in all_sites(model.config) if s.name not in WIDE_LOGITS],
        "last layer": ["z.2", "resid_post.2"],
    }[watching]
    whole, cache = model.run(tokens, record=record)
    ends = torch.tensor([6, 3, 0, 5])
    for at, wanted in (("last", whole[:, -1]), (ends, whole[torch.arange(4), ends])):
        logits, narrow = model.run(tokens, record=record, logits_at=at)
        assert_close(logits, wanted, **SAME)
        for site in cache:
            assert_close(narrow[site], cache[site], **SAME)


def test_a_patch_has_the_same_effect_where_only_some_logits_are_wanted(model, tokens):
    ends = torch.tensor([6, 3, 0, 5])
    for site in each_site(model.config):
        if site.name not in WIDE_LOGITS:
            whole, _ = model.run(tokens, patch={site: nudge})
            logits, _ = model.run(tokens, patch={site: nudge}, logits_at=ends)
            assert_close(logits, whole[torch.arange(4), ends], **SAME)


def test_logits_of_some_tokens_are_a_slice_of_all(model, tokens):
    candidates = torch.tensor([[3, 4], [22, 0], [7, 7], [1, 2]])
    ends = torch.tensor([6, 3, 0, 5])
    for at in ("last", ends):
        whole, _ = model.run(tokens, logits_at=at)
        some, _ = model.run(tokens, logits_at=at, logits_of=candidates)
        assert_close(some, whole.gather(1, candidates), **SAME)


def test_feed_forward_is_what_an_mlp_writes(make_model, tokens):
    for model, reads in ((make_model(), "resid_mid"), (make_model("parallel"), "resid_pre")):
        _, cache = model.run(tokens, record=[reads, "mlp_out"])
        for layer in range(3):
            assert_close(model.feed_forward(layer, cache[reads, layer]), cache["mlp_out", layer], **SAME)


def test_project_and_mix_are_the_steps_of_the_pass(model, tokens):
    _, cache = model.run(tokens, record=["resid_pre", "q", "k", "v", "z"])
    for layer in range(3):
        q, k, v = model.project(layer, cache["resid_pre", layer])
        for port, value in zip("qkv", (q, k, v), strict=True):
            assert_close(value, cache[port, layer], **SAME)
        assert_close(model.mix(layer, q, k, v), cache["z", layer], **SAME)
        prefix = Prefix.of(cache, 3, 4)
        resumed = model.mix(layer, q[:, 4:], k[:, 4:], v[:, 4:], prefix)
        assert_close(resumed, cache["z", layer][:, 4:], **SAME)


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2), (torch.float64, 1e-12)])
def test_a_model_runs_in_the_dtype_it_was_put_in(model, tokens, dtype, bound):
    exact = model.run(tokens)[0]
    lower = model.to(dtype=dtype)
    logits, cache = lower.run(tokens, record=all_sites(model.config))
    assert lower.dtype == logits.dtype == dtype
    assert {value.dtype for value in cache.values()} == {dtype}
    assert (logits.double() - exact).abs().max() <= bound * exact.abs().max()
    assert model.dtype == torch.float64, "the model it was made from is as it was"


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"record": ["resid_prex.0"]}, UnknownSite, "Did you mean 'resid_pre.0'"),
        ({"record": ["blocks.0.attn.hook_zz"]}, UnknownSite, r"Did you mean '.*z"),
        ({"record": ["z.3"]}, UnknownSite, r"layer 3; the layers of plain run 0\.\.2"),
        ({"patch": {"z.3": nudge}}, UnknownSite, r"run 0\.\.2"),
        ({"record": [Site("logits", 1)]}, UnknownSite, r"belongs to no layer.*Site\('logits'\)"),
        ({"patch": {"z.1": lambda x, c: x[:, :2]}}, ModelError, r"'z.1' returned shape \(4, 2, 3, 5\).*\(4, 7, 3, 5\)"),
        ({"patch": {"z.1": lambda x, c: None}}, ModelError, r"'z.1' returned NoneType.*return the new tensor"),
        ({"patch": {"z.1": lambda x, c: x.zero_()}}, ModelError, r"'z.1' wrote into .*clone"),
        ({"patch": {"ln1_scale.1": nudge, "q_input.1": nudge}}, ModelError, "Patch q, k or v instead"),
        ({"logits_at": torch.tensor([7, 0, 0, 0])}, ModelError, r"positions 0\.\.7.*0 to 6"),
        ({"logits_at": torch.tensor([-1, 0, 0, 0])}, ModelError, r"positions -1\.\.0.*0 to 6"),
        ({"logits_of": torch.zeros(4, 1, dtype=torch.long)}, ModelError, "logits_of needs one position"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_remedy(plain, tokens, settings, error, message):
    with pytest.raises(error, match=message):
        plain.run(tokens, **settings)


def test_prompts_longer_than_the_context_are_refused(plain):
    with pytest.raises(ModelError, match="at most 9 positions; these prompts have 10"):
        plain.run(torch.zeros(1, 10, dtype=torch.long))


def test_tokens_outside_the_vocabulary_are_refused(plain):
    with pytest.raises(ModelError, match=r"23 tokens, 0 to 22; these run from 0 to 23"):
        plain.run(torch.tensor([[0, 23]]))


def test_a_pass_needs_tokens_or_a_start(plain):
    with pytest.raises(ModelError, match="needs tokens, or a `start`"):
        plain.run(None)


def test_sites_before_the_start_are_refused_and_those_after_are_not(plain, tokens):
    _, cache = plain.run(tokens, record=["resid_mid"])
    start = ResidualStart(Site("resid_mid", 1), cache["resid_mid", 1])
    for settings in ({"record": ["z.1"]}, {"patch": {"embed": nudge}}, {"record": ["resid_post.0"]}):
        with pytest.raises(ModelError, match=r"starts at 'resid_mid.1' and never reaches .* Start earlier, or drop it"):
            plain.run(None, start=start, **settings)
    plain.run(None, start=start, record=["resid_mid.1", "mlp_in.1", "z.2", "logits"])


def test_a_start_must_be_a_residual_stream_that_the_model_has(plain, make_model, tokens):
    stream = plain.run(tokens, record=["resid_pre.0"])[1]["resid_pre", 0]
    with pytest.raises(ModelError, match=r"can start at resid_pre, resid_mid, resid_post of a layer, not at 'z.1'"):
        ResidualStart(Site("z", 1), stream)
    with pytest.raises(UnknownSite, match=r"run 0\.\.2"):
        plain.run(None, start=ResidualStart(Site("resid_pre", 3), stream))
    for variant in ("parallel", "attention_only"):
        with pytest.raises(UnknownSite, match="has no site 'resid_mid'"):
            make_model(variant).run(None, start=ResidualStart(Site("resid_mid", 1), stream))


@pytest.mark.parametrize(
    ("variant", "name"), [("attention_only", "mlp_out"), ("parallel", "resid_mid"), ("no_norm", "ln1_scale")]
)
def test_a_site_that_the_architecture_lacks_is_refused_and_the_others_are_named(make_model, tokens, variant, name):
    with pytest.raises(UnknownSite, match=f"{variant} has no site '{name}'. It has: attn_out"):
        make_model(variant).run(tokens, record=[name])


@pytest.mark.parametrize("name", ["attn.b_O", "ln1_post.b", "attn.q_norm.b"])
def test_a_bias_that_would_belong_to_no_head_is_refused(make_model, name):
    model = make_model("olmo2")
    shape = (20,) if "q_norm" in name else (12,)
    named = {**model.weights.named(), f"blocks.1.{name}": torch.ones(shape)}
    with pytest.raises(ModelError, match=f"olmo2: 'blocks.1.{name}' is not zero"):
        Weights.from_named(model.config, named)
