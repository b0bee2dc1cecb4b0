"""Positions, one a prompt: whether a pass has them, and a change that is let through there alone."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import ModelError, UnknownNode

Positions = Int[Tensor, "batch"]
Keys = Int[Tensor, "batch key"]
Rows = Float[Tensor, "batch head query_pos key_pos"]


def checked(positions: Keys, n_prompts: int, n_pos: int, first: int = 0) -> Keys:
    """Positions that every prompt of the pass has, ``first`` to ``n_pos - 1``; ``ModelError`` for others."""
    refuse_misshapen(positions, 2)
    if len(positions) != n_prompts:
        raise ModelError(
            f"positions are given for {len(positions)} prompts, and this pass has {n_prompts}. Cut them as the prompts are "
            "cut; for variants of a batch that are stacked, repeat them: positions.repeat(n_variants)."
        )
    if positions.numel() and not first <= int(positions.min()) <= int(positions.max()) < n_pos:
        raise ModelError(
            f"positions {int(positions.min())}..{int(positions.max())} are wanted, and this pass has {first}..{n_pos - 1}. "
            "Count from the beginning of each prompt; logits that are asked for at one position have position 0 alone."
        )
    return positions


def refuse_misshapen(positions: Any, n_axes: Literal[1, 2]) -> None:
    """``ModelError`` for what is no tensor of whole numbers, ``[prompt]`` or ``[prompt, key]``: a list, one number, ..."""
    is_tensor = isinstance(positions, Tensor)
    if is_tensor and positions.dim() == n_axes and not positions.is_floating_point():
        return
    given = f"a tensor of shape {tuple(positions.shape)} and {positions.dtype}" if is_tensor else repr(positions)
    wanted = "a position a prompt, such as prompts.end" if n_axes == 1 else "a row a prompt, such as prompts.end[:, None]"
    raise ModelError(f"positions are given as {given}. Give a tensor of whole numbers, {wanted}.")


def only_here(at: Positions | None, new: Tensor, old: Tensor, first: int = 0) -> Tensor:
    """``new`` at one position a prompt, ``old`` elsewhere: ``[batch pos ...]``, of which the first is position ``first``."""
    if at is None:
        return new
    here = _here(at, torch.arange(first, first + old.shape[1], device=old.device), len(old))
    return torch.where(here.view(*here.shape, *[1] * (old.dim() - 2)), new, old)


def only_rows(at: Positions | None, new: Rows, old: Rows) -> Rows:
    """The same of rows of attention: ``[batch head query_pos key_pos]``."""
    return new if at is None else torch.where(_here(at, query_positions(old), len(old))[:, None, :, None], new, old)


def query_positions(rows: Rows) -> Int[Tensor, "query_pos"]:
    """The queries' positions: after a prefix there are more keys than queries."""
    return torch.arange(rows.shape[-1] - rows.shape[-2], rows.shape[-1], device=rows.device)


def refuse_absent(layer: int, indices: list[int], n_heads: int) -> None:
    if (index := max(indices)) >= n_heads:
        raise UnknownNode(f"'a{layer}.h{index}' is not in this model, whose layers have heads 0..{n_heads - 1}.")


def refuse_the_future(at: Positions | None, keys: Keys, rows: Rows) -> None:
    if at is None or not bool((keys > at.to(keys)[:, None]).any()):
        return
    later = torch.arange(rows.shape[-1], device=rows.device) > query_positions(rows)[:, None]
    if not bool(rows.masked_select(later).any()):
        prompt = int((keys > at.to(keys)[:, None]).any(1).int().argmax())
        raise ModelError(
            f"prompt {prompt} is to attend from position {int(at[prompt])} to {keys[prompt].tolist()}, and a causal model sees "
            "no further than its own position. Name positions at or before `at`."
        )


def _here(at: Positions, computed: Int[Tensor, "pos"], n_prompts: int) -> Bool[Tensor, "batch pos"]:
    refuse_misshapen(at, 1)
    first = int(computed[0])
    return computed == checked(at[:, None], n_prompts, first + len(computed), first).to(computed.device)
