"""Images without labels in the objective, of which the teacher alone speaks, and in runs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from catalogue.cases import (
    CASES,
    CLASSES,
    CONFIGS,
    STUDENT_TAPS,
    TEACHER_TAPS,
    VOID,
    WEIGHTS,
    Answer,
    answers,
    changed,
    gradients,
    leaves,
    names,
    objective,
    stepped,
)
from forks import Forks
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from data import DataConfig, build_dataset
from data.labels import UNLABELLED
from data.streets.write import write_bdd100k
from engine.loop import train_step
from engine.player import Learner, Player, TrainConfig
from engine.run import start_accelerator
from engine.teachers import LiveTeacher, TeacherConfig
from errors import ConfigurationError
from losses import DistillationLoss, LossConfig
from losses.distillation import told_apart
from losses.logits import KDConfig
from models.unet import UNet

WEIGHTED = [name for name, case in CASES.items() if "class_weights" in case.options and case.name != "bpkd"]
TAUGHT = [name for name, case in CASES.items() if not case.supervised and name not in WEIGHTED]
SUPERVISED = [name for name, case in CASES.items() if case.supervised]


def mixed(variant: str, **changed: Any) -> DistillationLoss:
    """The objective of one case for images without labels."""
    case = CASES[variant]
    config = LossConfig(**({"cross_entropy": None} | {case.name: CONFIGS[case.name](weight=1.0, **case.options)}))
    torch.manual_seed(0)
    made = DistillationLoss(
        config,
        STUDENT_TAPS,
        TEACHER_TAPS,
        classes=CLASSES,
        class_weights=lambda scheme: WEIGHTS,
        total_steps=10,
        unlabelled=True,
    )
    return stepped(made)


def partly(labels: Tensor, images: list[int]) -> Tensor:
    """The labels with some images' unlabelled but for their padding, which is the void."""
    labels = labels.clone()
    labels[images] = torch.where(labels[images] == VOID, VOID, UNLABELLED)
    return labels


def same_images(term: DistillationLoss, labels: Tensor) -> DistillationLoss:
    """`stepped` makes the images of the labels, which are others here."""
    images = torch.stack([(labels + i).float().sin() for i in range(3)], 1)
    term.register_forward_pre_hook(lambda _, a, k: (a, k | {"images": images[: len(a[2])]}), with_kwargs=True)
    return term


def test_cross_entropy_of_labelled_pixels_and_kd_of_all() -> None:
    """The gradient of {labelled, unlabelled} is that of the sum made by hand, at strides 4 and 2."""
    torch.manual_seed(0)
    student = Answer(torch.randn(2, CLASSES, 4, 6, dtype=torch.float64, requires_grad=True))
    teacher = Answer(torch.randn(2, CLASSES, 8, 12, dtype=torch.float64))
    labels = torch.randint(0, CLASSES, (2, 16, 24))
    labels[0, :3] = VOID
    labels[1] = UNLABELLED
    labels[1, :, 20:] = VOID  # padding of a crop
    config = LossConfig(kd=KDConfig(weight=0.7, temperature=2.0))
    assert config.cross_entropy is not None
    config.cross_entropy.class_weights, config.cross_entropy.label_smoothing = "median", 0.1
    made = DistillationLoss(config, {}, {}, class_weights=lambda scheme: WEIGHTS, unlabelled=True)
    loss, values = made(student, teacher, labels)

    ours, theirs = (F.interpolate(one.logits, (16, 24), mode="bilinear") for one in (student, teacher))
    supervised = torch.where(labels == UNLABELLED, VOID, labels)
    ce = F.cross_entropy(ours, supervised, WEIGHTS.double(), ignore_index=VOID, label_smoothing=0.1)
    kl = F.kl_div((ours / 2).log_softmax(1), (theirs / 2).log_softmax(1), reduction="none", log_target=True)
    kd = 4 * kl.sum(1)[labels != VOID].mean()
    torch.testing.assert_close(loss, ce + 0.7 * kd)
    torch.testing.assert_close(values, {"cross_entropy": ce.detach(), "kd": kd.detach()})
    expected, found = (torch.autograd.grad(one, student.logits)[0] for one in (ce + 0.7 * kd, loss))
    torch.testing.assert_close(found, expected)
    assert made.counts(labels).tolist() == [float(WEIGHTS[labels[0, 3:]].sum()), 13 * 24 + 16 * 20]


