"""Prompts for Hugging Face's small models."""

import pytest
import torch


@pytest.fixture(scope="session")
def prompts() -> torch.Tensor:
    return torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))
