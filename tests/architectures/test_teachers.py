"""A folder of transformers as the teacher: by its path alone, in its own normalisation and class names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from folders import IMAGENET, SEGFORMER, write_folder, write_processor
from forks import Forks, Outcome

from data import DataConfig, build_dataset
from data.labels import CITYSCAPES
from models import load_model

TINY = ["data.size=[32,64]", "data.scenes=8", "train.batch_size=4", "train.steps=2", "student.width=4"]
MEAN, STD = [0.2, 0.7, 0.5], [0.6, 0.1, 0.3]
OTHER_WORDS = {"sidewalk": "pavement", "person": "pedestrian", "traffic sign": "signboard", "vegetation": "Tree"}


@pytest.fixture(scope="module")
def trained(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SegFormer that has learnt a little of the streets, as transformers would have saved it.

    It was trained on images normalised by MEAN and STD, and its classes have other words in another order.
    """
    base = tmp_path_factory.mktemp("trained")
    names = list(CITYSCAPES.names)
    shape = write_folder(base / "shape", SEGFORMER | {"hidden_sizes": [16, 24, 32, 48]}, names, (MEAN, STD))
    settings = ["model.name=hub", f"model.weights={shape}", "model.pretrained=false", "data.size=[32,64]"]
    settings += ["data.scenes=64", "data.scale=[1,1]", "train.batch_size=8", "train.lr=1e-2", "train.steps=100"]
    outcome = forks.script("train_teacher.py", f"run_dir={base / 'run'}", *settings)
    assert outcome.code == 0, outcome.text[-2000:]
    network = load_model(base / "run" / "best").net
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    network.decode_head.classifier.weight.data = network.decode_head.classifier.weight.data[order]
    network.decode_head.classifier.bias.data = network.decode_head.classifier.bias.data[order]
    words = [OTHER_WORDS.get(names[i], names[i]) for i in order]
    network.config.id2label = dict(enumerate(words))
    network.config.label2id = {word: i for i, word in enumerate(words)}
    network.save_pretrained(base / "folder")
    write_processor(base / "folder", MEAN, STD)
    return base / "folder"


def distil(forks: Forks, teacher: Path, run: Path, *settings: str) -> Outcome:
    return forks.script("distill.py", str(teacher), f"run_dir={run}", *TINY, *settings)


def score(outcome: Outcome) -> float:
    """The teacher's, as it is announced."""
    (line,) = (line for line in outcome.text.splitlines() if line.startswith("teacher: val mIoU"))
    return float(line.split()[3])


def error(outcome: Outcome) -> str:
    (line,) = (line for line in outcome.text.splitlines() if line.startswith("error: "))
    assert "Traceback" not in outcome.text
    return line


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_right_words_and_normalisation_score_as_in_its_own_training(
    forks: Forks, trained: Path, tmp_path: Path
) -> None:
    outcome = distil(forks, trained, tmp_path / "run", "losses.fitnet={taps: [last]}")
    assert outcome.code == 0, outcome.text[-2000:]
    results = json.loads((trained.parent / "run" / "results.json").read_text())
    # As it scored in its own training, on other scenes: 16 there, 2 here.
    assert score(outcome) > 10
    assert score(outcome) == pytest.approx(100 * results["best_miou"], abs=10)
    for said in ("sidewalk is pavement", "vegetation is Tree", "decoder.2 to decoder.0"):
        assert said in outcome.text, outcome.text


def test_its_answers_are_those_of_transformers_in_our_order(trained: Path) -> None:
    """The whole path, from the drawn image to our class, against transformers' own."""
    from transformers import SegformerForSemanticSegmentation

    from distill import load_teacher
    from engine.teachers import TeacherConfig

    config = DataConfig(size=[32, 64], scenes=8)
    data = build_dataset(config, "val")
    teacher = load_teacher(trained, "teacher.run", TeacherConfig(), config, data.labels.names).eval()
    image, _ = data.read(0)
    own = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 - colour(MEAN)) / colour(STD)
    network = SegformerForSemanticSegmentation.from_pretrained(trained).eval()
    with torch.no_grad():
        theirs = network(own.float()).logits
        ours = teacher(data.sample((-1, 0, 0), seed=0).images[None]).logits
    columns = {word: i for i, word in network.config.id2label.items()}
    order = [columns[OTHER_WORDS.get(name, name)] for name in CITYSCAPES.names]
    torch.testing.assert_close(ours, theirs[:, order], rtol=1e-3, atol=1e-3)


