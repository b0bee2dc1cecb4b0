"""The files of one entry of an activation store: written shard by shard, checked, and mapped into memory.

An entry is a folder with one ``.npy`` file a site and ``manifest.json``. A file's header tells the whole shape from the
beginning; the rows are appended, and after each shard (some prompts, all sites) the manifest is written anew with sizes
and checksums. What follows the last shard of the manifest, an interruption left there, and it is cut off.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from mechinterp.errors import StoreError
from mechinterp.files import read_document, to_document, write_text_atomically
from mechinterp.sites import Site

# How numpy stores each dtype. It has no bfloat16, whose 16 bits are therefore kept as an integer and reinterpreted.
_STORED = {torch.float32: "<f4", torch.float64: "<f8", torch.float16: "<f2", torch.bfloat16: "<i2"}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORED}
KIND, VERSION = "mechinterp-activations", 1


def dtype_name(dtype: torch.dtype) -> str:
    """``"float16"`` for ``torch.float16``; ``StoreError`` for what is not stored."""
    if dtype not in _STORED:
        raise StoreError(f"activations are stored as {', '.join(DTYPES)}, not as {dtype}.")
    return str(dtype).removeprefix("torch.")


class ShardWriter:
    """Appends activations to the files of ``folder``, after those that an interrupted harvest left there.

    ``about`` is what the manifest says of the entry: its key, ``n_prompts``, ``dtype``, ...
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]):
        self.folder, self.about = folder, about
        self.files = ExitStack()
        self.shards: list[int] = []
        self.columns: dict[str, _Column] = {}
        self.unsealed_bytes = self.unsealed_prompts = 0
        if (folder / "manifest.json").is_file():
            self._resume(read_document(folder / "manifest.json", KIND, VERSION, StoreError))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        self.files.close()

    @property
    def n_done(self) -> int:
        """How many prompts are safe on disk."""
        return sum(self.shards)

    def append(self, batch: Mapping[Site, Tensor]) -> None:
        """Write the activations of some prompts, every site with as many rows."""
        dtype = DTYPES[self.about["dtype"]]
        for site, values in batch.items():
            if str(site) not in self.columns:
                file = self.files.enter_context(_path(self.folder, str(site)).open("wb"))
                shape = (self.about["n_prompts"], *values.shape[1:])
                self.columns[str(site)] = _Column.create(file, shape, np.dtype(_STORED[dtype]))
            array = _to_numpy(site, values, dtype)
            self.columns[str(site)].write(array)
            self.unsealed_bytes += array.nbytes
        self.unsealed_prompts += len(values)

    def seal(self) -> None:
        """End a shard: what was appended is on disk, with its checksums in the manifest."""
        self.shards.append(self.unsealed_prompts)
        self.unsealed_bytes = self.unsealed_prompts = 0
        sites = {site: column.seal() for site, column in self.columns.items()}
        manifest = to_document(KIND, VERSION, {**self.about, "shards": self.shards, "sites": sites})
        write_text_atomically(self.folder / "manifest.json", manifest)

    def _resume(self, manifest: Mapping[str, Any]) -> None:
        sites = {site: (_path(self.folder, site), facts) for site, facts in manifest["sites"].items()}
        if not all(path.is_file() and path.stat().st_size >= facts["bytes"] for path, facts in sites.values()):
            return  # the system lost what it had promised to keep: begin again
        self.shards = manifest["shards"]
        for site, (path, facts) in sites.items():
            self.columns[site] = _Column.reopen(self.files.enter_context(path.open("r+b")), facts)


