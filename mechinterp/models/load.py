"""Getting a model: the built-in ones, a name, a directory, or an object from TransformerLens."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mechinterp.errors import ModelError, nearest
from mechinterp.models import convert
from mechinterp.models.config import ModelConfig
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights

BUILTIN: dict[str, Path] = {"builtin": Path(__file__).parent / "builtin"}


def load(
    source: Any, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, tokenizer: Any = None
) -> Transformer:
    """A ``Transformer`` from whatever you have.

    ``source`` is ``"builtin"`` (ships with the package, no network, well under a second); a directory, ours or a
    Hugging Face checkpoint; a TransformerLens ``HookedTransformer`` or ``TransformerBridge``, whose numerics, processed
    or raw, are kept, and with which some memory is shared (train neither of the two on); or a name such as ``"gpt2"``,
    which TransformerLens' ``TransformerBridge`` fetches with raw weights. ``tokenizer`` (a fast Hugging Face tokenizer
    or our ``Tokenizer``) replaces the one found.

    Raises ``ModelError`` for what does not exist or what the engine would not run exactly.
    """
    if isinstance(source, Transformer):
        model = source
    elif isinstance(source, str | os.PathLike):
        model = _by_name(str(source))
    elif hasattr(source, "cfg") and hasattr(source, "state_dict"):
        model = _from_lens(source)
    else:
        raise ModelError(
            f"cannot load a model from {type(source).__name__}. Pass a name, a directory, a HookedTransformer or a "
            "TransformerBridge."
        )
    if tokenizer is not None:
        wrapped = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.from_transformers(tokenizer)
        model = Transformer(model.weights, wrapped)
    return model.to(device, dtype)


def save(model: Transformer, directory: Path | str) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``tokenizer.json``; ``load(directory)`` reads them back equal.

    Written beside and renamed: a directory that exists is never left half-written, and never overwritten.
    """
    directory = Path(directory)
    if directory.exists():
        raise ModelError(f"{directory} exists already. Choose another directory, or remove it first.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        beside = Path(scratch) / directory.name
        beside.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in model.weights.named().items()}, beside / "model.safetensors")
        (beside / "config.json").write_text(model.config.to_json(), encoding="utf-8")
        shutil.copymode(beside / "config.json", beside / "model.safetensors")  # safetensors writes for its owner alone
        if model.tokenizer is not None:
            model.tokenizer.save(beside)
        beside.rename(directory)


def _by_name(source: str) -> Transformer:
    if source in BUILTIN:
        return _from_directory(BUILTIN[source])
    directory = Path(source).expanduser()
    if directory.is_dir():
        return _from_directory(directory)
    if os.sep in source.rstrip(os.sep) and (source.startswith((".", "~", os.sep)) or source.count("/") > 1):
        raise ModelError(
            f"there is no directory {source!r}. Give one with config.json and model.safetensors, or a model's name."
        )
    return _from_hub(source)


def _from_directory(directory: Path) -> Transformer:
    facts = directory / "config.json"
    if not facts.is_file():
        raise ModelError(f"{directory} has no config.json, so it holds no model. Save one there with `save_pretrained`.")
    try:
        text = facts.read_text(encoding="utf-8")
        is_ours = '"mechinterp-model"' in text
        if is_ours:
            config, named = ModelConfig.from_json(text), convert.read_safetensors(directory)
        else:
            config, named = convert.from_hugging_face(directory)
    except (KeyError, TypeError, ValueError) as problem:
        what = f"it lacks {problem}" if isinstance(problem, KeyError) else problem
        raise ModelError(f"{facts} does not describe a model: {what}. Download or write it again.") from problem
    tokenizer = _our_tokenizer(directory, config.name) if is_ours else _hugging_face_tokenizer(directory)
    return Transformer(Weights.from_named(config, named), tokenizer)


def _our_tokenizer(directory: Path, name: str) -> Tokenizer | None:
    return Tokenizer.from_directory(directory, name) if (directory / "tokenizer.json").is_file() else None


def _hugging_face_tokenizer(directory: Path) -> Tokenizer | None:
    """None if there are no tokenizer files: transformers would make up an empty tokenizer without a word."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    return Tokenizer.from_transformers(AutoTokenizer.from_pretrained(directory), directory.name)


def _from_lens(model: Any) -> Transformer:
    is_bridge = hasattr(model, "original_model")
    config, named = convert.from_bridge(model) if is_bridge else convert.from_hooked_transformer(model)
    tokenizer = getattr(model, "tokenizer", None)
    # TransformerLens reloads every tokenizer so that it adds BOS. The models we run so far were trained without, and
    # the published tasks say for themselves where they want one.
    wrapped = Tokenizer.from_transformers(tokenizer, config.name, prepends_bos=False) if tokenizer is not None else None
    return Transformer(Weights.from_named(config, named), wrapped)


def _from_hub(name: str) -> Transformer:
    from transformer_lens.model_bridge import TransformerBridge

    try:
        with _from_cache_if_unreachable():
            bridge = TransformerBridge.boot_transformers(name, device="cpu")
    except Exception as error:  # the hub, the network and TransformerLens each have their own way to fail
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load {name!r}: it is no built-in model, no directory here, and TransformerLens could not fetch it "
            f"({reason}).{nearest(name, [*BUILTIN, 'gpt2'])} Without a network use 'builtin' or a local directory."
        ) from error
    return _from_lens(bridge)


@contextmanager
def _from_cache_if_unreachable() -> Iterator[None]:
    """Without a network, look into the hub's cache at once: its client would try again and again for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    was_offline = constants.HF_HUB_OFFLINE
    if not was_offline:
        try:
            get_session().head(constants.ENDPOINT, timeout=10)
        except Exception:  # whatever the reason, the hub cannot be had
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline
