"""Exported files: what stands in them, that they agree with PyTorch, and how what can't be made is refused."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deploy.export as exporting
from deploy.export import ExportConfig, compare, export, remove_empty_pads, to_program, write_onnx
from deploy.exported import Exported, normalise, open_exported, quiet, read_metadata
from deploy.int8 import Int8Config, quantise
from deploy.postprocess import native_argmax
from errors import ConfigurationError
from models import SegmentationModel
from models.unet import UNet

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

CLASSES = ["road", "car", "sky"]
SIZE = (50, 64)  # 50 is no multiple of 8, the coarsest stride


def a_unet(**shape: Any) -> UNet:
    """A small one in eval mode whose labels vary and whose batch normalisation does something."""
    torch.manual_seed(0)
    model = UNet(CLASSES, **({"width": 8, "depth": 1} | shape))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
        model.classifier.weight.normal_()
    return model.eval()


def pictures(count: int = 2, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (count, size[0] // 8 + 1, size[1] // 8 + 1, 3), dtype=np.uint8)
    return [image.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]] for image in coarse]


def said(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name(f"{path.name}.json").read_text())


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_an_onnx_file_agrees_and_says_what_it_is(tmp_path: Path) -> None:
    model = a_unet()
    model.take_images((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # those of a run are none of the file's
    (path,) = export(model, ExportConfig(), tmp_path, pictures(), run="runs/a", colours=[(1, 2, 3)] * 3, miou=0.5)
    assert path == tmp_path / "onnx_fp32_50x64.onnx"
    metadata = said(path)
    assert metadata["agreement"] == 1.0
    assert 0 < metadata["largest_difference"] < 1e-4
    assert metadata["input"] == {"name": "images", "shape": [1, 3, 50, 64], "dtype": "float32"}
    assert metadata["output"] == {"kind": "logits", "dtype": "float32", "stride": 4}
    assert (metadata["run"], metadata["miou"], metadata["size"]) == ("runs/a", 0.5, [50, 64])
    assert (metadata["class_names"], metadata["colours"]) == (CLASSES, [[1, 2, 3]] * 3)
    assert metadata["mean"] == list(model.mean)
    model.take_images(model.mean, model.std)
    with torch.no_grad():
        logits = model(torch.from_numpy(normalise(pictures()[0][None], model.mean, model.std))).logits
    assert (open_exported(path).labels(pictures()[0]) == native_argmax(logits, SIZE)[0].numpy()).mean() > 0.999
    assert metadata["bytes"] == path.stat().st_size
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, f"{path.name}.json"]
    found = operators(path)
    assert "BatchNormalization" not in found
    assert found["Conv"] == 2 + 2 + 2 + 2 + 1
    kept = {known.key for node in onnx.load(path).graph.node for known in node.metadata_props}
    assert kept == {"pkg.torch.onnx.name_scopes"}  # the layers, not the files of the machine that made it
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()
    opset = {imported.domain: imported.version for imported in onnx.load(path).opset_import}
    assert opset[""] == 20


def test_a_file_of_free_size_takes_any_image_and_gives_labels(tmp_path: Path) -> None:
    model = a_unet()
    config = ExportConfig(dynamic=True, uint8_input=True, argmax=True)
    (path,) = export(model, config, tmp_path, pictures())
    assert path.name == "onnx_fp32_dynamic.onnx"
    metadata = said(path)
    assert metadata["input"] == {"name": "images", "shape": [None, None, None, 3], "dtype": "uint8"}
    assert metadata["output"] == {"kind": "labels", "dtype": "uint8", "stride": 1}
    assert (metadata["size"], metadata["largest_difference"]) == (None, None)
    file = open_exported(path)
    for size in ((50, 64), (8, 8), (33, 71), (96, 40)):
        images = np.stack(pictures(3, size))
        agreement, largest = compare(file, model, [images])
        assert agreement > 0.999
        assert largest is None
        answer = file(images)
        assert answer.shape == (3, *size)
        assert answer.dtype == np.uint8
        assert len(np.unique(answer)) > 1


def test_fixed_batches_and_other_precisions(tmp_path: Path) -> None:
    config = ExportConfig(precisions=["fp32", "fp16", "weight_int8"], batch=2)
    exact, half, rounded = export(a_unet(width=16), config, tmp_path, pictures(3))
    assert said(exact)["input"]["shape"] == [2, 3, 50, 64]
    assert 1e-5 < said(half)["largest_difference"] < 0.1
    weights = {w.name: w for w in onnx.load(rounded).graph.initializer}
    assert operators(rounded)["DequantizeLinear"] == operators(exact)["Conv"]
    assert sum(w.data_type == onnx.TensorProto.INT8 for w in weights.values()) == operators(exact)["Conv"]
    assert all(
        np.abs(onnx.numpy_helper.to_array(w)).max() == 127
        for w in weights.values()
        if w.data_type == onnx.TensorProto.INT8
    )
    sizes = [sum(len(w.raw_data) for w in onnx.load(p).graph.initializer) for p in (exact, half, rounded)]
    assert sizes[1] < 0.55 * sizes[0]
    assert sizes[2] < 0.3 * sizes[0]


def test_a_quantised_model_becomes_int8(tmp_path: Path) -> None:
    model = a_unet(width=16)
    images = [torch.randn(3, 48, 64) for _ in range(3)]
    quantised = quantise(model, images, Int8Config(ranges="minmax"))
    (path,) = export(quantised, ExportConfig(), tmp_path, pictures(2, (48, 64)))
    assert path.name == "onnx_int8_48x64.onnx"
    assert "Pad" not in operators(path)  # the size fits
    assert operators(path)["QuantizeLinear"] >= operators(path)["Conv"] - 1
    assert said(path)["agreement"] > 0.97
    stored = [w for w in onnx.load(path).graph.initializer if w.data_type == onnx.TensorProto.INT8 and w.dims]
    assert sum(len(w.dims) == 4 for w in stored) >= operators(path)["Conv"] - 1
    with pytest.raises(ConfigurationError, match=r"export\.precisions: fp32 can't be made of an int8 model"):
        export(quantised, ExportConfig(precisions=["fp32"]), tmp_path, pictures())
    with pytest.raises(ConfigurationError, match=r"export\.precisions: int8 can't be made of an fp32 model"):
        export(model, ExportConfig(precisions=["int8"]), tmp_path, pictures())


@pytest.mark.parametrize("format_", ["openvino", "torch"])
def test_other_formats_agree(tmp_path: Path, format_: str) -> None:
    if format_ == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
    (path,) = export(a_unet(), ExportConfig(formats=[format_]), tmp_path, pictures())
    metadata = said(path)
    assert metadata["agreement"] == 1.0
    assert metadata["versions"].keys() >= {"torch", *([format_] if format_ == "openvino" else [])}
    assert metadata["bytes"] == sum(f.stat().st_size for f in tmp_path.iterdir() if f.suffix != ".json")
    assert not any(str(Path(__file__).parents[2]).encode() in file.read_bytes() for file in tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
def test_executorch_agrees(tmp_path: Path, int8: bool) -> None:
    pytest.importorskip("executorch.runtime", reason="executorch is not installed")
    model: SegmentationModel = a_unet(width=16)
    if int8:
        model = quantise(model, [torch.randn(3, *SIZE) for _ in range(3)], Int8Config(ranges="minmax"))
    (path,) = export(model, ExportConfig(formats=["executorch"]), tmp_path, pictures())
    assert said(path)["agreement"] > (0.97 if int8 else 0.9999)
    with pytest.raises(ConfigurationError, match="has no operator mine, of layer odd;"):
        export(Odd(), ExportConfig(formats=["executorch"]), tmp_path, pictures())


@pytest.mark.slow
def test_core_ml_is_written_but_not_run_on_linux(tmp_path: Path) -> None:
    pytest.importorskip("coremltools", reason="coremltools is not installed")
    (path,) = export(a_unet(), ExportConfig(formats=["coreml"], precisions=["fp16"]), tmp_path, pictures())
    assert said(path)["agreement"] is None
    assert (path / "Manifest.json").exists()
    with pytest.raises(ConfigurationError, match="Core ML runs on macOS and iOS alone"):
        open_exported(path)


def test_padding_that_adds_nothing_is_taken_out(tmp_path: Path) -> None:
    import onnx_ir as ir

    x = ir.val("x", ir.DataType.FLOAT, [1, 1, 2, 2])
    amounts = {name: ir.val(name, const_value=ir.tensor(np.array(v), name=name)) for name, v in PADS.items()}
    first = ir.node("Pad", [x, amounts["none"]])
    second = ir.node("Pad", [first.outputs[0], amounts["some"]])
    graph = ir.Graph([x], [second.outputs[0]], nodes=[first, second], initializers=list(amounts.values()))
    remove_empty_pads(ir.Model(graph, ir_version=10))
    assert list(graph) == [second]
    assert second.inputs[0] is x


PADS = {"none": [0] * 8, "some": [0, 0, 0, 0, 0, 0, 1, 1]}


def test_weights_that_don_t_fit_stand_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporting, "LARGEST_PROTOBUF", 1000)
    (path,) = export(a_unet(), ExportConfig(), tmp_path, pictures())
    weights = path.with_name(f"{path.name}.data")
    assert weights.stat().st_size > path.stat().st_size / 4
    assert said(path)["bytes"] == weights.stat().st_size + path.stat().st_size
    assert open_exported(path).labels(pictures()[0]).shape == SIZE
    assert f"{path.name}: too large for one file; its weights stand in {weights.name}" in capsys.readouterr().out
    monkeypatch.undo()
    export(a_unet(), ExportConfig(), tmp_path, pictures())
    assert not weights.exists()
    assert open_exported(path).labels(pictures()[0]).shape == SIZE


# ------------------------------------------------------------------------------------------------ refusals


@torch.library.custom_op("segdistill_test::mine", mutates_args=())
def mine(x: Tensor) -> Tensor:
    return x * 2


@mine.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Peculiar(nn.Module):
    """A layer that no runtime knows, or that can't be traced."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "custom":
            return mine(x)
        if self.kind == "determinant":
            return x + torch.linalg.det(x[..., :8, :8]).sum()
        return x if float(x.sum()) > 0 else -x