def test_without_unlabelled_images_nothing_changes() -> None:
    student, teacher, labels = answers()
    config = LossConfig(kd=KDConfig(temperature=2.0))
    plain, other = (
        DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS, classes=CLASSES, unlabelled=unlabelled)
        for unlabelled in (False, True)
    )
    assert torch.equal(plain.counts(labels), other.counts(labels))
    for one, two in zip(
        gradients(plain(student, teacher, labels)[0], student),
        gradients(other(student, teacher, labels)[0], student),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_pseudo_labels_are_the_teachers_own_at_the_nearest_position() -> None:
    teacher = Answer(torch.randn(1, CLASSES, 2, 3, dtype=torch.float64))
    labels = torch.full((1, 4, 7), UNLABELLED)
    labels[0, 0, 0], labels[0, 3, 6] = 2, VOID
    own, taught = told_apart(labels, teacher)
    best = teacher.logits[0].argmax(0)
    # seven columns over three: centres 0.5/7 … 6.5/7 lie in the thirds 0, 0, 1, 1, 1, 2, 2
    expected = best[[0, 0, 1, 1]][:, [0, 0, 1, 1, 1, 2, 2]]
    expected[0, 0], expected[3, 6] = 2, VOID
    assert torch.equal(taught[0], expected)
    assert own.unique().tolist() == [2, VOID]
    assert int((own == 2).sum()) == 1


@pytest.mark.parametrize("variant", TAUGHT)
def test_taught_terms_are_those_of_the_teachers_classes(variant: str) -> None:
    student, teacher, labels = answers(4)
    labels = partly(labels, [1, 3])
    pseudo = torch.where(labels == UNLABELLED, teacher.logits.argmax(1), labels)
    term, plain = (same_images(one.double().eval(), pseudo) for one in (mixed(variant), objective(variant)))
    assert torch.equal(term.counts(labels), plain.counts(pseudo))
    (found, values), (expected, _) = term(student, teacher, labels), plain(student, teacher, pseudo)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert list(values) == [CASES[variant].name]
    for one, two in zip(gradients(found, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("variant", SUPERVISED)
def test_supervised_terms_are_those_of_the_labelled_images(variant: str) -> None:
    """Means over images too: an image without labels is none of those that are averaged over."""
    student, teacher, labels = answers(4)
    term, plain = (one.double().eval() for one in (mixed(variant), objective(variant)))
    half = [changed(answer, lambda x: x[[0, 2]]) for answer in (student, teacher)]
    found, _ = term(student, teacher, partly(labels, [1, 3]))
    expected, _ = plain(half[0], half[1], labels[[0, 2]])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for one, two in zip(gradients(found, student), gradients(expected, half[0]), strict=True):
        torch.testing.assert_close(one[[0, 2]], two, rtol=1e-10, atol=1e-14)
        assert not one[[1, 3]].any()
    assert float(term(student, teacher, partly(labels, [0, 1, 2, 3]))[0].detach()) == 0


@pytest.mark.parametrize("images", [[1], [0, 1]], ids=["half", "all"])
@pytest.mark.parametrize("variant", TAUGHT + SUPERVISED)
def test_finite(variant: str, images: list[int]) -> None:
    """In training, in float32, with all images unlabelled or half of them; what is taught has a gradient."""
    term = mixed(variant).train()
    student, teacher, labels = answers(2, dtype=torch.float32)
    loss, _ = term(student, teacher, partly(labels, images))
    found = gradients(loss, student)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in found)
    if variant in TAUGHT:
        assert any(bool(gradient[images].any()) for gradient in found)


@pytest.mark.parametrize("variant", [name for name in TAUGHT + SUPERVISED if name in names("parts")])
def test_parts_of_a_batch_add_up_to_the_batch(variant: str) -> None:
    term = mixed(variant).double().eval()
    student, teacher, labels = answers(4)
    labels = partly(labels, [0, 2])
    labels[1, 2:] = VOID
    whole = term(student, teacher, labels)[0]
    expected = gradients(whole, student)
    parts = [slice(0, 1), slice(1, 2), slice(2, 4)]
    denominators = torch.stack([term.counts(labels[part]) for part in parts]).sum(0)
    assert torch.equal(denominators, term.counts(labels))
    found = [torch.zeros_like(leaf) for leaf in leaves(student)]
    loss = 0.0
    for part in parts:
        ours, theirs = (changed(answer, lambda x, part=part: x[part]) for answer in (student, teacher))
        piece, _ = term(ours, theirs, labels[part], denominators=denominators)
        loss += float(piece.detach())
        for total, gradient in zip(found, gradients(piece, ours), strict=True):
            total[part] += gradient
    assert loss == pytest.approx(float(whole.detach()), rel=1e-12)
    for gradient, total in zip(expected, found, strict=True):
        torch.testing.assert_close(total, gradient, rtol=1e-10, atol=1e-14)


def test_a_step_without_labels_has_no_supervised_value() -> None:
    """0 would be averaged into what is logged."""
    config = TrainConfig(batch_size=2, threads=1)
    accelerator = start_accelerator(config)
    torch.manual_seed(0)
    model, teacher = UNet(list("abcd"), 4, 1, 2), UNet(list("abcd"), 4, 1, 2)
    torch.nn.init.normal_(teacher.classifier.weight)
    objective = DistillationLoss(LossConfig(kd=KDConfig()), model.taps, teacher.taps, unlabelled=True)
    live = LiveTeacher([teacher], accelerator.device, accelerator.autocast, TeacherConfig())
    player = Player(Learner(model, objective, live), config, accelerator)
    run: Any = SimpleNamespace(accelerator=accelerator, seed=0, terminated=False)
    for label, expected in ((UNLABELLED, {"kd"}), (1, {"cross_entropy", "kd"})):
        part = SimpleNamespace(images=torch.randn(2, 3, 16, 24), labels=torch.full((2, 16, 24), label))
        told, _ = train_step(run, player, [part], 0, 10)
        assert {"cross_entropy", "kd"} & told.keys() == expected
        assert told["loss"] > 0


@pytest.mark.parametrize("variant", WEIGHTED)
def test_class_weights_of_taught_pixels_are_refused(variant: str) -> None:
    case = CASES[variant]
    if case.supervised:
        mixed(variant)
        return
    with pytest.raises(ConfigurationError, match=rf"losses\.{case.name}\.class_weights: unlabelled pixels are"):
        mixed(variant)


# runs

TINY = ["data.size=[32,64]", "data.scenes=8", "train.batch_size=4", "train.lr=0.01"]
TEACHER = [*TINY, "model.width=4", "model.depth=2", "train.steps=6"]
STUDENT = [*TINY, "student.width=4", "student.depth=2", "losses.fitnet.weight=1", "losses.dice.weight=0.5"]


@pytest.fixture(scope="module")
def teacher(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    completed(forks.script("train_teacher.py", f"run_dir={run}", *TEACHER))
    return run


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Eight scenes as BDD100K and eight pictures without labels, of which there are as many as of all others."""
    root = tmp_path_factory.mktemp("mix")
    write_bdd100k(root / "bdd100k", scenes={"train": 8}, size=(32, 64), seed=7)
    (root / "images").mkdir()
    for i in range(8):
        small = np.random.default_rng(i).integers(0, 256, (4, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((64, 32)).save(root / "images" / f"{i}.png")
    return (
        f"data.mix=[{{name: bdd100k, root: {root}/bdd100k}}, {{root: {root}/images, unlabelled: true, weight: 2}}]"
    )


def completed(outcome: Any, code: int = 0) -> str:
    assert outcome.code == code, outcome.text[-3000:]
    return outcome.text


def logged(run: Path) -> list[dict[str, Any]]:
    """The events without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "system"} for line in lines]


def test_a_run_sees_each_source_by_its_weight_and_resumes_bit_for_bit(
    forks: Forks, teacher: Path, mix: str, tmp_path: Path
) -> None:
    """Three epochs of six steps, of which a quarter, a quarter and a half of the images come from each source."""
    settings = [*STUDENT, mix, "data.augment=false", "train.steps=18", "train.log_every=6"]
    settings += ["train.checkpoint_every=5", "train.ema=0.9"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    completed(forks.script("distill.py", str(teacher), f"run_dir={whole}", *settings))
    completed(forks.script("distill.py", str(teacher), f"run_dir={cut}", *settings, kill_in_step=13), -9)
    text = completed(forks.script("distill.py", str(cut / "config.yaml"), "resume=true"))
    assert "goes on at step 10" in text
    assert logged(cut) == logged(whole)
    weights = [(run / "best" / "model.safetensors").read_bytes() for run in (cut, whole)]
    assert weights[0] == weights[1]

    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), saved(whole)["data"]))
    assert isinstance(config, DataConfig)
    data = build_dataset(config, "train")
    events = [event for event in logged(whole) if event["split"] == "train"]
    assert len(events) == 3
    for epoch, event in enumerate(events):
        counts = data.label_counts()[data.order(24, seed=0, epoch=epoch)[:, 0]]
        shares = counts.sum(0) / counts.sum()
        found = [event[f"pixels.{name}"] for name in data.labels.names]
        np.testing.assert_allclose(found, shares[:-1], rtol=1e-9)
        assert 0.45 < sum(found) <= 0.5  # the half without labels is left over, and what the others' labels lack
        assert {"cross_entropy", "kd", "fitnet", "dice"} <= event.keys()


