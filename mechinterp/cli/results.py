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


@contextmanager
def file_written_whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` at the end; its folder is made if need be, and checked at once."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot write to {str(path)!r}: it is a folder. Give a file's name as --out.")
    with folder_written_whole(path.parent) as scratch:
        yield scratch / path.name


def check_folder(folder: Path, option: str = "--out") -> None:
    """``OSError``, naming the option, unless ``folder`` is there, or can be made, and can be written to."""
    _scratch_in(_nearest_folder(folder), folder, option).rmdir()


def _nearest_folder(folder: Path) -> Path:
    """``folder``, or the closest thing above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())


def _scratch_in(existing: Path, folder: Path, option: str = "--out") -> Path:
    if not existing.is_dir():
        raise NotADirectoryError(f"cannot write to {str(folder)!r}: {str(existing)!r} is a file. Give a folder as {option}.")
    try:
        return Path(tempfile.mkdtemp(prefix=".mechinterp-", dir=existing))
    except OSError as problem:
        raise PermissionError(
            f"cannot write to {str(folder)!r}: {problem.strerror} ({str(existing)!r}). Choose another folder with {option}."
        ) from None
