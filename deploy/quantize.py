"""Post-training int8 for teachers on a CPU: convolutions in whole numbers, all the rest as it was.

Calibration images give the range of each convolution's input. Activations are uint8 with one scale and zero point
a map, weights int8 with one scale an output channel (Jacob et al. 2018, arXiv 1712.05877; Krishnamoorthi 2018,
arXiv 1806.08342), sums int32, by oneDNN's kernels. PyTorch's own quantisation modules and quantised tensors, which
are deprecated, are not used.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from deploy.profiling import count_flops
from errors import ConfigurationError

ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
}
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in eval mode
LEAST_SHARE = 0.5


def quantize_int8(model: nn.Module, calibration_images: Sequence[Tensor]) -> nn.Module:
    """A copy of `model` for inference whose chains of convolutions compute in int8; `model` stays as it is.

    A chain is a module that does nothing but run its convolutions one after the other, each with what follows it
    of batch normalisation and ReLU or ReLU6, and that has a batch normalisation: the blocks of a UNet, the
    branches of an atrous pyramid, the units of a ResNet but for their shortcuts. Within one all maps are uint8;
    its answer is float32, as is what happens between chains: features, logits, sizes and the interface stay.
    Batch normalisation is folded into weights and bias. What has none stays in float32: classifiers, attention.

    The copy can be neither trained nor saved.

    Args:
        model: on the CPU, float32; `model(images)` runs it.
        calibration_images: images [3, H, W] or batches [B, 3, H, W] as the model is given them; ranges are their
            minimum and maximum, and what goes beyond is clipped.

    Raises:
        ConfigurationError: less than half of the model's FLOPs are in such chains, it is not on the CPU, or the
            CPU has no instructions for int8.
    """
    if next(model.parameters()).device.type != "cpu":
        raise ConfigurationError("teacher.precision: int8: is for the CPU alone; give bf16")
    if not torch.backends.mkldnn.is_available() or not has_int8():
        raise ConfigurationError("teacher.precision: int8: this CPU has no instructions for it (VNNI); give fp32")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    batches = [images.view(-1, *images.shape[-3:]) for images in calibration_images]
    observed = _observe(model, batches)
    flops = sum(chain.flops for chain in observed.values())
    share = flops / (len(batches[0]) * count_flops(model, batches[0].shape[-2:]))
    if share < LEAST_SHARE:
        raise ConfigurationError(
            f"teacher.precision: int8: only {share:.0%} of the model's FLOPs are in plain chains of convolution, "
            "batch normalisation and ReLU; give bf16"
        )
    for name, chain in observed.items():
        model.set_submodule(name, Int8Chain(chain))
    return model


def has_int8() -> bool:
    """Whether the CPU multiplies uint8 with int8 into int32 without overflow."""
    can = torch.cpu.get_capabilities()
    return any(can.get(name, False) for name in ("avx512_vnni", "avx_vnni"))


@dataclass
class Convolution:
    """One step of a chain: convolution with batch normalisation folded in, activation, and its input's range."""

    convolution: nn.Conv2d
    activation: tuple[str, list[float]] = ("none", [])
    lowest: float = 0.0
    highest: float = 0.0


@dataclass
class Chain:
    """Convolutions that run one after the other, and the FLOPs of one pass over the first calibration batch."""

    steps: list[Convolution]
    flops: int = 0


