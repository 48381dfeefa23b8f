"""What common accelerators take badly or not at all, by layer, and what to put in its place.

The rules are what vendors publish (`Rule.source`); Apple says little of its neural engine, so one rule is what
others found out. None was tried on such a device here. A model without findings may still fall back to the CPU
somewhere: that is for the vendors' own compilers to tell.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploy.export import TARGETS, ExportConfig, readable, to_program, write_onnx
from deploy.exported import first_line, library, quiet
from errors import ConfigurationError, DamagedFileError
from evaluation.report import table
from models import SegmentationModel

APPLE_GUIDE = "https://apple.github.io/coremltools/docs-guides/source/"
APPLE_PAPER = "https://machinelearning.apple.com/research/neural-engine-transformers"
APPLE_OTHERS = "https://github.com/hollance/neural-engine/blob/master/docs/unsupported-layers.md"
QUALCOMM = "https://docs.qualcomm.com/doc/80-63442-10/topic/"
ONNXRUNTIME_QNN = "https://onnxruntime.ai/docs/execution-providers/QNN-ExecutionProvider.html"
NVIDIA = "https://docs.nvidia.com/deeplearning/"
ONNX_TENSORRT = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md"
OPENVINO = (
    "https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-devices-and-modes/npu-device.html"
)
HEXAGON_OPERATORS = """
    Abs Add And ArgMax ArgMin Asin Atan AveragePool BatchNormalization Cast Clip Concat Constant Conv ConvTranspose
    Cos DepthToSpace DequantizeLinear Div Elu Equal Exp Expand Flatten Floor Gather Gelu Gemm GlobalAveragePool
    Greater GreaterOrEqual GridSample HardSwish Identity InstanceNormalization LRN LayerNormalization LeakyRelu
    Less LessOrEqual Log LogSoftmax LpNormalization MatMul Max MaxPool Min Mul Neg Not Or PRelu Pad Pow
    QuantizeLinear ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu Reshape Resize Round Sigmoid Sign Sin
    Slice Softmax SpaceToDepth Split Sqrt Squeeze Sub Tanh Tile TopK Transpose Unsqueeze Where
"""
"""ONNX operators that ONNX Runtime's QNN provider lists, and those that its graph optimisation takes away."""


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: its ONNX dtype (FLOAT, UINT8, …), shape with None where free, value if small."""

    dtype: str = ""
    shape: tuple[int | None, ...] = ()
    constant: np.ndarray | None = None


@dataclass(frozen=True)
class Layer:
    """An operator of the graph, or its input (`operator` is then "input").

    Args:
        path: the module that it belongs to.
        quantised: what it computes on comes from a DequantizeLinear.
    """

    operator: str
    path: str
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    quantised: bool = False

    @property
    def name(self) -> str:
        """Its path, with the operator where the path does not tell."""
        told = self.operator in ("input", "Conv", "ConvTranspose", "MatMul", "Gemm")
        return self.path if told else f"{self.path} ({self.operator})"

    @property
    def channels(self) -> tuple[int, int]:
        """Input and output channels of a convolution, by its weight."""
        outputs, inputs = self.inputs[1].shape[:2]
        return (inputs or 0) * self.attributes.get("group", 1), outputs or 0

    @property
    def depthwise(self) -> bool:
        return self.operator == "Conv" and self.attributes.get("group", 1) == self.channels[0] > 1


@dataclass(frozen=True)
class Rule:
    """What a target takes badly (`slow`) or not at all."""

    target: str
    slow: bool
    what: str
    instead: str
    source: str
    breaks: Callable[[Layer], bool]


@dataclass(frozen=True)
class Finding:
    """A rule that layers break."""

    rule: Rule
    layers: list[str]


# -------------------------------------------------------------------------------------------------- rules


def has_free_size(layer: Layer) -> bool:
    return layer.operator == "input" and None in layer.outputs[0].shape


def has_odd_channels(multiple: int, *, quantised: bool | None = None) -> Callable[[Layer], bool]:
    """Convolutions with channels that are no multiple; the image's three and depthwise ones aside."""

    def breaks(layer: Layer) -> bool:
        if layer.operator != "Conv" or layer.depthwise or quantised not in (None, layer.quantised):
            return False
        inputs, outputs = layer.channels
        return bool(outputs % multiple or (inputs % multiple and inputs != 3))

    return breaks


def is_float_product(layer: Layer) -> bool:
    return layer.operator in ("Conv", "ConvTranspose", "MatMul", "Gemm") and not layer.quantised


def is_grouped(layer: Layer) -> bool:
    return layer.operator == "Conv" and layer.attributes.get("group", 1) > 1


def is_dilated(layer: Layer) -> bool:
    return layer.operator in ("Conv", "ConvTranspose") and max(layer.attributes.get("dilations", [1])) > 1


def is_unlisted(layer: Layer) -> bool:
    return layer.operator not in ("input", *HEXAGON_OPERATORS.split())


def is_on_tokens(layer: Layer) -> bool:
    """A matrix product or a normalisation over the last axis of [B, positions, channels]."""
    return layer.operator in ("MatMul", "Gemm", "LayerNormalization")


