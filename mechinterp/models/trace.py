"""What one pass reads and writes: the patches it applies and the activations it keeps."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from mechinterp.cache import ActivationCache
from mechinterp.errors import ModelError
from mechinterp.models.weights import Weights
from mechinterp.sites import Site, resolve

Patch = Callable[[Tensor, ActivationCache], Tensor]

# In the last layer, these need every position even if logits are wanted at one: later positions attend to them.
_BEFORE_QUERIES = {"resid_pre", "k_input", "v_input", "ln1_scale", "ln1_normalized", "k", "v", "rot_k"}


class Trace:
    """Called around every activation of a pass: patches it, records it, returns it."""

    def __init__(
        self,
        weights: Weights,
        record: Iterable[Site | str] = (),
        patch: Mapping[Site | str, Patch] | None = None,
        first: int = 0,
    ):
        config = weights.config
        self._record = {(site.name, site.layer) for site in resolve(config, record)}
        self._patch = {(s.name, s.layer): (s, p) for key, p in (patch or {}).items() for s in resolve(config, [key])}
        self._touched = self._record | self._patch.keys()
        self._values: dict[Site, Tensor] = {}
        self.cache = ActivationCache(self._values, weights, first)
        self._refuse_dead_norms()

    def __call__(self, name: str, layer: int | None, value: Tensor) -> Tensor:
        key = (name, layer)
        if key not in self._touched:
            return value
        if key in self._patch:
            value = self._apply(*self._patch[key], value)
        if key in self._record:
            self._values[Site(name, layer)] = value
        return value

    def touches(self, name: str, layer: int | None) -> bool:
        return (name, layer) in self._touched

    def looks_past_keys(self, layer: int) -> bool:
        """Whether anything after ``layer``'s keys and values is read or written, other than the logits."""
        return any(at == layer and name not in _BEFORE_QUERIES for name, at in self._touched)

    def refuse_before(self, entrance: Site | None) -> None:
        """A site that the pass never reaches would be recorded as nothing and patched without effect: say so."""
        if entrance is None:
            return
        for name, layer in self._touched:
            site = Site(name, layer)
            if site.order < entrance.order:
                raise ModelError(
                    f"this pass starts at {str(entrance)!r} and never reaches {str(site)!r}. Start earlier, or drop it."
                )

    def _apply(self, site: Site, patch: Patch, value: Tensor) -> Tensor:
        version = None if value.is_inference() else value._version
        patched = patch(value, self.cache)
        if not isinstance(patched, Tensor):
            raise ModelError(f"the patch at {str(site)!r} returned {type(patched).__name__}; return the new tensor.")
        if version is not None and value._version != version:
            # It may be a view of the stream that others read, of a recorded tensor, or of the weights.
            raise ModelError(
                f"the patch at {str(site)!r} wrote into the value it was given. Write into value.clone() and return that."
            )
        if patched.shape != value.shape:
            raise ModelError(
                f"the patch at {str(site)!r} returned shape {tuple(patched.shape)}; "
                f"the activation there is {tuple(value.shape)} ({site.axes})."
            )
        return patched

    def _refuse_dead_norms(self) -> None:
        """Where every port has a stream of its own, nobody reads the shared normalisation: a patch there would be lost."""
        for name, layer in self._patch:
            if name in ("ln1_scale", "ln1_normalized") and any((f"{p}_input", layer) in self._touched for p in "qkv"):
                raise ModelError(
                    f"{name} and a per-head input ({name[:3]}: q_input, k_input, v_input) of layer {layer} cannot be used in "
                    "one pass: ports with an input of their own have a normalisation of their own. Patch q, k or v instead."
                )
            if name == "result" and ("z_written", layer) in self._touched:
                raise ModelError(
                    f"'result' and 'z_written' of layer {layer} cannot be used in one pass: what heads write is computed from "
                    "one of them. Patch 'z_written' alone, or 'result' alone."
                )
