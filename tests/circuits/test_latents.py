"""Latents and error add up to their layer, edges to their writer, and kept whole they are the model."""

import json

import numpy as np
import pytest
import torch

from circuits import Circuit, Scores, discover, evaluate_latents, exact_latents, latent_circuit, latent_curve, sparse_features
from circuits.ablation import resample
from circuits.discovery.attribution import attribution
from circuits.discovery.latents import latents
from circuits.latent_layers import layers_of
from mechinterp.errors import CircuitError, SAEError, TaskError, UnknownNode
from mechinterp.models.compiled import induction
from mechinterp.models.transformer import ResidualStart
from mechinterp.nodes import Node
from mechinterp.sites import Site
from saes import Place, SparseAutoencoder, each_head, each_layer, spliced

KINDS = {"relu": {}, "topk": {"k": 4}, "jumprelu": {}, "abstopk": {"k": 4}, "gated": {}}
D_SAE = 8


def of_layers(model, kind="relu", d_sae=D_SAE, places=None, **facts):
    """A random autoencoder with every tensor set, on concatenated z."""
    places = places or each_layer(model.config)
    width = places[0].width(model.config)
    return shaken(SparseAutoencoder.random(places, d_in=width, d_sae=d_sae, kind=kind, **KINDS[kind], **facts))


def of_heads(model, **facts):
    return of_layers(model, places=each_head(model.config), **facts)


CASES = [(of_layers, "resample"), (of_heads, "mean"), (of_layers, "zero")]


def shaken(autoencoder):
    generator = torch.Generator().manual_seed(3)
    noise = {name: 0.1 * torch.randn(x.shape, generator=generator) for name, x in autoencoder.tensors.items()}
    moved = {name: x + noise[name].to(x) for name, x in autoencoder.tensors.items()}
    return SparseAutoencoder(
        autoencoder.kind, autoencoder.places, **moved, k=autoencoder.k, normalize=autoencoder.normalize
    ).to(dtype=torch.float64)


def identity(model):
    """Latents x and -x where positive: nothing is left over."""
    places = each_layer(model.config)
    eye = torch.eye(places[0].width(model.config), dtype=model.dtype).expand(len(places), -1, -1)
    W_enc = torch.cat([eye, -eye], 2)
    zeros = torch.zeros_like(W_enc[:, 0]), torch.zeros_like(eye[:, 0])
    return SparseAutoencoder("relu", places, W_enc, zeros[0], W_enc.mT.contiguous(), zeros[1])


def layer_sums(scores):
    """[prompt layer]: everything of a layer, added up."""
    widths = [size + 1 for size in scores.settings["latents"].values()]
    return np.stack([part.sum(1) for part in np.split(scores.per_prompt, np.cumsum(widths)[:-1], axis=1)], 1)


def of_gathered(model, task, ablation):
    """[prompt layer]: what replacing all that a layer's heads gather costs, to first order."""
    prompts, mean = task.prompts, ablation == "mean"
    _, other = model.run(prompts.corrupted, record=["z"])
    start = ResidualStart(Site("resid_pre", 0), model.embed(prompts.clean).requires_grad_())
    logits, clean = model.run(None, start=start, record=["z"], logits_at=prompts.end)
    zs = [clean["z", layer] for layer in range(model.config.n_layers)]
    gradients = torch.autograd.grad(task.metric(logits, prompts).sum(), zs)
    replaced = [alike(prompts, other["z", layer]) if mean else other["z", layer] for layer in range(model.config.n_layers)]
    falls = [((z - new) * g).sum((1, 2, 3)) for z, new, g in zip(zs, replaced, gradients, strict=True)]
    return torch.stack(falls, 1).detach().numpy()


def alike(prompts, x):
    """Means over the prompts of one template and length."""
    layouts = torch.stack([prompts.groups, prompts.end], 1)
    same = (layouts[:, None] == layouts[None]).all(-1).double()
    return torch.einsum("ij,j...->i...", same / same.sum(1, keepdim=True), x)


