"""Structured pruning: whole channels are taken out, so that layers get narrower and a model faster everywhere.

Which layers hang together (skip connections, residual sums, depthwise convolutions) is found by torch-pruning's
dependency graph (Fang et al. 2023, DepGraph, arXiv 2301.12900), which also takes the channels out. Here stand
their order, and how far to go until a target is met.
"""

import copy
import math
import statistics
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from deploy.profiling import prepare
from errors import ConfigurationError
from models.interface import SegmentationModel
from models.pruned import Shape, layer_shapes, mark_pruned, shape_keys

TRACED = (64, 64)  # [height, width] of the image by which layers are traced
NEAR, NEAR_LATENCY = 0.02, 0.05  # how far from its target a result may be before that is said
PASSES = 3  # of a turn that are counted
ATTEMPTS = 12  # models whose latency is measured in the search of one that meets a target

Losses = Callable[[nn.Module], Iterable[Tensor]]
"""The loss of a model on a few batches, one scalar each."""
Ready = Callable[[SegmentationModel], Callable[[], Any]]
"""A model made ready on some runtime: calling what it gives is one forward pass."""


@dataclass
class PruneConfig:
    """How channels are taken out."""

    importance: Literal["magnitude", "taylor", "bn_scale"] = "magnitude"
    """By what channels are ordered: norm of all weights that read or write them; first-order estimate of how the
    loss changes without them (Molchanov et al. 2019); scale in batch normalisation (Liu et al. 2017). Norm and
    scale are relative to the mean over the channels of layers that hang together."""
    norm: Literal["l1", "l2"] = "l2"
    """Norm of importance=magnitude."""
    scope: Literal["global", "layer"] = "global"
    """global: the least important channels of all layers, each compared with its layer's mean; layer: the same
    share of each layer."""
    target: Literal["flops", "parameters", "latency"] = "flops"
    """What is brought down; latency is measured, beside that of the model before pruning."""
    share: float = 0.5
    """What is kept of it, 0 to 1."""
    milliseconds: float | None = None
    """target=latency: the latency to reach, in place of `share`."""
    backend: Literal["eager", "onnxruntime", "openvino"] = "eager"
    """Runtime of target=latency."""
    measurements: int = 12
    """target=latency: turns in which each model that is tried is timed, and the one before pruning."""
    iterations: int = 1
    """Steps in which channels are taken out; they are ordered anew before each."""
    rounds: int = 1
    """How often pruning and the fine-tuning after it are repeated, each time a part of the way."""
    round_to: int | None = None
    """Layers keep a multiple of so many channels, 8 say, as many kernels like them; null: any number."""
    min_channels: float = 0.1
    """The smallest share of its channels that any layer keeps."""
    batches: int = 8
    """importance=taylor: training batches on which the loss is taken."""

    def __post_init__(self) -> None:
        for key in ("share", "min_channels"):
            if not 0 < getattr(self, key) < 1:
                raise ConfigurationError(
                    f"prune.{key}: {getattr(self, key)} is not a share to keep; give more than 0 and less than 1"
                )
        for key in ("iterations", "rounds", "batches", "measurements", "round_to"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigurationError(f"prune.{key}: {value} is too small; give 1 or more")
        if self.milliseconds is not None and (self.target != "latency" or not self.milliseconds > 0):
            raise ConfigurationError(
                f"prune.milliseconds: {self.milliseconds} needs prune.target=latency and a number above 0"
            )


class Unit(NamedTuple):
    """Channels that are taken out together."""

    layer: str
    """The layer that writes them."""
    channels: list[int]
    narrowed: Counter[tuple[str, str]]
    """By how much the numbers of its shape fall, and those of all layers that hang on it: by (layer, number)."""


def prune(
    model: SegmentationModel,
    size: Sequence[int],
    config: PruneConfig,
    *,
    losses: Losses | None = None,
    ready: Ready | None = None,
    whole: SegmentationModel | None = None,
    fraction: float = 1.0,
) -> tuple[SegmentationModel, dict[str, Any]]:
    """A pruned copy of `model`, in eval mode, and a report of what was reached.

    Channels go in the order of `prune_order` until the target is met as nearly as whole channels allow. The
    classifier keeps its outputs, and every layer `config.min_channels`. The copy saves its layers' shapes
    (models/pruned.py) and has the `taps` that belong to them.

    Args:
        size: [height, width] of an image, for FLOPs and latency.
        losses: for importance=taylor.
        ready: makes a model ready to be timed, for target=latency; eager PyTorch by default.
        whole: what shares of FLOPs, parameters, latency and channels refer to; `model` itself by default.
        fraction: the part of the way from `whole` to the target: 0.5 on the way to a quarter is a half.

    Returns:
        The model; and `target`, `wanted` and `reached` (shares of `whole`'s), `flops`, `parameters`, for a latency
        `backend`, `wanted_ms`, `reached_ms` and `whole_ms`, and `note`, empty unless the target was missed.

    Raises:
        ConfigurationError: torch-pruning is missing, the model has layers that can't be pruned, or the target is
            out of reach.
    """
    check_prunable(model)
    work = Work(config, whole or model, size, losses)
    model = copy.deepcopy(model).eval()
    if config.target == "latency":
        return work.meet_latency(model, fraction, ready or eager_passes(size))
    return work.meet(model, config.target, config.share**fraction)


def check_prunable(model: SegmentationModel) -> None:
    """Raises ConfigurationError, naming a layer, if there is one of a kind that pruning does not know."""
    if model.precision != "fp32":
        raise ConfigurationError(f"prune: the model is quantised to {model.precision}; prune first, then quantise")
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and not shape_keys(module):
            raise ConfigurationError(
                f"prune: {model.architecture} has a {type(module).__name__} ({name}), and only convolutions, "
                "batch normalisation, PReLU and linear layers can be pruned; take a convolutional model"
            )
    if not isinstance(getattr(model, "classifier", None), nn.Conv2d):
        raise ConfigurationError(f"prune: {model.architecture} has no classifier of ours; take a model of models/")


# --------------------------------------------------------------------------------------------------------- order


class Traced(nn.Module):
    """A model behind a layer that stands for its image, by which the graph knows the image's channels.

    What hangs on that layer (the image, put beside a feature map; a depthwise convolution on the image) stays.
    """

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 3, 1)
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.image(images)).logits


