"""Information-flow routes: shares of a whole, checked against a loop over single tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuits.agreement import ranking
from circuits.discovery.flow import information_flow
from circuits.wiring import Wiring
from circuits.writes import sites
from mechinterp.models.compiled import induction
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights


def silenced(model: Transformer, *names: str) -> Transformer:
    """The model with the weights of these names (``b_O``, ``W_E``) set to zero."""
    named = {name: tensor * (name.split(".")[-1] not in names) for name, tensor in model.weights.named().items()}
    return Transformer(Weights.from_named(model.config, named))


def by_reader(scores) -> np.ndarray:
    return np.bincount(scores.wiring.edge_reader, weights=scores.values)


def near(stream, part) -> float:
    return max(float(stream.abs().sum() - (stream - part).abs().sum()), 1e-6)


def by_hand(model: Transformer, task) -> np.ndarray:
    """One edge, one prompt, one token at a time, from the definition. Prompts are run without their padding."""
    config, wiring = model.config, Wiring.of(model.config)
    found = np.zeros((len(wiring.writers), len(wiring.readers)))
    names = [*sites(model), "resid_pre", "resid_post", *["resid_mid"] * (config.has_mlp and not config.parallel)]
    for row, end in zip(task.prompts.clean, task.prompts.end.tolist(), strict=True):
        _, cache = model.run(row[None, : end + 1], record=names)
        outputs = [cache.output(writer)[0] for writer in wiring.writers]
        for column, reader in enumerate(wiring.readers):
            if reader.kind == "logits":
                stream, n_layers, positions = cache["resid_post", config.n_layers - 1][0], config.n_layers, [end]
            else:
                after_heads = reader.kind == "mlp" and not config.parallel
                stream = cache["resid_mid" if after_heads else "resid_pre", reader.layer][0]
                n_layers, positions = reader.layer + after_heads, range(end + 1)
            biases = [block.b_O.expand_as(stream) for block in model.weights.blocks[:n_layers] if block.b_O.any()]
            parts = [*outputs[: wiring.writers_before[column]], *biases]
            torch.testing.assert_close(sum(parts), stream)
            for pos in positions:
                at = np.array([near(stream[pos], part[pos]) for part in parts])
                found[: wiring.writers_before[column], column] += (at / at.sum() / len(positions))[: len(parts) - len(biases)]
    return wiring.vector(found / len(task))


def test_shares_are_what_the_definition_says(model, make_task):
    task = make_task(model, n_prompts=2)
    np.testing.assert_allclose(information_flow(model, task).values, by_hand(model, task), atol=1e-12)


def test_a_readers_shares_and_those_of_the_attention_biases_sum_to_one(plain, make_task):
    """The first reader of a bias b_O is the MLP of layer 0; the heads of layer 0 have the input alone."""
    first = Wiring.of(plain.config).mlp_reader(0)
    task = make_task(plain)
    sums = by_reader(information_flow(plain, task))
    np.testing.assert_allclose(sums[:first], 1)
    assert (sums[first:] < 0.999).all()
    np.testing.assert_allclose(by_reader(information_flow(silenced(plain, "b_O"), task)), 1)


def test_where_nothing_is_written_all_share_alike(make_model, make_task):
    model = silenced(make_model("attention_only"), "W_E", "W_pos", "W_O", "b_O")
    scores = information_flow(model, make_task(model))
    np.testing.assert_allclose(scores.values, 1 / scores.wiring.writers_before[scores.wiring.edge_reader])


def test_what_writes_nothing_has_no_share(plain, make_task):
    scores = information_flow(silenced(plain, "W_out", "b_out"), make_task(plain))
    from_mlp = np.array([writer.kind == "mlp" for writer, _ in scores.wiring.edges])
    assert scores.values[from_mlp].max() < 1e-6
    assert scores.values.min() > 0


def test_neither_corruption_nor_padding_nor_batches_count(plain, make_task):
    task = make_task(plain, n_prompts=4)
    prompts = task.prompts
    pad = torch.full((4, 2), 3)
    other = replace(prompts, clean=torch.cat([prompts.clean, pad], 1), corrupted=torch.cat([prompts.clean, pad + 1], 1))
    expected = information_flow(plain, task, keep_prompts=True)
    found = information_flow(plain, replace(task, prompts=other), keep_prompts=True, batch_size=3)
    np.testing.assert_allclose(found.per_prompt, expected.per_prompt, atol=1e-12)


def test_positions_split_the_share(plain, make_task):
    task = make_task(plain)
    task = replace(task, prompts=replace(task.prompts, positions={"third": task.prompts.end * 0 + 2, "END": task.prompts.end}))
    scores = information_flow(plain, task, keep_positions=True)
    np.testing.assert_allclose(sum(scores.by_span.values()), scores.values)
    into_logits = scores.wiring.edge_reader == len(scores.wiring.readers) - 1
    np.testing.assert_array_equal(scores.by_span["END"][into_logits], scores.values[into_logits])
    assert scores.by_span["third"][~into_logits].all()


def test_scores_say_that_they_are_shares(plain, make_task):
    scores = information_flow(plain, make_task(plain))
    assert (scores.method, scores.unit) == ("information-flow", "share of the reader")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_rounds_and_nothing_more(plain, make_task, dtype):
    task = make_task(plain)
    low = information_flow(plain.to(dtype=dtype), task).values
    np.testing.assert_allclose(low, information_flow(plain, task).values, atol=4 * torch.finfo(dtype).eps)


def test_size_says_nothing_of_planted_circuits():
    """Their distractors write more loudly than the circuit, so flow ranks the circuit below chance."""
    planted = induction()
    assert ranking(information_flow(planted.model, planted.task), planted.circuit_edges).auroc < 0.5
