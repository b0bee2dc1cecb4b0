"""What scores count: how many items of a kind a model has, and what they are called."""

from collections.abc import Mapping
from typing import Any, Literal

from circuits.wiring import Wiring
from mechinterp.errors import CircuitError

Items = Literal["edge", "node", "port", "neuron", "latent"]


def names_of(items: Items, wiring: Wiring, settings: Mapping[str, Any], n: int) -> tuple[str, ...]:
    """The names of ``n`` items, in their order; see ``Scores.names``."""
    if items == "edge":
        return wiring.edge_names
    if items == "node":
        return tuple(map(str, wiring.writers))
    if items == "port":
        return tuple(str(reader) for reader in wiring.readers if reader.port)
    if items == "latent":
        sizes = latents_by_layer(settings).items()
        return tuple(f"f{layer}.{latent}" for layer, size in sizes for latent in (*range(size), "error"))
    width = n // wiring.n_layers
    return tuple(f"m{layer}.n{neuron}" for layer in range(wiring.n_layers) for neuron in range(width))


def count_of(items: Items, wiring: Wiring, settings: Mapping[str, Any], given: int) -> int:
    """How many numbers there must be. A wiring does not know how wide an MLP is: ``given`` neurons come in whole layers."""
    if items == "latent":
        return sum(size + 1 for size in latents_by_layer(settings).values())
    layers, ports = wiring.n_layers, wiring.n_heads + 2 * wiring.n_groups
    whole_layers = max(given // layers, 1) * layers
    sizes = {"edge": wiring.n_edges, "node": len(wiring.writers), "port": layers * ports}
    return {**sizes, "neuron": whole_layers}[items]


def latents_by_layer(settings: Mapping[str, Any]) -> dict[int, int]:
    """How many latents each layer has; ``CircuitError`` where the settings do not say."""
    try:
        return {int(layer): int(size) for layer, size in settings["latents"].items()}
    except (KeyError, AttributeError, TypeError, ValueError):
        raise CircuitError(
            'latent scores must say how many latents each layer has, as in settings={"latents": {"5": 1024}}.'
        ) from None
