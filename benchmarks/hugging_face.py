"""A Hugging Face model whose heads' ``z`` can be read and written, for families that the engine does not run yet.

Only what autoencoders need: ``run(tokens, record, patch)`` at ``z``, the input of a layer's ``o_proj``.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechinterp.models.tokenizer import Tokenizer
from mechinterp.sites import Site


class HuggingFace:
    """Llama, Qwen, Gemma and their like, from a directory."""

    def __init__(self, directory: Path):
        self.model = AutoModelForCausalLM.from_pretrained(directory).eval()
        self.tokenizer = Tokenizer.from_transformers(AutoTokenizer.from_pretrained(directory), directory.name)
        facts = self.model.config
        self.config = SimpleNamespace(
            name=directory.name,
            n_layers=facts.num_hidden_layers,
            n_heads=facts.num_attention_heads,
            d_head=getattr(facts, "head_dim", None) or facts.hidden_size // facts.num_attention_heads,
            n_ctx=facts.max_position_embeddings,
        )

    @torch.no_grad()
    def run(
        self, tokens: Tensor, *, record: Any = (), patch: Mapping[Site, Callable] | None = None
    ) -> tuple[Tensor, dict[Site, Tensor]]:
        cache: dict[Site, Tensor] = {}
        patch = patch or {}
        with ExitStack() as hooks:
            for site in {*record, *patch}:
                assert site.name == "z"
                projection = self.model.model.layers[site.layer].self_attn.o_proj
                handle = projection.register_forward_pre_hook(self._hook(site, site in set(record), patch.get(site), cache))
                hooks.callback(handle.remove)
            return self.model(tokens, use_cache=False).logits, cache

    def _hook(self, site: Site, recorded: bool, patch: Callable | None, cache: dict[Site, Tensor]) -> Callable:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = inputs[0].unflatten(-1, (self.config.n_heads, self.config.d_head))
            z = patch(z, cache) if patch else z
            if recorded:
                cache[site] = z
            return (z.flatten(-2), *inputs[1:])

        return hook
