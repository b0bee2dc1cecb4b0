"""Attention sinks: positions that are attended to whatever is asked, which heads rest there, and how to take that away.

    sinks = find_sinks(model, task)
    print(sinks)                                              # which tokens, which heads, how much, how small their values
    edit = calibrate(sinks.heads(), sinks.mask, keep=0.4)     # an intervention, for run and generate

A head whose keys do not match must still spend its attention, as a softmax sums to one; it spends it where little is moved:
on the first token (Xiao et al. 2023, arXiv:2309.17453), whose value is small (Gu et al. 2024, arXiv:2410.10781), and on
punctuation and line breaks further on (Yu et al. 2024, arXiv:2406.15765). ``circuits.sinks`` measures what that does to a task.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import ModelError
from mechinterp.interventions import Rewrite, rewrite_attention, whole_head
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.trace import Patch
from mechinterp.models.transformer import Transformer
from mechinterp.nodes import Node, nodes_of
from mechinterp.positions import Positions, Rows
from mechinterp.sites import Site
from mechinterp.tasks.base import Task

Grid = Float[Tensor, "layer head_index batch pos"]
Mask = Bool[Tensor, "layer head_index batch pos"]
_OFTEN = 0.5  # a head rests on a token if the token is a sink for it in this share of its occurrences, or more


@dataclass(frozen=True)
class Sink:
    """A token that is a sink for some heads: as a prompt's first token, or further on.

    ``share``: the part of these heads' attention that it receives from queries after it; ``times_chance``: over what even
    attention would give it; ``value_norm``: the norm of its value over that of the prompt's other positions, in these heads.
    """

    token: str
    kind: str
    is_first: bool
    n_occurrences: int
    heads: tuple[Node, ...]
    share: float
    times_chance: float
    value_norm: float


@dataclass(frozen=True, eq=False)
class Sinks:
    """What every position of every prompt receives from queries after it, in every head, and the norms of the values.

    ``received``: attention, mean over these queries (0..1); ``chance``: the same were attention even; ``value_norms``: over
    the mean of the prompt's other positions. Padding and positions with fewer than ``min_queries`` after them hold nan. Of
    layers with a window only queries count that see the position; heads that share a value have its norm.
    """

    tokens: Int[Tensor, "batch pos"]
    received: Grid
    chance: Float[Tensor, "layer batch pos"]
    value_norms: Grid
    threshold: float
    max_value_norm: float
    model: str
    tokenizer: Tokenizer | None = None

    @property
    def mask(self) -> Mask:
        """Where sinks are: positions that receive more than ``threshold`` and whose value is below ``max_value_norm``."""
        return (self.received > self.threshold) & (self.value_norms < self.max_value_norm)

    @property
    def first(self) -> Mask:
        """The sinks among first tokens."""
        return self.mask & self._is_first

    @property
    def later(self) -> Mask:
        """The sinks further on: those that Yu et al. calibrate away, while the first token's stays."""
        return self.mask & ~self._is_first

    def heads(self, mask: Mask | None = None) -> tuple[Node, ...]:
        """The heads that have a sink (of ``mask``, such as ``sinks.later``) in at least half of the prompts."""
        return resting(self.mask if mask is None else mask)

    def rate(self, position: int = 0) -> float:
        """Gu et al.'s Sink_k: the share of heads that give position k more than the threshold, whatever its value."""
        return float((self.received[..., position].nanmean(-1) > self.threshold).double().mean())

    def table(self, min_seen: float = 0.1) -> tuple[Sink, ...]:
        """Each token that is a sink in at least half of its occurrences for some head: those with most heads first.

        ``min_seen``: how often it must occur, per prompt; one that is rare may have been attended to for another reason.
        """
        counted = ~self.chance.isnan().all(0)
        rows: list[Sink] = []
        for is_first in (True, False):
            here = counted & (self._is_first if is_first else ~self._is_first)
            tokens, seen = self.tokens[here].unique(return_counts=True)
            often = tokens[seen >= min_seen * len(self.tokens)]
            rows += [row for token in often.tolist() if (row := self._row(token, is_first, here))]
        return tuple(sorted(rows, key=lambda row: (-len(row.heads), -row.share)))

    def __str__(self) -> str:
        lines = [
            f"attention sinks of {self.model}: over {self.threshold:g} of the attention of the queries after them",
            f"{'token':<12} {'kind':<12} {'at':<6} {'seen':>5}  {'share':>5}  {'x chance':>8}  {'value norm':>10}  heads",
        ]
        for row in self.table():
            at, heads = "first" if row.is_first else "later", " ".join(map(str, row.heads))
            numbers = f"{row.n_occurrences:>5}  {row.share:>5.2f}  {row.times_chance:>8.1f}  {row.value_norm:>10.2f}"
            lines.append(f"{row.token!r:<12} {row.kind:<12} {at:<6} {numbers}  {heads}")
        return "\n".join(lines)

    @property
    def _is_first(self) -> Bool[Tensor, "pos"]:
        return torch.arange(self.tokens.shape[1]) == 0

    def _row(self, token: int, is_first: bool, here: Bool[Tensor, "batch pos"]) -> Sink | None:
        there = here & (self.tokens == token)
        rests = self.mask[:, :, there].double().mean(-1) >= _OFTEN
        if not bool(rests.any()):
            return None
        received, norms = self.received[:, :, there][rests], self.value_norms[:, :, there][rests]
        text = str(token) if self.tokenizer is None else self.tokenizer.strings([token])[0]
        return Sink(
            token=text,
            kind=_kind(token, text, self.tokenizer),
            is_first=is_first,
            n_occurrences=int(there.sum()),
            heads=_named(rests),
            share=float(received.mean()),
            times_chance=float((self.received / self.chance[:, None])[:, :, there][rests].mean()),
            value_norm=float(norms.mean()),
        )


