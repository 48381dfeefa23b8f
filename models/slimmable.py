"""UNets that share one set of weights: each is the first channels of every layer of the widest.

Slimmable networks (Yu et al. 2019, arXiv 1812.08928) and their training for any width (Yu & Huang 2019, arXiv
1903.05134), here with a width for each level by itself, and of plain or separable blocks.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from torch.optim.swa_utils import update_bn

from models.interface import Output
from models.slicing import group_sizes, layers
from models.unet import UNet

SLIMMABLE = ("plain", "separable")  # blocks without shortcuts, whose layers are the same whatever the widths


def has_slice(wide: UNet, channels: Sequence[int]) -> bool:
    """Whether the UNet of these channels is a part of `wide`: no wider at any level."""
    return all(own <= most for own, most in zip(channels, wide.channels, strict=True))


def answer_as(wide: UNet, channels: Sequence[int], images: Tensor) -> Output:
    """What the UNet of these channels says that shares the weights of `wide`, which its gradients reach.

    Batch normalisation takes the statistics of the batch; the running ones of `wide` stay as they are.
    """
    narrow = _empty(wide, channels).train()
    return functional_call(narrow, _first_channels(wide, narrow), (images,))


@torch.no_grad()
def cut_out(wide: UNet, channels: Sequence[int], batches: Iterable[Tensor]) -> UNet:
    """A UNet of these channels with a copy of its weights in `wide`, in eval mode.

    Its running statistics, which differ for every width, are averages over `batches` of images [B, 3, H, W].
    """
    narrow = _empty(wide, channels).to_empty(device=wide.classifier.weight.device)
    narrow.load_state_dict(_first_channels(wide, narrow))
    narrow.mean, narrow.std = wide.mean, wide.std
    update_bn(batches, narrow)
    return narrow.eval()


def _empty(wide: UNet, channels: Sequence[int]) -> UNet:
    """A UNet like `wide` of other channels, without memory for its weights."""
    with torch.device("meta"):
        return UNet(
            wide.class_names, depth=wide.depth, stride=wide.stride, block=wide.block, channels=list(channels)
        )


def _first_channels(wide: UNet, narrow: UNet) -> dict[str, Tensor]:
    """The state of `narrow` out of the parameters and buffers of `wide`, which gradients reach.

    Of each group of coupled channels (see models/slicing.py) the first are taken; where two maps are concatenated,
    the first of each.
    """
    own, offered = group_sizes(narrow), group_sizes(wide)

    def first(tensor: Tensor, groups: tuple[str, ...], dim: int = 0) -> Tensor:
        starts = [sum(offered[group] for group in groups[:i]) for i in range(len(groups))]
        pieces = [tensor.narrow(dim, start, own[group]) for group, start in zip(groups, starts, strict=True)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    source = dict(wide.named_parameters()) | dict(wide.named_buffers())
    state: dict[str, Tensor] = {}
    for layer in layers(narrow):
        weight = first(source[f"{layer.convolution}.weight"], layer.outputs)
        depthwise = layer.inputs == layer.outputs
        state[f"{layer.convolution}.weight"] = weight if depthwise else first(weight, layer.inputs, 1)
        for part in ("weight", "bias"):
            state[f"{layer.norm}.{part}"] = first(source[f"{layer.norm}.{part}"], layer.outputs)
        for part in ("running_mean", "running_var"):  # copies: a batch moves them
            state[f"{layer.norm}.{part}"] = first(source[f"{layer.norm}.{part}"], layer.outputs).clone()
        state[f"{layer.norm}.num_batches_tracked"] = source[f"{layer.norm}.num_batches_tracked"].clone()
    state["classifier.weight"] = first(source["classifier.weight"], layer.outputs, 1)
    state["classifier.bias"] = source["classifier.bias"]
    return state
