"""A model whose convolutions compute as int8 hardware will: batch norm folded, weights and maps rounded.

Activations are uint8 with one scale and zero point a map, weights int8 with one scale an output channel and no
zero point (Jacob et al. 2018, arXiv 1712.05877; Krishnamoorthi 2018, arXiv 1806.08342). The rounding is simulated
in floating point and its gradient is passed straight through, so a quantised model trains, saves, loads and gives
its taps like any other; `freeze` makes of it what exporters turn into integer arithmetic.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.interface import SegmentationModel

LARGEST = 127  # of a weight: −128 is not used, so that a weight and its negative are equally far from 0


@dataclass
class Plan:
    """Where a model is quantised; it is saved in `config.json` as `quantised`.

    Args:
        norms: batch normalisations by the convolution that each is folded into.
        inputs: all convolutions, each with the quantiser of its input.
        direct: those of them whose input is the rounded answer of another.
        outputs: convolutions and activations whose answer is quantised, each with its quantiser.
        exact: convolutions that stay in floating point.
    """

    norms: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    direct: list[str] = field(default_factory=list)
    outputs: dict[str, str] = field(default_factory=dict)
    exact: list[str] = field(default_factory=list)


class Quantiser(nn.Module):
    """Rounds a map to `scale * (n - zero_point)` for n in 0 … 255; maps that are joined later share one.

    0 is met exactly: it is what convolutions pad with.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.observe: Any = None  # while ranges are looked for: called with each map, which passes as it is
        self.frozen: tuple[float, int, int, int, torch.dtype] | None = None

    def set_range(self, lowest: float, highest: float) -> None:
        """The range that 0 … 255 stand for, widened to contain 0."""
        lowest, highest = min(lowest, 0.0), max(highest, 0.0)
        scale = (highest - lowest) / 255 or 1.0
        self.scale.fill_(scale)
        self.zero_point.fill_(round(-lowest / scale))

    def forward(self, x: Tensor) -> Tensor:
        if self.observe is not None:
            self.observe(x)
            return x
        if self.frozen is not None:
            whole = torch.ops.quantized_decomposed.quantize_per_tensor(x, *self.frozen)
            return torch.ops.quantized_decomposed.dequantize_per_tensor(whole, *self.frozen)
        return torch.fake_quantize_per_tensor_affine(x.float(), self.scale, self.zero_point, 0, 255)


class QuantisedConv2d(nn.Conv2d):
    """A convolution in int8: its input is rounded unless that has been done, its answer if `after` is given.

    With `exact` weights and input stay in floating point.
    """

    weight_scale: Tensor
    zero_points: Tensor

    def __init__(self, convolution: nn.Conv2d, before: Quantiser | None, after: Quantiser | None) -> None:
        super().__init__(
            convolution.in_channels,
            convolution.out_channels,
            cast(Any, convolution.kernel_size),
            cast(Any, convolution.stride),
            cast(Any, convolution.padding),
            cast(Any, convolution.dilation),
            convolution.groups,
            padding_mode=convolution.padding_mode,
        )
        self.weight, self.bias = convolution.weight, convolution.bias
        self.held = (before, after)  # in a tuple: they belong to the model, which saves them once
        self.exact = False
        self.stored = False

    def store(self) -> None:
        """Puts whole numbers and their scales in the place of the weights."""
        scale = self.scales()
        whole = (self.weight.detach() / scale.view(-1, 1, 1, 1)).round().clamp(-LARGEST, LARGEST).to(torch.int8)
        del self.weight
        self.register_buffer("weight", whole)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("zero_points", torch.zeros(len(scale), dtype=torch.int64, device=scale.device))
        self.stored = True

    def scales(self) -> Tensor:
        """Of each output channel: its largest weight is 127."""
        return (
            self.weight.detach().float().abs().amax((1, 2, 3)).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        )

    def forward(self, x: Tensor) -> Tensor:
        before, after = self.held
        if before is not None and not self.exact:
            x = before(x)
        x = self._conv_forward(x, self.rounded_weight(), self.bias)
        return x if after is None else after(x)

    def rounded_weight(self) -> Tensor:
        """The weights as they are multiplied, in floating point."""
        if self.exact:
            return self.weight
        if self.stored:
            return torch.ops.quantized_decomposed.dequantize_per_channel(
                self.weight, self.weight_scale, self.zero_points, 0, -LARGEST, LARGEST, torch.int8
            )
        scale = self.scales()
        zero_points = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
        return torch.fake_quantize_per_channel_affine(
            self.weight.float(), scale, zero_points, 0, -LARGEST, LARGEST
        )


