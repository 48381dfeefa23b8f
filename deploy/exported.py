"""Exported files: opened, checked and run in the runtimes that read them.

    exported = open_exported("runs/distilled/export/onnx_fp32_360x480.onnx", threads=2)
    labels = exported.labels(image)  # uint8 [360, 480, 3] RGB -> uint8 [360, 480]

A file stands beside its metadata, FILE.json, which has its classes, colours, normalisation and SHA-256.
"""

import hashlib
import importlib
import importlib.metadata
import io
import json
import logging
import os
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deploy.postprocess import native_argmax
from errors import ConfigurationError, DamagedFileError, UserError

RUNTIMES: dict[str, tuple[str, ...]] = {
    ".onnx": ("onnxruntime", "openvino", "tensorrt"),
    ".xml": ("openvino",),
    ".pte": ("executorch",),
    ".pt2": ("torch",),
    ".mlpackage": ("coreml",),
}
"""Which runtimes read a file, by its extension; the first is the default."""

ARITHMETIC: dict[str, tuple[str, ...]] = {"openvino": ("fp32", "bf16"), "tensorrt": ("fp32", "fp16")}
"""The arithmetic of floating-point layers, where a runtime lets one choose; the first is the default."""

Run = Callable[[np.ndarray], np.ndarray]


@dataclass
class Metadata:
    """What stands beside an exported file as FILE.json.

    Args:
        format: onnx, openvino, executorch, torch or coreml.
        precision: fp32, bf16, fp16, int8 or weight_int8.
        input: name; shape, [B, 3, H, W] float32 or [B, H, W, 3] uint8 RGB, None where it is free; dtype.
        output: kind, "logits" [B, C, h, w] or "labels" [B, H, W]; dtype; stride of the logits.
        mean, std: RGB of 0..1, for float32 input; that of uint8 input is inside the file.
        colours: RGB of each class.
        size: [H, W], None where it is free.
        miou: of the model that was exported, 0..1; None where it is not known.
        agreement: share of pixels whose label is PyTorch's; None of a file that was not run where it was made.
        largest_difference: of the logits from PyTorch's; None of labels.
        flops: of one image, as `deploy.profiling.count_flops` counts them.
        bytes: of all its files.
        sha256: of the file; of several, of one behind the other: that of `cat FILE.xml FILE.bin`.
    """

    format: str
    precision: str
    architecture: str
    run: str
    input: dict[str, Any]
    output: dict[str, Any]
    mean: list[float]
    std: list[float]
    class_names: list[str]
    colours: list[list[int]]
    ignore_index: int
    size: list[int] | None
    miou: float | None
    agreement: float | None
    largest_difference: float | None
    parameters: int
    flops: int
    bytes: int
    sha256: str
    versions: dict[str, str]

    def __post_init__(self) -> None:
        shape = self.input["shape"]
        sizes = [length for length in shape if length is not None]
        if len(shape) != 4 or not all(type(length) is int and length > 0 for length in sizes):
            raise ValueError(f"input.shape: {shape}")
        if self.input["dtype"] not in ("float32", "uint8"):
            raise ValueError(f"input.dtype: {self.input['dtype']!r}")
        if self.output["kind"] not in ("logits", "labels"):
            raise ValueError(f"output.kind: {self.output['kind']!r}")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError("mean and std: not three numbers each")
        if len(self.colours) != len(self.class_names) or any(len(colour) != 3 for colour in self.colours):
            raise ValueError("colours: not three numbers for each class")


class Exported:
    """A file ready to run; `open_exported` makes it.

    Attributes:
        path: of the file.
        metadata: what is known of it.
        runtime: what runs it.
    """

    def __init__(self, path: Path, metadata: Metadata, runtime: str, run: Run) -> None:
        self.path, self.metadata, self.runtime, self._run = path, metadata, runtime, run

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The file's own input to its own output, as `metadata` has them.

        Raises:
            ConfigurationError: the input has another shape or dtype.
        """
        wanted, dtype = self.metadata.input["shape"], self.metadata.input["dtype"]
        fits = images.ndim == 4 and all(w in (None, n) for w, n in zip(wanted, images.shape, strict=True))
        if not fits or images.dtype != dtype:
            shape = [("any" if length is None else length) for length in wanted]
            raise ConfigurationError(
                f"{self.path}: takes {dtype} {shape}, not {images.dtype} {list(images.shape)}; give it such, or "
                "export the model for this size (export.size=[h,w])"
            )
        return self._run(np.ascontiguousarray(images))

    def labels(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] RGB of the file's size, or of any if that is free -> uint8 labels [H, W].

        A file of a fixed batch is given the image so many times.

        Raises:
            ConfigurationError: the image has another shape or dtype.
        """
        if image.ndim != 3:
            raise ConfigurationError(f"{self.path}: an image is uint8 [H, W, 3], not {list(image.shape)}")
        batch = self.metadata.input["shape"][0] or 1
        answer = self(self.prepare(np.repeat(image[None], batch, 0)))
        return self.finish(answer[:1], image.shape[:2])[0]

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, H, W, 3] RGB -> the file's input."""
        if self.metadata.input["dtype"] == "uint8":
            return images
        if images.dtype != np.uint8 or images.shape[-1] != 3:
            raise ConfigurationError(
                f"{self.path}: an image is uint8 [H, W, 3], not {images.dtype} {list(images.shape[1:])}"
            )
        return normalise(images, self.metadata.mean, self.metadata.std)

    def finish(self, answer: np.ndarray, size: Sequence[int]) -> np.ndarray:
        """The file's output for images of `size` (height, width) -> uint8 labels [B, H, W]."""
        if self.metadata.output["kind"] == "labels":
            return answer
        return native_argmax(answer, (size[0], size[1]))