def dependency_graph(model: SegmentationModel) -> tuple[Any, dict[str, Any]]:
    """torch-pruning's graph of which layers hang on which, and its groups by the layer that writes a channel."""
    try:
        from torch_pruning import DependencyGraph
    except ImportError as error:
        raise ConfigurationError("prune: needs torch-pruning; pip install torch-pruning") from error
    traced = Traced(model.requires_grad_(True))
    names = {module: name for name, module in model.named_modules()}
    with torch.enable_grad():
        graph = DependencyGraph().build_dependency(traced, example_inputs=torch.zeros(1, 3, *TRACED))
    groups = graph.get_all_groups([traced.image, model.classifier], [nn.Conv2d, nn.Linear])
    return graph, {names[group[0].dep.target.module]: group for group in groups}


def importance_function(
    model: SegmentationModel, config: PruneConfig, losses: Losses | None
) -> Callable[[Any], Tensor | None]:
    """Gives the importance of each channel of a group; None for a group that has no layer to go by."""
    from torch_pruning import importance

    if config.importance == "magnitude":
        return importance.GroupMagnitudeImportance(p=int(config.norm[1]))
    if config.importance == "bn_scale":
        return importance.BNScaleImportance()
    if losses is None:
        raise ConfigurationError("prune.importance: taylor needs the loss on some batches; give magnitude")
    return taylor(model, losses)


def taylor(model: SegmentationModel, losses: Losses) -> Callable[[Any], Tensor | None]:
    """The square of how much the loss changes without a channel, to first order, added up over the batches.

    A batch normalisation whose γ and β are 0 gives no channel, which changes the loss by (γ ∂L/∂γ + β ∂L/∂β)
    (Molchanov et al. 2019, arXiv 1906.10771, section 3.2); the squares are added up over all that a channel
    passes. They compare across layers as they are.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    changes = {norm: torch.zeros_like(norm.weight) for norm in norms}
    model.requires_grad_(True)
    for loss in losses(model):
        model.zero_grad()
        loss.backward()
        for norm, change in changes.items():
            if norm.weight.grad is not None and norm.bias.grad is not None:
                change += (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).detach().square()
    model.zero_grad()

    def importance(group: Any) -> Tensor | None:
        passed = [item for item in group if item.dep.target.module in changes]
        scores = torch.zeros(len(group[0].idxs))
        for item in passed:
            scores.index_add_(0, torch.tensor(item.root_idxs), changes[item.dep.target.module][item.idxs])
        return scores if passed else None

    return importance


def narrowed_by(graph: Any, group: Any, names: Mapping[nn.Module, str]) -> list[Counter[tuple[str, str]]]:
    """For each channel of a group by how much the numbers of the layers' shapes fall without it."""
    found: list[Counter[tuple[str, str]]] = [Counter() for _ in group[0].idxs]
    for item in group:
        layer = item.dep.target.module
        if not shape_keys(layer):
            continue
        keys = [key for key in shape_keys(layer) if key != "groups"]
        if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1:
            keys = list(shape_keys(layer))
        elif len(keys) == 2:
            keys = [keys[1] if graph.is_out_channel_pruning_fn(item.dep.handler) else keys[0]]
        for channel in item.root_idxs:
            found[channel].update((names[layer], key) for key in keys)
    return found