class Odd(UNet):
    """A UNet with a peculiar layer."""

    def __init__(self, kind: str = "custom") -> None:
        super().__init__(CLASSES, width=4, depth=1)
        self.odd = Peculiar(kind)

    def forward(self, images: Tensor, taps: Any = ()) -> Any:
        answer = super().forward(images, taps)
        return dataclasses.replace(answer, logits=self.odd(answer.logits))


def test_an_unsupported_operator_is_named_with_its_layer(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^export.formats: onnx has no operator mine, of layer odd; "):
        export(Odd(), ExportConfig(), tmp_path, pictures())
    assert list(tmp_path.iterdir()) == []


def test_an_operator_that_openvino_lacks_is_named_with_its_layer(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    with pytest.raises(ConfigurationError, match="openvino has no operator Det, of layer odd; "):
        export(Odd("determinant"), ExportConfig(formats=["openvino"]), tmp_path, pictures())


def test_what_can_t_be_traced_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigurationError, match=r"^export: torch.export can't trace unet ") as raised:
        export(Odd("branch"), ExportConfig(), tmp_path, pictures())
    assert "\n" not in str(raised.value)
    assert "def forward" not in capfd.readouterr().err  # torch.export prints the whole graph


def test_a_file_that_does_not_agree_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_unet()
    (path,) = export(model, ExportConfig(formats=["torch"]), tmp_path, pictures())
    older = path.read_bytes()

    def wrong(self: Exported, images: np.ndarray) -> np.ndarray:
        return -right(self, images)

    right = Exported.__call__
    monkeypatch.setattr(Exported, "__call__", wrong)
    with pytest.raises(ConfigurationError, match=r"gives PyTorch's label on [\d.]+% of the pixels, where 99.9%"):
        export(model, ExportConfig(formats=["torch"]), tmp_path, pictures())
    assert path.read_bytes() == older
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, f"{path.name}.json"]
    monkeypatch.undo()
    assert read_metadata(path).agreement == 1.0