def normalise(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 [B, H, W, 3] RGB -> float32 [B, 3, H, W]: (value / 255 - mean) / std, computed once a value."""
    values = np.arange(256)[:, None] / 255
    table = ((values - np.array(mean)) / np.array(std)).astype(np.float32)[None]
    return np.stack([cv2.LUT(np.ascontiguousarray(image), table).transpose(2, 0, 1) for image in images])


# ------------------------------------------------------------------------------------------------- opening


def open_exported(path: str | Path, *, runtime: str = "", threads: int = 0, arithmetic: str = "") -> Exported:
    """An exported file in a runtime.

    Args:
        path: FILE.onnx, .xml, .pte, .pt2 or .mlpackage; its metadata FILE.json stands beside it.
        runtime: one that reads it, by `RUNTIMES`; "" is the first.
        threads: of the CPU; 0 is the runtime's choice. Torch and ExecuTorch have one number a process.
        arithmetic: of what is not int8, by `ARITHMETIC`; "" is the runtime's first, as is the file's precision.

    Raises:
        ConfigurationError: there is no such file or runtime, or its library is missing or does not take the file.
        DamagedFileError: the file is not the one that was exported, or its metadata are missing or not whole.
    """
    path = Path(path)
    if path.suffix not in RUNTIMES:
        raise ConfigurationError(f"{path}: not an exported file; give one that ends in {', '.join(RUNTIMES)}")
    if not path.exists():
        raise ConfigurationError(f"{path}: no such file; write it by python compress.py RUN stages=[export]")
    runtime = runtime or RUNTIMES[path.suffix][0]
    if runtime not in RUNTIMES[path.suffix]:
        readers = " or ".join(RUNTIMES[path.suffix])
        raise ConfigurationError(f"runtime: {runtime} does not read {path.name}; give {readers}")
    metadata = read_metadata(path)
    choices = (*ARITHMETIC.get(runtime, ()), metadata.precision)
    if arithmetic and arithmetic not in choices:
        raise ConfigurationError(
            f"arithmetic: {runtime} has no {arithmetic} for {path.name}; give "
            f"{' or '.join(dict.fromkeys(choices))}"
        )
    if digest(path) != metadata.sha256:
        raise DamagedFileError(f"{path}: not the file that was exported (SHA-256 differs); export it again")
    try:
        with quiet():
            run = OPENERS[runtime](path, threads, arithmetic)
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        raise ConfigurationError(
            f"{path}: {runtime} {version(runtime)} does not take it ({first_line(error)}); use another runtime or "
            "format"
        ) from error
    return Exported(path, metadata, runtime, run)


def read_metadata(path: Path) -> Metadata:
    """What stands in FILE.json beside the exported file `path`.

    Raises:
        DamagedFileError: it is missing, or not all of it is there in its type.
    """
    beside = path.with_name(f"{path.name}.json")
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
        metadata = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Metadata), OmegaConf.create(found)))
    except FileNotFoundError as error:
        raise DamagedFileError(f"{beside}: missing; export the model again") from error
    except (OmegaConfBaseException, ValueError, TypeError, KeyError) as error:
        raise DamagedFileError(
            f"{beside}: not the metadata of an exported file ({first_line(error)}); export the model again"
        ) from error
    assert isinstance(metadata, Metadata)
    return metadata


def files_of(path: Path) -> list[Path]:
    """All files of an exported model, in the order in which they are hashed.

    Raises:
        DamagedFileError: the weights of OpenVINO's .xml are missing.
    """
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.suffix == ".xml":
        weights = path.with_suffix(".bin")
        if not weights.exists():
            raise DamagedFileError(f"{weights}: missing, the weights of {path.name}; export the model again")
        return [path, weights]
    weights = path.with_name(f"{path.name}.data")
    return [path, weights] if weights.exists() else [path]


def digest(path: Path) -> str:
    """SHA-256 of an exported model's files, one behind the other."""
    hashed = hashlib.sha256()
    for file in files_of(path):
        with file.open("rb") as stream:
            while part := stream.read(2**20):
                hashed.update(part)
    return hashed.hexdigest()


# ------------------------------------------------------------------------------------------------ runtimes


def _open_onnxruntime(path: Path, threads: int, arithmetic: str) -> Run:
    runtime = library("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _open_tensorrt(path: Path, threads: int, arithmetic: str) -> Run:
    """TensorRT behind ONNX Runtime; the engine is built at the first pass of each size."""
    runtime = library("onnxruntime")
    provider = "TensorrtExecutionProvider"
    if provider not in runtime.get_available_providers():
        raise ConfigurationError(
            "runtime: tensorrt: this ONNX Runtime has no TensorRT; pip install onnxruntime-gpu tensorrt on a "
            "machine with an NVIDIA GPU, or give onnxruntime"
        )
    chosen = [(provider, {"trt_fp16_enable": arithmetic == "fp16"}), "CUDAExecutionProvider"]
    session = runtime.InferenceSession(str(path), providers=chosen)
    if session.get_providers()[0] != provider:  # ONNX Runtime goes on without, and only logs it
        raise ConfigurationError("runtime: tensorrt: its libraries do not load here; give onnxruntime")
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _open_openvino(path: Path, threads: int, arithmetic: str) -> Run:
    core = library("openvino").Core()
    if arithmetic == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ConfigurationError("arithmetic: this CPU has no instructions for bf16; give fp32")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if arithmetic == "bf16" else "f32",
    }
    if threads:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    request = core.compile_model(str(path), "CPU", settings).create_infer_request()
    return lambda images: request.infer([images])[0]


def _open_executorch(path: Path, threads: int, arithmetic: str) -> Run:
    bindings = library("executorch.extension.pybindings.portable_lib", "executorch")
    runtime = library("executorch.runtime", "executorch")
    if threads:
        bindings._unsafe_reset_threadpool(threads)
    program = runtime.Runtime.get().load_program(path)
    method = program.load_method("forward")

    def run(images: np.ndarray) -> np.ndarray:
        return method.execute([torch.from_numpy(images)])[0].numpy().copy()  # its memory serves the next pass too

    return run


def _open_torch(path: Path, threads: int, arithmetic: str) -> Run:
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers the operators of int8 programs)

    _refuse_pickles(path)
    if threads:
        torch.set_num_threads(threads)
    program = torch.export.load(path).module()

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return program(torch.from_numpy(images)).numpy()

    return run


