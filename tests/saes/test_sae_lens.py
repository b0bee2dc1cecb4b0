"""SAELens' autoencoders are ours and ours are SAELens': the same latents and reconstructions on both sides."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mechinterp.errors import SAEError
from saes.base import KINDS, SparseAutoencoder
from saes.files import load, save
from saes.places import Place
from saes.pursuit import Pursuit
from saes.sae_lens import from_sae_lens, to_sae_lens

HEADS, D_HEAD, D_SAE = 3, 4, 20
TOPK = {"k": 4}
INFERENCE = {
    "standard": ("StandardSAE", {}),
    "gated": ("GatedSAE", {}),
    "topk": ("TopKSAE", TOPK),
    "topk ranked by decoder norm": ("TopKSAE", TOPK | {"rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("JumpReLUSAE", {}),
    "abstopk": ("AbsTopKSAE", TOPK),
    "abstopk ranked by decoder norm": ("AbsTopKSAE", TOPK | {"rescale_acts_by_decoder_norm": True}),
    "matching_pursuit": ("MatchingPursuitSAE", {"max_iterations": 5, "residual_threshold": 0.5}),
}
TRAINING = {
    "standard": ("StandardTrainingSAE", {}),
    "gated": ("GatedTrainingSAE", {}),
    "topk": ("TopKTrainingSAE", TOPK),
    "topk not ranked by decoder norm": ("TopKTrainingSAE", TOPK | {"rescale_acts_by_decoder_norm": False}),
    "batchtopk": ("BatchTopKTrainingSAE", {"k": 3.5}),
    "batchtopk not ranked by decoder norm": ("BatchTopKTrainingSAE", TOPK | {"rescale_acts_by_decoder_norm": False}),
    "matryoshka_batchtopk": ("MatryoshkaBatchTopKTrainingSAE", TOPK | {"matryoshka_widths": [5, 20]}),
    "jumprelu": ("JumpReLUTrainingSAE", {}),
    "abstopk": ("AbsTopKTrainingSAE", TOPK),
    "matching_pursuit": ("MatchingPursuitTrainingSAE", {"decoder_init_norm": 1.0}),
}
SWITCHES = {
    "plain": {},
    "b_dec not subtracted": {"apply_b_dec_to_input": False},
    "constant norm": {"normalize_activations": "constant_norm_rescale"},
    "layer norm": {"normalize_activations": "layer_norm"},
    "layer norm, b_dec not subtracted": {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False},
}
PLACES = {"all heads": ("z.1", HEADS * D_HEAD), "one head": ("z.1.h2", D_HEAD), "residual stream": ("resid_post.1", 6)}


@pytest.fixture(scope="module")
def lens_saes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sae_lens")


@pytest.fixture
def make(lens_saes):
    """``make("TopKSAE", "z.1.h2", k=4)``: an autoencoder of SAELens, every parameter random."""

    def made(name, place="z.1", **facts):
        from sae_lens.saes.sae import SAEMetadata

        at = Place.parse(place)
        metadata = SAEMetadata(hook_name=at.site.hook_name, hook_head_index=at.head, model_name="random", l0=3.5)
        reshape = "hook_z" if place == "z.1" else "none"
        d_in = dict(PLACES.values())[place]
        config = getattr(lens_saes, f"{name}Config")
        sae = getattr(lens_saes, name)(
            config(**({"d_in": d_in, "d_sae": D_SAE, "reshape_activations": reshape, "metadata": metadata} | facts))
        )
        generator = torch.Generator().manual_seed(3)
        for own, parameter in sae.named_parameters():
            size = 0.1 if own == "threshold" else 0.5
            parameter.data = size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if own == "threshold":
                parameter.data.abs_()
        if name.startswith("Matching"):  # longer rows than 1 make a residual grow
            sae.W_dec.data /= sae.W_dec.data.norm(dim=-1, keepdim=True)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.6)
        return sae.requires_grad_(False)

    return made


def assert_equal(ours: SparseAutoencoder, theirs, at_most: float = 1e-5):
    x = torch.randn(2, 7, ours.d_in, generator=torch.Generator().manual_seed(4))
    given = x.unflatten(-1, (HEADS, D_HEAD)) if theirs.hook_z_reshaping_mode else x
    latents, wanted = ours.encode(x.unsqueeze(0))[0], theirs.encode(given)
    assert 0 < (wanted != 0).float().mean() < 1
    assert (latents - wanted).abs().max() < at_most
    assert (ours.reconstruct(x.unsqueeze(0))[0] - theirs(given).reshape(x.shape)).abs().max() < at_most


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("architecture", INFERENCE)
def test_what_sae_lens_saves_for_use_computes_the_same_here(architecture, switches, make, tmp_path):
    name, facts = INFERENCE[architecture]
    theirs = make(name, **facts, **SWITCHES[switches])
    theirs.save_model(tmp_path / "sae")
    assert_equal(load(tmp_path / "sae"), theirs)
    assert_equal(from_sae_lens(theirs), theirs)


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("architecture", TRAINING)
def test_what_sae_lens_saves_in_training_form_computes_the_same_here(architecture, switches, make, tmp_path, lens_saes):
    """Batch top-k has no latents of its own outside a batch: like all of them it is held against its inference form."""
    name, facts = TRAINING[architecture]
    theirs = make(name, **facts, **SWITCHES[switches])
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "inference")
    used = lens_saes.SAE.load_from_disk(tmp_path / "inference")
    for found in (from_sae_lens(theirs), load(tmp_path / "training"), load(tmp_path / "inference")):
        assert_equal(found, used)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("architecture", INFERENCE)
def test_an_autoencoder_stands_where_it_says(architecture, place, make, tmp_path):
    name, facts = INFERENCE[architecture]
    theirs = make(name, PLACES[place][0], **facts)
    theirs.save_model(tmp_path / "sae")
    ours = load(tmp_path / "sae")
    assert [str(at) for at in ours.places] == [PLACES[place][0]]
    assert (ours.about["model"], ours.about["sae_lens"]["l0"]) == ("random", 3.5)
    assert_equal(ours, theirs)


def random_of(kind: str, place: str = "z.1", **facts) -> SparseAutoencoder:
    if kind in ("topk", "abstopk"):
        facts["k"] = 4
    if kind == "matching_pursuit":
        facts["pursuit"] = Pursuit(0.3, 6, False)
    sized = SparseAutoencoder.random([Place.parse(place)], d_in=dict(PLACES.values())[place], d_sae=D_SAE, kind=kind, **facts)
    generator = torch.Generator().manual_seed(5)
    random = {name: 0.5 * torch.randn(tensor.shape, generator=generator) for name, tensor in sized.tensors.items()}
    if "threshold" in random:
        random["threshold"].abs_()
    if kind == "matching_pursuit":
        random["W_dec"] /= random["W_dec"].norm(dim=-1, keepdim=True)
        random |= {"W_enc": random["W_dec"].mT.contiguous(), "b_enc": torch.zeros(1, D_SAE)}
    return replace(sized, **random)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("normalize", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_ours_is_read_by_sae_lens_and_again_by_us(kind, normalize, place, tmp_path, lens_saes):
    about = {"model": "random", "tokens": 12, "losses": [1.5, 0.5], "nested": {"of": None}}
    ours = random_of(kind, PLACES[place][0], normalize=normalize, about=about)
    save(ours, tmp_path / "sae")
    theirs = lens_saes.SAE.load_from_disk(tmp_path / "sae")
    assert_equal(ours, theirs)
    assert_equal(ours, to_sae_lens(ours))
    at = Place.parse(PLACES[place][0])
    assert theirs.cfg.metadata.hook_name == at.site.hook_name
    assert (theirs.cfg.metadata.hook_head_index, theirs.cfg.metadata.model_name) == (at.head, "random")
    again = load(tmp_path / "sae")
    assert (again.kind, again.places, again.about, again.k, again.pursuit) == (kind, ours.places, about, ours.k, ours.pursuit)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in ours.tensors.items())
    assert again.normalize == normalize


def test_a_live_autoencoder_keeps_double_precision_and_shares_no_memory(lens_saes):
    ours = random_of("gated").to(dtype=torch.float64)
    theirs = to_sae_lens(ours)
    assert theirs.W_dec.dtype == torch.float64
    back = from_sae_lens(theirs)
    theirs.W_dec.data.zero_()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in ours.tensors.items())


def test_several_groups_are_no_single_autoencoder_of_sae_lens():
    both = SparseAutoencoder.random([Place.parse("z.0.h0"), Place.parse("z.0.h1")], d_in=4, d_sae=8)
    with pytest.raises(SAEError, match=r"group\('z.0.h0'\)"):
        to_sae_lens(both)


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_one_that_sae_lens_trains_in_the_same_notebook(normalize, make, lens_saes, tmp_path):
    theirs = make("TopKTrainingSAE", "z.1", **TOPK, normalize_activations=normalize).requires_grad_(True)
    acts = torch.randn(512, HEADS * D_HEAD, generator=torch.Generator().manual_seed(6))

    def batches():
        while True:
            yield from acts.split(64)

    config = lens_saes.config.SAETrainerConfig(
        total_training_samples=64 * 6, train_batch_size_samples=64, lr=1e-2, lr_end=1e-3, device="cpu", n_checkpoints=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = lens_saes.SAETrainer(config, theirs, batches()).fit()
    ours = from_sae_lens(trained)
    trained.save_model(tmp_path / "training")
    trained.save_inference_model(tmp_path / "inference")
    used = lens_saes.SAE.load_from_disk(tmp_path / "inference")
    for found in (ours, load(tmp_path / "training"), load(tmp_path / "inference")):
        assert_equal(found, used)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", ["StandardTrainingSAE", "BatchTopKTrainingSAE", "MatchingPursuitTrainingSAE"])
def test_the_scale_of_a_checkpoint_in_mid_training_is_folded(name, rescale, make, lens_saes, tmp_path):
    facts = TOPK | {"rescale_acts_by_decoder_norm": rescale} if name.startswith("Batch") else {}
    facts |= {"decoder_init_norm": 1.0} if name.startswith("Matching") else {}
    theirs = make(name, **facts, normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path / "sae")
    with pytest.warns(UserWarning, match="expected_average_only_in"):
        load(tmp_path / "sae")
    live = from_sae_lens(theirs, scale=1.7)
    (tmp_path / "sae" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 1.7, "has_whitening": False}))
    theirs.fold_activation_norm_scaling_factor(1.7)
    theirs.save_inference_model(tmp_path / "inference")
    used = lens_saes.SAE.load_from_disk(tmp_path / "inference")
    for found in (live, load(tmp_path / "sae")):
        assert_equal(found, used)
    with pytest.raises(SAEError, match="Leave `scale` out"):
        load(tmp_path / "inference", scale=1.7)


def rewrite(folder, change=None, tensors=None):
    """The folder with its configuration, or its tensors, changed."""
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg = cfg if change is None else change(cfg)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    if tensors is not None:
        save_file(tensors(load_file(folder / "sae_weights.safetensors")), folder / "sae_weights.safetensors")


@pytest.mark.parametrize("hook", [("hook_point", "hook_point_head_index"), ("hook_name", "hook_head_index")])
def test_the_layout_before_sae_lens_6_is_read(hook, make, lens_saes, tmp_path):
    theirs = make("TopKSAE", "z.1.h2", **TOPK)
    theirs.save_model(tmp_path / "sae")

    def older(cfg):
        facts = {name: cfg[name] for name in ("d_in", "d_sae", "dtype", "apply_b_dec_to_input")}
        facts |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "normalize_activations": False}
        return facts | {hook[0]: "blocks.1.attn.hook_z", hook[1]: 2, "model_name": "random", "context_size": 128}

    def with_factor(tensors):
        return tensors | {"scaling_factor": torch.ones(D_SAE)}

    rewrite(tmp_path / "sae", older, with_factor)
    ours = load(tmp_path / "sae")
    assert str(ours.places[0]) == "z.1.h2"
    assert ours.about == {"model": "random", "sae_lens": {"context_size": 128}}
    assert_equal(ours, theirs)


def test_thresholds_were_logarithms_once(make, tmp_path):
    theirs = make("JumpReLUTrainingSAE")
    theirs.save_model(tmp_path / "sae")
    rewrite(
        tmp_path / "sae",
        tensors=lambda t: {("log_" * (n == "threshold")) + n: x.log() if n == "threshold" else x for n, x in t.items()},
    )
    assert_equal(load(tmp_path / "sae"), theirs)


def test_a_finetuned_factor_scales_decoder_rows(make, tmp_path):
    theirs = make("StandardSAE")
    factor = torch.linspace(0.5, 2, D_SAE)
    theirs.save_model(tmp_path / "sae")
    rewrite(tmp_path / "sae", tensors=lambda tensors: tensors | {"scaling_factor": factor})
    with pytest.raises(SAEError, match="does not use it"):
        load(tmp_path / "sae")
    rewrite(tmp_path / "sae", lambda cfg: cfg | {"finetuning_scaling_factor": True})
    theirs.W_dec.data *= factor.unsqueeze(1)
    assert_equal(load(tmp_path / "sae"), theirs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_single(dtype, make, tmp_path):
    theirs = make("TopKSAE", **TOPK, dtype=dtype)
    theirs.save_model(tmp_path / "sae")
    ours = load(tmp_path / "sae")
    assert {tensor.dtype for tensor in ours.tensors.values()} == {torch.float32}
    assert_equal(ours, theirs.to(torch.float32))


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "temporal", "a plug-in"])
def test_other_architectures_are_refused_by_name(architecture, make, tmp_path):
    make("StandardSAE").save_model(tmp_path / "sae")
    rewrite(tmp_path / "sae", lambda cfg: cfg | {"architecture": architecture})
    with pytest.raises(SAEError, match=f"'{architecture}', and no autoencoder of one site"):
        load(tmp_path / "sae")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda cfg: cfg | {"normalize_activations": "covariance_whitening"}, "whitening is not folded"),
        (lambda cfg: cfg | {"normalize_activations": "batch"}, "no normalization 'batch'"),
        (lambda cfg: cfg | {"activation_fn": "tanh-relu"}, "activation function 'tanh-relu'"),
        (lambda cfg: cfg | {"d_sae": 21}, r"W_dec of .* \(20, 12\); with d_in=12 and d_sae=21 it is \(21, 12\)"),
        (lambda cfg: cfg | {"k": 0}, "k=0"),
        (lambda cfg: cfg | {"k": 99}, "sae'.*k=99 latents of 20"),
        (lambda cfg: cfg | {"d_in": None}, "d_in=None"),
        (lambda cfg: cfg | {"metadata": {}}, "place='z.5'"),
        (lambda cfg: cfg | {"metadata": {"hook_name": "model.layers.3"}}, "no place of ours"),
        (lambda cfg: cfg | {"metadata": {"hook_name": "blocks.1.hook_resid_pre", "hook_head_index": 1}}, "has no heads"),
    ],
)
def test_a_configuration_that_means_nothing_is_explained(change, says, make, tmp_path):
    make("TopKSAE", **TOPK).save_model(tmp_path / "sae")
    rewrite(tmp_path / "sae", change)
    with pytest.raises(SAEError, match=says):
        load(tmp_path / "sae")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: {name: x for name, x in tensors.items() if name != "b_enc"}, "lacks b_enc"),
        (lambda tensors: tensors | {"W_skip": torch.zeros(2)}, "has W_skip"),
        (lambda tensors: tensors | {"W_enc": tensors["W_enc"].mT.contiguous()}, "W_enc of"),
        (lambda tensors: tensors | {"b_dec": tensors["b_dec"] * torch.nan}, "b_dec of .* NaN"),
        (lambda tensors: tensors | {"b_dec": tensors["b_dec"].int()}, "b_dec of .* whole numbers"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, says, make, tmp_path):
    make("StandardSAE").save_model(tmp_path / "sae")
    rewrite(tmp_path / "sae", tensors=change)
    with pytest.raises(SAEError, match=says):
        load(tmp_path / "sae")


def test_a_place_can_be_given_to_one_that_has_none(make, tmp_path):
    theirs = make("StandardSAE")
    theirs.save_model(tmp_path / "sae")
    rewrite(tmp_path / "sae", lambda cfg: cfg | {"metadata": {"sae_lens_version": "6.1.0"}})
    assert [str(at) for at in load(tmp_path / "sae", place="z.4").places] == ["z.4"]
    theirs.cfg.metadata.hook_name = None
    assert from_sae_lens(theirs, place=Place.parse("z.4")).places == (Place.parse("z.4"),)


def test_folders_of_sae_lens_together_are_one_autoencoder(make, tmp_path):
    """Sorted as a forward pass meets them, with what all of them say."""
    for name, head in (("a", 2), ("b", 0), ("c", 1)):
        theirs = make("StandardSAE", "z.1.h2")
        theirs.cfg.metadata.hook_head_index = head
        theirs.cfg.metadata.l0 = float(head)
        theirs.save_model(tmp_path / "saes" / name)
    (tmp_path / "saes" / "notes").mkdir()
    ours = load(tmp_path / "saes")
    assert [str(place) for place in ours.places] == ["z.1.h0", "z.1.h1", "z.1.h2"]
    assert ours.about["model"] == "random"
    assert "l0" not in ours.about["sae_lens"]
    make("GatedSAE", "z.1.h2").save_model(tmp_path / "saes" / "a")
    with pytest.raises(SAEError, match=r"saes/b' has kind='relu' and .*saes/a' kind='gated'"):
        load(tmp_path / "saes")
    shutil.rmtree(tmp_path / "saes" / "a")
    shutil.copytree(tmp_path / "saes" / "b", tmp_path / "saes" / "d")
    with pytest.raises(SAEError, match=r"both stand at 'z.1.h0'"):
        load(tmp_path / "saes")
