"""Hugging Face checkpoints in our names: a ``ModelConfig``, and named tensors that are read when they are asked for.

What a family's configuration and tensors are called stands in ``families.py``. TransformerLens' own state dict is the
common tongue (``Weights.from_named``). Whatever the engine would not run exactly is refused by name and with the reason: a
family that it does not know, a setting that changes the forward pass, a tensor that a model of that configuration would
not use.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import ModelError, nearest
from mechinterp.models.checkpoint import Checkpoint
from mechinterp.models.config import ModelConfig
from mechinterp.models.families import FAMILIES, Family, Layout

Named = Mapping[str, Tensor]
Change = Callable[[Tensor], Tensor]

_UNEMBEDDINGS = ("lm_head", "embed_out")  # the latter in NeoX's files
# Buffers that old checkpoints carry along, from which nothing is learned.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias|\.position_ids)$")


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _half(x: Tensor, i: int) -> Tensor:
    return x.chunk(2, dim=-1)[i]


def gain_of(w: Tensor) -> Tensor:
    """A gain that is stored less one, in float32 at least: of ``1 + w`` half precision would lose most of ``w``."""
    return 1 + w.to(torch.promote_types(w.dtype, torch.float32))


class Lazy(Mapping[str, Tensor]):
    """Names to tensors, each made when it is asked for and not kept."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]):
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def from_hugging_face(directory: Path) -> tuple[ModelConfig, Named]:
    """A local Hugging Face directory (``config.json`` + safetensors), read without building Hugging Face's model."""
    facts = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if not isinstance(facts, dict) or not isinstance(facts.get("model_type"), str):
        raise ModelError(
            f"{directory / 'config.json'} does not describe a model: it names no model_type, such as 'llama'. Download or "
            "write it again."
        )
    if facts["model_type"] not in FAMILIES and "vision_config" in facts:
        raise ModelError(
            f"{directory} holds a {facts['model_type']!r} model, which reads more than text; the engine runs models of text "
            f"alone: {', '.join(FAMILIES)}. Save its language model by itself, with a configuration of one of these."
        )
    _family(facts["model_type"], str(directory))
    if quantized := facts.get("quantization_config"):
        how = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ModelError(
            f"{directory} holds quantized weights ({how}), which the engine does not multiply by. Load the checkpoint that "
            "they were made from."
        )
    if (directory / "adapter_config.json").is_file():
        raise ModelError(
            f"{directory} holds an adapter (adapter_config.json), which changes the weights beside it. Merge the two, with "
            "`model.merge_and_unload()` of peft, save the result and load that."
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    return from_hf_config(config, Checkpoint(directory), facts.get("_name_or_path") or directory.name)


def from_hf_config(config: Any, stored: Named, name: str) -> tuple[ModelConfig, Named]:
    """A Hugging Face configuration and its model's state dict, wherever that lies. Nothing is copied before it is asked for."""
    ours = config_of(config, name)
    family = FAMILIES[config.model_type]
    names = _Names(family.layout, ours, stored, family.biases(config))
    makers = names.all(tied=bool(config.tie_word_embeddings))
    names.refuse_unused()
    return ours, Lazy(makers)


def config_of(config: Any, name: str) -> ModelConfig:
    """What a Hugging Face configuration says, refused where the engine would run it otherwise."""
    family = _family(config.model_type, name)
    for setting, supported in family.refused.items():
        given = reduce(lambda at, part: getattr(at, part, supported), setting.split("."), config)
        if given != supported and (given or supported):
            raise ModelError(f"{name}: {setting}={given!r} changes the forward pass, and the engine does not do it.")
    return ModelConfig(name=name, d_vocab=config.vocab_size, **family.facts(config))


def _family(model_type: Any, name: str) -> Family:
    if model_type not in FAMILIES:
        raise ModelError(
            f"{name} holds a {model_type!r} model, which is none that the engine runs: {', '.join(FAMILIES)}."
            f"{nearest(str(model_type), FAMILIES)} Nothing was loaded, since another layout would compute something else."
        )
    return FAMILIES[model_type]


class _Names:
    """How to make each of our tensors from those of one checkpoint, and which of its tensors that uses."""

    def __init__(self, layout: Layout, config: ModelConfig, stored: Named, biases: Collection[str]):
        self.layout, self.config, self.stored, self.biases = layout, config, stored, biases
        stems = (layout.stem, layout.stem.partition(".")[2])  # some save the inner model
        self.stem = next((stem for stem in stems if any(name.startswith(stem) for name in stored)), "")
        self.used: set[str] = set()
        self.makers: dict[str, Callable[[], Tensor]] = {}

    def all(self, *, tied: bool) -> Mapping[str, Callable[[], Tensor]]:
        layout = self.layout
        self._keep("embed.W_E", f"{layout.embed}.weight")
        if layout.positions:
            skip = layout.skipped_positions
            self._keep("pos_embed.W_pos", f"{layout.positions}.weight", lambda W: W[skip:])
        self._unembed(tied)
        if layout.final:
            self._norm("ln_final", layout.final)
        for layer in range(self.config.n_layers):
            self._block(f"blocks.{layer}.", layout.block.format(layer))
        return self.makers

    def refuse_unused(self) -> None:
        """Tensors that would not be used, or that some layers lack: the model is not what its configuration says."""
        has = [frozenset(n[len(at) :] for n in self.used if n.startswith(at)) for at in self._blocks()]
        for layer, names in enumerate(has):
            if odd := sorted(names ^ has[0]):
                raise ModelError(
                    f"{self.config.name}: layers 0 and {layer} of the checkpoint do not hold the same tensors "
                    f"({', '.join(odd)}). It is incomplete; download it again."
                )
        unused = sorted(name for name in set(self.stored) - self.used if not _BUFFERS.search(name))
        if unused:
            raise ModelError(
                f"{self.config.name}: the checkpoint holds {len(unused)} tensors that a model of its config.json would not use "
                f"({', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''}). Configuration and weights contradict each "
                "other; download both again."
            )

    def _blocks(self) -> list[str]:
        return [self.stem + self.layout.block.format(layer) for layer in range(self.config.n_layers)]

    def _block(self, ours: str, theirs: str) -> None:
        layout, heads = self.layout, (self.config.n_heads, self.config.d_head)
        for name, stored, pick in self._ports(theirs + layout.qkv):
            self._linear("qkv", f"{ours}attn.{name}", stored, pick, pick)
        self._linear("out", f"{ours}attn.{{}}_O", theirs + layout.out, lambda W: W.unflatten(0, heads))
        for part, name in layout.mlp.items():
            self._linear("mlp", f"{ours}mlp.{{}}_{part}", theirs + name)
        if layout.gate_and_up:
            for part, half in (("gate", 0), ("in", 1)):
                pick = partial(_half, i=half)
                self._linear("mlp", f"{ours}mlp.{{}}_{part}", theirs + layout.gate_and_up, pick, pick)
        for norm, name in layout.norms.items():
            self._norm(ours + (f"attn.{norm}" if norm in ("q_norm", "k_norm") else norm), theirs + name)

    def _ports(self, theirs: str) -> Iterator[tuple[str, str, Change]]:
        """For queries, keys and values: our name, where they are stored, and how to pick them: ``head_index ... d_head``."""
        H, G, D, packing = self.config.n_heads, self.config.n_groups, self.config.d_head, self.layout.packing
        mark, sizes = "_" if self.config.is_grouped else "", (H * D, G * D, G * D)
        for i, (port, n) in enumerate((("{}_Q", H), (mark + "{}_K", G), (mark + "{}_V", G))):
            if packing == "apart":
                yield port, theirs.format(port[-1].lower()), lambda x, n=n: x.unflatten(-1, (n, D)).movedim(-2, 0)
            elif packing == "by_head":
                yield port, theirs, lambda x, i=i: x.unflatten(-1, (H, 3, D))[..., i, :].movedim(-2, 0)
            else:
                yield port, theirs, lambda x, i=i, n=n: x.split(sizes, dim=-1)[i].unflatten(-1, (n, D)).movedim(-2, 0)

    def _linear(self, part: str, ours: str, theirs: str, weight: Change = _as_it_is, bias: Change = _as_it_is) -> None:
        """``ours`` with W and b in its place; W as ``d_in d_out``, b if this part of the family has one."""
        flip = _as_it_is if self.layout.packing == "conv1d" else torch.t
        self._keep(ours.format("W"), f"{theirs}.weight", lambda W: weight(flip(W)))
        if part in self.biases:
            self._keep(ours.format("b"), f"{theirs}.bias", bias)

    def _norm(self, ours: str, theirs: str) -> None:
        self._keep(f"{ours}.w", f"{theirs}.weight", gain_of if self.layout.gains_less_one else _as_it_is)
        if "norm" in self.biases:
            self._keep(f"{ours}.b", f"{theirs}.bias")

    def _unembed(self, tied: bool) -> None:
        """A tied unembedding is the embedding; what is stored of it beside that must be the same."""
        head = next((name for name in _UNEMBEDDINGS if f"{name}.weight" in self.stored), _UNEMBEDDINGS[0])
        if not tied:
            self._keep("unembed.W_U", f"{head}.weight", torch.t, stem="")
        elif (name := f"{head}.weight") in self.stored:
            self.used.add(name)
            if not torch.equal(self.stored[name], self.makers["embed.W_E"]()):
                raise ModelError(
                    f"{self.config.name}: config.json says that the unembedding is the embedding (tie_word_embeddings), and "
                    f"the checkpoint holds another one, {name!r}. Set tie_word_embeddings to false if it is meant."
                )
        if "unembed" in self.biases:
            self._keep("unembed.b_U", f"{head}.bias", stem="")

    def _keep(self, ours: str, theirs: str, change: Change = _as_it_is, stem: str | None = None) -> None:
        theirs = (self.stem if stem is None else stem) + theirs
        if theirs not in self.stored:
            raise ModelError(
                f"{self.config.name}: the checkpoint lacks {theirs!r}, which a model of its config.json has. It is incomplete, "
                "or its configuration is another model's."
            )
        self.used.add(theirs)
        self.makers[ours] = partial(self._make, theirs, change)

    def _make(self, theirs: str, change: Change) -> Tensor:
        tensor = self.stored[theirs]
        try:
            return change(tensor)
        except RuntimeError as problem:
            raise ModelError(
                f"{self.config.name}: {theirs!r} has shape {tuple(tensor.shape)}, and a model of its config.json has another "
                f"({problem}). Configuration and weights contradict each other; download both again."
            ) from problem
