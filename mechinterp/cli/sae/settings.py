"""From the options of ``mechinterp sae`` to places and ``TrainSettings``."""

from collections.abc import Sequence
from typing import Any

from mechinterp.errors import SAEError, nearest


def places_asked(places: Sequence[str] | None, each_head: bool) -> list[str]:
    """As named; every layer's concatenated heads where nothing is."""
    if places and each_head:
        raise SAEError(f"--each-head means every head of every layer, and --places {places[0]} others. Give one of the two.")
    return ["z.*.h*"] if each_head else list(places or ["z"])


def check_choices(architecture: str, k: int | None, sparsity: float | None) -> None:
    """What can be told without a model."""
    from saes.settings import ARCHITECTURES, COUNTING

    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise SAEError(f"there is no architecture {architecture!r}. There are: {known}.{nearest(architecture, ARCHITECTURES)}")
    if k is not None and architecture not in COUNTING:
        raise SAEError(f"--k {k} is for {', '.join(COUNTING)}; {architecture!r} weighs its latents: set --sparsity.")
    if sparsity is not None and architecture in COUNTING:
        raise SAEError(
            f"--sparsity {sparsity:g} is for architectures that weigh latents; {architecture!r} counts them: set --k."
        )


def make_settings(
    transformer: Any,
    names: Sequence[str],
    architecture: str,
    d_sae: int | None,
    k: int | None,
    sparsity: float | None,
    **rest: Any,
) -> tuple[Any, Any]:
    """Places and settings, checked against each other and the model."""
    from saes.places import places_named
    from saes.settings import TrainSettings

    places = places_named(transformer.config, names)
    d_in = places[0].width(transformer.config)
    given = {} if sparsity is None else {"sparsity": sparsity}
    few = min(TrainSettings().k, max(1, d_in // 4))  # a head of 16 numbers is rebuilt by 16 latents without learning anything
    wide = {"d_sae": 8 * d_in if d_sae is None else d_sae, "k": few if k is None else k}
    return places, TrainSettings(architecture=architecture, **wide, **given, **rest)


def say_places(places: Sequence[Any], d_in: int, settings: Any) -> None:
    where = f"{places[0]} to {places[-1]}, {len(places)} autoencoders, each" if len(places) > 1 else f"{places[0]}:"
    print(f"Places  {where} of {d_in:,} numbers and {settings.d_sae:,} latents")