def has_many_axes(layer: Layer) -> bool:
    return any(len(value.shape) > 4 for value in layer.outputs)


def has_asymmetric_range(layer: Layer) -> bool:
    """A quantisation to uint8, or with a zero point that is not 0."""
    if layer.operator != "QuantizeLinear" or len(layer.inputs) < 3:
        return False
    zero_point = layer.inputs[2]
    return zero_point.dtype == "UINT8" or (zero_point.constant is not None and bool(zero_point.constant.any()))


def is_unknown_resize(layer: Layer) -> bool:
    mode = layer.attributes.get("mode", "nearest")
    transformation = layer.attributes.get("coordinate_transformation_mode", "half_pixel")
    known = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
    return layer.operator == "Resize" and (mode not in ("nearest", "linear") or transformation not in known)


def gives_labels(layer: Layer) -> bool:
    return layer.operator == "ArgMax"


def is_sensitive(layer: Layer) -> bool:
    return layer.operator in ("LayerNormalization", "Softmax", "Gelu", "Erf")


FIXED = "export one size: export.dynamic=false export.size=[h,w]"
RULES = (
    Rule(
        "coreml",
        True,
        "free size: on the neural engine in its default size alone",
        FIXED,
        f"{APPLE_GUIDE}flexible-inputs.html",
        has_free_size,
    ),
    Rule(
        "coreml",
        True,
        "dilated convolution: leaves the neural engine (found by users, not Apple's word)",
        "plain convolutions at a coarser stride (model.stride=16), or pooling in place of the atrous pyramid",
        APPLE_OTHERS,
        is_dilated,
    ),
    Rule(
        "coreml",
        True,
        "product or normalisation over the last axis: the neural engine wants [B, C, 1, S]",
        "1×1 convolutions on maps [B, C, H, W], or a convolutional student",
        APPLE_PAPER,
        is_on_tokens,
    ),
    Rule("coreml", True, "more than four axes", "reshape to [B, C, H, W]", APPLE_PAPER, has_many_axes),
    Rule(
        "coreml",
        True,
        "float32 arithmetic: on CPU and GPU alone",
        "export.formats=[coreml] export.precisions=[fp16]",
        f"{APPLE_GUIDE}typed-execution-example.html",
        lambda layer: is_float_product(layer) and layer.outputs[0].dtype == "FLOAT",
    ),
    Rule("hexagon", False, "free size", FIXED, ONNXRUNTIME_QNN, has_free_size),
    Rule(
        "hexagon",
        False,
        "operator that QNN does not list",
        "export one size; replace the layer",
        ONNXRUNTIME_QNN,
        is_unlisted,
    ),
    Rule(
        "hexagon",
        True,
        "floating-point product: fp16 at best, not at all on older chips",
        "quantise to int8; keep fewer layers in float",
        f"{QUALCOMM}htp_guidelines_other_perf.html",
        is_float_product,
    ),
    Rule(
        "hexagon",
        True,
        "channels not a multiple of 32: filled up with zeros",
        "widths of 32, 64, 96 …; pruning to multiples of 32",
        f"{QUALCOMM}htp_guidelines_channels.html",
        has_odd_channels(32),
    ),
    Rule(
        "hexagon",
        True,
        "grouped or depthwise convolution: leaves the matrix engine idle",
        "plain convolutions (model.block=plain or residual) with fewer channels",
        f"{QUALCOMM}htp_guidelines_low_depth_activations.html",
        is_grouped,
    ),
    Rule(
        "hexagon",
        True,
        "argmax: of at most four axes, and int32 where ONNX has int64",
        "export.argmax=false: labels straight from the logits (deploy.postprocess)",
        f"{QUALCOMM}HtpOpDefSupplement.html",
        gives_labels,
    ),
    Rule(
        "hexagon",
        True,
        "loses accuracy in 8 bits",
        "16-bit activations there (mixed precision), or ReLU and batch normalisation in the student",
        ONNXRUNTIME_QNN,
        is_sensitive,
    ),
    Rule(
        "tensorrt",
        False,
        "asymmetric quantisation: int8 with zero point 0 alone",
        "export fp32 or fp16 and let TensorRT's tools quantise",
        f"{NVIDIA}tensorrt/latest/inference-library/work-quantized-types.html",
        has_asymmetric_range,
    ),
    Rule(
        "tensorrt",
        False,
        "resize mode that its parser does not know",
        "bilinear or nearest F.interpolate",
        ONNX_TENSORRT,
        is_unknown_resize,
    ),
    Rule(
        "tensorrt",
        True,
        "free size: an optimisation profile and an engine tuned for its middle",
        FIXED,
        f"{NVIDIA}tensorrt/latest/inference-library/work-dynamic-shapes.html",
        has_free_size,
    ),
    Rule(
        "tensorrt",
        True,
        "channels not a multiple of 8: filled up for tensor cores in fp16",
        "widths of 8, 16, 24 …; pruning to multiples of 8",
        f"{NVIDIA}performance/dl-performance-convolutional/index.html",
        has_odd_channels(8, quantised=False),
    ),
    Rule(
        "tensorrt",
        True,
        "channels not a multiple of 16: filled up for tensor cores in int8",
        "widths of 16, 32, 48 …; pruning to multiples of 16",
        f"{NVIDIA}performance/dl-performance-convolutional/index.html",
        has_odd_channels(16, quantised=True),
    ),
    Rule(
        "tensorrt",
        True,
        "argmax: in floating point, and int64 becomes int32",
        "export.argmax=false: labels straight from the logits (deploy.postprocess)",
        ONNX_TENSORRT,
        gives_labels,
    ),
    Rule("openvino_npu", False, "free size", FIXED, OPENVINO, has_free_size),
    Rule(
        "openvino_npu",
        True,
        "float32 arithmetic: computed in fp16",
        "compare accuracy in fp16 (export.precisions=[fp16]), or quantise to int8",
        OPENVINO,
        lambda layer: is_float_product(layer) and layer.outputs[0].dtype == "FLOAT",
    ),
)


