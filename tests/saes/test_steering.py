"""Steered latents: they move the activation by their decoder rows, where they are told to, and nothing else moves."""

import pytest
import torch

from mechinterp.errors import ModelError, SAEError, UnknownNode
from mechinterp.generation import generate
from mechinterp.interventions import combine, scale_heads
from mechinterp.nodes import Node
from saes.base import SparseAutoencoder
from saes.places import Place, each_head, each_layer
from saes.splice import spliced
from saes.steering import MODES, steer_latents

AT = torch.tensor([6, 3, 5, 4])
NEUTRAL = {"add": 0.0, "scale": 1.0}


def of(config, *places: Place, **facts) -> SparseAutoencoder:
    settings = {"kind": "topk", "k": 3} | facts
    made = SparseAutoencoder.random(places, d_in=places[0].width(config), d_sae=10, **settings)
    made.b_dec.copy_(0.1 * torch.randn(made.b_dec.shape, generator=torch.Generator().manual_seed(2)))
    return made.to(dtype=torch.float64)


@pytest.fixture(scope="module")
def layers(plain):
    return of(plain.config, *each_layer(plain.config))


@pytest.mark.parametrize("mode", NEUTRAL)
def test_nothing_added_and_once_as_much_change_nothing(mode, model, tokens):
    autoencoder = of(model.config, *each_layer(model.config))
    values = {"z.0": {2: NEUTRAL[mode]}, "z.2": dict.fromkeys(range(10), NEUTRAL[mode])}
    clean, _ = model.run(tokens)
    torch.testing.assert_close(model.run(tokens, patch=steer_latents(autoencoder, values, mode=mode))[0], clean)


def test_a_latent_that_is_raised_moves_the_activation_by_its_decoder_row(model, tokens):
    autoencoder = of(model.config, *each_layer(model.config))
    _, clean = model.run(tokens, record=["z"])
    _, cache = model.run(tokens, record=["z"], patch=steer_latents(autoencoder, {"f1.7": 3.0, "f1.2": -0.5}))
    moved = (3.0 * autoencoder.W_dec[1, 7] - 0.5 * autoencoder.W_dec[1, 2]).unflatten(0, (-1, 5))
    torch.testing.assert_close(cache["z", 1] - clean["z", 1], moved.expand_as(cache["z", 1]))
    torch.testing.assert_close(cache["z", 0], clean["z", 0])


def test_a_heads_latent_moves_that_head_alone(plain, tokens):
    heads = of(plain.config, *each_head(plain.config))
    _, clean = plain.run(tokens, record=["z.1"])
    _, cache = plain.run(tokens, record=["z.1"], patch=steer_latents(heads, {Place.parse("z.1.h2"): {4: 2.0}}))
    assert torch.equal(cache["z", 1][:, :, :2], clean["z", 1][:, :, :2])
    row = 2 * heads.W_dec[heads.index("z.1.h2"), 4]
    torch.testing.assert_close(cache["z", 1][:, :, 2] - clean["z", 1][:, :, 2], row.expand(4, 7, -1))


def test_a_latent_set_to_nothing_is_ablated(plain, layers, tokens):
    _, clean = plain.run(tokens, record=["z.1"])
    latents = layers.encode(layers.read(plain.run(tokens, record=["z"])[1]))[1]
    latent = int(latents.sum((0, 1)).argmax())
    _, cache = plain.run(tokens, record=["z.1"], patch=steer_latents(layers, {"z.1": {latent: 0.0}}, mode="set"))
    lost = (latents[..., latent, None] * layers.W_dec[1, latent]).unflatten(-1, (3, 5))
    torch.testing.assert_close(cache["z", 1], clean["z", 1] - lost)
    scaled, _ = plain.run(tokens, patch=steer_latents(layers, {"z.1": {latent: 0.0}}, mode="scale"))
    torch.testing.assert_close(scaled, plain.run(tokens, patch={"z.1": lambda value, _: cache["z", 1]})[0])


def test_a_latent_that_is_set_has_its_value_whatever_it_was(plain, layers, tokens):
    _, clean = plain.run(tokens, record=["z.1"])
    before = layers.group("z.1").encode(clean["z", 1].flatten(2)[None])[0, ..., 4]
    _, cache = plain.run(tokens, record=["z.1"], patch=steer_latents(layers, {"f1.4": 2.5}, mode="set"))
    moved = ((2.5 - before)[..., None] * layers.W_dec[1, 4]).unflatten(-1, (3, 5))
    torch.testing.assert_close(cache["z", 1] - clean["z", 1], moved)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_error", [True, False])
