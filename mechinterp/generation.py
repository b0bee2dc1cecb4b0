"""Text that a model writes on: greedy or drawn, with any intervention in force."""

from typing import Any, overload

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.errors import ModelError
from mechinterp.interventions import Intervention
from mechinterp.models.transformer import Transformer
from mechinterp.tasks.base import tokenizer_of


@overload
def generate(
    model: Transformer,
    prompts: Int[Tensor, "batch pos"],
    n_new: int,
    *,
    ends: Int[Tensor, "batch"] | None = None,
    patch: Intervention | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Int[Tensor, "batch new"]: ...
@overload
def generate(
    model: Transformer,
    prompts: str,
    n_new: int,
    *,
    patch: Intervention | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> str: ...
@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Any,
    n_new: int,
    *,
    ends: Int[Tensor, "batch"] | None = None,
    patch: Intervention | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Int[Tensor, "batch new"] | str:
    """The ``n_new`` tokens that follow each prompt; of a text, the text that follows.

    ``ends``: each prompt's last position, where prompts are padded (as in ``PromptBatch.end``); None: all are full. ``patch``
    is an intervention, in force in every pass; its positions are counted from the beginning, so they mean the same tokens
    throughout. ``temperature`` 0 takes the likeliest token; more draws from ``softmax(logits / temperature)``, by ``seed``.
    Cost: a whole forward pass a token, as an edited activation changes all that follows. ``ModelError`` where the text would
    grow past the model's context, and for prompts of several lengths in a model that is not causal.

    >>> from mechinterp.models.load import load
    >>> generate(load("builtin"), "Then, Mary and John met at the park. John handed a ring to", 1)
    ' Mary'
    """
    if isinstance(prompts, str):
        tokenizer = tokenizer_of(model)
        batch = torch.tensor([tokenizer.encode(prompts)], dtype=torch.long)
        new = generate(model, batch, n_new, ends=ends, patch=patch, temperature=temperature, seed=seed)
        return tokenizer.decode(new[0].tolist(), after=tokenizer.spans(prompts)[0])
    if not isinstance(prompts, Tensor) or prompts.dim() != 2:
        given = f"a tensor of shape {tuple(prompts.shape)}" if isinstance(prompts, Tensor) else type(prompts).__name__
        raise ModelError(f"prompts are given as {given}. Give one text, or tokens of shape [batch, pos] with their `ends`.")
    n, width = prompts.shape
    last = (torch.full((n,), width - 1) if ends is None else ends).to(model.device)
    _refuse(model, prompts, last, n_new, temperature)
    text = torch.cat([prompts.to(model.device), prompts.new_zeros(n, n_new).to(model.device)], 1)
    draw, rows = torch.Generator().manual_seed(seed), torch.arange(n, device=model.device)
    for step in range(n_new):
        at = last + step
        logits, _ = model.run(text[:, : int(at.max()) + 1], patch=patch, logits_at=at)
        if temperature == 0:
            new = logits.argmax(-1)
        else:
            new = torch.multinomial((logits.float().cpu() / temperature).softmax(-1), 1, generator=draw)[:, 0]
        text[rows, at + 1] = new.to(text)
    return text[rows[:, None], last[:, None] + 1 + torch.arange(n_new, device=model.device)].to(prompts.device)


def _refuse(
    model: Transformer, prompts: Int[Tensor, "batch pos"], last: Int[Tensor, "_"], n_new: int, temperature: float
) -> None:
    n, width = prompts.shape
    if n_new < 0 or not 0 <= temperature < float("inf"):
        raise ModelError(f"n_new={n_new} and temperature={temperature} mean nothing: both are finite, 0 or more.")
    if not model.config.causal and len(last.unique()) > 1:
        raise ModelError(
            f"{model.config.name} is not causal, so shorter prompts would read their padding. Give prompts of one length."
        )
    if len(last) != n or not n or not 0 <= int(last.min()) <= int(last.max()) < width:
        raise ModelError(
            f"{n} prompts of {width} positions cannot end at {last.tolist()}. Give prompts of at least one token, and for "
            "each the position of its last one."
        )
    if (longest := int(last.max()) + 1 + n_new) > model.config.n_ctx:
        raise ModelError(
            f"{n_new} tokens after {int(last.max()) + 1} make {longest}, and {model.config.name} reads {model.config.n_ctx}. "
            f"Ask for at most {model.config.n_ctx - int(last.max()) - 1}."
        )
