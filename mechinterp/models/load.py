"""Getting a model: the built-in ones, a name, a directory, or an object from TransformerLens."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mechinterp.errors import ModelError, nearest
from mechinterp.models import convert, folding, lens
from mechinterp.models.checkpoint import Checkpoint
from mechinterp.models.config import ModelConfig
from mechinterp.models.tokenizer import Tokenizer
from mechinterp.models.transformer import Transformer
from mechinterp.models.weights import Weights

BUILTIN: dict[str, Path] = {"builtin": Path(__file__).parent / "builtin"}

# A configuration, tensors that are read when they are asked for, and a tokenizer that is looked for when it is needed.
_Found = tuple[ModelConfig, convert.Named, Callable[[], Tokenizer | None]]


def load(
    source: Any,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    fold: bool = False,
    tokenizer: Any = None,
) -> Transformer:
    """A ``Transformer`` from whatever you have.

    ``source`` is ``"builtin"`` (ships with the package, no network, well under a second); a directory, ours or a
    Hugging Face checkpoint; a TransformerLens ``HookedTransformer`` or ``TransformerBridge``, whose numerics, processed
    or raw, are kept, and with which some memory is shared (train neither of the two on); or a name such as ``"gpt2"``,
    which TransformerLens' ``TransformerBridge`` fetches with raw weights. Tensors are converted one by one as they are
    read, so that loading a directory needs little more memory than the model. ``fold=True`` gives TransformerLens' processed
    numerics (``folding.fold``, computed in float32 at least). ``tokenizer`` (a fast Hugging Face tokenizer or our
    ``Tokenizer``) replaces the one found; without either the model takes token ids only.

    Raises ``ModelError`` for what does not exist or what the engine would not run exactly.
    """
    as_read, stored = None if fold else dtype, None
    if isinstance(source, Transformer):
        weights, find_tokenizer = source.weights.to(device, as_read), lambda: source.tokenizer
    else:
        config, named, find_tokenizer = _find(source, as_read)
        if fold and "embed.W_E" in named:  # read as it is computed: a gain that is stored less one would be rounded before
            stored = named["embed.W_E"].dtype
            as_read = torch.promote_types(stored, torch.float32)
        weights = Weights.from_named(config, named, device=device, dtype=as_read)
    if tokenizer is None:
        tokenizer = find_tokenizer()
    elif not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_transformers(tokenizer)
    model = Transformer(weights, tokenizer)
    return _folded(model, dtype or stored or model.dtype) if fold else model


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


def _folded(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Weights that are changed are rounded once, at the end."""
    return folding.fold(model.to(dtype=torch.promote_types(model.dtype, torch.float32))).to(dtype=dtype)


def _find(source: Any, dtype: torch.dtype | None) -> _Found:
    if isinstance(source, str | os.PathLike):
        return _by_name(str(source), dtype)
    if hasattr(source, "cfg") and hasattr(source, "state_dict"):
        return _from_lens(source)
    raise ModelError(
        f"cannot load a model from {type(source).__name__}. Pass a name, a directory, a HookedTransformer or a "
        "TransformerBridge."
    )


def _by_name(source: str, dtype: torch.dtype | None) -> _Found:
    if source in BUILTIN:
        return _from_directory(BUILTIN[source])
    directory = Path(source).expanduser()
    if directory.is_dir():
        return _from_directory(directory)
    if directory.is_file():
        raise ModelError(f"{source!r} is a file. Give the directory that it lies in, with config.json and model.safetensors.")
    if os.sep in source.rstrip(os.sep) and (source.startswith((".", "~", os.sep)) or source.count("/") > 1):
        raise ModelError(
            f"there is no directory {source!r}. Give one with config.json and model.safetensors, or a model's name."
        )
    return _from_hub(source, dtype)


def _from_directory(directory: Path) -> _Found:
    facts = directory / "config.json"
    if not facts.is_file():
        raise ModelError(f"{directory} has no config.json, so it holds no model. Save one there with `save_pretrained`.")
    try:
        text = facts.read_text(encoding="utf-8")
        if '"mechinterp-model"' in text:
            config = ModelConfig.from_json(text)
            return config, Checkpoint(directory), lambda: _our_tokenizer(directory, config.name)
        config, named = convert.from_hugging_face(directory)
    except ModelError:
        raise
    except Exception as problem:  # transformers checks a family's facts in its own ways
        what = str(problem.args[0]) if isinstance(problem, KeyError) and problem.args else str(problem)
        what = f"it lacks {what!r}" if what.isidentifier() else " ".join(what.split()).rstrip(".")
        raise ModelError(f"{facts} does not describe a model: {what}. Download or write it again.") from problem
    return config, named, lambda: _hugging_face_tokenizer(directory)


def _our_tokenizer(directory: Path, name: str) -> Tokenizer | None:
    return Tokenizer.from_directory(directory, name) if (directory / "tokenizer.json").is_file() else None


def _hugging_face_tokenizer(directory: Path) -> Tokenizer | None:
    """None if there are no tokenizer files: transformers would make up an empty tokenizer without a word."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as problem:  # each kind of tokenizer has its own way to fail
        raise ModelError(
            f"the tokenizer in {directory} cannot be read ({_reason(problem)}). Pass `tokenizer=` to use another."
        ) from problem
    return Tokenizer.from_transformers(tokenizer, directory.name)


def _from_lens(model: Any) -> _Found:
    is_bridge = hasattr(model, "original_model")
    config, named = lens.from_bridge(model) if is_bridge else lens.from_hooked_transformer(model)

    def find_tokenizer() -> Tokenizer | None:
        if getattr(model, "tokenizer", None) is None:
            return None
        return Tokenizer.from_transformers(model.tokenizer, config.name, prepends_bos=lens.prepends_bos(model))

    return config, named, find_tokenizer


def _from_hub(name: str, dtype: torch.dtype | None) -> _Found:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    try:
        with _from_cache_if_unreachable():
            bridge = TransformerBridge.boot_transformers(name, device="cpu", dtype=dtype or torch.float32)
            # Not the bridge's own: TransformerLens has made that one add BOS, whatever the model was trained with.
            theirs = bridge.tokenizer and AutoTokenizer.from_pretrained(bridge.tokenizer.name_or_path)
    except Exception as problem:  # the hub, the network and TransformerLens each have their own way to fail
        raise ModelError(
            f"cannot load {name!r}: it is no built-in model, no directory here, and TransformerLens could not fetch it "
            f"({_reason(problem)}).{nearest(name, [*BUILTIN, 'gpt2'])} Without a network use 'builtin' or a local directory."
        ) from problem
    config, named = lens.from_bridge(bridge)
    return config, lens.give_away(bridge, named), lambda: theirs and Tokenizer.from_transformers(theirs, config.name)


def _reason(problem: Exception) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)


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
