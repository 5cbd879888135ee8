"""Training recipes: what a layer quantizes, how, and what its backward pass computes with."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from .. import names
from ..checkpoint.options import Options
from ..checkpoint.schema import Layout
from ..errors import FormatError
from ..formats import MXFP8, NVFP4, Format
from ..names import Kind, Name
from ..policy import FormatOverride, Policy, matches

Backward = Literal["quantized", "high_precision", "dequantized"]
Evaluation = Literal["same", "high_precision"]
DEFAULT_GRADIENTS = NVFP4(rounding="stochastic")


@dataclass(frozen=True)
class LayerRecipe:
    """How one Linear computes y = x·wᵀ and its gradients; `docs/training.md` has the equations.

    Attributes:
        activations: format of x in the forward pass; None leaves x as it is.
        weights: format of w; None leaves w as it is.
        gradients: format of dy in both matmuls of backward="quantized", which needs it; None otherwise.
        hadamard: transform the two operands of wgrad, xᵀ and dyᵀ, along the tokens, over which that matmul sums; for
            backward="quantized" only.
        backward: "quantized": dgrad and wgrad in the formats above, of operands quantized along what is summed over.
            "high_precision": from the original x and w. "dequantized": from what x and w decode to; 4-bit data is
            saved instead of the originals.
        evaluation: what a module in evaluation mode does: the "same", or all in "high_precision".
        batch_invariant: the forward pass of a token does not depend on the batch, bit for bit, so that the model that
            `halfbyte.load(…, batch_invariant=True)` serves gives the same log-probabilities; `docs/rl.md`.

    Raises:
        FormatError: the combination has no meaning.
    """

    activations: Format | None = NVFP4()  # noqa: RUF009  formats are frozen
    weights: Format | None = NVFP4()  # noqa: RUF009
    gradients: Format | None = None
    hadamard: bool = False
    backward: Backward = "high_precision"
    evaluation: Evaluation = "same"
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("backward", get_args(Backward)), ("evaluation", get_args(Evaluation))):
            if getattr(self, name) not in choices:
                raise FormatError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, choices))}")
        for name in ("activations", "weights", "gradients"):
            _check_operand(name, getattr(self, name))
        _check_bools(self, "hadamard", "batch_invariant")
        if self.batch_invariant and isinstance(self.activations, NVFP4) and self.activations.scaling == "tensor":
            raise FormatError(
                f"batch_invariant=True with activations={self.activations!r}: one scale for all tokens depends on the "
                "batch; use NVFP4(scaling='row'), MXFP8() or None"
            )
        if self.activations is None and self.weights is None:
            raise FormatError(
                "activations=None with weights=None quantizes nothing: leave layers out by policy instead"
            )
        if self.backward != "quantized":
            if self.gradients is not None:
                raise FormatError(
                    f"gradients={self.gradients!r} with backward={self.backward!r}, which quantizes no gradient: "
                    "use gradients=None, or backward='quantized'"
                )
            if self.hadamard:
                raise FormatError(
                    f"hadamard=True with backward={self.backward!r}, whose wgrad is not quantized: "
                    "use hadamard=False, or backward='quantized'"
                )
            return
        for name in ("activations", "weights", "gradients"):
            if getattr(self, name) is None:
                raise FormatError(
                    f"{name}=None with backward='quantized', which quantizes both operands of every matmul: give a "
                    "format, such as gradients=NVFP4(rounding='stochastic'), or use another backward"
                )
        if self.hadamard and not (isinstance(self.activations, NVFP4) and isinstance(self.gradients, NVFP4)):
            raise FormatError(
                f"hadamard=True with activations={self.activations!r}, gradients={self.gradients!r}: both operands of "
                "wgrad are transformed, and MXFP8 has no transform; use hadamard=False"
            )

    @property
    def wgrad_activations(self) -> Format:
        """Format of xᵀ in wgrad: as x, but with one scale for the tensor."""
        assert self.activations is not None  # checked when built: backward is "quantized"
        return _along_tokens(self.activations, self.hadamard)

    @property
    def wgrad_gradients(self) -> Format:
        """Format of dyᵀ in wgrad: as dy, but with one scale for the tensor."""
        assert self.gradients is not None
        return _along_tokens(self.gradients, self.hadamard)

    @property
    def token_block(self) -> int:
        """What the count of tokens is filled up to a multiple of, with zeros, where wgrad's operands are quantized."""
        return max(self.wgrad_activations.block_columns, self.wgrad_gradients.block_columns)

    @property
    def stochastic(self) -> bool:
        """Whether gradients need random words."""
        return isinstance(self.gradients, NVFP4) and self.gradients.rounding == "stochastic"

    def to_layer(self) -> LayerRecipe:
        """These values alone, where self is a TrainingRecipe."""
        return LayerRecipe(**{f.name: getattr(self, f.name) for f in fields(LayerRecipe)})


def _check_bools(recipe: LayerRecipe, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(recipe, name), bool):
            raise FormatError(f"{name}={getattr(recipe, name)!r}: needs True or False")