# -------------------------------------------------------------------------------------------------- check


def check(
    model: SegmentationModel | str | Path, targets: Sequence[str] = TARGETS, size: Sequence[int] = (360, 480)
) -> list[Finding]:
    """The rules of `targets` that a model breaks, each with its layers in the order in which they run.

    compress.py's stage `export` does `print(findings_table(check(model, config.check_for, size)))`.

    Args:
        model: a model, looked at as ONNX for one image of `size` (height, width), or the path of an ONNX file.

    Raises:
        ConfigurationError: there is no such file or target, or the model can't become ONNX.
        DamagedFileError: the file is no ONNX model.
    """
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        raise ConfigurationError(f"export.check_for: {unknown[0]!r} is none; give some of {', '.join(TARGETS)}")
    if not isinstance(model, str | Path):
        with tempfile.TemporaryDirectory() as aside:
            path = Path(aside, "model.onnx")
            config = ExportConfig()
            program = to_program(model, config, size)
            with quiet():
                write_onnx(program, path, config, "fp32")
            layers = read_layers(path)
    else:
        layers = read_layers(Path(model))
    findings = []
    for rule in RULES:
        names = [layer.name for layer in layers if rule.target in targets and rule.breaks(layer)]
        if names:
            findings.append(Finding(rule, list(dict.fromkeys(names))))
    return findings


def findings_table(findings: Sequence[Finding], shown: int = 3) -> str:
    """Markdown table of findings with the first `shown` layers of each; a line that says so if there are none."""
    if not findings:
        return "no known obstacle"
    rows = [
        {
            "target": found.rule.target,
            "is": "slow" if found.rule.slow else "not taken",
            "what": found.rule.what,
            "layers": ", ".join(found.layers[:shown])
            + (f" and {len(found.layers) - shown} more" if len(found.layers) > shown else ""),
            "instead": found.rule.instead,
        }
        for found in findings
    ]
    return table(rows)


def read_layers(path: Path) -> list[Layer]:
    """The input and the operators of an ONNX file, in the order in which they run."""
    onnx = library("onnx")
    if not path.exists():
        raise ConfigurationError(f"{path}: no such file; export the model as onnx first")
    try:
        graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    except Exception as error:
        raise DamagedFileError(f"{path}: not an ONNX model ({first_line(error)}); export it again") from error

    values: dict[str, Value] = {}
    for known in (*graph.value_info, *graph.input, *graph.output):
        tensor = known.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
        values[known.name] = Value(onnx.TensorProto.DataType.Name(tensor.elem_type), shape)
    for weight in graph.initializer:
        constant = onnx.numpy_helper.to_array(weight) if len(weight.dims) < 2 else None
        values[weight.name] = Value(onnx.TensorProto.DataType.Name(weight.data_type), tuple(weight.dims), constant)
    makers = {name: node for node in graph.node for name in node.output}
    stored = {weight.name for weight in graph.initializer}

    def layer_of(node: Any) -> Layer:
        maker = makers.get(node.input[0]) if node.input else None
        return Layer(
            node.op_type,
            module_of(node, stored),
            [values.get(name, Value()) for name in node.input],
            [values.get(name, Value()) for name in node.output],
            {a.name: text(onnx.helper.get_attribute_value(a)) for a in node.attribute},
            quantised=maker is not None and maker.op_type == "DequantizeLinear",
        )

    inputs = [Layer("input", known.name, outputs=[values[known.name]]) for known in graph.input]
    return [*inputs, *map(layer_of, graph.node)]


def module_of(node: Any, stored: set[str]) -> str:
    """The module whose weight a node multiplies by; of one without, the module that it was traced in."""
    weight = next((name for name in node.input[1:2] if name in stored and name.endswith(".weight")), "")
    if weight:  # batch normalisation is folded into the convolution, which then bears its name
        return readable(weight.removesuffix(".weight"))
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "")
    path = json.loads(scopes.replace("'", '"'))[-2:-1] if scopes else []
    return readable(path[0]) if path else node.name or node.op_type


def text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