def prune_order(
    model: SegmentationModel,
    config: PruneConfig,
    losses: Losses | None = None,
    least: Mapping[str, int] | None = None,
) -> list[Unit]:
    """The channels of `model` in the order in which they go; what a layer can't do without is not there.

    With `round_to` they go by so many at a time, and first of all what a layer has beyond a multiple.

    Args:
        losses: for importance=taylor.
        least: the fewest channels that each layer keeps; by default those of `config` for this model.
    """
    importance = importance_function(model, config, losses)
    graph, groups = dependency_graph(model)
    names = {module: name for name, module in model.named_modules()}
    step = config.round_to or 1
    queue = []
    for layer, group in groups.items():
        scored = importance(group)
        if scored is None:
            continue
        scores = scored.nan_to_num(0.0).tolist()  # a group of zeros was divided by its mean
        narrowed = narrowed_by(graph, group, names)
        alike: dict[frozenset[tuple[str, str]], list[int]] = {}
        for channel, those in enumerate(narrowed):  # of several maps side by side each is rounded by itself
            alike.setdefault(frozenset(those), []).append(channel)
        for channels in alike.values():
            channels.sort(key=lambda channel: scores[channel])
            beyond = len(channels) % step
            starts = [0, *range(beyond or step, len(channels), step)]
            for start, stop in zip(starts, [*starts[1:], len(channels)], strict=True):
                part = channels[start:stop]
                rank = statistics.mean(scores[c] for c in part)
                if config.scope == "layer":
                    rank = (start + stop) / 2 / len(channels)
                unit = Unit(layer, part, sum((narrowed[c] for c in part), Counter()))
                queue.append((start > 0 or not beyond, rank, unit))
    least = fewest_channels(model, config.min_channels) if least is None else least
    shapes, order = layer_shapes(model), []
    for _, _, unit in sorted(queue, key=lambda entry: (entry[0], entry[1], entry[2].layer)):
        left = narrowed_shapes(shapes, [unit])
        if all(written(left[name]) >= least.get(name, 1) for name, _ in unit.narrowed):
            shapes = left
            order.append(unit)
    return order


def narrowed_shapes(shapes: Mapping[str, Shape], units: Iterable[Unit]) -> dict[str, Shape]:
    """The shapes of the layers after some units are gone."""
    left, narrowed = dict(shapes), Counter[tuple[str, str]]()
    for unit in units:
        narrowed.update(unit.narrowed)
    for (name, key), number in narrowed.items():
        left[name] = left[name] | {key: left[name][key] - number}
    return left


def written(shape: Shape) -> int:
    """The number of channels that a layer writes."""
    return next(
        shape[key] for key in ("out_channels", "out_features", "num_features", "num_parameters") if key in shape
    )


def fewest_channels(model: SegmentationModel, share: float) -> dict[str, int]:
    """The number of channels that each layer has to keep, at least 1."""
    return {name: math.ceil(share * written(shape)) for name, shape in layer_shapes(model).items()}


def take_out(model: SegmentationModel, units: Sequence[Unit]) -> SegmentationModel:
    """A copy of `model` without these channels."""
    pruned = copy.deepcopy(model)
    channels: dict[str, list[int]] = {}
    for unit in units:
        channels.setdefault(unit.layer, []).extend(unit.channels)
    _, groups = dependency_graph(pruned)
    for layer, indices in channels.items():
        groups[layer].prune(sorted(indices))
    pruned.zero_grad()
    mark_pruned(pruned, layer_shapes(model))
    return pruned


# -------------------------------------------------------------------------------------------------------- targets


