"""Activation caches on disk: run a model over tokens once, and find what it computed again by what it is of.

    store = ActivationStore("activations")
    cache = store.cached_run(model, tokens, record=["z", "mlp_out"])   # a forward the first time, none the second
    cache["z", 9].flatten(0, 1)[rows]                                  # reads those rows from disk, and no others

An entry is a folder named by its key, the hash of (weights, tokens, sites, dtype). It holds one memory-mapped file a
site, laid out as the pass records it (``z``: prompts, positions, heads, d_head; of the layouts we measured, the one
whose random rows are read fastest). A harvest writes a hidden folder beside and renames it after its last shard: an
entry is whole or absent, and an interrupted harvest goes on with its next shard.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import StoreError, nearest
from mechinterp.models.transformer import Transformer
from mechinterp.shards import (
    DTYPES,
    KIND,
    VERSION,
    ShardWriter,
    dtype_name,
    open_shards,
    read_manifest,
    verify_shards,
)
from mechinterp.sites import Site, resolve

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, one process at a time may harvest a key
    fcntl = None


@dataclass(frozen=True)
class Entry:
    """What an entry holds, as its manifest says. ``size`` in bytes."""

    key: str
    model: str
    fingerprint: str
    sites: tuple[Site, ...]
    n_prompts: int
    n_positions: int
    dtype: torch.dtype
    size: int


class ActivationStore:
    """The activation caches in a directory, shared by everything that reads activations.

    Opening an entry costs about a millisecond a site: sizes, headers and times of change are compared with the
    manifest. A file with another time of change is read whole and compared with its checksum, each time, so copy a
    store with its times (``cp -a``). ``verify`` always reads everything.

    Several processes may use one store. Two that harvest the same key at once each write a folder of their own; the
    first to finish makes the entry, and the other throws its own away and reads that one.
    """

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)

    def key(
        self,
        model: Transformer,
        tokens: Int[Tensor, "batch pos"],
        record: Iterable[Site | str],
        dtype: torch.dtype = torch.float32,
    ) -> str:
        """The name of the entry: equal for equal weights, tokens, sites (in any order and spelling) and dtype."""
        sites = [str(site) for site in _sites(model, record)]
        facts = [KIND, VERSION, model.weights.fingerprint, list(tokens.shape), sites, dtype_name(dtype)]
        digest = hashlib.sha256(json.dumps(facts).encode())
        digest.update(tokens.detach().to("cpu", torch.int64).contiguous().numpy().data)
        return digest.hexdigest()[:24]

    def cached_run(
        self,
        model: Transformer,
        tokens: Int[Tensor, "batch pos"],
        record: Iterable[Site | str],
        *,
        batch_size: int = 32,
        dtype: torch.dtype = torch.float32,
        shard_bytes: int = 1 << 28,
    ) -> ActivationCache:
        """The activations of ``model`` on ``tokens``, as CPU tensors of ``dtype`` over memory-mapped files.

        Runs the model only if the store lacks them, ``batch_size`` prompts at a time, and keeps no more than a batch
        in memory. ``record`` is as in ``Transformer.run``. The harvest is made safe every ``shard_bytes`` (256 MiB); at
        most that much is computed again after an interruption. float16 and bfloat16 halve the size; values beyond
        float16's 65504 are refused. Writing into a returned tensor changes this process' view and never the file.

        Costs one forward the first time, 1.3 CPU seconds a GB for writing and checksums, and what the disk takes.
        Raises ``StoreError``, which names the file and keeps it, if what is stored was truncated, changed or replaced.
        """
        sites = _sites(model, record)
        key = self.key(model, tokens, sites, dtype)
        if not sites or len(tokens) == 0:
            raise StoreError("there is nothing to store: give at least one prompt and one site to record.")
        if not (self.directory / key).exists():
            with _claim(self.directory, key) as folder:
                about = {"key": key, "model": model.config.name, "fingerprint": model.weights.fingerprint}
                about |= {"n_prompts": tokens.shape[0], "n_positions": tokens.shape[1], "dtype": dtype_name(dtype)}
                if not (self.directory / key).exists():  # nobody finished while we claimed
                    with ShardWriter(folder, about) as writer:
                        _harvest(writer, model, tokens, sites, batch_size, shard_bytes)
                    _publish(folder, self.directory / key)
            self._sweep(key)
        return ActivationCache(open_shards(self.directory / key), model.weights)

    def entries(self) -> list[Entry]:
        """What is stored. Harvests under way or interrupted are no entries yet."""
        return [_entry(path.parent) for path in sorted(self.directory.glob("[!.]*/manifest.json"))]

    @property
    def size(self) -> int:
        """Bytes on disk, interrupted harvests included."""
        return sum(path.stat().st_size for path in self.directory.rglob("*") if path.is_file())

    def verify(self, key: str) -> None:
        """Read an entry whole and compare it with its checksums (about 1 s a GB): ``StoreError`` if one differs."""
        verify_shards(self._folder(key))

    def remove(self, key: str) -> None:
        """Delete an entry, damaged or not, and what interrupted harvests of it left."""
        if self._folder(key).is_dir():
            doomed = self.directory / f".{key}.{os.getpid()}.removed"
            self._folder(key).rename(doomed)  # first of all: nobody meets half an entry
            shutil.rmtree(doomed)
        self._sweep(key)

    def _folder(self, key: str) -> Path:
        folder = self.directory / key
        if not folder.is_dir() and not any(self._unfinished(key)):
            known = [path.parent.name for path in self.directory.glob("[!.]*/manifest.json")]
            raise StoreError(f"{self.directory} has no entry {key!r}; it has {len(known)}.{nearest(key, known)}")
        return folder

    def _unfinished(self, key: str) -> Iterator[Path]:
        return self.directory.glob(f".{key}.*.partial")

    def _sweep(self, key: str) -> None:
        """Remove what harvests that no longer run have left of an entry."""
        for folder in self._unfinished(key):
            with ExitStack() as stack:
                if _locked(folder, stack):
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _claim(directory: Path, key: str) -> Iterator[Path]:
    """A folder that this process alone writes. What an interrupted harvest left is taken up before one is made."""
    with ExitStack() as stack:
        for attempt in itertools.count():
            folder = directory / f".{key}.{attempt}.partial"
            folder.mkdir(parents=True, exist_ok=True)
            if _locked(folder, stack):
                yield folder
                return


def _locked(folder: Path, stack: ExitStack) -> bool:
    """Lock ``folder`` until ``stack`` closes or the process ends, however it ends. False if another one holds it."""
    if fcntl is None:
        return True
    try:
        lock = stack.enter_context((folder / "lock").open("ab"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between the two lines above the owner may have renamed its folder: then this is the lock of a finished entry.
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock"))
    except (BlockingIOError, FileNotFoundError):
        return False


def _harvest(
    writer: ShardWriter, model: Transformer, tokens: Tensor, sites: list[Site], batch_size: int, shard_bytes: int
) -> None:
    """Run the model over the prompts that ``writer`` does not have yet, and let it write what they do to ``sites``."""
    from tqdm import tqdm

    # Only the unembedding's own sites need it at every position.
    everywhere = any(site.name == "logits" or site.name.startswith("ln_final") for site in sites)
    bar = tqdm(total=len(tokens), initial=writer.n_done, unit="prompt", desc="recording", delay=2, disable=None)
    with torch.no_grad(), bar:
        for first in range(writer.n_done, len(tokens), batch_size):
            batch = tokens[first : first + batch_size]
            _, cache = model.run(batch.to(model.device), record=sites, logits_at="all" if everywhere else "last")
            writer.append(cache)
            bar.update(len(batch))
            if writer.unsealed_bytes >= shard_bytes:
                writer.seal()
    if writer.unsealed_prompts:
        writer.seal()


def _publish(folder: Path, final: Path) -> None:
    """Make a finished harvest the entry, unless another process was first: then theirs is, and ours is swept away."""
    try:
        folder.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def _entry(folder: Path) -> Entry:
    facts = read_manifest(folder)
    return Entry(
        key=facts["key"],
        model=facts["model"],
        fingerprint=facts["fingerprint"],
        sites=tuple(map(Site.parse, facts["sites"])),
        n_prompts=facts["n_prompts"],
        n_positions=facts["n_positions"],
        dtype=DTYPES[facts["dtype"]],
        size=sum(site["bytes"] for site in facts["sites"].values()),
    )


def _sites(model: Transformer, record: Iterable[Site | str]) -> list[Site]:
    return sorted(set(resolve(model.config, record)), key=lambda site: site.order)