def _check_operand(name: str, fmt: object) -> None:
    if fmt is None:
        return
    if not isinstance(fmt, Format):
        raise FormatError(f"{name}={fmt!r}: needs an NVFP4(...) or MXFP8() value, or None")
    if isinstance(fmt, MXFP8):
        return
    if fmt.hadamard:
        raise FormatError(f"{name}={fmt!r}: the transform belongs to wgrad's operands; use the recipe's hadamard=True")
    if fmt.error == "hessian":
        raise FormatError(f"{name}={fmt!r}: training has no Hessians; use error='mse' or 'mae'")
    if fmt.rounding == "stochastic" and name != "gradients":
        raise FormatError(f"{name}={fmt!r}: only gradients are rounded stochastically; use rounding='nearest'")
    if name == "gradients" and fmt.scale_rule == "four_over_six":
        raise FormatError(f"{name}={fmt!r}: 4over6 is for weights and activations; use scale_rule='amax'")


def _along_tokens(fmt: Format, hadamard: bool) -> Format:
    return fmt if isinstance(fmt, MXFP8) else replace(fmt, scaling="tensor", hadamard=hadamard)


@dataclass(frozen=True)
class LayerOverride:
    """Another recipe for some of the layers that the policy selects.

    Attributes:
        layer: theirs; None leaves them in high precision.
        match: patterns over Hugging Face names, as in `Policy`.
        kinds: what the weights are for.
        megatron: globs over Megatron-Core's module path. Any of the three selects.
    """

    layer: LayerRecipe | None
    match: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()
    megatron: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.match or self.kinds or self.megatron):
            raise FormatError("LayerOverride selects nothing: give match, kinds or megatron")
        for name in ("match", "kinds", "megatron"):
            if isinstance(getattr(self, name), str):
                raise FormatError(f"{name}={getattr(self, name)!r}: needs a tuple of strings")
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def selects(self, name: Name) -> bool:
        """Whether a weight gets this recipe, unless an earlier override selects it."""
        if name.kind in self.kinds or any(matches(pattern, name) for pattern in self.match):
            return True
        path = (names.megatron(name) or "").rpartition(".")[0]
        return bool(path) and any(fnmatch.fnmatchcase(path, pattern) for pattern in self.megatron)


@dataclass(frozen=True)
class TrainingRecipe(LayerRecipe):
    """A recipe for a whole model: that of a layer, and which layers.

    Attributes:
        policy: which weights are quantized, as in conversion.
        overrides: other recipes for some; the first that selects a layer holds.
        share_fused_scales: q/k/v, and gate/up, have one tensor scale, the largest's, as engines and the checkpoint
            writer have it: what is trained is what will be served.
        reuse_weights: Linear layers keep their quantized weight until the parameter changes, for gradient
            accumulation and evaluation; two more bytes per weight. Not in compiled graphs, which cannot see a change.
        main_grad: add weight gradients in float32 to `weight.main_grad` and leave `weight.grad` alone.
        seed: of stochastic rounding, 64 bits.
    """

    policy: Policy = Policy()  # noqa: RUF009
    overrides: tuple[LayerOverride, ...] = ()
    share_fused_scales: bool = True
    reuse_weights: bool = False
    main_grad: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bools(self, "share_fused_scales", "reuse_weights", "main_grad")
        if not isinstance(self.policy, Policy):
            raise FormatError(f"policy={self.policy!r}: needs a halfbyte.Policy")
        object.__setattr__(self, "overrides", tuple(self.overrides))
        for override in self.overrides:
            if not isinstance(override, LayerOverride):
                raise FormatError(f"overrides: {override!r} is not a LayerOverride")
            if override.layer is not None and override.layer.batch_invariant != self.batch_invariant:
                raise FormatError(
                    f"overrides: {override.layer!r} beside batch_invariant={self.batch_invariant} for the model: all "
                    "layers are, or none is"
                )
        if type(self.seed) is not int or not 0 <= self.seed < 2**64:
            raise FormatError(f"seed={self.seed!r}: needs an integer of 64 bits")

    def layer(self, name: Name) -> LayerRecipe | None:
        """The recipe of a layer that the policy selects; None where an override leaves it in high precision."""
        found = next((override for override in self.overrides if override.selects(name)), None)
        return self.to_layer() if found is None else found.layer

    def options(self, layout: Layout = "modelopt") -> Options:
        """What `checkpoint.convert` makes of a model trained with it, which decodes to the weights that it saw.

        Raises:
            FormatError: weights, or an override's, are what no checkpoint holds, or are selected by a Megatron name.
            CheckpointError: as `Options`.
        """
        if self.weights is None:
            raise FormatError("weights=None: the recipe quantizes no weights that a checkpoint could hold")
        ignored: list[str] = []
        overrides: list[FormatOverride] = []
        for override in self.overrides:
            fmt = None if override.layer is None else override.layer.weights
            if override.megatron or (fmt is None and override.kinds):
                raise FormatError(f"{override}: a checkpoint's exclusions are patterns; give Options yourself")
            if fmt is None:
                ignored += override.match
            else:
                overrides.append(FormatOverride(fmt, override.match, override.kinds))
        policy = replace(self.policy, ignore=(*self.policy.ignore, *ignored))
        return Options(format=self.weights, layout=layout, policy=policy, overrides=tuple(overrides))