class Costs:
    """What a model costs by the shapes of its layers: all its parameters and FLOPs are in them.

    Args:
        model: its layers, of whatever shape.
        size: [height, width] of the image that FLOPs are of.
    """

    def __init__(self, model: SegmentationModel, size: Sequence[int]) -> None:
        self.layers = {name: layer for name, layer in model.named_modules() if shape_keys(layer)}
        self.positions: Counter[str] = Counter()

        def count(name: str) -> Any:
            def hook(layer: nn.Module, inputs: Any, answer: Tensor) -> None:
                self.positions[name] += answer.numel() // written(layer_shapes(layer)[""])

            return hook

        handles = [layer.register_forward_hook(count(name)) for name, layer in self.layers.items()]
        with torch.no_grad():
            model(torch.zeros(1, 3, *size))
        for handle in handles:
            handle.remove()

    def multiplications(self, name: str, shape: Shape) -> int:
        """Of one position."""
        layer = self.layers[name]
        if isinstance(layer, nn.Conv2d):
            read = shape["in_channels"] // shape["groups"]
            return shape["out_channels"] * read * math.prod(layer.kernel_size)
        return shape["out_features"] * shape["in_features"] if isinstance(layer, nn.Linear) else 0

    def flops(self, shapes: Mapping[str, Shape]) -> int:
        """As `deploy.profiling.count_flops` counts them."""
        return sum(2 * self.positions[name] * self.multiplications(name, shape) for name, shape in shapes.items())

    def parameters(self, shapes: Mapping[str, Shape]) -> int:
        vectors = {
            name: len([p for p in layer.parameters() if p.ndim == 1]) for name, layer in self.layers.items()
        }
        return sum(
            self.multiplications(name, shape) + vectors[name] * written(shape) for name, shape in shapes.items()
        )


