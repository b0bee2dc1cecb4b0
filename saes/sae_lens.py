"""SAELens' autoencoders as ours and ours as SAELens': one mapping of configuration and tensors, for files and for objects.

Latents and reconstructions are equal on both sides. Where SAELens has a switch and our equation has none, ``folding.py``
puts it into the weights; what training alone used (coefficients, bandwidths) becomes ``about``.
"""

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mechinterp.errors import SAEError, UnknownSite
from saes.base import SparseAutoencoder
from saes.folding import Named, folded
from saes.places import Place
from saes.pursuit import Pursuit

OURS = "mechinterp"  # the key of SAELens' metadata under which our ``about`` stands
_LAYOUT = "6.54.12"  # the release of SAELens whose layout is written; without one it would read the layout before 6
KIND_OF = {
    "standard": "relu",
    "gated": "gated",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
    "abstopk": "abstopk",
    "matching_pursuit": "matching_pursuit",
}
_ENCODER = {
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag"),
    "batchtopk": ("W_enc", "b_enc", "topk_threshold"),
    "matryoshka_batchtopk": ("W_enc", "b_enc", "topk_threshold"),
    "jumprelu": ("W_enc", "b_enc", "threshold"),
    "matching_pursuit": (),
}
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}


def from_sae_lens(sae: Any, *, place: "Place | str | None" = None, scale: float | None = None) -> SparseAutoencoder:
    """A live autoencoder of SAELens, to be used or still in training, as ours. Shares no memory with it.

    ``place`` is where it stands, if its ``cfg.metadata`` does not say so by ``hook_name`` and ``hook_head_index``.
    ``scale`` is what inputs were multiplied by in training with ``expected_average_only_in`` (its trainer's
    ``activation_scaler.scaling_factor``), as long as SAELens has not folded it. Raises ``SAEError`` for architectures
    that are no autoencoder of one site (transcoders, temporal ones).
    """
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    return from_parts(sae.cfg.to_dict(), state, f"this {type(sae).__name__}", place, scale)


def to_sae_lens(autoencoder: SparseAutoencoder) -> Any:
    """A live ``sae_lens.SAE`` with the same latents and reconstructions; for several groups choose one with ``group``.

    On all heads' ``z`` it takes activations as SAELens does, ``[..., head_index, d_head]``. At other sites with heads
    (``q.5``) flatten them first: SAELens knows that reshaping for ``z`` alone.
    """
    from sae_lens import SAE

    cfg, tensors = to_parts(autoencoder)
    sae = SAE.from_dict({**cfg, "device": str(autoencoder.W_dec.device)})
    sae.load_state_dict(tensors)
    return sae


def from_parts(
    cfg: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: str,
    place: "Place | str | None" = None,
    scale: float | None = None,
) -> SparseAutoencoder:
    """One group of ours from a configuration and a state dict of SAELens, of any release and in training form or not.

    ``source`` names them in messages. Half precision becomes ``float32``.
    """
    cfg = _modern(cfg)
    architecture = _architecture(cfg, source)
    place = _place(cfg, source) if place is None else Place.parse(place) if isinstance(place, str) else place
    scale, normalize = _scaling(cfg, source, scale)
    pursuit = _pursuit(cfg, source, scale) if architecture == "matching_pursuit" else None
    named = folded(_checked(cfg, architecture, tensors, source), architecture, cfg, scale)
    named |= {"b_enc": named.pop("b_mag")} if "b_mag" in named else {}
    if pursuit is not None:
        named |= {"W_enc": named["W_dec"].mT.contiguous(), "b_enc": torch.zeros_like(named["W_dec"][:, 0])}
    try:
        return SparseAutoencoder(
            KIND_OF[architecture],
            (place,),
            **{name: tensor.unsqueeze(0) for name, tensor in named.items()},
            k=int(cfg["k"]) if architecture in ("topk", "abstopk") else None,
            normalize=normalize,
            pursuit=pursuit,
            about=_about(cfg["metadata"]),
        )
    except SAEError as problem:
        raise SAEError(f"{source}: {problem}") from None


