"""A narrower UNet out of a wider one: the weights of the channels that count most."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from errors import ConfigurationError
from models.unet import UNet

Groups = tuple[str, ...]


class Layer(NamedTuple):
    """A convolution with its batch normalisation, and the groups of channels that it reads and writes.

    The channels of a group are coupled: kept or dropped in all the layers that read or write them. A depthwise
    layer writes the groups that it reads; so does a block with an identity shortcut. Two groups are read where two
    maps are concatenated, in that order.
    """

    convolution: str
    norm: str
    inputs: Groups
    outputs: Groups


def layers(model: UNet) -> list[Layer]:
    """All convolutions but the classifier, in the order in which they run; the last writes what that reads."""
    found: list[Layer] = []

    def add(name: str, inputs: Groups, outputs: Groups) -> Groups:
        found.append(Layer(f"{name}.0", f"{name}.1", inputs, outputs))
        return outputs

    def add_block(name: str, inputs: Groups, count: int, channels: int) -> Groups:
        """The layers of a block from `count` to `channels` channels."""
        hidden: Groups = (f"{name}.hidden",)
        outputs: Groups = (name,)
        if model.block == "plain":
            add(f"{name}.0", inputs, hidden)
            add(f"{name}.1", hidden, outputs)
        elif model.block == "separable":
            add(f"{name}.0", inputs, inputs)
            add(f"{name}.1", inputs, hidden)
            add(f"{name}.2", hidden, hidden)
            add(f"{name}.3", hidden, outputs)
        elif model.block == "residual":
            outputs = inputs if count == channels else outputs
            add(f"{name}.first", inputs, hidden)
            add(f"{name}.second", hidden, outputs)
            if count != channels:
                add(f"{name}.shortcut", inputs, outputs)
        else:
            outputs = inputs if count == channels else outputs
            for unit, read in ((f"{name}.0", inputs), (f"{name}.1", outputs)):
                add(f"{unit}.expand", read, (unit,))
                add(f"{unit}.depthwise", (unit,), (unit,))
                add(f"{unit}.project", (unit,), outputs)
        return outputs

    x: Groups = ("image",)
    if model.stem_stride == 2:
        x = add("stem", x, ("stem",))
    elif model.stem_stride == 4:
        x = add("stem.1", add("stem.0", x, ("stem.half",)), ("stem",))
    skips, count = [], 3 if model.stem_stride == 1 else model.channels[0]
    for level, channels in enumerate(model.channels[:-1]):
        x = add_block(f"encoder.{level}", x, count, channels)
        skips.append(x)
        count = channels
    x = add_block("bottleneck", x, count, model.channels[-1])
    for i in range(len(model.decoder)):
        level = model.depth - 1 - i
        x = add_block(
            f"decoder.{i}",
            skips[level] + x,
            model.channels[level] + model.channels[level + 1],
            model.channels[level],
        )
    return found


def group_sizes(model: UNet) -> dict[str, int]:
    """Number of channels of each group of coupled channels."""
    sizes = {"image": 3}
    for layer in layers(model):
        if len(layer.outputs) == 1:
            sizes[layer.outputs[0]] = cast(nn.Conv2d, model.get_submodule(layer.convolution)).out_channels
    return sizes


@torch.no_grad()
def channel_importance(model: UNet) -> dict[str, Tensor]:
    """How much each channel of each group of coupled channels counts.

    In each layer that writes a channel, that is the L1 norm of its filter (Li et al. 2017, arXiv 1608.08710) times
    the |γ| of its batch normalisation (Liu et al. 2017, arXiv 1708.06519), divided by the layer's mean; over the
    layers that write it, the sum.
    """
    sizes = group_sizes(model)
    scores = {group: torch.zeros(size) for group, size in sizes.items()}
    for layer in layers(model):
        filters = model.get_parameter(f"{layer.convolution}.weight").float().abs().sum((1, 2, 3))
        written = (filters * model.get_parameter(f"{layer.norm}.weight").float().abs()).cpu()
        written = written / written.mean().clamp(min=torch.finfo(torch.float32).tiny)
        for group, part in zip(layer.outputs, written.split([sizes[g] for g in layer.outputs]), strict=True):
            scores[group] += part
    return scores


@torch.no_grad()
def slice_from(student: UNet, teacher: UNet, key: str = "student.slice_from") -> None:
    """Initialises `student` with the weights of `teacher`'s most important channels.

    Of each group of coupled channels, those of the highest `channel_importance` are kept in their order, of equal
    ones the earlier, and with them the filters, batch normalisation and statistics of every layer that writes or
    reads them: what pruning would leave of a copy of the teacher. A student as wide as the teacher gets its
    weights unchanged.

    Block, depth and the stem's stride have to agree, and no level of the student may be wider. Where a block of
    one has a shortcut without projection (equal channels in and out), that of the other needs it too. The logits
    of the student may have a larger stride, since its decoder is then the beginning of the teacher's. The
    classifier is sliced too where stride and class names agree, and otherwise stays as it was drawn. The student
    takes over `mean` and `std`, which the weights know, so `take_images` comes afterwards.

    Args:
        student: UNet that gets the weights.
        teacher: UNet that gives them; it stays as it is.
        key: of the configuration, which an error begins with.

    Raises:
        ConfigurationError: the student is no slice of the teacher.
    """
    for model, who in ((student, "student"), (teacher, "teacher")):
        if not isinstance(model, UNet):
            raise ConfigurationError(f"{key}: the {who} is no UNet; leave it out, or take two UNets")
        if model.changes:
            raise ConfigurationError(
                f"{key}: the {who} is {' and '.join(model.changes)}, and its channels are no longer those of its "
                "levels; name the run that it was made from"
            )
    for part in ("block", "depth", "stem_stride"):
        own, other = getattr(student, part), getattr(teacher, part)
        if own != other:
            what = part.replace("stem_stride", "stem's stride")
            raise ConfigurationError(
                f"{key}: the student's {what} is {own}, the teacher's {other}; make them agree"
            )
    if student.stride < teacher.stride:
        raise ConfigurationError(
            f"{key}: the student's stride is {student.stride}, the teacher's {teacher.stride}; "
            "give it that one or a larger"
        )
    for level, (own, other) in enumerate(zip(student.channels, teacher.channels, strict=True)):
        if own > other:
            raise ConfigurationError(
                f"{key}: the student has {own} channels at level {level}, the teacher {other}; make it no wider"
            )
    known = set(layers(teacher))
    differing = [layer.convolution.split(".")[:2] for layer in layers(student) if layer not in known]
    if differing:
        part, index = differing[0]
        block = part if part == "bottleneck" else f"{part}.{index}"
        raise ConfigurationError(
            f"{key}: only one of the two has equal channels in and out of {block}, and so its shortcut; "
            "give the student other channels"
        )

    sizes, offered, scores = group_sizes(student), group_sizes(teacher), channel_importance(teacher)
    kept = {
        group: scores[group].sort(descending=True, stable=True).indices[:size].sort().values
        for group, size in sizes.items()
    }

    def indices(groups: Groups) -> Tensor:
        """Where the kept channels stand in the concatenation of these groups."""
        starts = [sum(offered[g] for g in groups[:i]) for i in range(len(groups))]
        return torch.cat([kept[group] + start for group, start in zip(groups, starts, strict=True)])

    source, target = teacher.state_dict(), student.state_dict()
    for layer in layers(student):
        rows = indices(layer.outputs)
        name = f"{layer.convolution}.weight"
        depthwise = layer.inputs == layer.outputs
        weight = source[name].cpu()[rows]
        target[name].copy_(weight if depthwise else weight[:, indices(layer.inputs)])
        for part in ("weight", "bias", "running_mean", "running_var"):
            target[f"{layer.norm}.{part}"].copy_(source[f"{layer.norm}.{part}"].cpu()[rows])
        target[f"{layer.norm}.num_batches_tracked"].copy_(source[f"{layer.norm}.num_batches_tracked"])
    if (student.stride, student.class_names) == (teacher.stride, teacher.class_names):
        columns = indices(layer.outputs)
        target["classifier.weight"].copy_(source["classifier.weight"].cpu()[:, columns])
        target["classifier.bias"].copy_(source["classifier.bias"])
    student.mean, student.std = teacher.mean, teacher.std
