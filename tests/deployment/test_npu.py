"""The check for accelerators: what it finds, by which layer, and what it leaves in peace."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploy.export import TARGETS
from deploy.int8 import Int8Config, quantise
from deploy.npu import RULES, Finding, Layer, Value, check, findings_table
from errors import ConfigurationError, DamagedFileError
from models.dabnet import DABNet
from models.unet import UNet

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
helper = onnx.helper
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

CLASSES = [f"class {number}" for number in range(32)]
SIZE = (32, 48)


def found(findings: list[Finding], target: str, part: str) -> list[str]:
    """The layers of the one finding for a target that says `part`."""
    (finding,) = [f for f in findings if f.rule.target == target and part in f.rule.what]
    return finding.layers


def said(findings: list[Finding], target: str) -> list[str]:
    return [finding.rule.what for finding in findings if finding.rule.target == target]


@pytest.fixture(scope="module")
def unet() -> list[Finding]:
    return check(UNet(CLASSES[:11], width=24, depth=1, stride=4).eval(), size=SIZE)


def test_channels_are_named_by_layer(unet: list[Finding]) -> None:
    assert found(unet, "tensorrt", "multiple of 8") == ["stem.0.0", "stem.1.0", "classifier"]  # 12 and 11 channels
    odd = found(unet, "hexagon", "multiple of 32")
    assert odd[0] == "stem.0.0"
    assert "decoder.0.0.0" in odd
    assert odd[-1] == "classifier"


def test_a_float_model_is_told_for_engines_of_less_precision(unet: list[Finding]) -> None:
    layers = found(unet, "coreml", "float32 arithmetic")
    assert layers == found(unet, "openvino_npu", "float32") == found(unet, "hexagon", "floating-point")
    assert len(layers) == 2 + 2 + 2 + 2 + 1
    assert all(finding.rule.slow for finding in unet)


def test_dilated_and_grouped_convolutions() -> None:
    findings = check(DABNet(CLASSES[:3], blocks=[1, 1]).eval(), size=SIZE)
    dilated = found(findings, "coreml", "dilated")
    assert dilated == [f"block{number}.0.context.{part}.0" for number in (1, 2) for part in (0, 1)]
    grouped = found(findings, "hexagon", "depthwise")
    assert {*dilated, "block1.0.local.0.0"} <= {*grouped}
    assert "stem.0.0" not in grouped
    assert not {*grouped} & {*found(findings, "tensorrt", "multiple of 8")}  # depthwise ones have no tensor cores


def test_a_quantised_model(tmp_path: Path) -> None:
    model = UNet(CLASSES, width=32, depth=1).eval()
    quantised = quantise(model, [torch.randn(3, *SIZE) for _ in range(2)], Int8Config(ranges="minmax"))
    findings = check(quantised, size=SIZE)
    (refused,) = [finding for finding in findings if not finding.rule.slow]
    assert (refused.rule.target, "zero point" in refused.rule.what) == ("tensorrt", True)
    assert not any("float" in what for what in said(findings, "hexagon"))
    assert found(findings, "hexagon", "multiple of 32") == ["stem.0.0", "stem.1.0"]
    assert not said(findings, "openvino_npu")


def test_a_file_of_free_size_with_labels(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["images"], ["sizes"]),
        helper.make_node("Mod", ["sizes", "sizes"], ["rest"]),
        helper.make_node("ArgMax", ["images"], ["labels"], axis=1, keepdims=0),
    ]
    given = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", 3, "height", "width"])
    graph = helper.make_graph(nodes, "free", [given], [helper.make_empty_tensor_value_info("labels")])
    path = tmp_path / "free.onnx"
    onnx.save(helper.make_model(graph), path)
    findings = check(path)
    for target in TARGETS:
        assert found(findings, target, "free size") == ["images"]
    assert found(findings, "hexagon", "does not list") == ["Shape (Shape)", "Mod (Mod)"]
    assert found(findings, "hexagon", "argmax") == ["ArgMax (ArgMax)"]
    assert {finding.rule.target for finding in check(path, ["tensorrt"])} == {"tensorrt"}


def layer(operator: str, **known: Any) -> Layer:
    return Layer(operator, "it", **known)


FLOAT = Value("FLOAT", (1, 8, 4, 4))


@pytest.mark.parametrize(
    ("breaks", "fits", "target", "part"),
    [
        (
            layer("Resize", attributes={"mode": "cubic"}),
            layer("Resize", attributes={"mode": "linear", "coordinate_transformation_mode": "align_corners"}),
            "tensorrt",
            "resize mode",
        ),
        (
            layer("QuantizeLinear", inputs=[FLOAT, Value(), Value("UINT8", (), np.array(0))]),
            layer("QuantizeLinear", inputs=[FLOAT, Value(), Value("INT8", (), np.array(0))]),
            "tensorrt",
            "asymmetric",
        ),
        (
            layer("QuantizeLinear", inputs=[FLOAT, Value(), Value("INT8", (), np.array(3))]),
            layer("QuantizeLinear", inputs=[FLOAT, Value(), Value("INT8", (), np.array(0))]),
            "tensorrt",
            "asymmetric",
        ),
        (
            layer("Reshape", outputs=[Value("FLOAT", (1, 2, 3, 4, 5))]),
            layer("Reshape", outputs=[FLOAT]),
            "coreml",
            "four axes",
        ),
        (
            layer("Conv", inputs=[FLOAT, Value("FLOAT", (12, 24, 3, 3))]),
            layer("Conv", inputs=[FLOAT, Value("FLOAT", (12, 1, 3, 3))], attributes={"group": 12}),
            "tensorrt",
            "multiple of 8",
        ),
        (
            layer("Conv", inputs=[FLOAT, Value("FLOAT", (24, 24, 3, 3))], quantised=True),
            layer("Conv", inputs=[FLOAT, Value("FLOAT", (32, 3, 3, 3))], quantised=True),
            "tensorrt",
            "multiple of 16",
        ),
        (layer("LayerNormalization"), layer("BatchNormalization"), "coreml", "last axis"),
        (layer("Softmax"), layer("Relu"), "hexagon", "8 bits"),
        (layer("Det"), layer("Relu"), "hexagon", "does not list"),
    ],
)
def test_a_rule_tells_one_layer_from_another(breaks: Layer, fits: Layer, target: str, part: str) -> None:
    (rule,) = [rule for rule in RULES if rule.target == target and part in rule.what]
    assert rule.breaks(breaks)
    assert not rule.breaks(fits)


def test_every_target_has_rules_and_every_rule_a_source() -> None:
    assert {rule.target for rule in RULES} == {*TARGETS}
    assert all(rule.source.startswith("https://") for rule in RULES)


def test_the_table_names_the_first_layers(unet: list[Finding]) -> None:
    lines = findings_table(unet).splitlines()
    assert len(lines) == 2 + len(unet)
    (line,) = [line for line in lines if "floating-point product" in line]
    assert "stem.0.0, stem.1.0, encoder.0.0.0 and 6 more" in line
    assert findings_table([]) == "no known obstacle"


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="export.check_for: 'tpu' is none; give some of coreml"):
        check(tmp_path / "a.onnx", ["tpu"])
    with pytest.raises(ConfigurationError, match=r"a\.onnx: no such file"):
        check(tmp_path / "a.onnx")
    (tmp_path / "a.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(DamagedFileError, match=r"a\.onnx: not an ONNX model \("):
        check(tmp_path / "a.onnx")