class Work:
    """One pruning, towards any target; the arguments are those of `prune`."""

    def __init__(
        self, config: PruneConfig, whole: SegmentationModel, size: Sequence[int], losses: Losses | None
    ) -> None:
        self.config, self.whole, self.losses = config, whole, losses
        self.least = fewest_channels(whole, config.min_channels)
        self.costs = Costs(copy.deepcopy(whole).eval(), size)
        shapes = layer_shapes(whole)
        self.total = {"flops": self.costs.flops(shapes), "parameters": self.costs.parameters(shapes)}

    def share(self, target: str, shapes: Mapping[str, Shape]) -> float:
        """FLOPs or parameters of a model of these shapes, as a share of the whole's."""
        cost = self.costs.flops if target == "flops" else self.costs.parameters
        return cost(shapes) / self.total[target]

    def order(self, model: SegmentationModel) -> list[Unit]:
        return prune_order(model, self.config, self.losses, self.least)

    def meet(
        self, model: SegmentationModel, target: str, wanted: float, order: list[Unit] | None = None
    ) -> tuple[SegmentationModel, dict[str, Any]]:
        """`model` pruned to a share of FLOPs or parameters, and the report; `order` is the model's, if known."""
        shapes = layer_shapes(model)
        begun = self.share(target, shapes)
        if wanted >= begun:
            raise ConfigurationError(
                f"prune.share: {wanted:.3g} of the {target} is no less than there is, {begun:.3g}; give less"
            )
        for number in range(1, self.config.iterations + 1):
            goal = begun * (wanted / begun) ** (number / self.config.iterations)
            order = self.order(model) if order is None else order
            shapes, ordered = layer_shapes(model), order

            def left(length: int, shapes: Mapping[str, Shape] = shapes, ordered: list[Unit] = ordered) -> float:
                return self.share(target, narrowed_shapes(shapes, ordered[:length]))

            if left(len(order)) > goal * (1 + NEAR):
                raise ConfigurationError(
                    f"prune.share: {goal:.3g} of the {target} is out of reach, {left(len(order)):.3g} is what "
                    f"prune.min_channels={self.config.min_channels:g}{self.rounding(', ')} leaves; raise it, or "
                    "lower prune.min_channels"
                )
            enough = bisect_left(range(len(order)), True, key=lambda length: left(length) <= goal)
            length = min(max(enough - 1, 0), enough, key=lambda length: abs(left(length) - goal))
            model, order, reached = take_out(model, order[:length]), None, left(length)
        note = f"the nearest that whole channels{self.rounding(' and ')} allow"
        missed = abs(reached / wanted - 1) > NEAR
        return model, self.report(model, target, wanted, reached) | {"note": note if missed else ""}

    def rounding(self, joint: str) -> str:
        return f"{joint}prune.round_to={self.config.round_to}" if self.config.round_to else ""

    def report(self, model: SegmentationModel, target: str, wanted: float, reached: float) -> dict[str, Any]:
        shapes = layer_shapes(model)
        costs = {"flops": self.costs.flops(shapes), "parameters": self.costs.parameters(shapes)}
        return {"target": target, "wanted": wanted, "reached": reached, **costs, "note": ""}

    def meet_latency(
        self, model: SegmentationModel, fraction: float, ready: Ready
    ) -> tuple[SegmentationModel, dict[str, Any]]:
        """`model` pruned to a share of the latency of `whole`, and the report.

        The search goes over the share of FLOPs. Every model that it tries is timed in turn with `whole`; its
        latency is the median over the turns of the ratio of the two. What is reported is measured anew at the end.
        As in profile_latency.py a turn begins with a pass that is not counted: it meets cold caches, by which a
        small model would look a tenth slower.
        """
        config, parent = self.config, ready(self.whole)

        def compare(candidate: Callable[[], Any], rounds: int) -> tuple[list[float], dict[str, list[float]]]:
            times = {"whole": [turn(parent)], "pruned": [turn(candidate)]}
            for _ in range(rounds):
                times["whole"].append(turn(parent))
                times["pruned"].append(turn(candidate))
            times = {name: one[1:] for name, one in times.items()}  # without the warm-up
            return [one / other for one, other in zip(times["pruned"], times["whole"], strict=True)], times

        order, rounds = self.order(model), config.measurements
        smallest = take_out(model, order)
        ratios, times = compare(ready(smallest), rounds)
        whole_ms = statistics.median(times["whole"])
        wanted = config.share if config.milliseconds is None else config.milliseconds / whole_ms
        if wanted >= 1:
            raise ConfigurationError(
                f"prune.milliseconds: {config.milliseconds:g} is no less than the {whole_ms:.3g} before pruning; "
                "give less"
            )
        wanted **= fraction
        low = self.share("flops", layer_shapes(smallest)), statistics.median(ratios)
        if low[1] > wanted * (1 + NEAR_LATENCY):
            raise ConfigurationError(
                f"prune.share: {wanted:.3g} of the latency is out of reach, {low[1]:.3g} is what "
                f"prune.min_channels={config.min_channels:g}{self.rounding(', ')} leaves; raise it, or lower "
                "prune.min_channels"
            )
        high = self.share("flops", layer_shapes(model)), statistics.median(compare(ready(model), rounds)[0])
        best, error = smallest, abs(low[1] / wanted - 1)
        with tqdm(total=ATTEMPTS, desc="prune to a latency", leave=False, dynamic_ncols=True) as bar:
            for attempt in range(ATTEMPTS):
                part = 0.5 if attempt % 3 == 2 else (wanted - low[1]) / max(high[1] - low[1], 1e-9)
                flops = low[0] + min(max(part, 0.1), 0.9) * (high[0] - low[0])
                candidate, _ = self.meet(model, "flops", flops, order)
                run = ready(candidate)
                ratios, _ = compare(run, rounds)
                if abs(statistics.median(ratios) / wanted - 1) < NEAR_LATENCY:  # look closer
                    ratios += compare(run, 2 * rounds)[0]
                ratio = statistics.median(ratios)
                bar.set_postfix_str(f"{flops:.0%} of the FLOPs: {ratio:.0%} of the latency")
                bar.update()
                if abs(ratio / wanted - 1) < error:
                    best, error = candidate, abs(ratio / wanted - 1)
                if error < NEAR_LATENCY / 2:
                    break
                low, high = ((flops, ratio), high) if ratio < wanted else (low, (flops, ratio))
        ratios, times = compare(ready(best), 2 * rounds)
        reached = statistics.median(ratios)
        missed = abs(reached / wanted - 1) > NEAR_LATENCY
        whole_ms = statistics.median(times["whole"])
        return best, self.report(best, "latency", wanted, reached) | {
            "backend": config.backend,
            "whole_ms": whole_ms,
            "wanted_ms": wanted * whole_ms,
            "reached_ms": statistics.median(times["pruned"]),
            "note": f"the nearest of {attempt + 2} models, {reached / wanted - 1:+.1%} off" if missed else "",
        }


def turn(run: Callable[[], Any]) -> float:
    """Milliseconds of a forward pass: the median of those that follow the first."""
    run()
    times = []
    for _ in range(PASSES):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def eager_passes(size: Sequence[int]) -> Ready:
    """Makes models ready in eager PyTorch, for one image of `size`."""
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    return lambda model: prepare(model, images, "eager")
