"""Discovery: every method is a function from a model and a task to scores, one file each."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from circuits.discovery.acdc import acdc
from circuits.discovery.attribution import atp_star, attribution
from circuits.discovery.cdt import cdt, cdt_edges
from circuits.discovery.code_edges import codes_edges
from circuits.discovery.codes import codes
from circuits.discovery.divergence import divergence
from circuits.discovery.eap import clean_corrupted, eap, eap_ig
from circuits.discovery.exact import exact
from circuits.discovery.flow import information_flow
from circuits.discovery.hybrid import hybrid
from circuits.discovery.masks import edge_pruning, mask_ig, ugs
from circuits.discovery.neurons import neurons
from circuits.discovery.nodes import patching
from circuits.discovery.paper_codes import paper_codes
from circuits.discovery.paths import path_patching
from circuits.discovery.probes import probe
from circuits.discovery.relp import relp
from circuits.discovery.subnetwork import subnetwork_probing
from circuits.discovery.walk import WalkSettings
from circuits.scores import Scores
from circuits.solving import fitness
from mechinterp.errors import CircuitError, nearest
from mechinterp.models.transformer import Transformer
from mechinterp.tasks.base import Task

Discovery = Callable[..., Scores]

ALGORITHMS: dict[str, Discovery] = {
    # edges
    "exact": exact,
    "eap": eap,
    "eap-ig": eap_ig,
    "eap-ig-activations": partial(eap_ig, path="activations"),
    "clean-corrupted": clean_corrupted,
    "relp": relp,
    "hybrid": hybrid,
    "acdc": acdc,
    "mask-ig": mask_ig,
    "edge-pruning": edge_pruning,
    "ugs": ugs,
    "information-flow": information_flow,
    "cdt-edges": cdt_edges,
    # heads and MLPs
    "patching": patching,
    "path-patching": path_patching,
    "cdt": cdt,
    "cdt-paper": partial(cdt, rules="paper"),
    "atp": attribution,
    "atp-qk": partial(attribution, qk_fix=True),
    "atp-star": atp_star,
    "atp-ig": partial(attribution, steps=5),
    "subnetwork-probing": subnetwork_probing,
    # the MLPs' hidden units
    "neurons": neurons,
    # watched and not changed: what parts hear of or know, by distance, by discrete codes of a few examples or by a probe
    "divergence": divergence,
    "codes": codes,
    "codes-change": partial(codes, score="change"),
    "codes-answer": partial(codes, score="answer"),
    "codes-paper": paper_codes,
    "codes-edges": codes_edges,
    "probe": probe,
}

# What a part knows it need not use: these say nothing of what cutting it does.
WATCHING = frozenset({"divergence", "codes", "codes-change", "codes-answer", "codes-paper", "codes-edges", "probe"})

# A share of a reader compares only with others of that reader, so edges are taken from the logits upstream.
CUT_GREEDILY = frozenset({"information-flow"})


def discover(
    model: Transformer, task: Task, method: str | Discovery = "eap-ig", *, allow_unsolved: bool = False, **settings: Any
) -> Scores:
    """Score the parts of ``model`` on ``task``: positive means that the metric falls if the part is cut.

    ``method`` is a name of ``ALGORITHMS`` or a function ``(model, task, **settings) -> Scores``. ``settings`` are the
    method's own keywords (``ablation``, ``steps``, ...) and, for most, those of ``WalkSettings`` (``batch_size``,
    ``keep_positions``, ``resume``, ``progress``, ...). Raises ``TaskError`` where nothing can come of it: see ``fitness``,
    which also says what ``allow_unsolved`` allows.
    """
    if isinstance(method, str):
        known_method(method)
        _check_settings(method, settings)
    fitness(model, task, allow_unsolved=allow_unsolved)
    return (ALGORITHMS[method] if isinstance(method, str) else method)(model, task, **settings)


def known_method(name: str) -> Discovery:
    """The method of this name; ``CircuitError`` names those that there are."""
    if name not in ALGORITHMS:
        raise CircuitError(f"there is no method {name!r}; there are {', '.join(ALGORITHMS)}.{nearest(name, ALGORITHMS)}")
    return ALGORITHMS[name]


def settings_of(method: str) -> list[str]:
    """The keywords that a method takes beside model and task."""
    taken = inspect.signature(ALGORITHMS[method]).parameters.values()
    known = [parameter.name for parameter in taken if parameter.kind is parameter.KEYWORD_ONLY]
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken)
    return known + (list(WalkSettings.__annotations__) if takes_more else [])


def _check_settings(method: str, settings: Mapping[str, Any]) -> None:
    """A mistyped setting is named here, with those that there are; Python would name a function deep inside."""
    known = settings_of(method)
    if unknown := [name for name in settings if name not in known]:
        hint = nearest(unknown[0], known)
        raise CircuitError(f"{method!r} has no setting {unknown[0]!r}; it has {', '.join(known)}.{hint}")
