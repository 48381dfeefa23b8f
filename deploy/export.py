"""A trained model as a file for a runtime: ONNX, torch.export, OpenVINO, ExecuTorch, Core ML.

Every file is opened in its runtime at once, run on real images and compared with PyTorch; one that does not agree
is an error and does not stay. Beside it stands FILE.json with what a program needs to use it:
`deploy.exported.Metadata`.
"""

import copy
import dataclasses
import importlib.metadata
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from tqdm import tqdm

from deploy.exported import (
    Exported,
    Metadata,
    digest,
    files_of,
    first_line,
    library,
    normalise,
    open_exported,
    quiet,
)
from deploy.int8 import push_up
from deploy.postprocess import native_argmax
from deploy.profiling import count_flops, count_parameters
from errors import ConfigurationError, UserError
from models import SegmentationModel
from models.quantised import freeze

EXTENSIONS = {
    "onnx": ".onnx",
    "torch": ".pt2",
    "openvino": ".xml",
    "executorch": ".pte",
    "coreml": ".mlpackage",
}
PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnx": ("fp32", "fp16", "weight_int8", "int8"),
    "torch": ("fp32", "bf16", "int8"),
    "openvino": ("fp32", "fp16", "weight_int8", "int8"),
    "executorch": ("fp32", "int8"),
    "coreml": ("fp32", "fp16"),
}
"""The precisions in which a format is written; OpenVINO's bf16 is chosen where a file is opened."""
PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch": (),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "executorch": ("executorch",),
    "coreml": ("coremltools",),
}
DYNAMIC = ("onnx", "openvino", "torch")
TARGETS = ("coreml", "hexagon", "tensorrt", "openvino_npu")
AGREEMENT = {"fp32": 0.999, "fp16": 0.995, "bf16": 0.99, "int8": 0.98, "weight_int8": 0.97}
"""Least share of pixels whose label is PyTorch's: that of the quantised model for int8, in fp32 for the rest. A
UNet trained on CamVid has 99.9999 %, 99.95 %, 99.73 %, 99.68 % and 99.42 %."""
LARGEST_PROTOBUF = 2 * 10**9  # bytes; ONNX files are one protobuf message, which can't be larger
UNSUPPORTED = (
    r"No ONNX function found for <OpOverload\(op='[\w:]+[.:](\w+)'",
    r"Missing out variants: \{'\w+::(\w+)",
    r"Operator torch\._ops\.\w+\.(\w+)\.\w+ is not in Core ATen",
    r"Unsupported fx node \w+, kind (?:\w+::)?(\w+)",
    r"No conversion rule found for operations: (?:[\w.]+\.)?(\w+)-\d+",
    r"Could not find an implementation for (\w+)\(\d+\)",
)
"""How exporters and runtimes say that they don't take an operator."""


@dataclass
class ExportConfig:
    """Files for runtimes."""

    formats: list[str] = field(default_factory=lambda: ["onnx"])
    """Formats: onnx, torch (a torch.export program), openvino, executorch, coreml."""
    precisions: list[str] = field(default_factory=list)
    """fp32, fp16, bf16, weight_int8, as far as each format has it; empty is the model's own: fp32, or int8 of a
    quantised one."""
    size: list[int] | None = None
    """[height, width] of the images; null is the size at which the run is evaluated."""
    dynamic: bool = False
    """Any batch, height and width (onnx, openvino and torch)."""
    uint8_input: bool = False
    """Normalisation inside the file, which then takes RGB bytes [B, H, W, 3]."""
    argmax: bool = False
    """Upsampling and argmax inside the file, which then gives uint8 labels [B, H, W]."""
    batch: int = 1
    """Images of one pass."""
    opset: int = 20
    """Of ONNX."""
    images: int = 8
    """Real images on which each file is compared with PyTorch."""
    check_for: list[str] = field(default_factory=list)
    """Say which layers these targets take badly or not at all: coreml, hexagon, tensorrt, openvino_npu."""

    def __post_init__(self) -> None:
        known = {
            "formats": tuple(PRECISIONS),
            "precisions": tuple(dict.fromkeys(p for precisions in PRECISIONS.values() for p in precisions)),
            "check_for": TARGETS,
        }
        for key, choices in known.items():
            for value in getattr(self, key):
                if value not in choices:
                    raise ConfigurationError(f"export.{key}: {value!r} is none; give some of {', '.join(choices)}")
        if not self.formats:
            raise ConfigurationError(f"export.formats: none is named; give some of {', '.join(PRECISIONS)}")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ConfigurationError(f"export.size: {self.size} is not a size; give [height, width] in pixels")
        for key in ("batch", "images"):
            if getattr(self, key) < 1:
                raise ConfigurationError(f"export.{key}: {getattr(self, key)} is too small; give 1 or more")
        if not 18 <= self.opset <= 23:
            raise ConfigurationError(f"export.opset: {self.opset} is out of range; give 18 to 23")
        for format_ in self.formats:
            if self.dynamic and format_ not in DYNAMIC:
                raise ConfigurationError(
                    f"export.dynamic: {format_} files have one size; give some of {', '.join(DYNAMIC)}"
                )
            if format_ == "coreml" and (self.uint8_input or self.argmax):
                raise ConfigurationError(
                    "export.formats: coreml files take float images and give logits; leave out export.uint8_input "
                    "and export.argmax"
                )
        if self.dynamic and self.batch != 1:
            raise ConfigurationError("export.batch: a file of free size takes any batch; leave it out")