def test_elsewhere_than_its_position_everything_stays(with_error, mode, plain, layers, tokens):
    here = torch.arange(7) == AT[:, None]
    _, clean = plain.run(tokens, record=["z.1"])
    edits = {"with_error": with_error, "mode": mode}
    _, cache = plain.run(tokens, record=["z.1"], patch=steer_latents(layers, {"f1.4": 2.5}, at=AT, **edits))
    _, everywhere = plain.run(tokens, record=["z.1"], patch=steer_latents(layers, {"f1.4": 2.5}, **edits))
    assert torch.equal(cache["z", 1][~here], clean["z", 1][~here])
    assert torch.equal(cache["z", 1][here], everywhere["z", 1][here])


def test_without_the_error_the_steered_places_alone_are_reconstructed(plain, layers, tokens):
    nothing = steer_latents(layers, {"f1.0": 0.0}, with_error=False)
    torch.testing.assert_close(plain.run(tokens, patch=nothing)[0], plain.run(tokens, patch=spliced(layers.group("z.1")))[0])


def test_a_normalised_input_is_moved_in_its_own_measure(plain, tokens):
    autoencoder = of(plain.config, *each_layer(plain.config), normalize="layer_norm")
    _, clean = plain.run(tokens, record=["z.1"])
    _, cache = plain.run(tokens, record=["z.1"], patch=steer_latents(autoencoder, {"f1.7": 3.0}))
    deviation = clean["z", 1].flatten(2).std(-1, keepdim=True)
    moved = (3 * deviation * autoencoder.W_dec[1, 7]).unflatten(-1, (3, 5))
    torch.testing.assert_close(cache["z", 1] - clean["z", 1], moved)


def test_names_mean_the_same(plain, layers, tokens):
    ways = [{"f1.7": 3.0}, {Node.latent(1, 7): 3.0}, {"z.1": {7: 3.0}}, {"blocks.1.attn.hook_z": {7: 3.0}}]
    logits = [plain.run(tokens, patch=steer_latents(layers, way))[0] for way in ways]
    assert all(torch.equal(one, logits[0]) for one in logits)
    assert steer_latents(layers, {}) == {}


def test_steering_goes_with_other_interventions_and_while_text_grows(plain, layers, tokens):
    edit = combine(steer_latents(layers, {"f1.7": 30.0}, at=AT), scale_heads({"a1.h0": 0.0}))
    _, clean = plain.run(tokens, record=["z.1"])
    _, cache = plain.run(tokens, record=["z.1"], patch=edit)
    assert not cache["z", 1][:, :, 0].any()
    rows, moved = torch.arange(4), (30.0 * layers.W_dec[1, 7]).unflatten(0, (3, 5))
    torch.testing.assert_close(cache["z", 1][rows, AT, 1:], clean["z", 1][rows, AT, 1:] + moved[1:])
    first = plain.run(tokens, patch=edit, logits_at=AT)[0].argmax(-1)
    assert torch.equal(generate(plain, tokens, 2, ends=AT, patch=edit)[:, 0], first)


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"f1.10": 1.0}, SAEError, "latent 10 of 'z.1' is not there; it has latents 0..9"),
        ({"f7.1": 1.0}, SAEError, "no autoencoder here stands at 'z.7'"),
        ({"z.1.h0": {1: 1.0}}, SAEError, "no autoencoder here stands at 'z.1.h0'"),
        ({"z.1": 3.0}, SAEError, r"which latents of 'z.1' shall be 3.0\? Give \{17: 3.0\}"),
        ({"f1.3": {3: 1.0}}, SAEError, "is one latent and takes one value"),
        ({"f1.3": 1.0, "z.1": {3: 2.0}}, SAEError, "latent 3 of 'z.1' is given two values"),
        ({"f1.error": 1.0}, SAEError, "'f1.error' is no latent"),
        ({"f1.3@4": 1.0}, SAEError, "positions go into `at`"),
        ({"f1": 1.0}, UnknownNode, "'f1' is not the name of a node"),
    ],
)
def test_what_cannot_be_steered_is_said(layers, values, error, says):
    with pytest.raises(error, match=says):
        steer_latents(layers, values)


def test_an_unknown_mode_and_positions_that_are_not_there_are_said(plain, layers, tokens):
    with pytest.raises(SAEError, match="no mode 'sett'; there are add, set, scale.*Did you mean 'set'"):
        steer_latents(layers, {"f1.3": 1.0}, mode="sett")
    with pytest.raises(ModelError, match="positions 4..7 are wanted"):
        plain.run(tokens, patch=steer_latents(layers, {"f1.3": 1.0}, at=AT + 1))
