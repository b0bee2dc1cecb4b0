"""Random prompt pairs for random models: no meaning, so that nothing but the mathematics can make a test pass."""

import pytest
import torch

from mechinterp.metrics import METRICS
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import Task


@pytest.fixture(scope="session")
def make_task(nonsense_tokenizer):
    """``make_task(model, metric="logit_diff", changed=(3, 5))``: prompts whose corruption changes these positions."""

    def make(model, metric: str = "logit_diff", changed: tuple[int, ...] = (2, 4), n_prompts: int = 5, seed: int = 0) -> Task:
        generator = torch.Generator().manual_seed(seed)
        vocabulary, length = model.config.d_vocab, 7

        def draw(*shape: int) -> torch.Tensor:
            return torch.randint(vocabulary, shape, generator=generator)

        clean = draw(n_prompts, length)
        corrupted = clean.clone()
        for position in changed:
            corrupted[:, position] = (clean[:, position] + 1 + draw(n_prompts) % (vocabulary - 1)) % vocabulary
        answers = draw(n_prompts)
        prompts = PromptBatch(
            clean=clean,
            corrupted=corrupted,
            end=torch.tensor([length - 1 - (row % 2) for row in range(n_prompts)]),
            candidates=torch.stack([answers, (answers + 1) % vocabulary, (answers + 2) % vocabulary], dim=1),
            roles=torch.tensor([[1, -1, -1]]).repeat(n_prompts, 1),
            groups=torch.arange(n_prompts) % 2,
            positions={},
        )
        return Task("nonsense", prompts, METRICS[metric], metric, "random", ("even", "odd"), nonsense_tokenizer)

    return make


@pytest.fixture(scope="session")
def nonsense_tokenizer() -> Tokenizer:
    import tokenizers

    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")), "nonsense")


@pytest.fixture
def report():
    """A report of 40 edges, with a curve of two sizes and two random circuits."""
    from circuits import Curve, Report

    return Report(
        model="toy",
        task="t",
        corruption="abc",
        metric="logit_diff",
        ablation="resample",
        n_prompts=8,
        n_edges=40,
        n_edges_in_model=200,
        clean=4.0,
        corrupted=-1.0,
        circuit=3.0625,
        faithfulness=0.8125,
        interval=(0.7, 0.9),
        quartiles=(0.6, 0.8, 1.0),
        complement=0.125,
        random=(0.0, 0.1),
        groups={},
        curve=Curve((10, 200), (0.4, 1.0), (0.3, 1.0), (0.5, 1.0), (0.05, 1.0), (10, 200)),
        seed=0,
        accuracy_model=1.0,
        accuracy_circuit=0.75,
        kl=0.25,
    )
