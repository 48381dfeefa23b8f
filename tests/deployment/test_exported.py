"""Opening exported files: runtimes, wrong inputs, damage, missing parts."""

import hashlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data.transforms import Appearance, colour_table
from deploy.export import ExportConfig, export
from deploy.exported import OPENERS, RUNTIMES, normalise, open_exported
from deploy.postprocess import native_argmax
from errors import ConfigurationError, DamagedFileError
from models.unet import UNet

SIZE = (40, 48)
CLASSES = ["road", "car", "sky"]


def a_unet() -> UNet:
    torch.manual_seed(0)
    model = UNet(CLASSES, width=4, depth=1)
    nn.init.normal_(model.classifier.weight)
    return model.eval()


def picture(size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of each format that can be written here."""
    folder = tmp_path_factory.mktemp("export")
    for package, format_ in (("torch", "torch"), ("onnxruntime", "onnx"), ("openvino", "openvino")):
        try:
            __import__(package)
        except ImportError:
            continue
        export(a_unet(), ExportConfig(formats=[format_]), folder, [picture()])
    return folder


@pytest.fixture
def files(made: Path, tmp_path: Path) -> Path:
    """A copy of that folder to break."""
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def the_file(folder: Path, suffix: str) -> Path:
    found = list(folder.glob(f"*{suffix}"))
    if not found:
        pytest.skip(f"no {suffix} can be written here")
    return found[0]


@pytest.mark.parametrize(
    ("suffix", "runtime"),
    [(".pt2", "torch"), (".onnx", "onnxruntime"), (".onnx", "openvino"), (".xml", "openvino")],
)
def test_every_runtime_gives_pytorch_s_labels(made: Path, suffix: str, runtime: str) -> None:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    file = open_exported(the_file(made, suffix), runtime=runtime, threads=1)
    assert file.runtime == runtime
    model, image = a_unet(), picture()
    images = normalise(image[None], model.mean, model.std)
    with torch.no_grad():
        logits = model(torch.from_numpy(images)).logits
    answer = file(images)
    assert answer.dtype == np.float32
    np.testing.assert_allclose(answer, logits.numpy(), atol=1e-4)
    labels = file.labels(image)
    assert labels.dtype == np.uint8
    assert labels.shape == SIZE
    assert (labels == native_argmax(logits, SIZE)[0].numpy()).mean() > 0.999
    kept = answer.copy()
    file(np.zeros_like(images))
    np.testing.assert_array_equal(answer, kept)  # not overwritten by the next


def test_images_are_normalised_as_the_data_package_does() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    table = colour_table(mean, std, Appearance())
    image = picture()
    expected = np.stack([table[c][image[..., c]] for c in range(3)])
    np.testing.assert_array_equal(normalise(image[None], mean, std)[0], expected)


def test_a_wrong_input_is_one_line(made: Path) -> None:
    file = open_exported(the_file(made, ".pt2"))
    for wrong in (
        np.zeros((1, 3, 40, 40), np.float32),
        np.zeros((2, 3, *SIZE), np.float32),
        np.zeros((1, 3, *SIZE), np.float64),
        np.zeros((3, *SIZE), np.float32),
    ):
        with pytest.raises(ConfigurationError, match=r"takes float32 \[1, 3, 40, 48\], not") as raised:
            file(wrong)
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigurationError, match=r"takes float32 \[1, 3, 40, 48\], not float32 \[1, 3, 64, 64\]"):
        file.labels(picture((64, 64)))
    for wrong in (np.zeros(SIZE, np.uint8), np.zeros((*SIZE, 4), np.uint8), np.zeros((*SIZE, 3), np.float32)):
        with pytest.raises(ConfigurationError, match=r"an image is uint8 \[H, W, 3\]"):
            file.labels(wrong)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx", ".xml", ".bin"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_file_is_told(files: Path, suffix: str, damage: str) -> None:
    path = the_file(files, suffix)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) * 2 // 3] if damage == "truncated" else data)
    with pytest.raises(DamagedFileError, match="not the file that was exported") as raised:
        open_exported(path if suffix != ".bin" else path.with_suffix(".xml"))
    assert raised.value.exit_code == 3


def test_missing_parts_are_told(files: Path) -> None:
    path = the_file(files, ".pt2")
    (files / f"{path.name}.json").unlink()
    with pytest.raises(DamagedFileError, match=r"\.pt2\.json: missing; export the model again"):
        open_exported(path)
    xml = the_file(files, ".xml")
    xml.with_suffix(".bin").unlink()
    with pytest.raises(DamagedFileError, match=r"\.bin: missing, the weights of"):
        open_exported(xml)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("mean"),
        lambda m: m.update(parameters="many"),
        lambda m: m.update(surprise=1),
        lambda m: m["input"].update(shape=[1, 3, 40]),
        lambda m: m["input"].update(shape=[1, 3, "40", 48]),
        lambda m: m["input"].pop("dtype"),
        lambda m: m["input"].update(dtype="float64"),
        lambda m: m["output"].update(kind="boxes"),
        lambda m: m.update(colours=[[0, 0, 0]]),
        lambda m: m.update(std=[1.0]),
        lambda m: m.update(size="${oc.env:HOME}"),
    ],
)
def test_metadata_that_is_not_whole_is_damaged(files: Path, change: Any) -> None:
    path = the_file(files, ".pt2")
    beside = files / f"{path.name}.json"
    metadata = json.loads(beside.read_text())
    change(metadata)
    beside.write_text(json.dumps(metadata))
    with pytest.raises(DamagedFileError, match="not the metadata of an exported file") as raised:
        open_exported(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_metadata_that_is_no_json_is_damaged(files: Path, text: str) -> None:
    path = the_file(files, ".pt2")
    (files / f"{path.name}.json").write_text(text)
    with pytest.raises(DamagedFileError, match="not the metadata of an exported file"):
        open_exported(path)


def test_a_program_with_pickled_objects_is_not_loaded(files: Path) -> None:
    path = the_file(files, ".pt2")
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for name in parts:
        if "/data/sample_inputs/" in name:
            parts[name] = b"\x80\x04}."
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    sign(path)
    with pytest.raises(DamagedFileError, match="holds pickled objects"):
        open_exported(path)


def test_a_file_that_a_runtime_does_not_take_is_one_line(files: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    path = the_file(files, ".onnx")
    path.write_bytes(b"not a model")
    sign(path)
    with pytest.raises(ConfigurationError, match=r"onnxruntime [\d.]+ does not take it \(") as raised:
        open_exported(path)
    assert "\n" not in str(raised.value)


def sign(path: Path) -> None:
    """Makes the metadata fit the file."""
    beside = path.with_name(f"{path.name}.json")
    metadata = json.loads(beside.read_text())
    metadata["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    beside.write_text(json.dumps(metadata))


def test_unknown_files_and_runtimes_are_told(made: Path, tmp_path: Path) -> None:
    path = the_file(made, ".pt2")
    with pytest.raises(
        ConfigurationError, match=r"model\.tflite: not an exported file; give one that ends in \.onnx"
    ):
        open_exported(tmp_path / "model.tflite")
    with pytest.raises(ConfigurationError, match=r"a\.onnx: no such file; write it by"):
        open_exported(tmp_path / "a.onnx")
    with pytest.raises(ConfigurationError, match="runtime: openvino does not read .*; give torch"):
        open_exported(path, runtime="openvino")
    with pytest.raises(ConfigurationError, match="arithmetic: torch has no bf16 for .*; give fp32"):
        open_exported(path, arithmetic="bf16")


@pytest.mark.parametrize(("suffix", "module"), [(".onnx", "onnxruntime"), (".xml", "openvino")])
def test_a_missing_runtime_is_named(made: Path, suffix: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = the_file(made, suffix)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=rf"^{module}: not installed; pip install {module}"):
        open_exported(path)


def test_tensorrt_is_told_where_it_is_missing(made: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if "TensorrtExecutionProvider" in runtime.get_available_providers():
        pytest.skip("TensorRT is there")
    with pytest.raises(ConfigurationError, match="runtime: tensorrt: this ONNX Runtime has no TensorRT"):
        open_exported(the_file(made, ".onnx"), runtime="tensorrt")


def test_openvino_computes_in_bf16_where_asked(made: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    path = the_file(made, ".xml")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(ConfigurationError, match="no instructions for bf16"):
            open_exported(path, arithmetic="bf16")
        return
    images = normalise(picture()[None], (0.5,) * 3, (0.2,) * 3)
    exact, coarse = (open_exported(path, arithmetic=a)(images) for a in ("fp32", "bf16"))
    difference = np.abs(exact - coarse).max() / np.abs(exact).max()
    assert 1e-4 < difference < 0.1


def test_every_runtime_has_an_opener() -> None:
    assert {runtime for runtimes in RUNTIMES.values() for runtime in runtimes} == OPENERS.keys()