def to_parts(autoencoder: SparseAutoencoder) -> tuple[dict[str, Any], Named]:
    """The configuration and the state dict that SAELens has for one group; the tensors are ours, not copies."""
    if autoencoder.n_groups != 1:
        raise SAEError(
            f"SAELens' autoencoders stand at one place each, and these at {autoencoder.n_groups}. Choose one with "
            f".group({str(autoencoder.places[0])!r}), say; `save` writes a folder for each."
        )
    named = {name: tensor[0].detach() for name, tensor in autoencoder.tensors.items()}
    if autoencoder.kind == "gated":
        named["b_mag"] = named.pop("b_enc")
    if autoencoder.kind == "matching_pursuit":
        named = {name: named[name] for name in ("W_dec", "b_dec")}
    (place,) = autoencoder.places
    cfg = {
        "d_in": autoencoder.d_in,
        "d_sae": autoencoder.d_sae,
        "dtype": str(autoencoder.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": autoencoder.normalize,
        "reshape_activations": "hook_z" if place.site.name == "z" and place.head is None else "none",
        "architecture": {"relu": "standard"}.get(autoencoder.kind, autoencoder.kind),
        "metadata": _metadata(autoencoder, place),
    }
    if autoencoder.kind in ("topk", "abstopk"):
        cfg |= {"k": autoencoder.k, "rescale_acts_by_decoder_norm": False}
    if autoencoder.kind == "matching_pursuit":
        cfg |= asdict(autoencoder.pursuit or Pursuit())
    return cfg, named


def _metadata(autoencoder: SparseAutoencoder, place: Place) -> dict[str, Any]:
    about = dict(autoencoder.about)
    return {
        **about.get("sae_lens", {}),
        "hook_name": place.site.hook_name or str(place.site),  # z_written is a name of ours alone
        "hook_head_index": place.head,
        "model_name": about.get("model"),
        "sae_lens_version": _LAYOUT,
        "sae_lens_training_version": about.get("sae_lens", {}).get("sae_lens_training_version"),
        OURS: about,
    }


def _about(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Our own facts as they were; or the model's name, and SAELens' other facts under ``sae_lens``."""
    if isinstance(metadata.get(OURS), Mapping):
        return dict(metadata[OURS])
    ours = ("model_name", "hook_name", "hook_head_index")
    rest = {name: value for name, value in metadata.items() if name not in ours and value is not None}
    model = {"model": metadata["model_name"]} if metadata.get("model_name") else {}
    return model | ({"sae_lens": rest} if rest else {})


def _modern(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The layout since SAELens 6: before, facts about the model stood beside ``d_in``, and top-k was an activation function."""
    cfg = {_RENAMED.get(name, name): value for name, value in cfg.items()}
    metadata = cfg["metadata"] if isinstance(cfg.get("metadata"), Mapping) else {}
    beside = ("hook_name", "hook_head_index", "model_name", "context_size", "prepend_bos", "dataset_path", "sae_lens_version")
    cfg["metadata"] = {name: cfg[name] for name in beside if name in cfg} | dict(metadata)
    cfg["architecture"] = cfg.get("architecture") or "standard"
    if cfg.get("activation_fn") == "topk":
        cfg |= {"architecture": "topk", "k": (cfg.get("activation_fn_kwargs") or {}).get("k", cfg.get("k"))}
    spelled = {True: "expected_average_only_in", False: "none", None: "none"}
    normalize = cfg.get("normalize_activations")
    cfg["normalize_activations"] = normalize if isinstance(normalize, str) else spelled.get(normalize, str(normalize))
    return cfg


def _architecture(cfg: Mapping[str, Any], source: str) -> str:
    architecture = cfg["architecture"]
    if architecture not in KIND_OF:
        raise SAEError(
            f"{source} is a {architecture!r}, and no autoencoder of one site that we know. We read {', '.join(KIND_OF)}."
        )
    if cfg.get("activation_fn", "relu") not in ("relu", "topk"):
        raise SAEError(f"{source} has the activation function {cfg['activation_fn']!r}; we know 'relu' and 'topk'.")
    counts = architecture in ("topk", "abstopk")
    for name in ("d_in", "d_sae", *(("k",) if counts else ())):
        value = cfg.get(name)
        if not (isinstance(value, int | float) and value >= 1 and float(value).is_integer()):
            raise SAEError(f"{source} has {name}={value!r} in its configuration; a whole number from 1 on is needed.")
    return architecture


def _place(cfg: Mapping[str, Any], source: str) -> Place:
    hook, head = (cfg["metadata"].get(name) for name in ("hook_name", "hook_head_index"))
    remedy = "Say where it stands: place='z.5', or place='z.5.h3' for one head."
    if not isinstance(hook, str):
        raise SAEError(f"{source} does not say where it stands (metadata.hook_name). {remedy}")
    try:
        place = Place.parse(hook)
        return Place(place.site, place.head if head is None else int(head))
    except (SAEError, UnknownSite, ValueError, TypeError) as problem:
        raise SAEError(f"{source} stands at {hook!r}, head {head}, which is no place of ours ({problem}) {remedy}") from None


def _scaling(cfg: Mapping[str, Any], source: str, scale: float | None) -> tuple[float, str]:
    """The factor of inputs to be folded, and which ``normalize`` is left."""
    normalize = cfg["normalize_activations"]
    if normalize == "covariance_whitening":
        raise SAEError(
            f"{source} is a checkpoint whose whitening is not folded yet. Let SAELens finish training: it folds it at the end."
        )
    if normalize == "expected_average_only_in":
        if scale is None:
            warnings.warn(
                f"{source} was trained on inputs multiplied by a number that it does not keep (expected_average_only_in). "
                "It is read as SAELens reads it, without. If you know the number, give scale=...",
                stacklevel=2,
            )
        return 1.0 if scale is None else scale, "none"
    if scale is not None:
        raise SAEError(f"{source} does not multiply its inputs (normalize_activations={normalize!r}). Leave `scale` out.")
    return 1.0, normalize


def _checked(cfg: Mapping[str, Any], architecture: str, tensors: Mapping[str, Tensor], source: str) -> Named:
    """The tensors that the architecture has, and no others: of their shapes, finite, in single or double precision."""
    named = _recent(cfg, architecture, tensors, source)
    d_in, d_sae = int(cfg["d_in"]), int(cfg["d_sae"])
    shapes = {"W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    own = {"W_enc": (d_in, d_sae), "topk_threshold": ()}
    shapes |= {name: own.get(name, (d_sae,)) for name in _ENCODER.get(architecture, ("W_enc", "b_enc"))}
    if missing := [name for name in shapes if name not in named]:
        raise SAEError(f"{source} lacks {', '.join(missing)}; a {architecture} autoencoder has {', '.join(shapes)}.")
    if "scaling_factor" in named:
        shapes["scaling_factor"] = (d_sae,)
    if foreign := [name for name in named if name not in shapes]:
        raise SAEError(f"{source} has {', '.join(foreign[:5])}; a {architecture} autoencoder has {', '.join(shapes)} alone.")
    for name, shape in shapes.items():
        if tuple(named[name].shape) != shape:
            given = tuple(named[name].shape)
            raise SAEError(f"{name} of {source} has shape {given}; with d_in={d_in} and d_sae={d_sae} it is {shape}.")
        if not (named[name].is_floating_point() and named[name].isfinite().all()):
            raise SAEError(
                f"{name} of {source} holds NaN, infinity or whole numbers: training diverged, or the file is damaged. "
                "Go back to an earlier checkpoint."
            )
    wide = torch.float64 if named["W_dec"].dtype == torch.float64 else torch.float32
    return {name: tensor.to(wide) for name, tensor in named.items()}


def _recent(cfg: Mapping[str, Any], architecture: str, tensors: Mapping[str, Tensor], source: str) -> Named:
    """Older releases trained the logarithm of thresholds, and wrote a finetuned factor for each latent, mostly all 1."""
    named = dict(tensors)
    if architecture == "jumprelu" and "log_threshold" in named:
        named["threshold"] = named.pop("log_threshold").float().exp()
    unused = "scaling_factor" in named and not cfg.get("finetuning_scaling_factor")
    if unused and not (named.pop("scaling_factor") == 1).all():
        raise SAEError(f"{source} has a scaling_factor and says it does not use it (finetuning_scaling_factor is off).")
    return named


def _pursuit(cfg: Mapping[str, Any], source: str, scale: float) -> Pursuit:
    given = asdict(Pursuit()) | {name: cfg[name] for name in asdict(Pursuit()) if name in cfg}
    limit = given["max_iterations"]
    try:
        return Pursuit(
            residual_threshold=float(given["residual_threshold"]) / scale,
            max_iterations=None if limit is None else int(limit),
            stop_on_duplicate_support=bool(given["stop_on_duplicate_support"]),
        )
    except (TypeError, ValueError) as problem:
        raise SAEError(f"{source} does not say in numbers when its pursuit stops ({problem}).") from None
