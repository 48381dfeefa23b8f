"""A teacher of another class list answers in ours."""

import math

import pytest
import torch

from data.labels import CAMVID, CITYSCAPES
from errors import ConfigurationError
from models import ModelConfig, Output, build_model, map_classes
from models.classes import match_classes

# Some of ADE20K's 150 as transformers' checkpoints have them, in both of their spellings.
ADE = ["wall", "building", "sky", "floor", "tree", "road, route", "sidewalk, pavement", "person", "earth", "car"]
ADE += ["fence", "signboard", "pole", "bus", "truck", "van", "minibike, motorbike", "bicycle", "traffic light"]
ADE += ["streetlight", "grass", "plant"]


class Names:
    """Class names as a data set has them."""

    def __init__(self, *names: str) -> None:
        self.names = names


def words(theirs: list[str], groups: list[list[int]], ours: tuple[str, ...]) -> dict[str, list[str]]:
    return {our: [theirs[i] for i in group] for our, group in zip(ours, groups, strict=True)}


def test_the_same_names_in_another_order() -> None:
    names = list(CITYSCAPES.names)
    assert match_classes(names, names) == [[i] for i in range(19)]
    assert match_classes(names[::-1], names) == [[18 - i] for i in range(19)]
    assert match_classes([name.title().replace(" ", "_") for name in names], names) == [[i] for i in range(19)]


def test_cityscapes_teacher_on_camvid() -> None:
    theirs = list(CITYSCAPES.names)
    found = words(theirs, match_classes(theirs, CAMVID.names), CAMVID.names)
    assert found == {
        "sky": ["sky"],
        "building": ["building", "wall"],
        "pole": ["pole"],
        "road": ["road"],
        "pavement": ["sidewalk"],
        "tree": ["vegetation"],
        "signsymbol": ["traffic light", "traffic sign"],
        "fence": ["fence"],
        "car": ["car", "truck", "bus"],
        "pedestrian": ["person"],
        "bicyclist": ["rider", "bicycle"],
    }


def test_ade20k_teacher_on_cityscapes() -> None:
    found = words(ADE, match_classes(ADE, CITYSCAPES.names, absent=["rider", "train"]), CITYSCAPES.names)
    assert found["sidewalk"] == ["sidewalk, pavement"]
    assert found["vegetation"] == ["tree", "plant"]
    assert found["terrain"] == ["earth", "grass"]
    assert found["car"] == ["car", "van"]  # bus and truck are classes of ours
    assert found["building"] == ["building"]  # and so is wall
    assert found["motorcycle"] == ["minibike, motorbike"]
    assert found["pole"] == ["pole", "streetlight"]
    assert found["rider"] == found["train"] == []


def test_what_is_given_comes_first() -> None:
    found = match_classes(["a", "b", "sky, heaven"], ["sky", "x"], {"x": "b + a", "sky": "heaven"})
    assert found == [[2], [1, 0]]


@pytest.mark.parametrize(
    ("theirs", "ours", "options", "said"),
    [
        (["sky"], ["sky", "mud", "fog"], {}, "teacher.classes: the teacher has none like mud, fog; say which"),
        (
            ["sky"],
            ["sky"],
            {"given": {"mud": "sky"}},
            "teacher.classes: 'mud' is no class of the data set; it has sky",
        ),
        (["sky"], ["sky"], {"absent": ["mud"]}, "teacher.absent: 'mud' is no class of the data set; it has sky"),
        (["sky"], ["sky"], {"given": {"sky": "air"}}, "teacher.classes: the teacher has no 'air'; it has sky"),
        (
            ["sky", "car"],
            ["sky", "fog"],
            {"given": {"fog": "sky"}},
            "teacher.classes: sky and fog both take the teacher's sky; give it to one",
        ),
    ],
)
def test_classes_that_do_not_fit(theirs: list[str], ours: list[str], options: dict, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        match_classes(theirs, ours, **options)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_spelling_does_not_matter() -> None:
    assert match_classes(["signboard", "Pedestrian"], ["Traffic_Sign", "PERSON"]) == [[0], [1]]


def test_a_class_named_twice_counts_once() -> None:
    assert match_classes(["a", "b"], ["x", "b"], {"x": "a + a"}) == [[0], [1]]


def test_one_class_at_least_is_known() -> None:
    with pytest.raises(ConfigurationError, match="teacher.absent: names all classes"):
        match_classes(["a"], ["x", "y"], absent=["x", "y"])


def test_probabilities_of_partners_add_up() -> None:
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(width=4, depth=2), Names("vegetation", "rider", "bicycle", "train", "sky")
    ).eval()
    torch.nn.init.normal_(model.classifier.weight)
    mapped = map_classes(model, ["sky", "bicyclist", "pole", "tree"], {}, ["pole"])
    images = torch.randn(2, 3, 33, 47)
    answer = mapped(images, taps=["bottleneck"])
    assert isinstance(answer, Output)
    assert set(answer.features) == {"bottleneck"}
    theirs, ours = model(images).logits.softmax(1), answer.logits.softmax(1)
    kept = 1 - theirs[:, 3]
    wanted = torch.stack([theirs[:, 4], theirs[:, 1] + theirs[:, 2], 1e-6 * kept, theirs[:, 0]], 1) / kept[:, None]
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    assert mapped.taps == model.taps
    assert mapped.stride == model.stride
    assert mapped.notes() == ["bicyclist is rider + bicycle", "pole is unknown to it", "tree is vegetation"]


def test_the_class_without_a_partner_stays_finite_in_half_precision() -> None:
    model = build_model(ModelConfig(width=4, depth=2), Names("sky", "car")).eval().bfloat16()
    logits = map_classes(model, ["sky", "car", "mud"], {}, ["mud"])(torch.randn(1, 3, 32, 32).bfloat16()).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    gap = logits[:, :2].float().logsumexp(1) - logits[:, 2].float()
    assert gap.mean().item() == pytest.approx(math.log(1e6), rel=0.02)


def test_equal_classes_stay_the_model_itself() -> None:
    model = build_model(ModelConfig(width=4, depth=2), Names("sky", "car"))
    assert map_classes(model, ["sky", "car"], {}, []) is model
    assert map_classes(model, ["car", "sky"], {}, []) is not model


def test_images_of_another_normalisation_reach_the_model() -> None:
    model = build_model(ModelConfig(width=4, depth=2), Names("sky", "car")).eval()
    images = torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
    expected = model((images - mean) / std).logits
    mapped = map_classes(model, ["car", "sky"], {}, [])
    mapped.take_images((0.5, 0.5, 0.5), (0.5, 0.25, 0.5))
    given = (images - 0.5) / torch.tensor([0.5, 0.25, 0.5]).view(3, 1, 1)
    torch.testing.assert_close(mapped(given).logits, expected.flip(1), rtol=1e-4, atol=1e-6)