def test_logits_that_are_not_numbers_do_not_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Exported.__call__
    monkeypatch.setattr(Exported, "__call__", lambda self, images: right(self, images) * np.float32(np.nan))
    with pytest.raises(ConfigurationError, match="gives PyTorch's label on"):
        export(a_unet(), ExportConfig(formats=["torch"]), tmp_path, pictures())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"formats": ["onxx"]}, "export.formats: 'onxx' is none; give some of onnx, torch, openvino"),
        ({"formats": []}, "export.formats: none is named"),
        ({"precisions": ["fp8"]}, "export.precisions: 'fp8' is none"),
        ({"check_for": ["tpu"]}, "export.check_for: 'tpu' is none; give some of coreml, hexagon"),
        ({"size": [64]}, "export.size: "),
        ({"batch": 0}, "export.batch: 0 is too small"),
        ({"opset": 9}, "export.opset: 9 is out of range"),
        ({"dynamic": True, "batch": 2}, "export.batch: "),
        ({"dynamic": True, "formats": ["executorch"]}, "export.dynamic: executorch files have one size"),
        ({"uint8_input": True, "formats": ["coreml"]}, "coreml files take float images"),
    ],
)
def test_a_wrong_key_is_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("[", r"\[")):
        ExportConfig(**keys)


def test_a_precision_that_a_format_lacks_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = ExportConfig(formats=["torch", "onnx"], precisions=["bf16"])
    with pytest.raises(ConfigurationError, match=r"export\.precisions: onnx files have no bf16"):
        export(a_unet(), config, tmp_path, pictures())
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ConfigurationError, match=r"^openvino: not installed; pip install openvino"):
        export(a_unet(), ExportConfig(formats=["openvino"]), tmp_path, pictures())


def test_libraries_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = to_program(a_unet(), ExportConfig(), SIZE)
    capfd.readouterr()
    with quiet():
        write_onnx(program, tmp_path / "a.onnx", ExportConfig(), "fp32")
        print("chatter")
    assert capfd.readouterr() == ("", "")
    print("heard again")
    assert capfd.readouterr().out == "heard again\n"
