"""The folders of ``mechinterp sae``: whose they are, and what an autoencoder in one of them was trained on.

``run.json`` stands in each, with everything that was asked for. The same again goes on; anything else is refused.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mechinterp.cli import say
from mechinterp.cli.inputs import check_positive, load_model
from mechinterp.cli.results import check_folder
from mechinterp.cli.sae.data import Data, corpus_of, drawn, joined
from mechinterp.cli.words import model_in_words
from mechinterp.errors import SAEError

RUN = "run.json"
_KIND, _VERSION = "mechinterp sae run", 1


@dataclass(frozen=True, eq=False)
class Trained:
    """An autoencoder from disk. ``data``: what it was trained on, where one of our folders says so."""

    folder: Path
    autoencoder: Any
    data: Data | None

    def asked(self, model: str | None, sources: list[str] | None, **changes: Any) -> Data:
        """Its own data, or what was named instead."""
        model = model or (self.data.model if self.data else self.autoencoder.about.get("model"))
        if model is None:
            raise SAEError(f"{str(self.folder)!r} does not say which model it was trained on. Name it with --model.")
        given = {name: value for name, value in changes.items() if value is not None}
        if self.data is None:
            return Data(model, tuple(sources or ()), **given).checked()
        return replace(self.data, model=model, sources=tuple(sources or self.data.sources), **given).checked()


def check_folders(folder: Path, store: Path | None) -> None:
    """Before anything is loaded: both can be written to, and ``folder`` holds a run of ours or nothing."""
    check_folder(folder)
    if store is not None:
        check_folder(store, "--store")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RUN).is_file():
        some = ", ".join(sorted(path.name for path in folder.iterdir())[:3])
        raise SAEError(f"{str(folder)!r} holds other files ({some}). Choose a new folder with --out.")


def check_same_run(folder: Path, asked: Mapping[str, Any]) -> bool:
    """Whether a run has begun in ``folder``; ``SAEError`` where it is another one."""
    import json

    from mechinterp.files import read_document
    from saes.checkpoints import check_same

    path = folder / RUN
    if not path.is_file():
        return False
    check_same(path, read_document(path, _KIND, _VERSION, SAEError), json.loads(json.dumps(asked)))
    return True


def begin_run(folder: Path, asked: Mapping[str, Any]) -> None:
    from mechinterp.files import to_document, write_text_atomically

    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / RUN, to_document(_KIND, _VERSION, asked))


def data_in_run(data: Data) -> dict[str, Any]:
    """As ``run.json`` keeps it."""
    return asdict(data) | {"sources": list(data.sources)}


def read_trained(folder: Path) -> Trained:
    """The autoencoder in ``folder`` or in its ``autoencoder``, with what the nearest ``run.json`` says of its data."""
    from saes import load

    inside = folder / "autoencoder"
    if (folder / RUN).is_file() and not inside.is_dir():
        what = "holds several autoencoders, in runs/" if (folder / "runs").is_dir() else "holds a training that is not finished"
        remedy = "Name one of them." if (folder / "runs").is_dir() else "Type the same `mechinterp sae train` again to go on."
        raise SAEError(f"{str(folder)!r} {what}. {remedy}")
    found = load(inside if inside.is_dir() else folder)
    above = (folder, *folder.resolve().parents[:2])  # autoencoder/ in a run, runs/topk-16-seed0/ in a frontier
    run = next((path / RUN for path in above if (path / RUN).is_file()), None)
    return Trained(folder, found, None if run is None else _data_of(run))


def load_its_model(trained: Trained, data: Data, device: str) -> Any:
    """The model that the autoencoder reads; ``SAEError`` where it does not fit, a warning where it has other weights."""
    transformer = load_model(data.model, device)
    trained.autoencoder.check_fits(transformer.config)
    fingerprint = trained.autoencoder.about.get("fingerprint")
    if fingerprint not in (None, transformer.weights.fingerprint):
        say.warn(f"{str(trained.folder)!r} was trained on a model of other weights than {data.model}.")
    print(f"Model   {data.model}: {model_in_words(transformer.config)}")
    return transformer


def unseen_text(trained: Trained, data: Data, transformer: Any, limit: int) -> tuple[Any, str]:
    """Rows of ``data``, and which they are in words. Of sources that were trained on: the rows held out, and no others."""
    check_positive("--limit", limit)
    own = trained.data
    repeated = [source for source in data.sources if own is not None and source in own.sources]
    is_same = own is not None and own.is_same_text(data)
    if repeated and not is_same:
        say.warn(f"{', '.join(repeated)} was trained on with other options, so rows of it may have been seen in training.")
    corpora = []
    for source in data.sources:
        corpus = corpus_of(source, data, transformer)
        held_out = is_same and source in repeated
        corpora.append(corpus.split(data.held_out, data.seed)[1] if held_out else corpus)
    everything = joined(corpora, transformer)
    corpus = drawn(everything, limit, data.seed)
    which = "held-out rows" if is_same and len(repeated) == len(data.sources) else "rows"
    words = f"{', '.join(data.sources)}: {len(corpus):,} of {len(everything):,} {which}, {corpus.n_kept:,} positions"
    print(f"Text    {words}")
    return corpus, words


def _data_of(run: Path) -> Data:
    from mechinterp.files import read_document

    document = read_document(run, _KIND, _VERSION, SAEError)
    try:
        return Data(**document["data"] | {"sources": tuple(document["data"]["sources"])})
    except (KeyError, TypeError) as problem:
        raise SAEError(f"{str(run)!r} does not say what was trained on ({problem!r}). Remove it, and name --data.") from None
