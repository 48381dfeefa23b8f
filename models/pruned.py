"""Pruned models: layers narrower than their architecture's, each of which config.json names with its shape."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from models.interface import SegmentationModel, Tap

# What the shape of each kind of layer is made of, in PyTorch's own words. Only models of these can be pruned.
SHAPES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("in_channels", "out_channels", "groups"),
    nn.BatchNorm2d: ("num_features",),
    nn.Linear: ("in_features", "out_features"),
    nn.PReLU: ("num_parameters",),
}

Shape = dict[str, int]


def shape_keys(layer: nn.Module) -> tuple[str, ...]:
    """The attributes that are a layer's shape; none for one that has no shape of its own or an unknown one."""
    return next((keys for kind, keys in SHAPES.items() if isinstance(layer, kind)), ())


def layer_shapes(model: nn.Module) -> dict[str, Shape]:
    """The shape of each layer by name."""
    return {
        name: {key: getattr(layer, key) for key in shape_keys(layer)}
        for name, layer in model.named_modules()
        if shape_keys(layer)
    }


def mark_pruned(model: SegmentationModel, before: Mapping[str, Shape]) -> None:
    """Notes in `model.changes["pruned"]` the layers whose shape is not that of `before`, and corrects `taps`.

    Saved with the model, they are what `load_model` needs to build it again.
    """
    changed = {name: shape for name, shape in layer_shapes(model).items() if shape != before[name]}
    model.changes["pruned"] = {**model.changes.get("pruned", {}), **changed}
    correct_taps(model)


def restore_shapes(model: SegmentationModel, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Gives a freshly built model the layer shapes of the pruned one that was saved; its weights are loaded next.

    Raises:
        ValueError: a shape is none, or the layers do not fit together.
        AttributeError: there is no such layer.
    """
    for name, shape in saved.items():
        resize(name, model.get_submodule(name), shape)
    model.changes["pruned"] = {name: dict(shape) for name, shape in saved.items()}
    try:
        correct_taps(model)
    except RuntimeError as error:
        raise ValueError(f"pruned layers do not fit together: {str(error).splitlines()[0]}") from error


def resize(name: str, layer: nn.Module, shape: Mapping[str, Any]) -> None:
    """Gives a layer another shape, and weights of it, which are 0."""
    keys = shape_keys(layer)
    whole = all(type(value) is int and value > 0 for value in shape.values())
    if not keys or set(shape) != set(keys) or not whole:
        raise ValueError(f"pruned.{name}: {dict(shape)} is no shape of a {type(layer).__name__}")
    for key, value in shape.items():
        setattr(layer, key, value)
    sizes: dict[str, tuple[int, ...]]
    if isinstance(layer, nn.Conv2d):
        if layer.in_channels % layer.groups or layer.out_channels % layer.groups:
            raise ValueError(f"pruned.{name}: {dict(shape)}: the groups do not divide the channels")
        weight = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        sizes = {"weight": weight, "bias": (layer.out_channels,)}
    elif isinstance(layer, nn.Linear):
        sizes = {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}
    else:
        sizes = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (shape[keys[0]],))
    for part, size in sizes.items():
        value = getattr(layer, part, None)
        if isinstance(value, nn.Parameter):
            setattr(layer, part, nn.Parameter(value.new_zeros(size)))
        elif value is not None:
            setattr(layer, part, value.new_zeros(size))


@torch.no_grad()
def correct_taps(model: SegmentationModel) -> None:
    """Sets the channels of `model.taps` to what the model answers."""
    weight = cast(torch.Tensor, next(model.parameters()))
    was_training = model.training
    model.eval()
    answer = model(weight.new_zeros(1, 3, 64, 64), tuple(model.taps))
    model.train(was_training)
    model.taps = {name: Tap(answer.features[name].shape[1], tap.stride) for name, tap in model.taps.items()}
