"""The same three methods through ``HookedTransformer``'s hooks, as one writes them with TransformerLens.

These are what we compare with, so they are written with care: parameters frozen, one pass where one suffices, scores of
a reader for all its writers in one product. What they cannot avoid is what the hooks cost: a residual stream per head at
every port, every head's output, and whole forward passes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from circuits.wiring import Wiring
from mechinterp.metrics import logit_diff
from mechinterp.nodes import Node
from mechinterp.prompts import PromptBatch


def split(model: HookedTransformer, on: bool, results: bool) -> None:
    """A stream per head and port and per MLP; with ``results``, every head's output too."""
    model.set_use_split_qkv_input(on)
    model.set_use_hook_mlp_in(on)
    model.set_use_attn_result(results)


def metric(model: HookedTransformer, prompts: PromptBatch, logits: Tensor) -> Tensor:
    return logit_diff(logits[torch.arange(len(prompts)), prompts.end], prompts)


def _writer_hooks(model: HookedTransformer, keep) -> list:
    """Hooks that pass each writer's output on to ``keep(first writer, value [batch pos writer d_model])``."""
    hooks, after = [("hook_embed", lambda x, hook: keep("embed", x.unsqueeze(2)))], 1
    hooks.append(("hook_pos_embed", lambda x, hook: keep("pos_embed", x.unsqueeze(2))))
    for layer in range(model.cfg.n_layers):
        hooks.append((f"blocks.{layer}.attn.hook_result", lambda x, hook, at=after: keep(at, x)))
        after += model.cfg.n_heads
        hooks.append((f"blocks.{layer}.hook_mlp_out", lambda x, hook, at=after: keep(at, x.unsqueeze(2))))
        after += 1
    return hooks


def differences(model: HookedTransformer, prompts: PromptBatch) -> Tensor:
    """``[batch pos writer d_model]``: what each writer writes on the corrupted prompt minus on the clean one."""
    split(model, on=False, results=True)
    wiring = Wiring(model.cfg.n_layers, model.cfg.n_heads)
    delta = torch.zeros(*prompts.clean.shape, len(wiring.writers), model.cfg.d_model)
    with torch.no_grad():
        model.run_with_hooks(prompts.corrupted, fwd_hooks=_writer_hooks(model, _adding(delta, 1)), return_type=None)
        model.run_with_hooks(prompts.clean, fwd_hooks=_writer_hooks(model, _adding(delta, -1)), return_type=None)
    return delta


def _adding(delta: Tensor, sign: int):
    def keep(at, value: Tensor) -> None:
        first = at if isinstance(at, int) else 0
        delta[:, :, first : first + value.shape[2]].add_(value.detach(), alpha=sign)

    return keep


def eap(model: HookedTransformer, prompts: PromptBatch) -> Tensor:
    """``[writer reader]``: edge attribution patching, with gradients from backward hooks (as EAP-IG's library does)."""
    split(model, on=True, results=True)
    wiring = Wiring(model.cfg.n_layers, model.cfg.n_heads)
    delta = torch.zeros(*prompts.clean.shape, len(wiring.writers), model.cfg.d_model)
    with torch.no_grad():
        model.run_with_hooks(prompts.corrupted, fwd_hooks=_writer_hooks(model, _adding(delta, 1)), return_type=None)
    grid = torch.zeros(len(wiring.writers), len(wiring.readers))
    model.reset_hooks()
    for name, hook in _writer_hooks(model, _adding(delta, -1)):
        model.add_hook(name, hook)
    model.add_hook("hook_embed", lambda x, hook: x.requires_grad_())
    for name, readers in _readers(model, wiring):
        model.add_hook(name, lambda g, hook, at=readers: _contract(grid, delta, g, at, wiring), dir="bwd")
    metric(model, prompts, model(prompts.clean)).sum().backward()
    model.reset_hooks()
    return grid.neg_() / len(prompts)


def _readers(model: HookedTransformer, wiring: Wiring) -> Iterable[tuple[str, slice]]:
    after, heads = 0, model.cfg.n_heads
    for layer in range(model.cfg.n_layers):
        for port in "qkv":
            yield f"blocks.{layer}.hook_{port}_input", slice(after, after + heads)
            after += heads
        yield f"blocks.{layer}.hook_mlp_in", slice(after, after + 1)
        after += 1
    yield f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", slice(after, after + 1)


def _contract(grid: Tensor, delta: Tensor, gradient: Tensor, readers: slice, wiring: Wiring) -> None:
    n_writers = int(wiring.writers_before[readers.start])
    gradient = gradient if gradient.dim() == 4 else gradient.unsqueeze(2)
    grid[:n_writers, readers] = torch.einsum("bpwm,bprm->wr", delta[:, :, :n_writers], gradient)


def corrupted_z(model: HookedTransformer, prompts: PromptBatch):
    """Every layer's ``z`` on the corrupted prompts."""
    split(model, on=False, results=False)
    with torch.no_grad():
        return model.run_with_cache(prompts.corrupted, names_filter=lambda name: name.endswith("hook_z"), return_type=None)[1]


@torch.no_grad()
def clean_metric(model: HookedTransformer, prompts: PromptBatch) -> Tensor:
    return metric(model, prompts, model(prompts.clean))


def heads(model: HookedTransformer, prompts: PromptBatch, corrupted, clean: Tensor, which: Iterable[tuple[int, int]]) -> Tensor:
    """``[head]``: the fall of the metric when one head after another writes what it does on the corrupted prompt."""
    split(model, on=False, results=False)
    falls = []
    with torch.no_grad():
        for layer, head in which:
            name = f"blocks.{layer}.attn.hook_z"

            def patch(z, hook, head=head, name=name):
                z[:, :, head] = corrupted[name][:, :, head]
                return z

            logits = model.run_with_hooks(prompts.clean, fwd_hooks=[(name, patch)])
            falls.append((clean - metric(model, prompts, logits)).mean())
    return torch.stack(falls)


def edges(
    model: HookedTransformer, prompts: PromptBatch, delta: Tensor, clean: Tensor, which: Iterable[tuple[Node, Node]]
) -> Tensor:
    """``[edge]``: the fall of the metric when one reader after another takes one writer's change on top."""
    split(model, on=True, results=False)
    wiring, falls = Wiring(model.cfg.n_layers, model.cfg.n_heads), []
    with torch.no_grad():
        for writer, reader in which:
            change = delta[:, :, wiring.writers.index(writer)]

            def patch(stream, hook, reader=reader, change=change):
                if reader.port is None:
                    return stream + change
                stream = stream.clone()
                stream[:, :, reader.index] += change
                return stream

            logits = model.run_with_hooks(prompts.clean, fwd_hooks=[(_hook_of(model, reader), patch)])
            falls.append((clean - metric(model, prompts, logits)).mean())
    return torch.stack(falls)


def _hook_of(model: HookedTransformer, reader: Node) -> str:
    if reader.kind == "logits":
        return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    return f"blocks.{reader.layer}.hook_{reader.port}_input" if reader.port else f"blocks.{reader.layer}.hook_mlp_in"
