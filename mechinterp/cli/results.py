"""Where a command's files go: checked before anything is computed, and there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folder_written_whole(folder: Path, names: Collection[str] = ()) -> Iterator[Path]:
    """A scratch folder whose files move into ``folder`` at the end; on failure ``folder`` stays as it was.

    ``folder`` need not exist. ``OSError`` at once if it cannot be written, so that nobody waits for a result in vain.
    Earlier files called one of ``names`` that were not written anew are removed, so that a folder never mixes two runs;
    all others are kept.
    """
    scratch = _scratch_in(_nearest_folder(folder), folder)
    try:
        yield scratch
        folder.mkdir(parents=True, exist_ok=True)
        written = sorted(file.name for file in scratch.iterdir())
        for name in written:
            os.replace(scratch / name, folder / name)
        for name in set(names) - set(written):
            (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _nearest_folder(folder: Path) -> Path:
    """``folder``, or the closest thing above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())


def _scratch_in(existing: Path, folder: Path) -> Path:
    if not existing.is_dir():
        raise NotADirectoryError(f"cannot write to {str(folder)!r}: {str(existing)!r} is a file. Give a folder as --out.")
    try:
        return Path(tempfile.mkdtemp(prefix=".mechinterp-", dir=existing))
    except OSError as problem:
        raise PermissionError(
            f"cannot write to {str(folder)!r}: {problem.strerror} ({str(existing)!r}). Choose another folder with --out."
        ) from None