@torch.no_grad()
def find_sinks(
    model: Transformer,
    prompts: Task | Int[Tensor, "batch pos"],
    *,
    ends: Int[Tensor, "batch"] | None = None,
    threshold: float = 0.3,
    max_value_norm: float = 1.0,
    min_queries: int = 4,
    batch_size: int = 32,
) -> Sinks:
    """Where the heads' attention rests, on a task's clean prompts or on tokens.

    A position k of a prompt is a sink of a head if the queries i > k give it more than ``threshold`` on average,
    ``mean_{i>k} A_ik > threshold``, and its value is smaller than ``max_value_norm`` times the mean of the others'. Gu et al.
    (2024, sec. 3.2, threshold 0.3) also count i = k, where the first token has attention 1 by force, and do not ask for a
    small value (``torch.inf``): in a short prompt that would call a word a sink to which everybody attends for what it says.
    Yu et al. take a few times chance as threshold (see ``Sinks.chance``). At least ``min_queries`` must come after it: with
    one query, the token before would be a sink of every head that looks one back. ``ends``: each prompt's last position,
    for tokens that are padded. In a model that is not causal all other positions ask.

    Cost: a forward pass that makes every layer's pattern; ``ModelError`` where no prompt has ``min_queries + 1`` tokens.
    """
    if isinstance(prompts, Task):
        ends = prompts.prompts.end
    tokens = prompts.prompts.clean if isinstance(prompts, Task) else prompts
    ends = torch.full((len(tokens),), tokens.shape[1] - 1) if ends is None else ends
    parts = [
        _measure(model, rows.to(model.device), at.to(model.device), min_queries)
        for rows, at in zip(tokens.split(batch_size), ends.split(batch_size), strict=True)
    ]
    received, norms = (torch.cat([part[i] for part in parts], 2) for i in (0, 2))
    chance = torch.cat([part[1] for part in parts], 1)
    if bool(chance.isnan().all()):
        raise ModelError(
            f"no position has min_queries={min_queries} queries after it: the longest prompt has {int(ends.max()) + 1} tokens. "
            "Give longer prompts, or fewer queries."
        )
    return Sinks(tokens.cpu(), received, chance, norms, threshold, max_value_norm, model.config.name, model.tokenizer)


def resting(mask: Mask) -> tuple[Node, ...]:
    """The heads that have a sink in at least half of the prompts."""
    return _named(mask.any(-1).double().mean(-1) >= _OFTEN)


def calibrate(
    heads: Node | str | Iterable[Node | str],
    sinks: Bool[Tensor, "batch pos"] | Mask,
    *,
    keep: float = 0.4,
    at: Positions | None = None,
) -> dict[Site | str, Patch]:
    """Attention on sinks is scaled to the share ``keep``, and what is taken goes to the other positions in proportion.

    Attention calibration (Yu et al. 2024, arXiv:2406.15765): with S the sinks of a head, ``A_ik <- keep A_ik`` for k in S and
    ``A_ik <- A_ik (1 + (1 - keep) sum_S A_i / (1 - sum_S A_i))`` for the others, so that a row sums to what it did. A row that
    has nothing elsewhere is left as it is. ``keep=1`` changes nothing; the paper's scripts take 0.4 (``BETA``).

    ``sinks``: where they are, one mask for all heads or one a head, such as ``find_sinks(...).mask``, or its ``later``, which
    spares the first token. The paper's code finds them in the pass itself, one prompt at a time, by a mean attention above
    0.1, and leaves out the first that it finds, which is meant to be the first token. ``at``: one query a prompt, or all.
    Tokens that a text grows by are no sinks.
    """
    if not 0 <= keep <= 1:
        raise ModelError(f"keep={keep} is no share of the attention on sinks. Give 0 (none is left) to 1 (all).")
    by_layer: dict[int, list[int]] = defaultdict(list)
    for head in nodes_of(heads):
        layer, index = whole_head(head)
        by_layer[layer].append(index)
    edits: dict[Site | str, Patch] = {}
    for layer, indices in by_layer.items():
        indices = sorted(set(indices))
        edits |= rewrite_attention([Node.head(layer, i) for i in indices], _taking(sinks, layer, indices, keep), at=at)
    return edits


