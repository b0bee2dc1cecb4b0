"""What every head does on a task's clean prompts, as named numbers that can be compared between heads, tasks and models.

    attention: END -> IO        share of attention from one named position to another; those of one query sum to 1
    role: END -> the answer     the same from END, to what has a meaning in any task; they sum to 1 as well
    text: -> the one before     mean share over all queries of the prompts, of those that have such a key
    writes: IO                  what the head writes at END lifts this token's logit over the mean of the vocabulary, by so many
                                standard deviations over the vocabulary: positive copies, negative suppresses
    logits: IO                  the same in logits

A key counts once, as the first that fits. The answer, a foil and the same word are looked for among words and not tokens
(" Red" is "red"). What is written goes to the logits directly: later parts are left out, and the final normalisation keeps the
scale of the whole run, as one after attention does, of which each head has its share. Logits are those before a soft cap.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.cache import ActivationCache
from mechinterp.head_scores import readout
from mechinterp.models.transformer import Transformer
from mechinterp.prompts import PromptBatch
from mechinterp.tasks.base import Task

ATTENDED, ANSWER, FOIL = "what it attends to", "the answer", "a foil"
ROLES = (
    "itself",
    "the same word",
    ANSWER,
    FOIL,
    f"just after {ANSWER}",
    f"just after {FOIL}",
    "what followed it",
    "the one before",
    "the first token",
    "none of these",
)
TEXT = ("itself", "the same word", "what followed it", "the one before", "the first token")
N_AFTER = 3  # tokens are just after: models put what they know of a word on the words that follow it
_ROUNDING = 3e-4  # a head whose logits spread by less than this part of what they could says nothing (the root of rounding)
Summed = dict[str, tuple[Float[Tensor, "head_index"], int]]  # a feature's sum over prompts (or queries), and how many


@torch.no_grad()
def head_features(
    model: Transformer, task: Task, *, batch_size: int = 16, progress: bool = True
) -> dict[str, Float[Tensor, "layer head_index"]]:
    """The means over clean prompts of every feature above, by name.

    ``what it attends to`` is the token with most attention from END; the first token, where heads rest, does not count.
    Cost: one forward pass with all patterns kept, and ``d_vocab d_model^2`` once.
    """
    prompts, words, reader = _with_distinct_names(task.prompts), _words(model, task), Reader.of(model)
    sites = ["pattern", model.config.write_site, *(["ln_final_scale"] if model.weights.ln_final is not None else [])]
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)
    with tqdm(total=len(task), desc=task.name, unit="prompt", delay=2, disable=None if progress else True) as bar:
        for batch in prompts.split(batch_size):
            batch = batch.to(model.device)
            keys = Keys.of(batch, words.to(model.device))
            _, cache = model.run(batch.clean, record=sites, logits_at=batch.end, logits_of=batch.clean[:, :0])
            layers = [_of_layer(reader, cache, batch, keys, layer) for layer in range(model.config.n_layers)]
            for name, (_, count) in layers[0].items():
                found = torch.stack([layer[name][0] for layer in layers]).double().cpu()
                sums[name], counts[name] = sums.get(name, torch.zeros_like(found)) + found, counts[name] + count
            bar.update(len(batch))
    seen = (name for name, total in sums.items() if counts[name] and (total.any() or not name.startswith("attention")))
    return {name: sums[name] / counts[name] for name in seen}


def _of_layer(reader: "Reader", cache: ActivationCache, batch: PromptBatch, keys: "Keys", layer: int) -> Summed:
    pattern, rows = cache["pattern", layer], torch.arange(len(batch), device=batch.end.device)
    at_end = pattern[rows, :, batch.end]
    found: Summed = {}
    for query, index in batch.positions.items():
        shares = torch.einsum("bhk,bkn->nh", pattern[rows, :, index], keys.named.to(pattern))
        found |= {f"attention: {query} -> {key}": (share, len(batch)) for key, share in zip(keys.names, shares, strict=True)}
    shares = torch.einsum("bhk,bnk->nh", at_end, keys.roles.to(pattern))
    found |= {f"role: END -> {role}": (share, len(batch)) for role, share in zip(ROLES, shares, strict=True)}
    for kind, mask in keys.text.items():
        share = torch.einsum("bhqk,bqk->h", pattern, mask.to(pattern))
        found[f"text: -> {kind}"] = (share, int(mask.any(2).sum()))
    z = cache[reader.model.config.write_site, layer][rows, batch.end]
    scale = cache["ln_final_scale"][:, 0] if "ln_final_scale" in cache else z.new_ones(len(batch), 1)
    return found | reader.writes(layer, z / scale[:, None], at_end, batch)


@dataclass(frozen=True, eq=False)
class Keys:
    """Which keys of a batch are which: by name, by role as seen from END, and by kind as seen from every query."""

    names: tuple[str, ...]
    named: Bool[Tensor, "batch key_pos name"]
    roles: Bool[Tensor, "batch role key_pos"]
    text: Mapping[str, Bool[Tensor, "batch query_pos key_pos"]]

    @classmethod
    def of(cls, batch: PromptBatch, words: Int[Tensor, "d_vocab"]) -> "Keys":
        names = batch.span_names
        batch = replace(batch, clean=words[batch.clean], corrupted=words[batch.corrupted], candidates=words[batch.candidates])
        return cls(names, F.one_hot(batch.spans, len(names)).bool(), _roles(batch), _in_text(batch))


def _roles(batch: PromptBatch) -> Bool[Tensor, "batch role key_pos"]:
    """``ROLES``, each key in the first that fits."""
    key, end = torch.arange(batch.clean.shape[1], device=batch.end.device), batch.end[:, None]
    same = batch.clean == batch.clean.gather(1, end)
    is_candidate = batch.clean[:, :, None] == batch.candidates[:, None]
    answer, foil = ((is_candidate & sign[:, None]).any(2) for sign in (batch.roles > 0, batch.roles < 0))
    near_answer, near_foil = (_after(mask, N_AFTER) & (key < end) for mask in (answer, foil))
    elsewhere = (_after(same), key == end - 1, (key == 0).expand_as(same), torch.ones_like(same))
    stacked = torch.stack([key == end, same, answer, foil, near_answer, near_foil, *elsewhere], 1)
    return stacked & (stacked.cumsum(1) == 1)


def _in_text(batch: PromptBatch) -> dict[str, Bool[Tensor, "batch query_pos key_pos"]]:
    """``TEXT``, for every query of the prompt but the first; a key may be several."""
    key = torch.arange(batch.clean.shape[1], device=batch.end.device)
    query = key[:, None]
    counts = ((query > 0) & (query <= batch.end[:, None, None])).expand(-1, -1, len(key))
    same = (batch.clean[:, :, None] == batch.clean[:, None]) & (key < query)
    fits = (key == query, same, _after(same) & (key < query), key == query - 1, key == 0)
    return {kind: mask & counts for kind, mask in zip(TEXT, fits, strict=True)}


def _after(mask: Bool[Tensor, "*some key_pos"], n: int = 1) -> Bool[Tensor, "*some key_pos"]:
    """The ``n`` keys after those that are marked."""
    found = torch.zeros_like(mask)
    for step in range(1, n + 1):
        found |= F.pad(mask, (step, 0))[..., : mask.shape[-1]]
    return found


@dataclass(frozen=True, eq=False)
class Reader:
    """What the logits read of a head, over their mean: ``R``, and ``R R^T / d_vocab``, which gives their spread."""

    model: Transformer
    R: Float[Tensor, "d_model d_vocab"]
    gram: Float[Tensor, "d_model also_d_model"]

    @classmethod
    def of(cls, model: Transformer) -> "Reader":
        R = readout(model)
        return cls(model, R, R @ R.T / R.shape[1])

    def writes(
        self,
        layer: int,
        z: Float[Tensor, "batch head_index d_head"],
        at_end: Float[Tensor, "batch head_index key_pos"],
        batch: PromptBatch,
    ) -> Summed:
        """How far a head lifts the logits of the tokens that it may be about; ``z``, as it is written, over the final scale."""
        written = torch.einsum("bhd,hdm->bhm", z, self.model.weights.W_O(layer))
        rows, lifted = torch.arange(len(batch), device=z.device), {}
        for name, index in batch.positions.items():
            lifted[name] = torch.einsum("bhm,mb->bh", written, self.R[:, batch.clean[rows, index]])
        rest = at_end.clone()
        rest[:, :, 0] = -1
        attended = batch.clean[rows[:, None], rest.argmax(2)]
        lifted[ATTENDED] = torch.einsum("bhm,mbh->bh", written, self.R[:, attended])
        candidates = torch.einsum("bhm,mbc->bhc", written, self.R[:, batch.candidates])
        for name, sign in ((ANSWER, batch.roles > 0), (FOIL, batch.roles < 0)):
            share = sign / sign.sum(1, keepdim=True).clamp(min=1)
            lifted[name] = torch.einsum("bhc,bc->bh", candidates, share.to(candidates))
        spread = torch.einsum("bhm,mn,bhn->bh", written, self.gram, written).clamp(min=0).sqrt()
        heard = spread > _ROUNDING * written.norm(dim=2) * self.gram.trace().sqrt()
        found: Summed = {}
        for name, logits in lifted.items():
            count = int((batch.roles < 0).any(1).sum()) if name == FOIL else len(batch)
            found[f"logits: {name}"] = (logits.sum(0), count)
            found[f"writes: {name}"] = (torch.where(heard, logits / spread, 0.0).sum(0), count)
        return found


def _with_distinct_names(prompts: PromptBatch) -> PromptBatch:
    """END first, then plain names, then those like ``IO+1``; without those that never have a token of their own."""
    plain_first = sorted(prompts.positions, key=lambda name: "+" in name or "-" in name)
    named = {"END": prompts.end} | {name: prompts.positions[name] for name in plain_first if name != "END"}
    prompts = replace(prompts, positions=named)
    owned = prompts.spans.unique().tolist()
    return replace(prompts, positions={name: at for index, (name, at) in enumerate(named.items()) if index in owned})


def _words(model: Transformer, task: Task) -> Int[Tensor, "d_vocab"]:
    """For each token of the prompts the first token that is the same word; a token without text is a word of its own."""
    words = torch.arange(model.config.d_vocab)
    used = torch.cat([task.prompts.clean.flatten(), task.prompts.candidates.flatten()]).unique().tolist()
    first: dict[str, int] = {}
    for token, text in zip(used, task.tokenizer.strings(used), strict=True):
        words[token] = first.setdefault(text.strip().casefold() or f"token {token}", token)
    return words