def _refuse_pickles(path: Path) -> None:
    """Raises DamagedFileError if `torch.export.load` would unpickle objects: that can run code out of the file."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        configs = [json.loads(archive.read(name))["config"] for name in names if name.endswith("_config.json")]
        payloads = [payload for config in configs for payload in config.values()]
        pickled = any(payload["use_pickle"] for payload in payloads)
        samples = any(archive.getinfo(name).file_size for name in names if "/data/sample_inputs/" in name)
    if pickled or samples:
        raise DamagedFileError(f"{path}: holds pickled objects, which exported files never do; export it again")


def _open_coreml(path: Path, threads: int, arithmetic: str) -> Run:
    tools = library("coremltools")
    if sys.platform != "darwin":
        raise ConfigurationError(f"{path}: Core ML runs on macOS and iOS alone; use another format here")
    model = tools.models.MLModel(str(path))
    known = model.get_spec().description
    return lambda images: model.predict({known.input[0].name: images})[known.output[0].name]


OPENERS: dict[str, Callable[[Path, int, str], Run]] = {
    "onnxruntime": _open_onnxruntime,
    "openvino": _open_openvino,
    "tensorrt": _open_tensorrt,
    "executorch": _open_executorch,
    "torch": _open_torch,
    "coreml": _open_coreml,
}


# ----------------------------------------------------------------------------------------------- libraries


def library(module: str, package: str = "") -> Any:
    """An optional library's module.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        with quiet():
            return importlib.import_module(module)
    except ImportError as error:
        package = package or module
        raise ConfigurationError(f"{package}: not installed; pip install {package}, or leave it out") from error


def version(runtime: str) -> str:
    """Version of a runtime's package, "" where it can't be told."""
    package = {"tensorrt": "onnxruntime", "coreml": "coremltools"}.get(runtime, runtime)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the warnings, logs and prints of libraries from the user, those of their C++ parts too."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept, disabled = (os.dup(1), os.dup(2)), logging.root.manager.disable
    heard = io.StringIO()
    with (
        tempfile.TemporaryFile() as elsewhere,
        redirect_stdout(heard),
        redirect_stderr(heard),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        os.dup2(elsewhere.fileno(), 1)
        os.dup2(elsewhere.fileno(), 2)
        try:
            yield
        finally:
            for descriptor, original in zip(kept, (1, 2), strict=True):
                os.dup2(descriptor, original)
                os.close(descriptor)
            logging.disable(disabled)
