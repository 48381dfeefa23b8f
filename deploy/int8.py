"""Quantisation of a trained model to int8: where to round, in which ranges, and which layers to leave alone.

`quantise` reads off the model's graph what feeds what, so that maps which are joined or resized share their scale,
as integer kernels of all runtimes want it. What comes out is a model like any other (models/quantised.py): it can
be evaluated, trained further (quantisation-aware training is the same loop) and exported.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from tqdm import tqdm

from errors import ConfigurationError
from models.interface import SegmentationModel
from models.quantised import Plan, insert_quantisers, quantised_layers, quantisers_of

BINS = 2048
CANDIDATES = 100  # ends of the range that are tried for the least squared error
# Operators that only move values, choose among them or mix neighbours: their answer keeps their input's scale.
KEEP_SCALE = (
    "max_pool2d",
    "upsample_",
    "cat",
    "pad",
    "constant_pad_nd",
    "slice",
    "clone",
    "contiguous",
    "dropout",
)
# Of these, the ones that rounding commutes with exactly.
COMMUTE = ("max_pool2d", "cat", "slice", "clone", "contiguous")  # not pad: OpenVINO ignores the zero point there
FUSED = (nn.ReLU, nn.ReLU6)  # activations that kernels compute together with the convolution before them


@dataclass
class Int8Config:
    """Post-training quantisation to int8."""

    ranges: Literal["minmax", "percentile", "mse"] = "mse"
    """Ends of a map's range on the calibration images: what was seen, its percentile, or least squared error."""
    percentile: float = 99.99
    """Per cent of the values inside the range of ranges=percentile."""
    images: int = 48
    """Calibration images."""
    keep: list[str] = field(default_factory=list)
    """Layers that stay in floating point, by name; the name of a block stands for all in it."""
    sensitive: int = 0
    """How many layers more stay in floating point: those whose quantisation alone changes the answer most."""

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ConfigurationError(f"int8.percentile: {self.percentile} is not in 50 … 100; give say 99.99")
        for key, least in (("images", 1), ("sensitive", 0)):
            if getattr(self, key) < least:
                raise ConfigurationError(f"int8.{key}: {getattr(self, key)} is too small; give {least} or more")


def quantise(
    model: SegmentationModel, images: Sequence[Tensor], config: Int8Config | None = None
) -> SegmentationModel:
    """A copy of `model` whose convolutions compute in int8, with ranges from calibration images.

    Convolutions alone are quantised: linear layers, attention and normalisation that no convolution can take in
    stay in floating point, and so does the classifier: integer kernels want to round their answer, and the logits
    are not rounded.

    Args:
        model: float32, of ours; it stays as it is.
        images: calibration images [3, H, W], normalised as the model is given them, all of one size.
        config: ranges and exceptions.

    Raises:
        ConfigurationError: no images, a name in `keep` that no convolution has, no convolution to quantise, or a
            model that is quantised already or comes from transformers.
    """
    config = config or Int8Config()
    if not images:
        raise ConfigurationError("int8.images: no image to calibrate with; give one or more")
    if model.precision == "int8":
        raise ConfigurationError("int8: the model is quantised already; name the run that it was made of")
    if model.architecture == "hub":
        raise ConfigurationError("int8: a model of transformers can't be saved quantised; take one of ours")
    quantised = copy.deepcopy(model).eval().requires_grad_(True)
    plan = make_plan(quantised, images[0].shape[-2:])
    plan.exact = sorted({*plan.exact, *named(plan, config.keep)})
    insert_quantisers(quantised, plan)
    calibrate(quantised, images, config)
    if config.sensitive:
        layers = quantised_layers(quantised)
        worst = sorted(find_sensitive(model, quantised, images).items(), key=lambda item: -item[1])
        for name, _ in worst[: config.sensitive]:
            layers[name].exact = True
        plan.exact = sorted(name for name, layer in layers.items() if layer.exact)
        quantised.changes["quantised"] = asdict(plan)
    return quantised


def named(plan: Plan, keep: Sequence[str]) -> list[str]:
    """The convolutions that `keep` stands for."""
    found = {
        prefix: [name for name in plan.inputs if name == prefix or name.startswith(f"{prefix}.")]
        for prefix in keep
    }
    for prefix, names in found.items():
        if not names:
            raise ConfigurationError(
                f"int8.keep: no convolution is called {prefix!r}; there are {', '.join(plan.inputs)}"
            )
    return sorted({name for names in found.values() for name in names})


# ------------------------------------------------------------------------------------------------- where to round


