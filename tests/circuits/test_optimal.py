"""The best constant in a writer's place: never worse than the mean, and known where the model is simple enough."""

from dataclasses import replace

import pytest
import torch

from circuits.ablation import ABLATIONS, replacement_for
from circuits.discovery.eap import eap
from circuits.masked import run_node_mask
from circuits.optimal import fit_constants, optimal_ablation
from circuits.wiring import Wiring
from circuits.writes import Writes
from mechinterp.errors import CircuitError
from mechinterp.metrics import kl_divergence
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights


def losses(model, prompts, replacement):
    """The KL of the whole model from the one that lost each writer, the slow and obvious way."""
    whole, found = model.run(prompts.clean, logits_at=prompts.end)[0], []
    for writer in range(len(Wiring.of(model.config).writers)):
        kept = torch.ones(1, len(Wiring.of(model.config).writers))
        kept[0, writer] = 0
        found.append(kl_divergence(whole, run_node_mask(model, prompts, kept, replacement)).mean())
    return torch.stack(found)


def test_no_writer_is_missed_more_than_with_its_mean(model, make_task):
    prompts = make_task(model, n_prompts=8).prompts
    constants = fit_constants(model, prompts, steps=30)
    assert (constants.loss <= constants.loss_of_mean).all()
    assert (constants.loss < constants.loss_of_mean).float().mean() > 0.5
    assert constants.loss.sum() < 0.9 * constants.loss_of_mean.sum()
    torch.testing.assert_close(losses(model, prompts, constants(model, prompts)), constants.loss, rtol=1e-4, atol=1e-6)


def test_where_nothing_was_learnt_the_means_are_kept(plain, make_task):
    """Means over prompts and positions, padding left out: make_task's odd prompts end one position early."""
    prompts = make_task(plain).prompts
    constants = fit_constants(plain, prompts, steps=1, lr=0.0)
    writes = Writes.during(plain, prompts.clean)
    for value, written in zip(constants.values[1:3], (writes.z[0], writes.mlp_out[0]), strict=True):
        seen = torch.cat([row[: end + 1] for row, end in zip(written, prompts.end.tolist(), strict=True)])
        torch.testing.assert_close(value, seen.mean(0))
    torch.testing.assert_close(constants.loss, constants.loss_of_mean)


def test_the_best_constant_input_of_a_model_without_context_predicts_the_average(make_model, make_task):
    """Without heads, logits are linear in the input. The best constant then gives the mean of the predicted
    distributions, and its loss is their Jensen-Shannon divergence. The mean of the embeddings gives neither."""
    drawn = make_model("no_norm", n_layers=1, d_mlp=None, d_vocab=6, d_model=12)
    named = drawn.weights.named()
    named["blocks.0.attn.W_O"] = torch.zeros_like(named["blocks.0.attn.W_O"])
    model = Transformer(Weights.from_named(drawn.config, named)).to(dtype=torch.float64)
    prompts = make_task(model, n_prompts=12).prompts
    constants = fit_constants(model, prompts, steps=200, batch_size=48)
    p = model.run(prompts.clean, logits_at=prompts.end)[0].softmax(-1)
    average = p.mean(0)
    logits, _ = model.run(prompts.clean[:1], patch={"resid_post.0": lambda x, _: constants.values[0].expand_as(x)})
    biased = logits[0, -1] + drawn.weights.blocks[0].b_O.double() @ model.weights.W_U
    torch.testing.assert_close(biased.softmax(-1), average, atol=1e-2, rtol=0)
    divergence = (p * (p.log() - average.log())).sum(-1).mean()
    left, won = constants.loss[0] - divergence, constants.loss_of_mean[0] - constants.loss[0]
    assert 0 <= left < 0.05 * won
    torch.testing.assert_close(constants.loss[1:], torch.zeros_like(constants.loss[1:]))


def test_constants_are_the_same_at_all_positions_of_all_prompts(plain, make_task):
    prompts = make_task(plain).prompts
    writes = ABLATIONS["optimal"](plain, prompts)
    for tensor in (writes.input, *writes.z, *writes.mlp_out):
        torch.testing.assert_close(tensor, tensor[:1, :1].expand_as(tensor))


def test_a_seed_fixes_the_constants_and_corrupted_prompts_do_not_matter(plain, make_task):
    prompts = make_task(plain).prompts
    one, same, other = (fit_constants(plain, prompts, steps=3, batch_size=4, seed=seed) for seed in (0, 0, 1))
    without = fit_constants(plain, replace(prompts, corrupted=prompts.clean), steps=3, batch_size=4)
    for again in (same, without):
        assert all(torch.equal(a, b) for a, b in zip(one.values, again.values, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.values, other.values, strict=True))


def test_constants_can_be_fitted_on_other_prompts(plain, make_task):
    task, others = make_task(plain), make_task(plain, n_prompts=3, seed=1).prompts
    fitted = fit_constants(plain, others, steps=3)
    by_maker = replacement_for(plain, task, optimal_ablation(steps=3, fit_on=others))
    by_constants = replacement_for(plain, task, fitted)
    assert by_maker.name == by_constants.name == "custom:optimal"
    assert torch.equal(by_maker.writes.z[1], by_constants.writes.z[1])
    assert by_constants.writes.z[1].shape[0] == len(task)
    assert eap(plain, task, ablation=fitted).settings["ablation"] == "custom:optimal"


def test_constants_of_another_model_are_refused(plain, make_model, make_task):
    prompts = make_task(plain).prompts
    constants = fit_constants(plain, prompts, steps=1)
    with pytest.raises(CircuitError, match="fitted on a model of another shape"):
        constants(make_model(n_layers=2), prompts)
