"""What text autoencoders are trained and measured on: named on the command line, checked, and made into a ``Corpus``."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechinterp.cli.inputs import check_positive
from mechinterp.cli.sae.options import HELD_OUT, PROMPTS, TOKENS
from mechinterp.errors import SAEError, nearest

SUFFIXES = (".jsonl", ".json", ".txt")


@dataclass(frozen=True)
class Data:
    """Text as it was asked for; the same ``Data`` give the same rows, and hold out the same ones.

    ``sources``: tasks, files and data sets; none stand for every task, which is what the built-in model was trained on.
    ``prompts`` and ``tokens`` are of each source.
    """

    model: str
    sources: tuple[str, ...] = ()
    prompts: int = PROMPTS
    tokens: int = TOKENS
    context: int | None = None
    held_out: float = HELD_OUT
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "sources", tuple(self.sources) or _every_task(self.model))
        check_positive("--prompts", self.prompts)
        check_positive("--tokens", self.tokens)
        if not 0 < self.held_out < 1:
            raise SAEError(f"--held-out {self.held_out:g} leaves nothing on one side. Give a share such as 0.1.")
        if twice := next((source for source in self.sources if self.sources.count(source) > 1), None):
            raise SAEError(f"--data {twice} is named twice. Name each once.")

    def checked(self) -> "Data":
        """The same, if all its sources are there: a file on which an autoencoder was trained may be gone since."""
        for source in self.sources:
            _kind(source)
        return self

    def is_same_text(self, other: "Data") -> bool:
        """Whether a source that both name gives both the same rows."""
        same = ("model", "prompts", "tokens", "context", "held_out", "seed")
        return all(getattr(self, name) == getattr(other, name) for name in same)


def split(data: Data, transformer: Any) -> tuple[Any, Any]:
    """The corpus to train on and the one held out: a share of each source, so that each is measured on too."""
    both = [corpus_of(source, data, transformer).split(data.held_out, data.seed) for source in data.sources]
    training, held_out = zip(*both, strict=True)
    return joined(training, transformer), joined(held_out, transformer)


def corpus_of(source: str, data: Data, transformer: Any) -> Any:
    """Distinct prompts of a task, clean and corrupted; or packed rows of text."""
    from mechinterp.tasks import TASKS
    from saes import corpus_of_tasks, corpus_of_texts, read_texts

    kind = _kind(source)
    if kind == "task":
        return _distinct(corpus_of_tasks(TASKS[source](transformer, n_prompts=data.prompts, seed=data.seed)))
    texts = read_texts(source) if kind == "file" else _downloaded(source)
    return corpus_of_texts(transformer, texts, context=data.context, n_tokens=data.tokens, name=Path(source).name)


def joined(corpora: Sequence[Any], transformer: Any) -> Any:
    """One corpus after another, padded to the width of the widest."""
    import torch

    from saes import Corpus

    if len(corpora) == 1:
        return corpora[0]
    width, pad = max(corpus.tokens.shape[1] for corpus in corpora), torch.nn.functional.pad
    missing = [(0, width - corpus.tokens.shape[1]) for corpus in corpora]
    tokens = [pad(of.tokens, by, value=transformer.tokenizer.pad_id) for of, by in zip(corpora, missing, strict=True)]
    keep = [pad(of.keep, by, value=False) for of, by in zip(corpora, missing, strict=True)]
    return Corpus(torch.cat(tokens), torch.cat(keep), "+".join(corpus.name for corpus in corpora))


def drawn(corpus: Any, limit: int, seed: int) -> Any:
    """``limit`` rows, each as likely as the others, in their order; all of them where there are no more."""
    import torch

    check_positive("--limit", limit)
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(seed))
    return corpus[order[:limit].sort().values]


def activations_of(transformer: Any, corpus: Any, places: Any, store: Path | None) -> Any:
    """Recorded in ``store``, or computed whenever they are needed."""
    from mechinterp.store import ActivationStore
    from saes import harvest, stream

    if store is None:
        return stream(transformer, corpus, places)
    return harvest(transformer, corpus, places, ActivationStore(store))


def say_text(data: Data, training: Any, unseen: Any) -> None:
    print(f"Text    {', '.join(data.sources)}: {len(training):,} rows to train on ({training.n_kept:,} positions), ", end="")
    print(f"{len(unseen):,} held out")


def _every_task(model: str) -> tuple[str, ...]:
    from mechinterp.models.load import BUILTIN
    from mechinterp.tasks import TASKS

    if model not in BUILTIN:
        raise SAEError(
            f"on what text is {model} to be run? Name it with --data: a file ({', '.join(SUFFIXES)}), a data set such as "
            f"roneneldan/TinyStories, or a task ({', '.join(TASKS)})."
        )
    return tuple(TASKS)


def _kind(source: str) -> str:
    """Told by the name: a task's, a file that there is, or ``owner/name`` as data sets are called."""
    from mechinterp.tasks import TASKS

    if source in TASKS:
        return "task"
    path = Path(source)
    if path.is_file() and path.suffix in SUFFIXES:
        return "file"
    if path.exists():
        raise SAEError(f"--data {source}: {'a folder' if path.is_dir() else 'such a file'} is not read. Give {_or(SUFFIXES)}.")
    is_path = path.suffix in SUFFIXES or source.startswith((".", "~", "/"))
    if source.count("/") == 1 and all(source.split("/")) and not is_path:
        return "dataset"
    raise SAEError(
        f"there is no task and no file {source!r} for --data. Tasks: {', '.join(TASKS)}.{nearest(source, TASKS)} A file is one "
        f"of {_or(SUFFIXES)}; a data set is named as owner/name."
    )


def _distinct(corpus: Any) -> Any:
    """Without the prompts that are there already: a small task repeats itself, and held-out rows would not be unseen."""
    first = {tuple(row): number for number, row in reversed(list(enumerate(corpus.tokens.tolist())))}
    return corpus[sorted(first.values())]


def _downloaded(source: str) -> Iterator[Any]:
    """The records of a data set's training split, as they arrive; ``SAEError`` where it cannot be had."""
    name, _, configuration = source.partition(":")
    try:
        _knock()
        from datasets import load_dataset

        yield from load_dataset(name, configuration or None, split="train", streaming=True)
    except Exception as problem:  # the hub, the network and every format have their own ways to fail
        reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
        raise SAEError(
            f"the data set {source!r} cannot be read ({reason}). Check its name; without a network give a file of text "
            f"({_or(SUFFIXES)})."
        ) from None


def _knock() -> None:
    """Fail at once where the hub cannot be reached: its client tries again and again for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if not constants.HF_HUB_OFFLINE:
        get_session().head(constants.ENDPOINT, timeout=10)


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