class _Column:
    """The file of one site while it is written: appended to and not mapped, so that a full disk is no crash."""

    def __init__(self, file: IO[bytes], shape: list[int], shards: list[dict[str, Any]]):
        self.file, self.shape, self.shards = file, shape, shards
        self.digest = hashlib.sha256()

    @classmethod
    def create(cls, file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> "_Column":
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(text := io.BytesIO(), header)
        column = cls(file, list(shape), [])
        column.write(np.frombuffer(text.getvalue(), np.uint8))
        return column

    @classmethod
    def reopen(cls, file: IO[bytes], facts: Mapping[str, Any]) -> "_Column":
        file.truncate(facts["bytes"])
        file.seek(facts["bytes"])
        return cls(file, facts["shape"], facts["shards"])

    def write(self, values: np.ndarray) -> None:
        self.digest.update(values.data)
        self.file.write(values.data)

    def seal(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        status = os.fstat(self.file.fileno())
        before = sum(shard["bytes"] for shard in self.shards)
        self.shards.append({"bytes": status.st_size - before, "sha256": self.digest.hexdigest()})
        self.digest = hashlib.sha256()
        return {"shape": self.shape, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "shards": self.shards}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an entry says about itself."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise _damaged(path, "is missing")
    manifest = read_document(path, KIND, VERSION, StoreError)
    if manifest.get("key") != folder.name:
        raise _damaged(path, f"belongs to another entry, {manifest.get('key')!r}")
    return manifest


def open_shards(folder: Path) -> dict[Site, Tensor]:
    """Every site of an entry as a tensor over its file. Nothing is read but headers, unless a file looks changed."""
    manifest, opened = read_manifest(folder), {}
    for site, facts in manifest["sites"].items():
        path = _path(folder, site)
        if _status(path, facts).st_mtime_ns != facts["mtime_ns"]:
            _check_sums(path, facts)
        opened[Site.parse(site)] = _map(path, tuple(facts["shape"]), DTYPES[manifest["dtype"]])
    return opened


def verify_shards(folder: Path) -> None:
    """Read every byte of an entry and compare it with the checksums."""
    for site, facts in read_manifest(folder)["sites"].items():
        _status(_path(folder, site), facts)
        _check_sums(_path(folder, site), facts)


def _map(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        # "c", copy on write: torch warns about arrays that cannot be written to, and the file must never change.
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except ValueError as error:
        raise _damaged(path, f"is no array that we wrote ({error})") from error
    if array.shape != shape or array.dtype != np.dtype(_STORED[dtype]):
        ours = f"{np.dtype(_STORED[dtype])} {shape}"
        raise _damaged(path, f"holds {array.dtype} {array.shape} and should hold {ours}")
    tensor = torch.from_numpy(array)
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor


def _status(path: Path, facts: Mapping[str, Any]) -> os.stat_result:
    if not path.is_file():
        raise _damaged(path, "is missing")
    status = path.stat()
    if status.st_size != facts["bytes"]:
        how = "truncated" if status.st_size < facts["bytes"] else "another file"
        raise _damaged(path, f"has {status.st_size:,} bytes and should have {facts['bytes']:,}: it is {how}")
    return status


def _check_sums(path: Path, facts: Mapping[str, Any]) -> None:
    """Compare a whole file with the checksums of its shards; the header belongs to the first."""
    with open(path, "rb") as file:
        for number, shard in enumerate(facts["shards"], 1):
            digest, left = hashlib.sha256(), shard["bytes"]
            while chunk := file.read(min(left, 1 << 20)):
                digest.update(chunk)
                left -= len(chunk)
            if digest.hexdigest() != shard["sha256"]:
                which = f"shard {number} of {len(facts['shards'])}"
                raise _damaged(path, f"was changed after it was written: {which} differs from its checksum")


def _damaged(path: Path, how: str) -> StoreError:
    store, key = path.parent.parent, path.parent.name
    return StoreError(
        f"{path} {how}. Nothing was deleted. Put the right file back from a copy, or give the entry up with "
        f"ActivationStore({str(store)!r}).remove({key!r}) and run again."
    )


def _to_numpy(site: Site, values: Tensor, dtype: torch.dtype) -> np.ndarray:
    stored = values.to("cpu", dtype).contiguous()
    if dtype == torch.float16 and bool((stored.isinf() & values.cpu().isfinite()).any()):
        largest = values[values.isfinite()].abs().max()
        raise StoreError(f"{str(site)!r} reaches {largest:.3g}, and float16 ends at 65504. Store bfloat16 or float32.")
    return (stored.view(torch.int16) if dtype == torch.bfloat16 else stored).numpy()


def _path(folder: Path, site: str) -> Path:
    return folder / f"{site}.npy"
