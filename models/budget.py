"""The widest UNet that fits a budget of parameters or of FLOPs."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from errors import ConfigurationError
from models.unet import BLOCKS, EXPANSION, check_shape

Channels = NDArray[Any]

NARROWEST = 2.0
ENOUGH = 0.99


def student_for(
    *,
    parameters: int | None = None,
    flops: float | None = None,
    stride: int = 4,
    depth: int = 3,
    block: str = "plain",
    classes: int = 19,
    size: Sequence[int] = (512, 1024),
) -> dict[str, Any]:
    """Arguments of the widest UNet that costs at most so many parameters or FLOPs, or both: the tighter one binds.

    Every level has about twice the channels of the level above it. First comes the real-valued width w at which
    w·2^i channels would spend the budget. Each level is then rounded down or up to a multiple of 8, 4, 2 or 1,
    the largest that is at most an eighth of it, and of all these combinations the one that spends most wins. If
    that spends less than 99 % of the budget, multiples of at most a sixteenth, then of a 32nd are tried; then
    single channels, with the first level settled and the others scaled to what it leaves, at last a few channels
    off the doubling, the bottleneck before the others.

    So channels are as round as the budget allows, which hardware likes, and less than 2 % of any budget from
    20 000 parameters or 50 MFLOPs up is left over, if it is at least twice what the smallest UNet needs; below
    that, the next wider one can cost too much. The same arguments always give the same answer.

    Args:
        parameters: at most so many, as `deploy.profiling.count_parameters` counts.
        flops: at most so many for one image of `size`, as `deploy.profiling.count_flops` counts: those of the
            convolutions, and a multiply-add is 2.
        stride: of the logits, as in `UNet`.
        depth: as in `UNet`.
        block: as in `UNet`.
        classes: number of classes.
        size: height and width of the image that `flops` is about.

    Returns:
        dict: the UNet's `depth`, `stride`, `block` and `channels`.

    Raises:
        ConfigurationError: no budget is given, or not even the smallest UNet fits; level i of that has 2·2^i
            channels. Or there is no UNet of this stride and depth.
    """
    check_shape(depth, stride, key="student_for")
    if block not in BLOCKS:
        raise ConfigurationError(f"student_for.block: {block!r} is no block; give one of {', '.join(BLOCKS)}")
    budgets = np.array([np.inf if budget is None else budget for budget in (parameters, flops)], dtype=float)
    if np.isinf(budgets).all():
        raise ConfigurationError("student_for: no budget; give parameters, flops or both")

    def spent(channels: Channels) -> NDArray[Any]:
        """Share of the tighter budget."""
        costs = unet_costs(channels, stride=stride, block=block, classes=classes, size=size)
        return np.max(np.stack(costs) / budgets.reshape(2, *[1] * (channels.ndim - 1)), axis=0)

    doubling = 2.0 ** np.arange(depth + 1)
    smallest = NARROWEST * doubling
    at = f" at {size[0]}×{size[1]}"
    least = unet_costs(smallest, stride=stride, block=block, classes=classes, size=size)
    for name, budget, needed in zip(("parameters", "flops"), budgets, least, strict=True):
        if needed > budget:
            raise ConfigurationError(
                f"student_for.{name}: {budget:.0f} is too few: the smallest UNet of depth {depth}, "
                f"stride {stride} and block {block} needs {needed:.0f}{at if name == 'flops' else ''}; "
                "give that, or another shape"
            )

    def width(first: float | None = None) -> Channels:
        """Real-valued channels that spend the budget: all levels doubling, or all but a given first."""

        def levels(w: float) -> Channels:
            return np.concatenate([[w if first is None else first], w * doubling[1:]])

        low, high = NARROWEST, 2 * NARROWEST
        while spent(levels(high)) < 1:
            high *= 2
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(levels(middle)) <= 1 else (low, middle)
        return levels(low)

    def best(options: Sequence[Channels]) -> tuple[float, Channels]:
        """Of all combinations of these channels of each level, that which spends most, and the share it spends."""
        enough = [np.unique(np.maximum(some, least)) for some, least in zip(options, smallest, strict=True)]
        candidates = np.array(list(product(*enough)))
        shares = spent(candidates)
        shares = np.where(shares <= 1, shares, 0)
        return shares.max(), candidates[shares.argmax()]

    def attempts() -> Iterator[tuple[float, Channels]]:
        ideal = width()
        for fineness in (8, 16, 32):
            steps = 2 ** np.floor(np.log2(np.clip(ideal / fineness, 1, 8)))
            yield best([np.array([x // step, x // step + 1]) * step for x, step in zip(ideal, steps, strict=True)])
        for low, high, last in ((0, 1, 1), (-1, 2, 2), (-3, 3, 10)):
            for first in np.maximum(ideal[0] // 1 + (0, 1, -1, 2, -2, 3), NARROWEST):
                _, *inner, coarsest = width(first) // 1
                options = [level + np.arange(low, high + 1) for level in inner]
                yield best([np.array([first]), *options, coarsest + np.arange(low, last + 1)])

    share, channels = 0.0, smallest
    for found in attempts():
        share, channels = max((share, channels), found, key=lambda pair: pair[0])
        if share >= ENOUGH:
            break
    return {"depth": depth, "stride": stride, "block": block, "channels": [int(count) for count in channels]}


def unet_costs(
    channels: Channels, *, stride: int, block: str, classes: int, size: Sequence[int]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Parameters and FLOPs of UNets, by formula.

    Args:
        channels: [..., depth + 1], any number of UNets at once; they may be fractions.

    Returns:
        tuple: parameters [...] and FLOPs [...] for one image of `size`.
    """
    levels = list(np.moveaxis(np.asarray(channels, dtype=float), -1, 0))
    depth, stem = len(levels) - 1, min(stride, 4)
    total = stem * 2**depth
    height, width = (-(-side // total) * total for side in size)
    parameters, flops = np.zeros_like(levels[0]), np.zeros_like(levels[0])

    def add(weights: Any, normed: Any, at: int) -> None:
        """Convolutions' weights and their outputs' batch-norm channels, on maps of stride `at`."""
        nonlocal parameters, flops
        parameters = parameters + weights + 2 * normed
        flops = flops + 2 * weights * (height // at) * (width // at)

    if stem == 2:
        add(9 * 3 * levels[0], levels[0], 2)
    elif stem == 4:
        half = levels[0] // 2
        add(9 * 3 * half, half, 2)
        add(9 * half * levels[0], levels[0], 4)
    inputs = 3 * np.ones_like(levels[0]) if stem == 1 else levels[0]
    for level, outputs in enumerate(levels):
        add(*BLOCK_COSTS[block](inputs, outputs), stem * 2**level)
        inputs = outputs
    finest = next(level for level in range(depth + 1) if stem * 2**level == stride)
    for level in range(depth - 1, finest - 1, -1):
        add(*BLOCK_COSTS[block](levels[level] + levels[level + 1], levels[level]), stem * 2**level)
    add(classes * levels[finest], 0, stride)
    return parameters + classes, flops


def plain_cost(a: Channels, b: Channels) -> tuple[Channels, Channels]:
    """Weights of the block's convolutions and channels of its batch normalisations; so the other three."""
    return 9 * (a * b + b * b), 2 * b


def separable_cost(a: Channels, b: Channels) -> tuple[Channels, Channels]:
    return 9 * (a + b) + a * b + b * b, a + 3 * b


def residual_cost(a: Channels, b: Channels) -> tuple[Channels, Channels]:
    projected = a != b
    return 9 * (a * b + b * b) + projected * a * b, 2 * b + projected * b


def inverted_cost(a: Channels, b: Channels) -> tuple[Channels, Channels]:
    first, second = EXPANSION * np.minimum(a, b), EXPANSION * b
    return first * (a + 9 + b) + second * (b + 9 + b), 2 * (first + second) + 2 * b


BLOCK_COSTS = {
    "plain": plain_cost,
    "separable": separable_cost,
    "residual": residual_cost,
    "inverted": inverted_cost,
}
