"""What follows when heads of one layer write something else: their entrance to the rest of the model.

A head's change has rank ``d_head``. The MLP behind it takes ``norm(x + Δz W_O) W_in``, and but for one number a position,
by which the normalisation divides, that is linear: ``x W_in`` is common to all heads, ``W_O W_in`` is made once a layer, and
a change costs ``Δz (W_O W_in)``: for GPT-2 a twelfth of the product. It is the same sum in another order. A gated MLP has
two such matrices.

Heads that change together, such as those that share a key, are a *unit*: as many neighbours as there are numbers in a change.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.discovery import suffix
from circuits.discovery.suffix import CleanRun
from mechinterp.models.normalization import normalize, scale_of
from mechinterp.models.transformer import ACTIVATIONS

Units = slice | Int[Tensor, "some_unit"]


class HeadsOf:
    """The heads of one layer of a clean run. Changes are of what heads write: of ``z``, or where there is one ``z_written``."""

    def __init__(self, run: CleanRun, layer: int):
        self.run, self.layer, config = run, layer, run.model.config
        is_last = layer == config.n_layers - 1  # there END alone counts, and sharing saves nothing
        self.feed_mlp = run.after_attention(layer) == "resid_mid" and not is_last
        self.W_O = run.model.weights.W_O(layer).flatten(0, 1)
        if self.feed_mlp:
            self._share()

    def falls(self, change: Float[Tensor, "variant batch pos unit d_unit"]) -> Float[Tensor, "unit variant batch"]:
        """By how much the metric falls if one unit's heads alone change so, for each unit and variant."""
        per_unit = change.flatten(0, 2).transpose(0, 1)
        at_once = max(1, suffix.TOKENS_AT_ONCE // per_unit.shape[1])
        groups = [slice(first, first + at_once) for first in range(0, len(per_unit), at_once)]
        return torch.cat([self._falls(some, len(per_unit), per_unit[some], change.shape[:3]) for some in groups])

    def falls_of(
        self, change: Float[Tensor, "variant batch pos unit d_unit"], wanted: Bool[Tensor, "unit variant"]
    ) -> Float[Tensor, "pair batch"]:
        """``falls`` of some pairs of unit and variant alone, in the order of ``wanted.nonzero()``."""
        units, variants = wanted.nonzero().unbind(1)
        per_pair = change[variants, :, :, units].flatten(1, 2)
        at_once, shape = max(1, suffix.TOKENS_AT_ONCE // per_pair.shape[1]), (1, *change.shape[1:3])
        parts = zip(units.split(at_once), per_pair.split(at_once), strict=True)
        return torch.cat([self._falls(some, len(wanted), pairs, shape)[:, 0] for some, pairs in parts])

    def _falls(
        self, units: Units, n_units: int, change: Float[Tensor, "some_unit row d_unit"], shape
    ) -> Float[Tensor, "some_unit variant batch"]:
        written = torch.bmm(change, self.W_O.unflatten(0, (n_units, -1))[units]).unflatten(1, shape)
        entrance = self.run.after_attention(self.layer)
        if self.feed_mlp:
            into = [torch.bmm(change, W.unflatten(0, (n_units, -1))[units]).unflatten(1, shape) for W in self.W_O_in]
            entrance, written = "resid_post", written + self._mlp_change(into, written)
        return self.run.falls(entrance, self.layer, written.flatten(0, 1)).unflatten(0, written.shape[:2])

    def _share(self) -> None:
        """What all heads' changes have in common on their way into the MLP, for each matrix that reads it (gate first)."""
        block, config = self.run.model.weights.blocks[self.layer], self.run.model.config
        self.biases, self.W_O_in, self.clean = [], [], []
        for W, bias in [(block.W_gate, block.b_gate)] * config.gated + [(block.W_in, block.b_in)]:
            assert W is not None
            assert bias is not None
            if block.ln2 is not None:
                bias = bias if block.ln2.b is None else bias + block.ln2.b @ W
                W = W if block.ln2.w is None else block.ln2.w.unsqueeze(1) * W
                W = W - W.mean(0) if config.centred else W  # x (W - mean) is (x - mean x) W: the centring, done once
            self.biases.append(bias)
            self.W_O_in.append(self.W_O @ W)
            self.clean.append(self.run["resid_mid", self.layer] @ W)

    def _mlp_change(
        self, into: list[Float[Tensor, "some_unit variant batch pos d_mlp"]], written: Float[Tensor, "*axes d_model"]
    ) -> Float[Tensor, "some_unit variant batch pos d_model"]:
        """What the layer's MLP writes after a change, of which ``into`` comes to its matrices, minus the clean run's."""
        config, block = self.run.model.config, self.run.model.weights.blocks[self.layer]
        assert block.b_out is not None
        assert block.W_out is not None
        share = None if block.ln2 is None else scale_of(self.run["resid_mid", self.layer] + written, config).reciprocal()
        for pre, clean, bias in zip(into, self.clean, self.biases, strict=True):
            pre.add_(clean)
            pre = pre if share is None else pre.mul_(share)
            pre.add_(bias)
        post = ACTIVATIONS[config.activation](into[0])
        post = post * into[1] if config.gated else post
        mlp_out = torch.addmm(block.b_out, post.flatten(0, 3), block.W_out)
        return normalize(mlp_out, block.ln2_post, config).unflatten(0, written.shape[:4]).sub_(self.run["mlp_out", self.layer])