def colour(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(3, 1, 1)


def test_wrong_classes_lower_its_score_and_the_guard_says_so(forks: Forks, trained: Path, tmp_path: Path) -> None:
    right = distil(forks, trained, tmp_path / "right")
    wrong = copy(trained, tmp_path / "teacher")
    names = json.loads((wrong / "config.json").read_text())["id2label"]
    turned = {str((int(i) + 7) % 19): name for i, name in names.items()}
    change(wrong / "config.json", id2label=turned, label2id={name: int(i) for i, name in turned.items()})
    outcome = distil(forks, wrong, tmp_path / "run")
    assert outcome.code == 2
    assert score(outcome) < 0.4 * score(right)
    assert error(outcome).startswith(f"error: teacher.run: {wrong}: val mIoU")
    assert "is near chance" in error(outcome)
    assert distil(forks, wrong, tmp_path / "run", "teacher.accept_near_chance=true").code == 0


def test_a_wrong_normalisation_lowers_its_score_and_the_guard_says_so(
    forks: Forks, trained: Path, tmp_path: Path
) -> None:
    """ImageNet's in place of its own costs it a third; one that is far off blinds it."""
    right = distil(forks, trained, tmp_path / "right")
    wrong = copy(trained, tmp_path / "teacher")
    write_processor(wrong, *IMAGENET)
    assert score(distil(forks, wrong, tmp_path / "usual")) < 0.8 * score(right)
    write_processor(wrong, [3.0, -3.0, 3.0], STD)
    outcome = distil(forks, wrong, tmp_path / "run")
    assert outcome.code == 2, outcome.text[-2000:]
    assert score(outcome) < 0.4 * score(right)
    assert "is near chance" in error(outcome)


def test_a_run_of_ours_near_chance_is_only_warned_of(forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "teacher"
    settings = [setting.replace("student", "model") for setting in TINY]
    assert forks.script("train_teacher.py", f"run_dir={run}", *settings).code == 0
    outcome = distil(forks, run, tmp_path / "run")
    assert outcome.code == 0, outcome.text[-2000:]
    assert "teacher: WARNING: val mIoU" in outcome.text


def test_classes_without_a_partner_are_listed_or_given(forks: Forks, trained: Path, tmp_path: Path) -> None:
    poor = copy(trained, tmp_path / "teacher")
    names = json.loads((poor / "config.json").read_text())["id2label"]
    renamed = {i: {"rider": "horseman", "train": "steam engine"}.get(name, name) for i, name in names.items()}
    change(poor / "config.json", id2label=renamed, label2id={name: int(i) for i, name in renamed.items()})
    outcome = distil(forks, poor, tmp_path / "run")
    assert outcome.code == 2
    assert error(outcome).startswith("error: teacher.classes: the teacher has none like rider, train; say which")
    settings = ["teacher.classes={rider: horseman}", "teacher.absent=[train]"]
    outcome = distil(forks, poor, tmp_path / "run", *settings)
    assert outcome.code == 0, outcome.text[-2000:]
    assert "teacher: rider is horseman" in outcome.text
    assert "teacher: train is unknown to it" in outcome.text


# ------------------------------------------------------------------------------------------------ wrong things


def test_wrong_folders(forks: Forks, trained: Path, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", copy(trained, tmp_path / "teacher")
    (folder / "preprocessor_config.json").rename(tmp_path / "kept.json")
    outcome = distil(forks, folder, run)
    assert (outcome.code, "preprocessor_config.json" in error(outcome)) == (2, True)
    (tmp_path / "kept.json").rename(folder / "preprocessor_config.json")

    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    outcome = distil(forks, folder, run)
    assert (outcome.code, "weights" in error(outcome)) == (2, True)
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert distil(forks, folder, run).code == 3

    from safetensors.torch import load, save

    state = load(whole)
    missing = {name: value for name, value in state.items() if name != "decode_head.linear_fuse.weight"}
    (folder / "model.safetensors").write_bytes(save(missing, {"format": "pt"}))
    outcome = distil(forks, folder, run)
    assert (outcome.code, "missing decode_head.linear_fuse.weight" in error(outcome)) == (3, True)
    more = state | {"decode_head.more.weight": torch.zeros(2)}
    (folder / "model.safetensors").write_bytes(save(more, {"format": "pt"}))
    outcome = distil(forks, folder, run)
    assert (outcome.code, "superfluous decode_head.more.weight" in error(outcome)) == (3, True)


def test_wrong_names(forks: Forks, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = f"run_dir={tmp_path / 'run'}"
    outcome = forks.script("distill.py", "teacher.run=nowhere/at_all", run, *TINY)
    assert (outcome.code, "nowhere/at_all" in error(outcome)) == (2, True)
    outcome = forks.script("distill.py", str(trained), "teacher.hub=a/b", run, *TINY)
    assert outcome.code == 2
    assert error(outcome) == "error: teacher.hub: teacher.run is given too; give one teacher"
    outcome = distil(forks, trained, tmp_path / "run", "losses.fitnet.taps=[encoder.9]")
    assert (outcome.code, "the student has no tap 'encoder.9'" in error(outcome)) == (2, True)
    outcome = distil(forks, trained, tmp_path / "run", "losses.fitnet.taps=[bottleneck:encoder.9]")
    assert (outcome.code, "the teacher has no tap 'encoder.9'" in error(outcome)) == (2, True)


def test_without_a_network(forks: Forks, tmp_path: Path) -> None:
    settings = ["teacher.hub=nobody/has-this-model", f"run_dir={tmp_path / 'run'}", *TINY]
    outcome = forks.script("distill.py", *settings, set_offline=True)
    assert outcome.code == 2
    assert error(outcome).startswith(
        "error: teacher.hub: nobody/has-this-model is neither a folder nor in the cache"
    )


def test_fine_tuning_asks_before_it_drops_a_classifier(forks: Forks, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [f"run_dir={run}", "model.name=hub", f"model.weights={trained}"]
    settings += [setting for setting in TINY if not setting.startswith("student")]
    outcome = forks.script("train_teacher.py", *settings)
    assert outcome.code == 2
    assert "add model.new_head=true to draw its classifier anew" in error(outcome)
    assert forks.script("train_teacher.py", *settings, "model.new_head=true").code == 0