def export(
    model: SegmentationModel,
    config: ExportConfig,
    folder: str | Path,
    images: Sequence[np.ndarray],
    *,
    run: str = "",
    colours: Sequence[Sequence[int]] | None = None,
    miou: float | None = None,
) -> list[Path]:
    """Writes every format in every precision to `folder`, runs each file and compares it with PyTorch.

    A file is FORMAT_PRECISION_HxW (`dynamic` where the size is free) with its format's extension. An older one of
    that name is replaced once the new one has been found to agree.

    Args:
        folder: RUN/export, made where it is missing.
        images: real ones, uint8 [H, W, 3] RGB of one size, which is the file's unless `config.size` says another;
            at most `config.images` of them are used.
        run: the run's folder, for the metadata.
        colours: RGB of each class; grey by default.
        miou: of the model, 0..1.

    Returns:
        The files, each with its metadata beside it.

    Raises:
        ConfigurationError: a library is missing, a format can't hold the model, or a file does not agree.
    """
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    model.take_images(model.mean, model.std)  # what the file is given is normalised as the weights know it
    jobs = list(_jobs(config, model.precision))
    for format_ in config.formats:
        for package in PACKAGES[format_]:
            library(package)
    images = [_resized(image, config.size) for image in images[: config.images]]
    size = images[0].shape[:2]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    classes = len(model.class_names)
    known = {
        "architecture": model.architecture,
        "run": run,
        "mean": list(model.mean),
        "std": list(model.std),
        "class_names": list(model.class_names),
        "colours": [[128] * 3] * classes if colours is None else [list(map(int, c)) for c in colours],
        "ignore_index": 255,
        "size": None if config.dynamic else list(size),
        "miou": miou,
        "parameters": count_parameters(model),
        "flops": count_flops(model, size),
    }
    written = []
    bar = tqdm(jobs, desc="export", leave=False, dynamic_ncols=True)
    for format_, precision in bar:
        bar.set_postfix_str(f"{format_} {precision}")
        name = f"{format_}_{precision}_{'dynamic' if config.dynamic else f'{size[0]}x{size[1]}'}"
        target = folder / f"{name}{EXTENSIONS[format_]}"
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as aside:
            path = Path(aside, target.name)
            program = to_program(model, config, size, format_, precision)
            try:
                with quiet():
                    WRITERS[format_](program, path, config, precision)
                _describe(path, config, model, known | {"format": format_, "precision": precision})
                if format_ != "coreml" or sys.platform == "darwin":
                    _check(path, model, config, precision, images)
            except (OSError, MemoryError):  # the machine failed
                raise
            except Exception as error:
                raise _explained(error, program, format_) from error
            _put(path, target)
        if format_ == "onnx" and len(files_of(target)) > 1:
            bar.write(f"{target.name}: too large for one file; its weights stand in {files_of(target)[1].name}")
        written.append(target)
    return written


