"""Autoencoders on disk, in SAELens' format: whatever reads SAELens' folders reads ours, and we read theirs.

One group is a folder with ``cfg.json`` and ``sae_weights.safetensors``. Several are a folder of such folders named by
their places (``z.5``, ``z.5.h3``), with ``autoencoder.json`` to keep their order and what is known about them all.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp.errors import MechinterpError, SAEError
from mechinterp.files import read_document, to_document
from saes.base import SparseAutoencoder
from saes.places import Place
from saes.sae_lens import from_parts, to_parts

_CONFIG, _WEIGHTS, _INDEX, _SCALER = "cfg.json", "sae_weights.safetensors", "autoencoder.json", "activation_scaler.json"
_KIND, _VERSION = "mechinterp autoencoders", 1
_ALIKE = ("kind", "d_in", "d_sae", "k", "normalize", "pursuit")


def save(autoencoder: SparseAutoencoder, directory: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write ``directory`` in SAELens' format, whole or not at all; ``load`` and ``SAE.load_from_disk`` read it.

    Weights are written in ``float32``. With several groups SAELens reads each subfolder. Missing parents are created. A
    directory that exists is refused; with ``overwrite`` an autoencoder there, and nothing else, is replaced once the new
    one is complete. ``OSError`` (no space left, say) leaves things as they were.

    >>> heads = SparseAutoencoder.random([Place.parse("z.0.h0"), Place.parse("z.0.h1")], d_in=4, d_sae=8)
    >>> folder = getfixture("tmp_path") / "heads"
    >>> save(heads, folder)
    >>> sorted(path.name for path in folder.iterdir())
    ['autoencoder.json', 'z.0.h0', 'z.0.h1']
    >>> torch.equal(load(folder).W_enc, heads.W_enc)
    True
    """
    _check_survives(autoencoder.about)
    several = autoencoder.n_groups > 1
    with _folder_beside(Path(os.path.realpath(Path(directory).expanduser())), overwrite) as beside:
        places = tqdm(autoencoder.places, "writing autoencoders", delay=2, leave=False, disable=None)
        for group, place in enumerate(places):
            one = autoencoder.group(group)
            if several:
                # What is known about all of them (a history of training, say) stands once, in the index.
                one = replace(one, about={name: autoencoder.about[name] for name in ("model",) if name in autoencoder.about})
            _write(one, beside / str(place) if several else beside)
        if several:
            index = {"places": [str(place) for place in autoencoder.places], "about": dict(autoencoder.about)}
            (beside / _INDEX).write_text(to_document(_KIND, _VERSION, index), encoding="utf-8", newline="\n")


def load(directory: str | os.PathLike, *, place: "Place | str | None" = None, scale: float | None = None) -> SparseAutoencoder:
    """The autoencoder in a folder that ``save`` or SAELens wrote; a folder of such folders is one with several groups.

    SAELens' ``save_inference_model`` and ``save_model`` (checkpoints in training form) are read, of every release since
    it writes safetensors; half precision becomes ``float32``. ``place`` is for those that do not say where they stand,
    ``scale`` for those trained on scaled inputs, as in ``from_sae_lens``; a checkpoint's own ``activation_scaler.json``
    is read. Several groups must be of one kind and shape; without our index they are sorted as a forward pass meets them.

    Raises ``SAEError``, which names the file and the remedy. Nothing is ever unpickled.
    """
    root = Path(directory).expanduser()
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise SAEError(
            f"{str(root)!r} {what}; an autoencoder is a folder with {_CONFIG} and {_WEIGHTS}. One that SAELens publishes "
            "comes from from_sae_lens(sae_lens.SAE.from_pretrained(release, sae_id))."
        )
    if (root / _CONFIG).exists() or (root / _WEIGHTS).exists():
        return _read(root, place, scale)
    about, folders = _members(root)
    if place is not None and len(folders) > 1:
        raise SAEError(f"{str(root)!r} holds {len(folders)} autoencoders and not one to be placed. Load them one by one.")
    return _stacked(folders, place, scale, about)


def _members(root: Path) -> tuple[dict[str, Any] | None, list[Path]]:
    """What our index says about them all, and their folders; without an index, all folders that hold one."""
    if (root / _INDEX).exists():
        index = read_document(root / _INDEX, _KIND, _VERSION, SAEError)
        try:
            names, about = [str(Place.parse(name)) for name in index["places"]], dict(index["about"])
        except (KeyError, TypeError, ValueError, MechinterpError) as problem:
            raise SAEError(f"{str(root / _INDEX)!r} does not list places ({problem}). Write the autoencoder again.") from None
        if missing := [name for name in names if not (root / name).is_dir()]:
            raise SAEError(f"{str(root)!r} lacks {', '.join(missing[:5])}, which {_INDEX} lists. Copy the whole folder again.")
        return about, [root / name for name in names]
    folders = [folder for folder in sorted(root.iterdir()) if (folder / _CONFIG).exists() or (folder / _WEIGHTS).exists()]
    if not folders:
        raise SAEError(f"{str(root)!r} holds no {_CONFIG}, nor does a folder in it.{_pickles(root)}")
    return None, folders