def saved(run: Path) -> Any:
    return OmegaConf.load(run / "config.yaml")


@pytest.mark.parametrize(
    "how",
    [
        ["teacher.source=average", "train.ema=0.9", "losses.fitnet=null", "data.sampling=rare_class"],
        ["mode=online", "online.models=[{width: 4, depth: 2}, {width: 4, depth: 2}]", "losses.fitnet=null"],
        ["teacher.source=cache", "teacher.cache.shard=5"],
        ["data.crop=[24,40]", "data.rare_crop=0.1", "data.copy_paste=0.5", "data.finish_on_device=true"],
    ],
    ids=["average", "online", "cache", "crops"],
)
def test_other_teachers_and_samplings(
    forks: Forks, teacher: Path, mix: str, tmp_path: Path, how: list[str]
) -> None:
    """The cache counts right answers at labelled positions alone."""
    run = tmp_path / "run"
    own = "source=average" in how[0] or "online" in how[0]
    named = [] if own else [str(teacher)]
    settings = [*STUDENT, mix, "train.steps=3", f"teacher.cache.folder={tmp_path / 'cache'}", "train.log_every=1"]
    if own:
        settings.remove(f"teacher.cache.folder={tmp_path / 'cache'}")
    completed(forks.script("distill.py", *named, f"run_dir={run}", *settings, *how))
    events = [event for event in logged(run) if event["split"] == "train"]
    assert len(events) == 3
    assert all(np.isfinite(event["kd"]) and np.isfinite(event["gradient_norm"]) for event in events)
    if "cache" in how[0]:
        figures = np.concatenate([np.load(file) for file in sorted((tmp_path / "cache").glob("*/figures.npy"))])
        assert len(figures) == 24
        assert (figures[:16, 1] > 0).all()
        assert not figures[16:, 1:].any()  # neither labelled nor right