class Logits(nn.Module):
    """A model that answers a tensor, the logits, as tracers and exporters want it."""

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def make_plan(model: SegmentationModel, size: Sequence[int]) -> Plan:
    """Where the model's graph is rounded: the input of every convolution, and its answer, after a ReLU if any.

    Maps between which only operators lie that keep the scale (pooling, resizing, concatenation, padding) are
    rounded alike. The last convolutions, whose answer no other one reads, are `exact`.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        graph = torch.export.export(Logits(model), (torch.zeros(1, 3, *size, device=device),)).graph
    convolutions = [node for node in graph.nodes if kind(node) == "conv2d"]
    if not convolutions:
        raise ConfigurationError(f"int8: {model.architecture} has no convolution to quantise")
    calls: dict[str, int] = {}
    for node in graph.nodes:
        calls[module_name(node)] = calls.get(module_name(node), 0) + 1

    plan, groups = Plan(), Groups()
    answers: dict[Node, tuple[str, Node]] = {}  # a map that is rounded: the module after which, its convolution
    for node in convolutions:
        name, end = module_name(node), node
        after = only_user(end)
        if after is not None and kind(after) == "batch_norm":
            plan.norms[name] = module_name(after)
            end, after = after, only_user(after)
        where = name
        if after is not None and is_module(model, after, FUSED) and calls[module_name(after)] == 1:
            end, where = after, module_name(after)
        answers[end] = where, node
    last = {end for end in answers if not leads_to(end, "conv2d")}
    for node in convolutions:
        follow_back(cast(Node, node.args[0]), groups)
    numbers: dict[Node, str] = {}

    def quantiser(node: Node) -> str:
        return numbers.setdefault(groups.find(node), str(len(set(numbers.values()))))

    for node in convolutions:
        fed = cast(Node, node.args[0])
        plan.inputs[module_name(node)] = quantiser(fed)
        if fed in answers and calls[module_name(node)] == 1:
            plan.direct.append(module_name(node))
    for end, (where, _) in answers.items():
        if end not in last:
            plan.outputs[where] = quantiser(end)
    plan.exact = sorted(module_name(node) for end, (_, node) in answers.items() if end in last)
    return plan


class Groups:
    """Maps that share a quantiser (union-find)."""

    def __init__(self) -> None:
        self.parent: dict[Node, Node] = {}

    def find(self, node: Node) -> Node:
        while (above := self.parent.get(node, node)) is not node:
            node = above
        return node

    def join(self, one: Node, other: Node) -> None:
        one, other = self.find(one), self.find(other)
        if one is not other:
            self.parent[one] = other


def follow_back(node: Node, groups: Groups) -> None:
    """Joins a map with those that it is made of by operators that keep the scale."""
    if kind(node).startswith(KEEP_SCALE):
        for source in node.all_input_nodes:
            groups.join(node, source)
            follow_back(source, groups)


def kind(node: Node) -> str:
    """Name of a node's operator without overload and without the mark of working in place: conv2d, relu."""
    return getattr(node.target, "__name__", str(node.target)).partition(".")[0].rstrip("_")


