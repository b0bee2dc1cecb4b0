"""Every exception that the toolkit raises on purpose.

    MechinterpError
    ├── UnknownNode, UnknownSite (LookupError)   what was asked, what there is, the nearest name
    ├── TaskError (ValueError)                   prompts that do not align, answers of several tokens
    ├── CircuitError (ValueError)                an edge outside the wiring, more edges than exist, a file that is no circuit
    ├── SAEError (ValueError)                    an autoencoder that does not fit the site, a file that is none, bad settings
    ├── StoreError (OSError)                     a truncated or foreign shard: named, kept, never read as data
    └── ModelError (RuntimeError)                an architecture or a file that the engine cannot run, and which part of it

All of them are raised at the border, where input arrives, and say what was given, what would be right and what to do.
"""

import difflib
from collections.abc import Iterable


class MechinterpError(Exception):
    """The root: catch this to catch everything that the toolkit refuses."""


class UnknownNode(MechinterpError, LookupError):
    """A node that cannot be parsed, or that this model lacks."""


class UnknownSite(MechinterpError, LookupError):
    """A place in the forward pass that this model lacks, or that this pass did not record."""


class TaskError(MechinterpError, ValueError):
    """Prompts that do not align, words that are several tokens, a metric that means nothing here."""


class CircuitError(MechinterpError, ValueError):
    """An edge outside the wiring, more edges than exist, scores that cannot be ranked, a file that is no circuit."""


class SAEError(MechinterpError, ValueError):
    """An autoencoder that does not fit the model or the site, settings that mean nothing, a file that is no autoencoder."""


class StoreError(MechinterpError, OSError):
    """A shard that is truncated, foreign or already being written."""


class ModelError(MechinterpError, RuntimeError):
    """An architecture, a checkpoint or a request that the engine cannot run exactly."""


def nearest(given: str, known: Iterable[str]) -> str:
    """A closing sentence that names the closest known spelling, or nothing.

    >>> nearest("a9.h61", ["a9.h6", "m4"])
    " Did you mean 'a9.h6'?"
    """
    close = difflib.get_close_matches(given, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
