"""The default pairing of taps of any two models, by stride and depth."""

from typing import NamedTuple

import pytest

from errors import ConfigurationError
from losses import DistillationLoss, LossConfig
from losses.contrast import CIRKDMemoryConfig
from losses.features import AttentionTransferConfig, FitnetConfig, ReviewConfig
from losses.latent import AffinityConfig, KTAConfig
from losses.term import auto_taps, deepest_first


class Shape(NamedTuple):
    """A tap as the losses see it."""

    channels: int
    stride: int


def shapes(**strides: list[int]) -> dict[str, Shape]:
    """Taps by their strides, numbered but for the bottleneck."""
    return {
        (part if part == "bottleneck" else f"{part}.{i}"): Shape(8, stride)
        for part, found in strides.items()
        for i, stride in enumerate(found)
    }


UNET = shapes(encoder=[4, 8, 16], bottleneck=[32], decoder=[16, 8, 4])
DEEP = shapes(encoder=[2, 4, 8, 16], bottleneck=[32], decoder=[16, 8, 4, 2])
SHALLOW = shapes(encoder=[4, 8], bottleneck=[16], decoder=[8, 4])
COARSE = shapes(encoder=[4, 8, 16], bottleneck=[32], decoder=[16])
HEADLESS = shapes(encoder=[4, 8, 16], bottleneck=[32])
SEGFORMER = shapes(encoder=[4, 8, 16, 32], bottleneck=[32], decoder=[4])
DEEPLAB = shapes(encoder=[4, 8, 16, 16], bottleneck=[16], decoder=[4])


@pytest.mark.parametrize(
    ("part", "student", "teacher", "pairs"),
    [
        ("encoder", UNET, UNET, "0:0 1:1 2:2"),
        ("encoder", UNET, SEGFORMER, "0:0 1:1 2:2"),
        ("encoder", UNET, DEEP, "0:1 1:2 2:3"),
        ("encoder", DEEP, UNET, "1:0 2:1 3:2"),
        ("encoder", DEEPLAB, UNET, "0:0 1:1 3:2"),  # of two maps of one stride, that nearer in relative depth
        ("encoder", UNET, DEEPLAB, "0:0 1:1 2:3"),
        ("decoder", UNET, UNET, "0:0 1:1 2:2"),
        ("decoder", UNET, SEGFORMER, "2:0"),
        ("decoder", UNET, DEEP, "0:0 1:1 2:2"),
        ("decoder", COARSE, UNET, "0:0"),
        ("decoder", SHALLOW, UNET, "0:1 1:2"),
    ],
)
def test_encoder_and_decoder(part: str, student: dict, teacher: dict, pairs: str) -> None:
    expected = [tuple(f"{part}.{i}" for i in pair.split(":")) for pair in pairs.split()]
    assert auto_taps("fitnet", part, student, teacher) == expected


def test_a_teacher_is_rather_finer() -> None:
    student, teacher = shapes(decoder=[8]), shapes(decoder=[16, 4])
    assert auto_taps("kta", "decoder", student, teacher) == [("decoder.0", "decoder.1")]


@pytest.mark.parametrize(
    ("student", "teacher", "tap"),
    [(UNET, SEGFORMER, "bottleneck"), (UNET, DEEPLAB, "bottleneck"), (SHALLOW, SEGFORMER, "encoder.2")],
)
def test_the_latents_bottleneck_is_not_coarser_than_the_students(student: dict, teacher: dict, tap: str) -> None:
    assert auto_taps("fitnet", "bottleneck", student, teacher) == [("bottleneck", "bottleneck")]
    assert auto_taps("kta", "bottleneck", student, teacher, True) == [("bottleneck", tap)]
    objective = DistillationLoss(LossConfig(kta=KTAConfig(), affinity=AffinityConfig()), student, teacher)
    assert objective.teacher_taps == [tap]


@pytest.mark.parametrize(
    ("student", "teacher", "pair"),
    [
        (UNET, DEEPLAB, ("decoder.2", "decoder.0")),
        (HEADLESS, UNET, ("bottleneck", "decoder.2")),
        (UNET, HEADLESS, ("decoder.2", "bottleneck")),
    ],
)
def test_last_is_what_the_classifiers_see(student: dict, teacher: dict, pair: tuple[str, str]) -> None:
    assert auto_taps("ifvd", "last", student, teacher) == [pair]


def test_without_a_decoder_the_bottleneck_stands_for_it() -> None:
    assert auto_taps("fitnet", "decoder", HEADLESS, UNET) == [("bottleneck", "decoder.0")]


def test_what_a_model_lacks_is_said() -> None:
    with pytest.raises(ConfigurationError) as caught:
        auto_taps("fitnet", "encoder", UNET, shapes(bottleneck=[16], decoder=[4]))
    said = "losses.fitnet.taps: the teacher has no tap in its encoder; name some of bottleneck, decoder.0"
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("model", "order"),
    [
        (UNET, "bottleneck encoder.2 decoder.0 encoder.1 decoder.1 encoder.0 decoder.2"),
        (SEGFORMER, "bottleneck encoder.3 encoder.2 encoder.1 decoder.0 encoder.0"),
        (DEEPLAB, "bottleneck encoder.3 encoder.2 encoder.1 decoder.0 encoder.0"),
        (HEADLESS, "bottleneck encoder.2 encoder.1 encoder.0"),
        (shapes(encoder=[4, 8], decoder=[8, 4]), "decoder.0 encoder.1 decoder.1 encoder.0"),
    ],
)
def test_the_order_of_depth(model: dict, order: str) -> None:
    assert deepest_first([*sorted(model), "logits"], model) == [*order.split(), "logits"]


@pytest.mark.parametrize("teacher", [UNET, SEGFORMER, DEEPLAB, HEADLESS])
@pytest.mark.parametrize("student", [UNET, SHALLOW, COARSE, HEADLESS])
def test_defaults_fit_any_two_models_and_the_pairs_are_printed(student: dict, teacher: dict) -> None:
    config = LossConfig(
        attention_transfer=AttentionTransferConfig(),
        fitnet=FitnetConfig(),
        review=ReviewConfig(),
        cirkd_memory=CIRKDMemoryConfig(),
    )
    objective = DistillationLoss(config, student, teacher, classes=3)
    assert set(objective.student_taps) <= student.keys()
    assert set(objective.teacher_taps) <= teacher.keys()
    (line,) = (line for line in objective.describe() if line.startswith("cirkd_memory"))
    ((ours, theirs),) = auto_taps("cirkd_memory", "last", student, teacher)
    assert (ours if ours == theirs else f"{ours} to {theirs}") in line


def test_words_and_taps_add_up_without_repeating() -> None:
    config = LossConfig(fitnet=FitnetConfig(taps=["decoder", "last", "bottleneck:encoder.2"]))
    (term,) = [term for name, term in DistillationLoss(config, UNET, UNET).terms.items() if name == "fitnet"]
    assert [ours for ours, _ in term.pairs] == ["decoder.0", "decoder.1", "decoder.2", "bottleneck"]


def test_a_memory_takes_one_pair() -> None:
    with pytest.raises(ConfigurationError, match="taps: encoder is 3 taps; name one, say last"):
        DistillationLoss(LossConfig(cirkd_memory=CIRKDMemoryConfig(taps=["encoder"])), UNET, UNET, classes=3)