def _stacked(
    folders: list[Path], place: "Place | str | None", scale: float | None, about: dict[str, Any] | None
) -> SparseAutoencoder:
    """Group by group into tensors made once: those of every head of a model are never in memory twice."""
    first = _read(folders[0], place, scale)
    tensors = {name: tensor.new_empty(len(folders), *tensor.shape[1:]) for name, tensor in first.tensors.items()}
    places, facts = [], []
    for group, folder in enumerate(tqdm(folders, "reading autoencoders", delay=2, leave=False, disable=None)):
        one = _read(folder, place, scale)
        for name in _ALIKE:
            if (given := getattr(one, name)) != (wanted := getattr(first, name)):
                raise SAEError(
                    f"{str(folder)!r} has {name}={given!r} and {str(folders[0])!r} {name}={wanted!r}; groups are of one kind "
                    "and shape. Load them one by one."
                )
        if one.places[0] in places:
            twice = folders[places.index(one.places[0])]
            raise SAEError(f"{str(folder)!r} and {str(twice)!r} both stand at {str(one.places[0])!r}. Load them one by one.")
        for name, tensor in one.tensors.items():
            tensors[name][group] = tensor[0]
        places.append(one.places[0])
        facts.append(dict(one.about))
    stacked = replace(first, places=tuple(places), about=_shared(facts) if about is None else about, **tensors)
    if about is not None:
        return _as_listed(stacked, folders)
    return stacked.group(*sorted(range(len(places)), key=lambda group: (places[group].site.order, places[group].head or 0)))


def _as_listed(stacked: SparseAutoencoder, folders: list[Path]) -> SparseAutoencoder:
    for place, folder in zip(stacked.places, folders, strict=True):
        if str(place) != folder.name:
            raise SAEError(f"{str(folder)!r} holds an autoencoder of {str(place)!r}. Was the folder renamed?")
    return stacked


def _shared(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all of them say."""
    found = {}
    for name, value in facts[0].items():
        values = [other.get(name) for other in facts]
        if all(isinstance(other, Mapping) for other in values):
            found[name] = _shared([dict(other or {}) for other in values])
        elif all(other == value for other in values):
            found[name] = value
    return found


def _read(folder: Path, place: "Place | str | None", scale: float | None) -> SparseAutoencoder:
    cfg, weights = _config(folder), folder / _WEIGHTS
    if not weights.is_file():
        raise SAEError(f"{str(folder)!r} has {_CONFIG} and no {_WEIGHTS}.{_pickles(folder)}")
    return from_parts(cfg, _tensors(weights), repr(str(folder)), place, _scale(folder) if scale is None else scale)


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        raise SAEError(f"{str(folder)!r} has {_WEIGHTS} and no {_CONFIG}, which says what the weights mean. Copy both.")
    return _json(path)


def _scale(folder: Path) -> float | None:
    """What a checkpoint in mid-training multiplies inputs by; SAELens folds it into the weights at the end."""
    path = folder / _SCALER
    scale = _json(path).get("scaling_factor") if path.is_file() else None
    return float(scale) if isinstance(scale, int | float) else None


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise SAEError(f"{str(path)!r} is not JSON or is truncated ({problem}). Copy or download it again.") from None
    if not isinstance(found, dict):
        raise SAEError(f"{str(path)!r} holds a {type(found).__name__} and no JSON object, so it is no configuration.")
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as problem:
        raise SAEError(
            f"{str(path)!r} cannot be read as safetensors ({problem}): it is truncated, or only a pointer to the real file. "
            "Copy or download it again."
        ) from None


def _pickles(folder: Path) -> str:
    """A closing sentence for folders with PyTorch files, which can run anybody's code when they are read."""
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".bin", ".pkl"))
    if not found:
        return f" An autoencoder is a folder with {_CONFIG} and {_WEIGHTS}."
    return (
        f" It holds {', '.join(found[:3])}: pickles, which are never read here. Load it with the program that wrote it and "
        "save it as safetensors (SAELens: sae.save_model(folder))."
    )


def _write(autoencoder: SparseAutoencoder, folder: Path) -> None:
    """One group. ``OSError`` where safetensors has an error of its own for a full disk."""
    cfg, tensors = to_parts(autoencoder.to("cpu", torch.float32))
    folder.mkdir(exist_ok=True)
    (folder / _CONFIG).write_text(json.dumps(cfg, indent=1, allow_nan=False) + "\n", encoding="utf-8", newline="\n")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _WEIGHTS)
    except SafetensorError as problem:
        number = re.search(r"os error (\d+)", str(problem))
        raise OSError(int(number[1]) if number else 0, str(problem), str(folder / _WEIGHTS)) from None
    shutil.copymode(folder / _CONFIG, folder / _WEIGHTS)  # safetensors writes for its owner alone


def _check_survives(about: Mapping[str, Any]) -> None:
    try:
        json.dumps(dict(about), allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise SAEError(f"`about` holds what JSON cannot keep ({problem}). Use numbers, text, lists and dictionaries.") from None


@contextmanager
def _folder_beside(target: Path, overwrite: bool) -> Iterator[Path]:
    """A fresh hidden folder next to ``target``, renamed to it at the end, or removed on failure."""
    if os.path.lexists(target):
        _check_replaceable(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    beside.mkdir()
    try:
        yield beside
        if overwrite and target.exists():
            _swap(beside, target)
        else:
            beside.rename(target)  # refused by the system if somebody else has filled the target meanwhile
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _swap(beside: Path, target: Path) -> None:
    """Between the two renames both are whole, and the old one is back if the second fails."""
    old = beside.with_name(f"{beside.name}.old")
    target.rename(old)
    try:
        beside.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not overwrite:
        raise SAEError(f"{str(target)!r} exists already. Choose another name, or replace it with overwrite=True.")
    if not target.is_dir():
        raise SAEError(f"{str(target)!r} is a file; an autoencoder is a folder. Choose another name.")
    ours = {_CONFIG, _WEIGHTS, _INDEX}
    inside = [path for path in target.iterdir() if path.name not in ours]
    foreign = [path for path in inside if not path.is_dir() or {found.name for found in path.iterdir()} - {_CONFIG, _WEIGHTS}]
    if foreign:
        names = ", ".join(path.name for path in foreign[:5])
        raise SAEError(f"{str(target)!r} also holds {names}; overwrite replaces an autoencoder and nothing else. Move it away.")