def _taking(sinks: Tensor, layer: int, indices: list[int], keep: float) -> Rewrite:
    def rewrite(rows: Rows) -> Rows:
        mask = _mask_of(sinks, layer, indices).to(rows.device)
        if mask.shape[0] != len(rows) or mask.shape[-1] > rows.shape[-1]:
            raise ModelError(
                f"sinks are marked in {mask.shape[0]} prompts of {mask.shape[-1]} positions; this pass has {len(rows)} of "
                f"{rows.shape[-1]}. Cut the mask as the prompts are cut."
            )
        is_sink = torch.nn.functional.pad(mask, (0, rows.shape[-1] - mask.shape[-1])).unsqueeze(2)
        taken = (1 - keep) * (rows * is_sink).sum(-1, keepdim=True)
        elsewhere = (rows * ~is_sink).sum(-1, keepdim=True)
        changed = torch.where(is_sink, keep * rows, rows * (1 + taken / torch.where(elsewhere > 0, elsewhere, 1)))
        return torch.where(elsewhere > 0, changed, rows)

    return rewrite


def _mask_of(sinks: Tensor, layer: int, indices: list[int]) -> Bool[Tensor, "batch #head key_pos"]:
    if sinks.dim() == 2:
        return sinks.unsqueeze(1)
    if layer >= sinks.shape[0] or max(indices) >= sinks.shape[1]:
        marked = f"{sinks.shape[0]} layers of {sinks.shape[1]} heads"
        raise ModelError(f"sinks are marked for {marked}, not for 'a{layer}.h{max(indices)}'. Find them in this model.")
    return sinks[layer, indices].transpose(0, 1)


def _measure(
    model: Transformer, tokens: Int[Tensor, "batch pos"], ends: Int[Tensor, "batch"], min_queries: int
) -> tuple[Grid, Float[Tensor, "layer batch pos"], Grid]:
    """Attention received, what it would be if it were even, and the relative norms of the values."""
    config = model.config
    _, cache = model.run(tokens, record=["pattern", "v"])
    asking = {window: _who_asks(tokens.shape[1], ends, config.causal, window) for window in {None, config.window}}
    real = torch.arange(tokens.shape[1], device=ends.device) <= ends[:, None]
    received, chances, norms = [], [], []
    for layer in range(config.n_layers):
        asks, n_seen = asking[config.window_of(layer)]
        n_asks = asks.sum(1)
        few = n_asks < max(min_queries, 1)
        share = torch.einsum("bhqk,bqk->hbk", cache["pattern", layer], asks.to(model.dtype)) / n_asks
        chance = (asks / n_seen[:, :, None]).sum(1) / n_asks
        size = torch.einsum("bkg->gbk", cache["v", layer].norm(dim=-1)) * real
        others = (size.sum(-1, keepdim=True) - size) / (real.sum(-1, keepdim=True) - 1)
        norm = (size / others).repeat_interleave(config.n_heads // config.n_groups, 0)
        for found, of_layer in zip((received, chances, norms), (share, chance, norm), strict=True):
            found.append(of_layer.double().masked_fill(few, torch.nan).cpu())
    return torch.stack(received), torch.stack(chances), torch.stack(norms)


def _who_asks(
    n_pos: int, ends: Int[Tensor, "batch"], causal: bool, window: int | None
) -> tuple[Bool[Tensor, "batch query_pos key_pos"], Int[Tensor, "batch query_pos"]]:
    """Which queries may attend to each key other than their own, and how many keys they see in all."""
    place = torch.arange(n_pos, device=ends.device)
    real = place <= ends[:, None]
    asks = real[:, :, None] & real[:, None] & (place[:, None] != place)
    if not causal:
        return asks, (ends[:, None] + 1).expand(-1, n_pos)
    window = n_pos if window is None else window
    back = place[:, None] - place
    return asks & (back > 0) & (back < window), (place + 1).clamp(max=window).expand(len(ends), -1)


def _named(heads: Bool[Tensor, "layer head_index"]) -> tuple[Node, ...]:
    return tuple(Node.head(layer, head) for layer, head in heads.nonzero().tolist())


def _kind(token: int, text: str, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return "token"
    if token == tokenizer.bos_id:
        return "BOS"
    if "\n" in text:
        return "newline"
    return "word" if any(letter.isalnum() for letter in text) else "punctuation"