def of_heads_in(scores):
    per_head = scores.per_prompt[:, [writer.kind == "head" for writer in scores.wiring.writers]]
    return per_head.reshape(len(per_head), scores.wiring.n_layers, -1).sum(-1)


@pytest.mark.parametrize("ablation", ["resample", "mean"])
@pytest.mark.parametrize(("make", "normalize"), [(of_layers, "none"), (of_heads, "none"), (of_layers, "layer_norm")])
def test_latents_and_error_sum_to_their_heads(model, make_task, make, normalize, ablation):
    task, autoencoder = make_task(model), make(model, normalize=normalize)
    scores = latents(model, task, autoencoder, ablation=ablation, keep_prompts=True)
    np.testing.assert_allclose(layer_sums(scores), of_gathered(model, task, ablation), atol=1e-12)
    if not model.config.has_norms_after:  # or heads have their share of what is written, and latents move its scale
        heads = attribution(model, task, ablation=ablation, keep_prompts=True)
        np.testing.assert_allclose(layer_sums(scores), of_heads_in(heads), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
def test_latents_and_error_make_z_again(plain, tokens, kind, normalize):
    _, cache = plain.run(tokens, record=["z"])
    for make in (of_layers, of_heads):
        autoencoder = make(plain, kind=kind, normalize=normalize)
        for at in layers_of(plain, autoencoder):
            z = cache[at.site]
            found, error = at.split(z)
            torch.testing.assert_close(at.join(found, error), z)
            torch.testing.assert_close(at.error(z, found), error)
            written = at.join(found, error) - at.join(torch.zeros_like(found), error)
            torch.testing.assert_close(found @ at.rows([*range(at.width)]), written.flatten(2))


def test_the_error_is_what_the_autoencoder_leaves_over(plain, tokens):
    autoencoder = of_layers(plain)
    _, cache = plain.run(tokens, record=["z"])
    missed = autoencoder.read(cache) - autoencoder.reconstruct(autoencoder.read(cache))
    for at, expected in zip(layers_of(plain, autoencoder), missed, strict=True):
        torch.testing.assert_close(at.split(cache[at.site])[1], expected)
        torch.testing.assert_close(at.split(cache[at.site])[0], autoencoder.encode(autoencoder.read(cache))[at.layer])


def test_a_perfect_autoencoder_leaves_no_error(plain, make_task):
    scores = latents(plain, make_task(plain), identity(plain))
    errors = [score for name, score in zip(scores.names, scores.values, strict=True) if name.endswith("error")]
    assert errors == [0.0] * plain.config.n_layers


def by_autograd(model, task, autoencoder, through):
    """The definition: leaves added to every latent of an explicit splice, and to the error."""
    prompts, leaves, errors = task.prompts, {}, {}

    def edit(place, found):
        leaves[place] = torch.zeros_like(found, requires_grad=True)
        return found + leaves[place]

    def run(patch):
        return task.metric(model.run(prompts.clean, patch=patch, logits_at=prompts.end)[0], prompts)

    falls = []
    for place in autoencoder.places:
        later = {p.site for p in autoencoder.places if p.layer > place.layer}
        own = autoencoder.group(place)
        splices = spliced(autoencoder, with_error=True)
        patch = {site: splices[site] for site in later} if through == "latents" else {}
        (_, clean), (_, corrupted) = (model.run(t, record=["z"]) for t in (prompts.clean, prompts.corrupted))
        x, other = own.read(clean), own.read(corrupted)
        values = run(patch | spliced(own, with_error=True, edit=edit))
        gradient = torch.autograd.grad(values.sum(), leaves[place])[0]
        errors[place] = torch.zeros_like(x[0], requires_grad=True)
        added = {place.site: lambda z, _, at=place: at.write(z, at.part(z) + errors[at])}
        error_gradient = torch.autograd.grad(run(patch | added).sum(), errors[place])[0]
        change = (own.encode(x) - own.encode(other))[0]
        lost = ((x - own.reconstruct(x)) - (other - own.reconstruct(other)))[0]
        falls.append([(change * gradient).sum((0, 1)) / len(task), (lost * error_gradient).sum() / len(task)])
    return falls


@pytest.mark.parametrize("through", ["model", "latents"])
def test_scores_are_what_autograd_finds_in_an_explicit_splice(model, make_task, through):
    task, autoencoder = make_task(model, "prob_diff"), of_layers(model)
    expected = torch.cat([torch.cat([own, error[None]]) for own, error in by_autograd(model, task, autoencoder, through)])
    np.testing.assert_allclose(latents(model, task, autoencoder, through=through).values, expected, atol=1e-14)


@pytest.mark.parametrize("through", ["model", "latents"])
def test_latents_of_heads_are_numbered_head_by_head(plain, make_task, through):
    task, autoencoder = make_task(plain), of_heads(plain)
    found = by_autograd(plain, task, autoencoder, through)
    scores, heads = latents(plain, task, autoencoder, through=through), plain.config.n_heads
    by_layer = [found[heads * layer : heads * (layer + 1)] for layer in range(plain.config.n_layers)]
    expected = [torch.cat([*(own for own, _ in layer), sum(error for _, error in layer)[None]]) for layer in by_layer]
    np.testing.assert_allclose(scores.values, torch.cat(expected), atol=1e-12)
    assert scores.names[D_SAE + 1] == f"f0.{D_SAE + 1}"
    assert scores.names[heads * D_SAE] == "f0.error"


def test_the_gradient_through_latents_leaves_errors_out(plain, make_task):
    """Without latents nothing passes a later layer but its error; for a perfect autoencoder both ways are the same."""
    task, autoencoder = make_task(plain), identity(plain)
    ways = [latents(plain, task, autoencoder, through=through).values for through in ("model", "latents")]
    np.testing.assert_allclose(*ways, atol=1e-12)
    ways = [latents(plain, task, of_layers(plain), through=through).values for through in ("model", "latents")]
    assert np.abs(ways[0] - ways[1]).max() > 1e-3 * np.abs(ways[0]).max()
    np.testing.assert_allclose(*(way[-D_SAE - 1 :] for way in ways), atol=1e-12)  # nothing is behind the last layer


def fall_of_patching(model, task, layer):
    """What replacing a layer's whole z by the corrupted one costs each prompt."""
    prompts, site = task.prompts, Site("z", layer)
    _, other = model.run(prompts.corrupted, record=[site])
    runs = [model.run(prompts.clean, patch=p, logits_at=prompts.end)[0] for p in ({}, {site: lambda *_: other[site]})]
    return (task.metric(runs[0], prompts) - task.metric(runs[1], prompts)).numpy()


@pytest.mark.parametrize("make", [of_layers, of_heads])
def test_integrated_gradients_sum_to_what_patching_the_layer_does(plain, make_task, make):
    task = make_task(plain, "prob_diff")
    exact = np.stack([fall_of_patching(plain, task, layer) for layer in range(plain.config.n_layers)], 1)
    off = [
        np.abs(layer_sums(latents(plain, task, make(plain), steps=steps, keep_prompts=True)) - exact).max() for steps in (4, 40)
    ]
    assert off[1] < 1e-4 * np.abs(exact).max()
    assert off[1] < off[0] / 20  # midpoints: the square of the step


def test_integrated_gradients_of_a_layer_see_only_latents_of_later_ones(plain, make_task):
    task, autoencoder = make_task(plain), identity(plain)
    ways = [latents(plain, task, autoencoder, steps=3, through=through).values for through in ("model", "latents")]
    np.testing.assert_allclose(*ways, atol=1e-12)


def replaced_parts(model, task, autoencoder, ablation):
    """By the definitions: each place's latents and error under an ablation."""
    prompts = task.prompts
    _, other = model.run(prompts.corrupted, record=["z"])
    x = autoencoder.read(other)
    found = autoencoder.encode(x)
    parts = found, x - autoencoder.decode(found)
    if ablation == "zero":
        parts = tuple(torch.zeros_like(part) for part in parts)
    if ablation == "mean":
        parts = tuple(torch.stack([alike(prompts, own) for own in part]) for part in parts)
    return [dict(zip(autoencoder.places, part, strict=True)) for part in parts]


def fall_of_one(model, task, autoencoder, name, share, ablation):
    """What moving one latent, or one layer's errors, ``share`` of the way to its replacement costs."""
    node, prompts, (latents, errors) = Node.parse(name), task.prompts, replaced_parts(model, task, autoencoder, ablation)
    here = [place for place in autoencoder.places if place.layer == node.layer]
    own = autoencoder.group(*here)

    def moved(place, found):
        one = (torch.arange(D_SAE) == node.index % D_SAE) & (place == here[node.index // D_SAE])
        return found + share * one * (latents[place] - found)

    def of_errors(z, _):
        x = torch.stack([place.part(z) for place in here])
        for place, part, missed in zip(here, x, x - own.reconstruct(x), strict=True):
            z = place.write(z, part + share * (errors[place] - missed))
        return z

    patch = {here[0].site: of_errors} if node.kind == "error" else spliced(own, with_error=True, edit=moved)
    runs = [model.run(prompts.clean, patch=p, logits_at=prompts.end)[0] for p in ({}, patch)]
    return float((task.metric(runs[0], prompts) - task.metric(runs[1], prompts)).mean())


@pytest.mark.parametrize(("make", "ablation"), CASES)
def test_chosen_latents_cost_what_an_edited_splice_measures(model, make_task, make, ablation):
    task, autoencoder = make_task(model, n_prompts=6), make(model)
    measured = exact_latents(model, task, autoencoder, ["f2.7", "f0.3", "f1.0", "f0.3", "f1.error"], ablation=ablation)
    assert [str(node) for node in measured] == ["f0.3", "f1.0", "f1.error", "f2.7"]
    for node, fall in measured.items():
        assert fall == pytest.approx(fall_of_one(model, task, autoencoder, str(node), 1.0, ablation), abs=1e-12)


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
@pytest.mark.parametrize("make", [of_layers, of_heads])
def test_a_score_is_the_derivative_of_replacing_a_part(plain, make_task, make, ablation):
    task, autoencoder, little = make_task(plain, "prob_diff", n_prompts=6), make(plain), 1e-4
    scores = latents(plain, task, autoencoder, ablation=ablation)
    for item in (0, 5, D_SAE, len(scores) - 2, len(scores) - 1):
        ends = [fall_of_one(plain, task, autoencoder, scores.names[item], s, ablation) for s in (little, -little)]
        slope = (ends[0] - ends[1]) / (2 * little)
        assert scores.values[item] == pytest.approx(slope, rel=1e-4, abs=1e-4 * np.abs(scores.values).max())


def test_spans_sum_to_the_scores(plain, make_task):
    task, autoencoder = make_task(plain), of_heads(plain)
    scores = latents(plain, task, autoencoder, keep_positions=True)
    np.testing.assert_allclose(sum(scores.by_span.values()), latents(plain, task, autoencoder).values, atol=1e-12)


def test_neither_batches_nor_parts_change_a_score(plain, make_task, monkeypatch, tmp_path):
    task, autoencoder = make_task(plain), of_layers(plain)
    for settings in ({"steps": 3}, {"ablation": "mean"}):
        whole = latents(plain, task, autoencoder, keep_prompts=True, **settings)
        with monkeypatch.context() as patch:
            patch.setattr("circuits.discovery.backward._TOKENS_AT_ONCE", 14)
            patch.setattr("circuits.latent_replacement._TOKENS_AT_ONCE", 14)
            pieces = latents(plain, task, autoencoder, keep_prompts=True, batch_size=3, resume=tmp_path, **settings)
        np.testing.assert_allclose(pieces.per_prompt, whole.per_prompt, atol=1e-12)
        assert latents(plain, task, autoencoder, keep_prompts=True, batch_size=3, resume=tmp_path, **settings) == pieces
    other = latents(plain, task, of_layers(plain, kind="topk"), batch_size=3, resume=tmp_path, ablation="mean")
    assert not np.allclose(other.values, whole.values)  # another autoencoder's batches are not taken for this one's


def test_autoencoder_and_model_may_differ_in_precision(plain, make_task):
    task, autoencoder = make_task(plain), of_layers(plain)
    single = autoencoder.to(dtype=torch.float32)
    for settings in ({}, {"steps": 2}, {"through": "latents"}):
        scores, rounded = (latents(plain, task, a, **settings) for a in (autoencoder, single))
        np.testing.assert_allclose(rounded.values, scores.values, atol=1e-5)
        circuits = [latent_circuit(plain, task, a, s, 6) for a, s in ((autoencoder, scores), (single, rounded))]
        weights = [{edge: circuit.edges[edge]["weight"] for edge in circuit.edges} for circuit in circuits]
        assert weights[1] == pytest.approx(weights[0], abs=1e-5)
    exact = [exact_latents(plain, task, a, ["f1.3", "f0.error"]) for a in (autoencoder, single)]
    assert exact[1] == pytest.approx(exact[0], abs=1e-5)
    reports = [evaluate_latents(plain, task, a, ["f1.3", "f0.error"], allow_undefined=True) for a in (autoencoder, single)]
    assert reports[1].circuit == pytest.approx(reports[0].circuit, abs=1e-5)


def test_scores_are_saved_and_loaded(plain, make_task, tmp_path):
    scores = discover(plain, make_task(plain), sparse_features(of_layers(plain), steps=2), allow_unsolved=True)
    scores.save(tmp_path / "scores.json")
    again = Scores.load(tmp_path / "scores.json")
    assert again == scores
    assert again.items == "latent"
    assert again.method == "latents-ig"
    assert again.names == tuple(f"f{layer}.{i}" for layer in range(3) for i in (*range(D_SAE), "error"))
    with pytest.raises(CircuitError, match="these are latent scores"):
        scores.top(3)
    with pytest.raises(CircuitError, match="how many latents each layer has"):
        Scores(scores.wiring, scores.values, method="m", unit="u", model="m", task="t", items="latent")


def test_an_autoencoder_of_some_layers_and_heads_scores_these(plain, make_task):
    task, some = make_task(plain), [Place.parse(name) for name in ("z.2.h1", "z.0.h2")]
    scores, every = (latents(plain, task, a, keep_prompts=True) for a in (of_heads(plain).group(*some), of_heads(plain)))
    assert scores.names == tuple(f"f{layer}.{i}" for layer in (0, 2) for i in (*range(3 * D_SAE), "error"))
    known, wide = (dict(zip(s.names, s.values, strict=True)) for s in (scores, every))
    for layer, head in ((0, 2), (2, 1)):
        for i in range(3 * D_SAE):
            expected = wide[f"f{layer}.{i}"] if i // D_SAE == head else 0.0
            assert known[f"f{layer}.{i}"] == pytest.approx(expected, abs=1e-14)
    heads = of_heads_in(attribution(plain, task, keep_prompts=True))
    np.testing.assert_allclose(layer_sums(scores), heads[:, [0, 2]], atol=1e-12)


@pytest.mark.parametrize("steps", [None, 5])
def test_the_heads_of_a_known_circuit_come_first(steps):
    planted = induction(n_prompts=8)
    model, width = planted.model, planted.model.config.d_head
    scores = discover(model, planted.task, sparse_features(identity(model), steps=steps))

    def head(name):
        node = Node.parse(name)
        return f"a{node.layer}.h{node.index % (model.config.n_heads * width) // width}"

    values = dict(zip(scores.names, scores.values, strict=True))
    strong = {name for name, value in values.items() if abs(value) > 1e-4}
    assert {head(name) for name in strong} == set(planted.roles.values())
    exact = exact_latents(model, planted.task, identity(model), strong)
    ranked = sorted(strong, key=lambda name: -values[name])
    np.testing.assert_allclose([exact[Node.parse(name)] for name in ranked[:10]], [values[n] for n in ranked[:10]], rtol=1e-3)


@pytest.mark.parametrize(("make", "ablation"), CASES)
def test_edges_out_of_a_part_sum_to_its_score(model, make_task, make, ablation):
    task, autoencoder = make_task(model), make(model)
    scores = latents(model, task, autoencoder, ablation=ablation)
    circuit = latent_circuit(model, task, autoencoder, scores, len(scores))
    assert isinstance(circuit, Circuit)
    for name, score in zip(scores.names, scores.values, strict=True):
        node = Node.parse(name)
        assert circuit.nodes[node]["score"] == score
        out = sum(weight for _, _, weight in circuit.out_edges(node, data="weight"))
        assert out == pytest.approx(score, abs=1e-12)
    whole = attribution(model, task, ablation=ablation)
    of_input = sum(weight for _, _, weight in circuit.out_edges(Node.input(), data="weight"))
    assert of_input == pytest.approx(whole.values[0], abs=1e-12)


def test_with_errors_as_leaves_no_edge_enters_them_and_sums_hold(plain, make_task):
    task, autoencoder = make_task(plain), of_layers(plain)
    scores = latents(plain, task, autoencoder, through="latents")
    circuit = latent_circuit(plain, task, autoencoder, scores, len(scores))
    assert not [edge for edge in circuit.edges if edge[1].kind == "error"]
    for name, score in zip(scores.names, scores.values, strict=True):
        out = sum(weight for _, _, weight in circuit.out_edges(Node.parse(name), data="weight"))
        assert out == pytest.approx(score, abs=1e-12)


def test_fewer_parts_keep_the_weights_of_their_edges(plain, make_task, monkeypatch):
    task, autoencoder = make_task(plain), of_layers(plain)
    scores = latents(plain, task, autoencoder, steps=2)
    whole = latent_circuit(plain, task, autoencoder, scores, len(scores))
    monkeypatch.setattr("circuits.discovery.backward._TOKENS_AT_ONCE", 14)
    circuit = latent_circuit(plain, task, autoencoder, scores, 6)
    assert {str(node) for node in circuit} == {"input", "logits", *(name for name, _ in scores.strongest(6))}
    for writer, reader, weight in circuit.edges(data="weight"):
        assert weight == pytest.approx(whole.edges[writer, reader]["weight"], abs=1e-12)
    few = latent_circuit(plain, task, autoencoder, scores, 6, n_edges=4)
    strongest = sorted((abs(weight) for _, _, weight in circuit.edges(data="weight")), reverse=True)
    assert sorted((abs(w) for _, _, w in few.edges(data="weight")), reverse=True) == strongest[:4]
    threshold = abs(scores.strongest(6)[-1][1])
    assert set(latent_circuit(plain, task, autoencoder, scores, threshold=threshold)) == set(circuit)


@pytest.mark.parametrize("suffix", ["json", "graphml", "gexf", "node-link.json"])
def test_a_circuit_of_latents_is_written_and_read(plain, make_task, tmp_path, suffix):
    task, autoencoder = make_task(plain), of_layers(plain)
    scores = latents(plain, task, autoencoder)
    circuit = latent_circuit(plain, task, autoencoder, scores, 10)
    assert any(node.kind == "error" for node in circuit)
    assert json.loads(circuit.graph["settings"])["through"] == "model"
    circuit.save(tmp_path / f"circuit.{suffix}")
    again = Circuit.load(tmp_path / f"circuit.{suffix}")
    assert again.nodes(data=True) == circuit.nodes(data=True)
    assert dict(again.edges) == dict(circuit.edges)
    assert again.graph == circuit.graph


def test_a_circuit_of_latents_is_drawn(plain, make_task, tmp_path):
    task, autoencoder = make_task(plain), of_layers(plain)
    circuit = latent_circuit(plain, task, autoencoder, latents(plain, task, autoencoder), 10)
    for suffix in ("svg", "dot"):
        circuit.save(tmp_path / f"circuit.{suffix}")
        text = (tmp_path / f"circuit.{suffix}").read_text()
        assert all(str(node) in text for node in circuit)
    assert "error" in repr(circuit)
    assert "latents" in repr(circuit)


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
@pytest.mark.parametrize("make", [of_layers, of_heads])
def test_everything_kept_is_the_model_and_nothing_kept_the_replaced_run(model, make_task, make, ablation):
    task, autoencoder = make_task(model, n_prompts=6), make(model)
    names = latents(model, task, autoencoder).names
    some = {"ablation": ablation, "allow_undefined": True}
    every, none = (evaluate_latents(model, task, autoencoder, kept, **some) for kept in (names, []))
    assert (every.faithfulness, every.interval, every.complement) == (1.0, (1.0, 1.0), 0.0)
    assert (none.faithfulness, none.interval, none.complement) == (0.0, (0.0, 0.0), 1.0)
    assert (every.n_latents + every.n_errors, none.n_latents + none.n_errors) == (len(names), 0)
    prompts = task.prompts
    assert every.circuit == pytest.approx(
        float(task.metric(model.run(prompts.clean, logits_at=prompts.end)[0], prompts).mean())
    )
    if ablation == "resample":
        _, other = model.run(prompts.corrupted, record=["z"])
        patch = {site: lambda *_, z=z: z for site, z in other.items()}
        replaced = task.metric(model.run(prompts.clean, patch=patch, logits_at=prompts.end)[0], prompts)
        assert none.circuit == pytest.approx(float(replaced.mean()), abs=1e-12)


def test_one_layer_kept_is_that_layer_unpatched(plain, make_task):
    task, autoencoder, prompts = make_task(plain), of_heads(plain), make_task(plain).prompts
    kept = [name for name in latents(plain, task, autoencoder).names if name.startswith("f1.")]
    report = evaluate_latents(plain, task, autoencoder, kept, allow_undefined=True)
    _, other = plain.run(prompts.corrupted, record=["z"])
    patch = {site: lambda *_, z=z: z for site, z in other.items() if site.layer != 1}
    expected = task.metric(plain.run(prompts.clean, patch=patch, logits_at=prompts.end)[0], prompts)
    assert report.circuit == pytest.approx(float(expected.mean()), abs=1e-12)


def test_latents_left_out_are_written_over_what_the_run_encodes(plain, make_task):
    """Against splices: latents 0 to 3 of every layer are kept, and all errors of the clean *run in hand*."""
    task, autoencoder, prompts = make_task(plain), of_layers(plain), make_task(plain).prompts
    _, other = plain.run(prompts.corrupted, record=["z"])
    replaced = dict(zip(autoencoder.places, autoencoder.encode(autoencoder.read(other)), strict=True))
    patch = spliced(autoencoder, with_error=True, edit=lambda at, f: torch.where(torch.arange(D_SAE) < 4, f, replaced[at]))
    expected = float(task.metric(plain.run(prompts.clean, patch=patch, logits_at=prompts.end)[0], prompts).mean())
    kept = [f"f{layer}.{i}" for layer in range(3) for i in range(4)]
    by_hand = evaluate_latents(plain, task, autoencoder, [*kept, "f0.error", "f1.error", "f2.error"], allow_undefined=True)
    assert by_hand.circuit == pytest.approx(expected, abs=1e-12)
    keep = evaluate_latents(plain, task, autoencoder, kept, errors="keep", allow_undefined=True)
    assert (keep.circuit, keep.n_latents, keep.n_errors) == (by_hand.circuit, 12, 3)
    remove = evaluate_latents(plain, task, autoencoder, [*kept, "f0.error"], errors="remove", allow_undefined=True)
    chosen = evaluate_latents(plain, task, autoencoder, kept, allow_undefined=True)
    assert (remove.circuit, remove.n_errors) == (chosen.circuit, 0)


def test_the_curve_of_a_known_circuit_climbs_to_one():
    planted = induction(n_prompts=8)
    autoencoder = identity(planted.model)
    scores = latents(planted.model, planted.task, autoencoder)
    few, many, every = latent_curve(planted.model, planted.task, autoencoder, scores, [2, 60, len(scores)])
    assert few.faithfulness < 0.5
    assert many.faithfulness == pytest.approx(1.0, abs=1e-4)
    assert many.complement == pytest.approx(0.0, abs=1e-4)
    assert (every.faithfulness, every.n_errors) == (1.0, 2)
    circuit = latent_circuit(planted.model, planted.task, autoencoder, scores, 60)
    assert evaluate_latents(planted.model, planted.task, autoencoder, circuit) == many


def test_what_does_not_fit_is_refused_with_a_remedy(plain, make_model, make_task):
    task, autoencoder = make_task(plain), of_layers(plain)
    scores = latents(plain, task, autoencoder)
    with pytest.raises(SAEError, match=r"stands at 'resid_post.0'. Train one on 'z'"):
        latents(plain, task, of_layers(plain, places=[Place.parse("resid_post.0")]))
    with pytest.raises(SAEError, match="two autoencoders at one place"):
        latents(plain, task, autoencoder.group(0, 0))
    with pytest.raises(SAEError, match="reads 15 numbers"):
        latents(make_model(d_head=4), task, autoencoder)
    with pytest.raises(CircuitError, match="'model', 'latents', not through='errors'"):
        latents(plain, task, autoencoder, through="errors")
    with pytest.raises(CircuitError, match="at least one step"):
        latents(plain, task, autoencoder, steps=0)
    with pytest.raises(CircuitError, match="cannot be replaced by 'custom:half'.*Use 'resample'"):
        latents(plain, task, autoencoder, ablation=half)
    with pytest.raises(TaskError, match="no gradient"):
        latents(plain, make_task(plain, "is_preferred"), autoencoder)
    for name in ("f3.0", f"f0.{D_SAE}", "m1", "f1.error@2", "a0.h0"):
        with pytest.raises(UnknownNode, match=r"f0.0 to f0.7 and f0.error"):
            exact_latents(plain, task, autoencoder, [name])
    with pytest.raises(CircuitError, match="another autoencoder"):
        latent_circuit(plain, task, of_layers(plain, kind="topk"), scores, 3)
    with pytest.raises(CircuitError, match="these are node scores"):
        latent_circuit(plain, task, autoencoder, attribution(plain, task), 3)
    for wrong in ({}, {"n": 2, "threshold": 0.1}):
        with pytest.raises(CircuitError, match="n=50 or threshold"):
            latent_circuit(plain, task, autoencoder, scores, **wrong)
    for wrong in ({"n": 0}, {"threshold": 1e9}):
        with pytest.raises(CircuitError, match="no circuit of 0 latents"):
            latent_circuit(plain, task, autoencoder, scores, **wrong)
    with pytest.raises(CircuitError, match="'chosen', 'keep', 'remove'"):
        evaluate_latents(plain, task, autoencoder, [], errors="all")
    with pytest.raises(TaskError, match="faithfulness is undefined"):
        evaluate_latents(plain, make_task(plain, changed=(6,)), autoencoder, [])


def half(model, prompts):
    return resample(model, prompts).map(lambda x: x / 2)