class Int8Chain(nn.Module):
    """Float32 maps [B, D, h, w] in and out, int8 convolutions between."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        # Packed for oneDNN, weights are no tensors that can be moved or converted: no buffers.
        self.steps = [_pack(step) for step in chain.steps]

    def forward(self, x: Tensor) -> Tensor:
        first = self.steps[0]
        x = torch.add(first.offset, x.float(), alpha=1 / first.scale).clamp_(0, 255).to(torch.uint8)
        x = x.contiguous(memory_format=torch.channels_last)
        for step, following in zip(self.steps, [*self.steps[1:], None], strict=True):
            x = step(x, following)
        return x


@dataclass(frozen=True)
class PackedConvolution:
    """A convolution as oneDNN takes it; nothing changes it, so copies of a model share it.

    Args:
        scale, zero_point: of the input: its value is `scale * (stored - zero_point)`.
        offset: float [], the zero point and the half that rounds; a tensor, since `torch.add` wants one.
        weight: int8, in oneDNN's own order.
        weight_scale, weight_zero_point: of each output channel; the zero points are 0.
        activation: oneDNN's name of it and its bounds.
    """

    scale: float
    zero_point: int
    offset: Tensor
    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None
    shape: tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups
    activation: tuple[str, list[float]]

    def __deepcopy__(self, memo: object) -> "PackedConvolution":
        return self

    def __call__(self, x: Tensor, following: "PackedConvolution | None") -> Tensor:
        """uint8 -> uint8 as the following convolution takes it; float32 of the last."""
        scale, zero_point, dtype = 1.0, 0, torch.float32
        if following is not None:
            scale, zero_point, dtype = following.scale, following.zero_point, torch.uint8
        return torch.ops.onednn.qconv2d_pointwise(
            x,
            self.scale,
            self.zero_point,
            self.weight,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            *self.shape,
            scale,
            zero_point,
            dtype,
            *self.activation,
            "",
        )


def _pack(step: Convolution) -> PackedConvolution:
    convolution = step.convolution
    lowest, highest = min(step.lowest, 0.0), max(step.highest, 0.0)  # 0 is exact: the padding
    scale = (highest - lowest) / 255 or 1.0
    zero_point = round(-lowest / scale)
    weight = convolution.weight.detach()
    weight_scale = weight.abs().amax((1, 2, 3)).clamp(min=torch.finfo(torch.float32).tiny) / 127
    whole = (weight / weight_scale.view(-1, 1, 1, 1)).round().to(torch.int8)
    assert not isinstance(convolution.padding, str)
    shape = (
        list(convolution.stride),
        list(convolution.padding),
        list(convolution.dilation),
        convolution.groups,
    )
    return PackedConvolution(
        scale,
        zero_point,
        torch.tensor(zero_point + 0.5),
        torch.ops.onednn.qconv_prepack(whole, weight_scale, scale, zero_point, *shape, None),
        weight_scale,
        torch.zeros(len(weight), dtype=torch.int32),
        None if convolution.bias is None else convolution.bias.detach(),
        shape,
        step.activation,
    )


# --------------------------------------------------------------------------------------------- calibration


@torch.no_grad()
def _observe(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, Chain]:
    """The model's largest chains by name, with the ranges of their inputs over all batches.

    Whether a module is a chain can't be told by its parts: it is one if running them in order gives its answer.
    """
    candidates = {name: chain for name, module in model.named_modules() if name and (chain := _chain(module))}
    seen: dict[str, bool] = {}

    def watch(name: str, chain: Chain) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], answer: Any) -> None:
            if not seen.get(name, True):
                return
            x, flops = inputs[0], 0
            for step in chain.steps:
                if x.shape[1] != step.convolution.in_channels:
                    seen[name] = False
                    return
                step.lowest = min(step.lowest, float(x.min()))
                step.highest = max(step.highest, float(x.max()))
                x = step.convolution(x)
                flops += 2 * step.convolution.weight[0].numel() * x.numel()
                x = _activate(x, step.activation)
            chain.flops = chain.flops if name in seen else flops
            tolerance = 1e-3 * float(x.abs().max())
            same = isinstance(answer, Tensor) and answer.shape == x.shape
            seen[name] = same and torch.allclose(answer, x, rtol=1e-3, atol=tolerance)

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(watch(name, chain)) for name, chain in candidates.items()
    ]
    try:
        for images in batches:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    chains: dict[str, Chain] = {}
    for name, chain in candidates.items():  # a module comes before its parts
        if seen.get(name) and not any(name.startswith(f"{whole}.") for whole in chains):
            chains[name] = chain
    return chains


def _chain(module: nn.Module) -> Chain | None:
    """The parts of a module, if they could be a chain: convolutions, batch normalisations, activations alone."""
    parts = [part for part in _leaves(module) if not isinstance(part, NOTHING)]
    normalised = any(isinstance(part, nn.BatchNorm2d) for part in parts)
    if not normalised or isinstance(module, nn.BatchNorm2d):
        return None
    steps: list[Convolution] = []
    plain = True  # the last step has neither normalisation nor activation yet
    for part in parts:
        if type(part) is nn.Conv2d and not isinstance(part.padding, str) and part.padding_mode == "zeros":
            steps.append(Convolution(part))
            plain = True
        elif steps and plain and isinstance(part, nn.BatchNorm2d) and part.running_var is not None:
            if part.num_features != steps[-1].convolution.out_channels:
                return None
            steps[-1].convolution = fuse_conv_bn_eval(steps[-1].convolution, part)
        elif steps and type(part) in ACTIVATIONS and steps[-1].activation[0] == "none":
            steps[-1].activation = ACTIVATIONS[type(part)]
            plain = False
        else:
            return None
    return Chain(steps)


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if not any(part.children()))


def _activate(x: Tensor, activation: tuple[str, list[float]]) -> Tensor:
    name, bounds = activation
    if name == "none":
        return x
    return x.relu() if name == "relu" else x.clamp(*bounds)