def _jobs(config: ExportConfig, own: str) -> Iterator[tuple[str, str]]:
    """(format, precision) of each file to write.

    Raises:
        ConfigurationError: a format has no such precision, or int8 is wanted of a model that is not quantised.
    """
    for precision in config.precisions or [own]:
        if (precision == "int8") != (own == "int8"):
            does = "add the stage that quantises it" if precision == "int8" else "leave out export.precisions"
            raise ConfigurationError(f"export.precisions: {precision} can't be made of an {own} model; {does}")
        for format_ in config.formats:
            if precision not in PRECISIONS[format_]:
                choices = ", ".join(PRECISIONS[format_])
                raise ConfigurationError(
                    f"export.precisions: {format_} files have no {precision}; give some of {choices}"
                )
            yield format_, precision


def _resized(image: np.ndarray, size: Sequence[int] | None) -> np.ndarray:
    if size is None or image.shape[:2] == tuple(size):
        return image
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)


def _put(path: Path, target: Path) -> None:
    """Moves a file, what belongs to it and its metadata, which come last, to where they shall stand."""
    files = [path] if path.is_dir() else files_of(path)
    if target.is_dir():
        shutil.rmtree(target)
    for file in [*files, path.with_name(f"{path.name}.json")]:
        file.replace(target.with_name(file.name))
    if len(files) == 1:
        target.with_name(f"{target.name}.data").unlink(missing_ok=True)  # of an older file


# ------------------------------------------------------------------------------------------------ programs


class Deployed(nn.Module):
    """What is exported: a model, with normalisation before and labels behind it where wanted.

    Args:
        normalised: images are float32 [B, 3, H, W], normalised; else uint8 [B, H, W, 3].
        argmax: the answer is uint8 labels [B, H, W]; else float32 logits [B, C, h, w].
        dtype: of weights and maps; image and logits are float32 whatever it is.
    """

    factor: Tensor
    shift: Tensor

    def __init__(self, model: SegmentationModel, *, normalised: bool, argmax: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.normalised, self.argmax, self.dtype = model.to(dtype), normalised, argmax, dtype
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.mean, model.std))
        self.register_buffer("factor", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> Tensor:
        size = images.shape[-2:] if self.normalised else images.shape[1:3]
        if not self.normalised:
            images = images.permute(0, 3, 1, 2).float() * self.factor + self.shift
        logits = self.model(images.to(self.dtype)).logits.float()
        if not self.argmax:
            return logits
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return logits.argmax(1).to(torch.uint8)


@torch.no_grad()
def to_program(
    model: SegmentationModel,
    config: ExportConfig,
    size: Sequence[int],
    format_: str = "onnx",
    precision: str = "fp32",
) -> ExportedProgram:
    """A model as `torch.export` sees it, for images of `size` (height, width), or any if `config` says so.

    Raises:
        ConfigurationError: the model does what can't be traced, as a branch that depends on its input.
    """
    if model.precision == "int8":
        model = freeze(model, signed=format_ == "executorch")
    halves = {"fp16": torch.float16, "bf16": torch.bfloat16} if format_ in ("onnx", "torch") else {}
    dtype = halves.get(precision, torch.float32)  # the other formats round where they are written
    deployed = Deployed(
        copy.deepcopy(model), normalised=not config.uint8_input, argmax=config.argmax, dtype=dtype
    ).eval()
    batch, height, width = config.batch, *size
    if config.dynamic:  # no special sizes: the padding of a size that fits is not that of one that does not
        batch, height, width = 2, height | 1, width | 1
    shape = (batch, height, width, 3) if config.uint8_input else (batch, 3, height, width)
    example = torch.zeros(shape, dtype=torch.uint8 if config.uint8_input else torch.float32)
    free = dict.fromkeys((0, 1, 2) if config.uint8_input else (0, 2, 3), Dim.DYNAMIC)
    try:
        with quiet():
            program = torch.export.export(
                deployed, (example,), strict=False, dynamic_shapes=(free,) if config.dynamic else None
            )
    except Exception as error:
        raise ConfigurationError(
            f"export: torch.export can't trace {model.architecture} ({first_line(error)}); change the model"
        ) from error
    if model.precision == "int8":
        push_up(program)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names the files of this machine
    return program


def _explained(error: BaseException, program: ExportedProgram, format_: str) -> UserError:
    """What an exporter or a runtime complains of, in one line: the operator and its layer, if it is that."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(map(str, chain))
    operator = next((found[1] for pattern in UNSUPPORTED if (found := re.search(pattern, text))), None)
    if operator is None and isinstance(error, UserError):
        return error
    if operator is None:
        return ConfigurationError(f"export.formats: {format_} can't hold this model ({first_line(error)})")
    return ConfigurationError(
        f"export.formats: {format_} has no operator {operator}, of layer {layer_of(program, operator)}; replace "
        "it in the model, or leave this format out"
    )


def layer_of(program: ExportedProgram, operator: str) -> str:
    """The module path of the first use of an operator, whose name may be an exporter's: bessel_j0, Det."""
    operator = operator.lower().removesuffix("_copy")
    for node in program.graph.nodes:
        if node.op == "call_function" and operator in re.split(r"[.:]", str(node.target).lower())[-2:][0]:
            stack = list(node.meta.get("nn_module_stack", {}).values())
            return readable(stack[-1][0] if stack else "")
    return "?"


def readable(path: str) -> str:
    """A module's path without that of the wrapper: `encoder.0.1`."""
    path = re.sub(r"^L\['self'\]\.?", "", path)
    return "the model itself" if path in ("", "model") or path[0] == "_" else path.removeprefix("model.")


# ------------------------------------------------------------------------------------------------- writers


def _write_torch(program: ExportedProgram, path: Path, config: ExportConfig, precision: str) -> None:
    program.example_inputs = None  # they would be pickled
    torch.export.save(program, path)


def write_onnx(program: ExportedProgram, path: Path, config: ExportConfig, precision: str) -> None:
    import onnx

    axes = ("batch", "height", "width", "") if config.uint8_input else ("batch", "", "height", "width")
    exported: Any = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=config.opset,
        input_names=["images"],
        output_names=["labels" if config.argmax else "logits"],
        dynamic_shapes=({axis: name for axis, name in enumerate(axes) if name},) if config.dynamic else None,
        verbose=False,
    )
    for node in exported.model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        node.doc_string = None
        if scopes is not None:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    remove_empty_pads(exported.model)
    if precision == "weight_int8":
        round_weights(exported.model)
    size = sum(value.const_value.nbytes for value in exported.model.graph.initializers.values())
    exported.save(path, external_data=size > LARGEST_PROTOBUF)
    onnx.checker.check_model(str(path), full_check=True)


