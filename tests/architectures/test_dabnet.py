"""DABNet: the authors' parameters, the authors' logits, and images of any size."""

import pytest
import torch
from torch import Tensor

from deploy.profiling import count_parameters
from errors import ConfigurationError
from models.dabnet import DABModule, DABNet, DownSampling
from models.interface import Tap

CITYSCAPES, CAMVID = ([f"class {i}" for i in range(number)] for number in (19, 11))


def filled(model: DABNet) -> DABNet:
    """The model with weights that are no random numbers, set in the order in which the authors' code has them."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * 1.7 + value.numel()).view_as(value)
            if value.dim() == 4:
                value.copy_(wave * (3 / value[0].numel()) ** 0.5)
            else:
                value.copy_(0.2 * wave + (0 if name.endswith(("bias", "running_mean")) else 1))
    return model.double().eval()


def picture(height: int, width: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    colours = [torch.sin(rows / 7.0 + i) * torch.cos(columns / (5.0 + i)) for i in range(3)]
    return torch.stack(colours)[None].double()


def test_as_many_parameters_as_the_authors() -> None:
    """0.76 million in the paper; the numbers are those of the authors' code for 19 and for 11 classes."""
    assert count_parameters(DABNet(CITYSCAPES)) == 756_643
    assert count_parameters(DABNet(CAMVID)) == 754_571


def test_logits_of_the_authors_code() -> None:
    """Computed by the authors' code from the same weights and picture, before it upsamples."""
    with torch.no_grad():
        logits = filled(DABNet(CAMVID))(picture(64, 96)).logits[0]
    expected = [
        [
            -1.017125,
            0.556889,
            2.006566,
            3.008229,
            3.338233,
            2.922899,
            1.854958,
            0.372854,
            -1.192499,
            -2.491598,
            -3.234388,
        ],
        [
            -0.404623,
            -0.014331,
            0.379161,
            0.687997,
            0.84322,
            0.810175,
            0.596239,
            0.249179,
            -0.153517,
            -0.521936,
            -0.773821,
        ],
        [
            -1.527591,
            0.304329,
            2.068301,
            3.370476,
            3.920112,
            3.594491,
            2.466314,
            0.787475,
            -1.067187,
            -2.683574,
            -3.70079,
        ],
    ]
    assert logits.shape == (11, 8, 12)
    found = torch.stack([logits[:, 0, 0], logits[:, 3, 5], logits[:, 7, 11]])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)


def test_taps() -> None:
    assert DABNet(CAMVID).taps == {
        "encoder.0": Tap(32, 2),
        "encoder.1": Tap(64, 4),
        "bottleneck": Tap(128, 8),
        "decoder.0": Tap(259, 8),
    }


def test_last_tap_is_what_the_classifier_sees() -> None:
    model = DABNet(CAMVID, [1, 1]).eval()
    output = model(torch.randn(1, 3, 40, 56), taps=["decoder.0"])
    torch.testing.assert_close(model.classifier(output.features["decoder.0"]), output.logits)


@pytest.mark.parametrize("size", [(33, 47), (7, 9), (2, 17)])
def test_odd_sizes_are_padded_on_the_right_and_below(size: tuple[int, int]) -> None:
    model, images = DABNet(CAMVID, [1, 1]).eval(), torch.randn(1, 3, *size)
    padded = torch.nn.functional.pad(images, (0, -size[1] % 8, 0, -size[0] % 8))
    found, expected = model(images).logits, model(padded).logits
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


def test_the_second_blocks_dilations() -> None:
    def dilations(number: int) -> list[int]:
        modules = DABNet(CAMVID, [1, number]).block2
        return [m.context[0][0].dilation[0] for m in modules if isinstance(m, DABModule)]

    assert dilations(6) == [4, 4, 8, 8, 16, 16]
    assert dilations(3) == [4, 8, 16]
    assert dilations(1) == [4]
    assert dilations(7) == [4, 4, 4, 8, 8, 16, 16]


def test_channels_are_kept_where_none_are_added() -> None:
    assert DownSampling(8, 8)(torch.randn(2, 8, 6, 10)).shape == (2, 8, 3, 5)


@pytest.mark.parametrize("blocks", [[3], [3, 6, 1], [0, 6], [3, -1]])
def test_blocks_that_are_none(blocks: list[int]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        DABNet(CAMVID, blocks)
    assert str(caught.value) == (
        f"model.blocks: {blocks} are not the modules of DABNet's two blocks; give two numbers"
    )