def module_name(node: Node) -> str:
    """Name of the innermost module that a node comes from, within the model that `Logits` holds."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0].removeprefix("model").removeprefix(".") if stack else ""


def is_module(model: nn.Module, node: Node, kinds: tuple[type[nn.Module], ...]) -> bool:
    return node.op == "call_function" and type(model.get_submodule(module_name(node))) in kinds


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def leads_to(node: Node, wanted: str) -> bool:
    """Whether an operator of that kind reads what comes of a node."""
    waiting, seen = list(node.users), set(node.users)
    while waiting:
        user = waiting.pop()
        if kind(user) == wanted:
            return True
        waiting += [other for other in user.users if other not in seen]
        seen |= set(user.users)
    return False


# --------------------------------------------------------------------------------------------------------- ranges


@torch.no_grad()
def calibrate(model: SegmentationModel, images: Sequence[Tensor], config: Int8Config) -> None:
    """Sets the range of every quantiser by what it meets on the images while no map is rounded."""
    quantisers = list(quantisers_of(model).values())
    histograms = [Histogram() for _ in quantisers]
    passes = ("extremes",) if config.ranges == "minmax" else ("extremes", "counts")
    try:
        for name in passes:
            for quantiser, histogram in zip(quantisers, histograms, strict=True):
                quantiser.observe = getattr(histogram, f"see_{name}")
            for image in tqdm(images, desc=f"calibrate: {name}", leave=False, dynamic_ncols=True):
                model(image[None])
    finally:
        for quantiser in quantisers:
            quantiser.observe = None
    for quantiser, histogram in zip(quantisers, histograms, strict=True):
        if histogram.highest >= histogram.lowest:  # else its one reader stays in floating point
            quantiser.set_range(*histogram.ends(config))


class Histogram:
    """The values that a quantiser meets: their extremes, then how many fall into each of 2048 bins between."""

    def __init__(self) -> None:
        self.lowest, self.highest = float("inf"), float("-inf")
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def see_extremes(self, x: Tensor) -> None:
        lowest, highest = x.aminmax()
        self.lowest, self.highest = min(self.lowest, float(lowest)), max(self.highest, float(highest))

    def see_counts(self, x: Tensor) -> None:
        self.counts += torch.histc(x.float(), BINS, self.lowest, self.highest).double().cpu()

    def ends(self, config: Int8Config) -> tuple[float, float]:
        """Lowest and highest value of the range."""
        if config.ranges == "minmax" or self.lowest == self.highest:
            return self.lowest, self.highest
        if config.ranges == "percentile":
            return self.percentiles(config.percentile)
        return self.least_squares()

    def centres(self) -> Tensor:
        width = (self.highest - self.lowest) / BINS
        return self.lowest + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)

    def percentiles(self, inside: float) -> tuple[float, float]:
        """The narrowest cut that leaves `inside` per cent, taken from the side of the greatest magnitude first.

        A map after a ReLU is cut above alone; one with both signs is cut where its magnitude is rarest.
        """
        magnitude, order = self.centres().abs().sort()
        share = self.counts[order].cumsum(0) / self.counts.sum()
        bound = float(magnitude[int((share < inside / 100).sum())])
        return max(self.lowest, -bound), min(self.highest, bound)

    def least_squares(self) -> tuple[float, float]:
        """The range, shrunk by one factor on both sides, whose rounding and clipping err least."""
        centres = self.centres()
        factors = torch.arange(1, CANDIDATES + 1, dtype=torch.float64)[:, None] / CANDIDATES
        lowest, highest = factors * min(self.lowest, 0.0), factors * max(self.highest, 0.0)
        scale = (highest - lowest) / 255
        zero = (-lowest / scale).round()
        rounded = (((centres / scale).round() + zero).clamp(0, 255) - zero) * scale
        error = ((rounded - centres).square() * self.counts).sum(1)
        best = int(error.argmin())
        return float(lowest[best]), float(highest[best])


@torch.no_grad()
def find_sensitive(
    model: SegmentationModel, quantised: SegmentationModel, images: Sequence[Tensor]
) -> dict[str, float]:
    """How much quantising each layer alone, its weights and its input, changes the model's answer.

    Args:
        model: in floating point, what `quantised` was made of.
        images: [3, H, W], normalised.

    Returns:
        By layer the mean over pixels of KL(softmax of the model ‖ softmax with that layer quantised), in nats.
    """
    quantised = copy.deepcopy(quantised).eval()
    layers = quantised_layers(quantised)
    wanted = [name for name, layer in layers.items() if not layer.exact]
    quantisers, plan = quantisers_of(quantised), Plan(**quantised.changes["quantised"])
    truths = [model(image[None]).logits.log_softmax(1) for image in images]
    for layer in layers.values():
        layer.exact = True

    def idle(x: Tensor) -> None:
        """A quantiser that is observed does not round."""

    found = {}
    for name in tqdm(wanted, desc="sensitivity", leave=False, dynamic_ncols=True):
        layer = layers[name]
        layer.exact = False
        for number, quantiser in quantisers.items():
            quantiser.observe = None if number == plan.inputs[name] else idle
        sums = [
            F.kl_div(quantised(image[None]).logits.log_softmax(1), truth, reduction="sum", log_target=True)
            / truth[:, 0].numel()
            for image, truth in zip(images, truths, strict=True)
        ]
        found[name] = float(torch.stack(sums).mean())
        layer.exact = True
    return found


# --------------------------------------------------------------------------------------------------------- export


def push_up(program: ExportedProgram) -> None:
    """Rounds before pooling, cutting and concatenation what is rounded after them: the same numbers.

    Integer kernels take over an operator between a dequantisation and a quantisation alone, and XNNPACK wants a
    dequantisation of its own for each reader. `program` is that of a frozen model (models.quantised.freeze) and is
    changed.
    """
    graph = program.graph
    quantised = torch.ops.quantized_decomposed
    for node in reversed(list(graph.nodes)):
        if kind(node) not in COMMUTE or not node.users:
            continue
        users = list(node.users)
        if any(kind(user) != "quantize_per_tensor" or user.args[1:] != users[0].args[1:] for user in users):
            continue
        for source in node.all_input_nodes:
            if not isinstance(source.meta["val"], Tensor):  # a length, where the size is free
                continue
            if kind(source) == "dequantize_per_tensor" and source.args[1:] == users[0].args[1:]:
                continue
            with graph.inserting_before(node):
                whole = graph.call_function(users[0].target, (source, *users[0].args[1:]))
                back = graph.call_function(quantised.dequantize_per_tensor.default, (whole, *users[0].args[1:]))
            whole.meta = dict(source.meta) | {"val": source.meta["val"].to(users[0].args[-1])}
            back.meta = dict(source.meta)
            node.replace_input_with(source, back)
    for node in list(graph.nodes):
        if kind(node) == "dequantize_per_tensor":
            for user in list(node.users)[1:]:
                with graph.inserting_before(user):
                    own = graph.call_function(node.target, node.args)
                own.meta = dict(node.meta)
                user.replace_input_with(node, own)
    program.graph_module.recompile()