class Rounded(nn.Module):
    """An activation whose answer is rounded."""

    def __init__(self, inner: nn.Module, quantiser: Quantiser) -> None:
        super().__init__()
        self.inner, self.held = inner, (quantiser,)

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](self.inner(x))


@torch.no_grad()
def insert_quantisers(model: SegmentationModel, plan: Plan) -> None:
    """Folds batch norm and puts the quantisers of `plan` into `model` itself; their ranges are not set yet."""
    quantisers = {name: Quantiser() for name in [*plan.inputs.values(), *plan.outputs.values()]}
    device = next(model.parameters()).device
    model.quantisers = nn.ModuleDict(dict(sorted(quantisers.items()))).to(device)
    model.precision = "int8"
    model.changes["quantised"] = asdict(plan)
    for name, norm in plan.norms.items():
        convolution, folded = model.get_submodule(name), model.get_submodule(norm)
        fused = fuse_conv_bn_eval(cast(nn.Conv2d, convolution).eval(), cast(nn.BatchNorm2d, folded).eval())
        model.set_submodule(name, fused.requires_grad_(True))
        model.set_submodule(norm, nn.Identity())
    for name, before in plan.inputs.items():
        convolution = cast(nn.Conv2d, model.get_submodule(name))
        after = plan.outputs.get(name, "")
        first = None if name in plan.direct else quantisers[before]
        quantised = QuantisedConv2d(convolution, first, quantisers.get(after))
        quantised.exact = name in plan.exact
        model.set_submodule(name, quantised)
    for name in plan.outputs.keys() - plan.inputs.keys():
        model.set_submodule(name, Rounded(model.get_submodule(name), quantisers[plan.outputs[name]]))


def restore_plan(model: SegmentationModel, saved: Mapping[str, Any]) -> None:
    """Makes a freshly built model the quantised one that was saved; its weights and ranges are loaded next."""
    insert_quantisers(model, Plan(**saved))


def quantised_layers(model: nn.Module) -> dict[str, QuantisedConv2d]:
    """The convolutions of a quantised model by name, those in floating point (`exact`) too."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedConv2d)}


def quantisers_of(model: SegmentationModel) -> dict[str, Quantiser]:
    """The quantisers of a quantised model by name."""
    return {name: cast(Quantiser, one) for name, one in cast(nn.ModuleDict, model.quantisers).items()}


def freeze(model: SegmentationModel, *, signed: bool = False) -> SegmentationModel:
    """A copy of a quantised model for exporters and inference: whole numbers for weights, ranges as constants.

    Its graph has the operators of `torch.ops.quantized_decomposed`, which exporters know: QuantizeLinear and
    DequantizeLinear in ONNX.

    Args:
        signed: activations as int8 (XNNPACK's form) in place of uint8 (that of x86 processors); the same numbers.
    """
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers torch.ops.quantized_decomposed)

    model = copy.deepcopy(model).eval().requires_grad_(False)
    least, dtype = (-128, torch.int8) if signed else (0, torch.uint8)
    for one in quantisers_of(model).values():
        one.frozen = float(one.scale), int(one.zero_point) + least, least, least + 255, dtype
    for layer in quantised_layers(model).values():
        if not layer.exact:
            layer.store()
    return model