def remove_empty_pads(model: Any) -> None:
    """Takes out the Pad nodes that add nothing: they keep runtimes from joining what stands around them."""
    from onnx_ir import convenience

    for node in list(model.graph):
        amounts = node.inputs[1].const_value if node.op_type == "Pad" else None
        if amounts is not None and not amounts.numpy().any():
            convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            model.graph.remove(node, safe=True)


def round_weights(model: Any) -> None:
    """Weights of convolutions and matrix products as int8, with one scale an output channel, made float32 again by
    a DequantizeLinear in front of each: a quarter of the bytes, and the arithmetic that it was."""
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        weight = node.inputs[1] if node.op_type in ("Conv", "MatMul", "Gemm") else None
        if weight is None or weight.name not in graph.initializers or len(weight.shape) < 2:
            continue
        transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
        axis = 0 if node.op_type == "Conv" or transposed else len(weight.shape) - 1
        values = weight.const_value.numpy()
        others = tuple(a for a in range(values.ndim) if a != axis)
        scale = np.maximum(np.abs(values).max(others, keepdims=True), np.finfo(np.float32).tiny) / 127
        whole = np.rint(values / scale).astype(np.int8)
        rounded, scales = (
            ir.val(f"{weight.name}_{what}", const_value=ir.tensor(array, name=f"{weight.name}_{what}"))
            for what, array in (("int8", whole), ("scale", scale.reshape(-1).astype(np.float32)))
        )
        for value in (rounded, scales):
            graph.register_initializer(value)
        back = ir.node("DequantizeLinear", [rounded, scales], attributes={"axis": axis})
        back.metadata_props.update(node.metadata_props)
        graph.insert_before(node, back)
        node.replace_input_with(1, back.outputs[0])
        if not weight.uses():
            del graph.initializers[weight.name]


def _write_openvino(program: ExportedProgram, path: Path, config: ExportConfig, precision: str) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as aside:
        between = Path(aside, "model.onnx")
        write_onnx(program, between, config, precision)
        model = openvino.Core().read_model(between)
        openvino.save_model(model, path, compress_to_fp16=precision == "fp16")


def _write_executorch(program: ExportedProgram, path: Path, config: ExportConfig, precision: str) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)