def test_who_needs_labels_or_a_teacher_says_so(forks: Forks, teacher: Path, mix: str, tmp_path: Path) -> None:
    run = f"run_dir={tmp_path / 'run'}"
    text = completed(forks.script("train_teacher.py", run, *TEACHER, mix), 2)
    assert "error: data.mix: unlabelled images need a teacher; use distill.py" in text
    text = completed(forks.script("distill.py", str(teacher), run, *TINY, mix, "losses.kd=null"), 2)
    assert "error: losses: with unlabelled images in data.mix, and none compares with a teacher" in text
    text = completed(forks.script("distill.py", str(teacher), run, *TINY, mix, "losses.kd.class_weights=enet"), 2)
    assert "error: losses.kd.class_weights: unlabelled pixels are counted before the teacher tells" in text


def test_evaluation_of_the_training_images(forks: Forks, teacher: Path, mix: str, tmp_path: Path) -> None:
    """Unlabelled ones count neither as right nor as wrong."""
    run = tmp_path / "run"
    completed(forks.script("distill.py", str(teacher), f"run_dir={run}", *STUDENT, mix, "train.steps=2"))
    completed(forks.script("evaluate.py", str(run), "split=train", "pictures=6"))
    found = json.loads((run / "evaluation_train.json").read_text())
    assert found["images"] == 24
    assert 0 < found["pixel_accuracy"] < 1
    assert len(list((run / "images").glob("train_unlabelled--*.png"))) == 2