def _write_coreml(program: ExportedProgram, path: Path, config: ExportConfig, precision: str) -> None:
    import coremltools

    program = program.run_decompositions({})
    for node in list(program.graph.nodes):  # two forms of torch 2.13 that coremltools 9 does not know
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            program.graph_signature.replace_all_uses(node.name, node.args[0].name)
            program.graph.erase_node(node)
        elif node.target is torch.ops.aten.max_pool2d.default and len(node.args) == 2:
            node.args = (*node.args, node.args[1])
    made = coremltools.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=coremltools.target.iOS16,
        compute_precision=getattr(coremltools.precision, "FLOAT16" if precision == "fp16" else "FLOAT32"),
        skip_model_load=True,
    )
    made.save(str(path))


WRITERS: dict[str, Callable[[ExportedProgram, Path, ExportConfig, str], None]] = {
    "onnx": write_onnx,
    "torch": _write_torch,
    "openvino": _write_openvino,
    "executorch": _write_executorch,
    "coreml": _write_coreml,
}


# -------------------------------------------------------------------------------------- metadata and check


def _describe(path: Path, config: ExportConfig, model: SegmentationModel, known: dict[str, Any]) -> None:
    """Writes the metadata of a file that has not been run yet."""
    height, width = known["size"] or (None, None)
    batch = None if config.dynamic else config.batch
    packages = ("torch", *PACKAGES[known["format"]])
    metadata = Metadata(
        input={
            "name": "images",
            "shape": [batch, height, width, 3] if config.uint8_input else [batch, 3, height, width],
            "dtype": "uint8" if config.uint8_input else "float32",
        },
        output={
            "kind": "labels" if config.argmax else "logits",
            "dtype": "uint8" if config.argmax else "float32",
            "stride": 1 if config.argmax else model.stride,
        },
        agreement=None,
        largest_difference=None,
        bytes=sum(file.stat().st_size for file in files_of(path)),
        sha256=digest(path),
        versions={package: importlib.metadata.version(package) for package in packages},
        **known,
    )
    _write_metadata(path, metadata)


def _write_metadata(path: Path, metadata: Metadata) -> None:
    text = json.dumps(dataclasses.asdict(metadata), indent=2)
    path.with_name(f"{path.name}.json").write_text(text + "\n", encoding="utf-8")


def _check(
    path: Path, model: SegmentationModel, config: ExportConfig, precision: str, images: Sequence[np.ndarray]
) -> None:
    """Runs a file and puts its agreement with PyTorch into its metadata.

    Raises:
        ConfigurationError: it does not agree.
    """
    exported = open_exported(path)
    batches = [np.stack(images[start : start + config.batch]) for start in range(0, len(images), config.batch)]
    if config.dynamic:  # another batch and another size, which no stride divides
        height, width = images[0].shape[:2]
        batches.append(np.stack([image[: height * 3 // 4 | 1, : width * 3 // 4 | 1] for image in images[:2]]))
    agreement, largest = compare(exported, model, batches)
    least = AGREEMENT[precision]
    if agreement < least:
        raise ConfigurationError(
            f"export: {path.name} gives PyTorch's label on {agreement:.3%} of the pixels, where {least:.1%} are "
            "asked for; choose another format or precision"
        )
    _write_metadata(path, dataclasses.replace(exported.metadata, agreement=agreement, largest_difference=largest))


@torch.inference_mode()
def compare(
    exported: Exported, model: SegmentationModel, batches: Sequence[np.ndarray]
) -> tuple[float, float | None]:
    """The share of pixels whose label is that of `model`, and the largest difference of the logits, if it has any.

    Args:
        batches: uint8 [B, H, W, 3]; one with fewer images than the file takes is filled up with its first.
    """
    equal = pixels = 0
    largest: float | None = None if exported.metadata.output["kind"] == "labels" else 0.0
    for images in batches:
        count, size = len(images), images.shape[1:3]
        fill = (exported.metadata.input["shape"][0] or count) - count
        given = np.concatenate([images, np.repeat(images[:1], fill, 0)])
        answer = exported(exported.prepare(given))[:count]
        logits = model(torch.from_numpy(normalise(images, model.mean, model.std))).logits.float()
        if largest is not None:
            largest = max(largest, float(np.abs(answer - logits.numpy()).max()))
        expected = native_argmax(logits, size).numpy()
        equal += int((exported.finish(answer, size) == expected).sum())
        pixels += expected.size
    return equal / pixels, largest
