"""predict.py: it writes what the model says; videos keep their length, size and rate; faults are one line."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import predict
from data.labels import CAMVID, CITYSCAPES
from data.streets import draw_clip
from data.transforms import resize_label
from deploy.export import ExportConfig, export
from deploy.exported import normalise, open_exported
from deploy.postprocess import native_argmax
from engine.config import parse
from errors import ConfigurationError, DamagedFileError
from evaluation.metrics import predict as labels_of
from evaluation.pictures import colourise, legend, overlay
from models import ModelConfig, SegmentationModel, build_model, load_model

ROOT = Path(__file__).resolve().parents[2]
SIZE = (64, 96)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose untrained model is evaluated at 64x96."""
    folder = tmp_path_factory.mktemp("runs") / "untrained"
    torch.manual_seed(0)
    build_model(ModelConfig(width=8, depth=2), CITYSCAPES).save_pretrained(folder / "best")
    (folder / "config.yaml").write_text("data: {name: streets, size: [64, 96]}\n")
    return folder


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    return [image for image, _ in draw_clip(1, seed=2, size=SIZE, frames=7)]


@pytest.fixture
def photos(tmp_path: Path, frames: list[np.ndarray]) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(frames):
        cv2.imwrite(str(folder / f"{number}.png"), image[..., ::-1])
    return folder


@pytest.fixture
def drive(tmp_path: Path, frames: list[np.ndarray]) -> Path:
    """A video of 7 frames, 12.5 a second."""
    path = tmp_path / "drive.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 12.5, SIZE[::-1])
    for image in frames:
        writer.write(np.ascontiguousarray(image[..., ::-1]))
    writer.release()
    return path


def call(*arguments: object) -> None:
    predict.main(parse(predict.Config, list(map(str, arguments)), runs="run", files=tuple(predict.RUNTIMES)))


def read(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert picture is not None, path
    return picture if picture.ndim == 2 else picture[..., ::-1]


def read_video(path: Path) -> tuple[list[np.ndarray], float]:
    capture, pictures = cv2.VideoCapture(str(path)), []
    while True:
        whole, picture = capture.read()
        if not whole:
            return pictures, capture.get(cv2.CAP_PROP_FPS)
        pictures.append(picture[..., ::-1])


def expected(model: SegmentationModel, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.from_numpy(normalise(image[None], model.mean, model.std))).logits
    return labels_of(logits, (image.shape[0], image.shape[1]))[0].numpy()


def test_outputs_of_images_are_the_models_labels(
    run: Path, photos: Path, frames: list[np.ndarray], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    call(run, f"input={photos}", f"out={out}", "write=[overlay,side_by_side,mask]", "legend=false", "opacity=0.3")
    model = load_model(run)
    assert len(list(out.iterdir())) == 3 * len(frames)
    for number, image in enumerate(frames):
        labels = expected(model, image)
        assert len(np.unique(labels)) > 1
        np.testing.assert_array_equal(read(out / f"{number}_mask.png"), labels)
        drawn = overlay(image, labels, CITYSCAPES.colours, 0.3)
        np.testing.assert_array_equal(read(out / f"{number}_overlay.png"), drawn)
        both = np.hstack([image, colourise(labels, CITYSCAPES.colours)])
        np.testing.assert_array_equal(read(out / f"{number}_side_by_side.png"), both)


def test_one_image_with_coloured_mask_and_legend(run: Path, photos: Path, tmp_path: Path) -> None:
    call(run, f"input={photos / '3.png'}", f"out={tmp_path}", "write=[overlay,mask]", "masks=colours")
    mask, drawn = read(tmp_path / "3_mask.png"), read(tmp_path / "3_overlay.png")
    assert {tuple(colour) for colour in mask.reshape(-1, 3)} <= set(CITYSCAPES.colours)
    assert drawn.shape[1] == SIZE[1]
    assert drawn.shape[0] > SIZE[0]
    strip = {tuple(colour) for colour in drawn[SIZE[0] :].reshape(-1, 3)}
    assert set(CITYSCAPES.colours) <= strip  # the field of every class


def test_labels_have_the_images_own_size(run: Path, tmp_path: Path) -> None:
    large = draw_clip(1, seed=2, size=(100, 151), frames=1)[0][0]
    cv2.imwrite(str(tmp_path / "large.png"), large[..., ::-1])
    call(run, f"input={tmp_path / 'large.png'}", f"out={tmp_path}", "write=[mask]")
    model = load_model(run)
    small = cv2.resize(large, SIZE[::-1], interpolation=cv2.INTER_AREA)
    with torch.no_grad():
        logits = model(torch.from_numpy(normalise(small[None], model.mean, model.std))).logits
    np.testing.assert_array_equal(read(tmp_path / "large_mask.png"), native_argmax(logits, (100, 151))[0].numpy())
    call(
        run,
        f"input={tmp_path / 'large.png'}",
        f"out={tmp_path}",
        "write=[mask]",
        "size=[100,151]",
        "overwrite=true",
    )
    np.testing.assert_array_equal(read(tmp_path / "large_mask.png"), expected(model, large))


def test_a_photo_is_turned_as_its_file_says(run: Path, frames: list[np.ndarray], tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    Image.fromarray(frames[0]).save(tmp_path / "portrait.jpg", exif=exif)
    call(run, f"input={tmp_path / 'portrait.jpg'}", f"out={tmp_path}", "write=[mask]")
    assert read(tmp_path / "portrait_mask.png").shape == SIZE[::-1]


def test_a_video_keeps_length_size_and_rate(run: Path, drive: Path, tmp_path: Path) -> None:
    call(
        run, f"input={drive}", f"out={tmp_path}", "write=[overlay,side_by_side,mask]", "legend=false", "opacity=0"
    )
    originals, _ = read_video(drive)
    pictures, rate = read_video(tmp_path / "drive_overlay.mp4")
    assert (len(pictures), rate) == (7, 12.5)
    for picture, original in zip(pictures, originals, strict=True):  # in order, but for the compression
        assert picture.shape == (*SIZE, 3)
        distances = [np.abs(picture.astype(int) - other).mean() for other in originals]
        assert np.argmin(distances) == [id(other) for other in originals].index(id(original))
    both, rate = read_video(tmp_path / "drive_side_by_side.mp4")
    assert (len(both), rate, both[0].shape) == (7, 12.5, (SIZE[0], 2 * SIZE[1], 3))
    masks = sorted((tmp_path / "drive_mask").iterdir())
    assert [path.name for path in masks] == [f"{number:06d}.png" for number in range(7)]
    model = load_model(run)
    for path, original in zip(masks, originals, strict=True):
        np.testing.assert_array_equal(read(path), expected(model, original))
    assert not list(tmp_path.glob("*.part.*"))


def test_images_become_a_video(run: Path, photos: Path, tmp_path: Path) -> None:
    call(run, f"input={photos}", f"out={tmp_path}", "video=true", "rate=5", "frames=4")
    pictures, rate = read_video(tmp_path / "photos_overlay.mp4")
    assert (len(pictures), rate) == (4, 5.0)


def test_an_odd_size_loses_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    for number in range(2):
        cv2.imwrite(str(tmp_path / "odd" / f"{number}.png"), np.full((33, 47, 3), 99, np.uint8))
    call(run, f"input={tmp_path / 'odd'}", f"out={tmp_path}", "video=true", "legend=false")
    assert read_video(tmp_path / "odd_overlay.mp4")[0][0].shape == (34, 48, 3)


def test_what_exists_is_not_replaced_unasked(run: Path, photos: Path, drive: Path, tmp_path: Path) -> None:
    arguments = [run, f"input={photos}", f"out={tmp_path}", "frames=2"]
    call(*arguments)
    (tmp_path / "0_overlay.png").unlink()
    kept = (tmp_path / "1_overlay.png").read_bytes()
    with pytest.raises(ConfigurationError, match="1_overlay.png: exists already; give overwrite=true"):
        call(*arguments)
    assert not (tmp_path / "0_overlay.png").exists()  # before all work
    call(*arguments, "overwrite=true", "opacity=0.9")
    assert (tmp_path / "1_overlay.png").read_bytes() != kept

    clip = [run, f"input={drive}", f"out={tmp_path}", "write=[mask]"]
    call(*clip)
    with pytest.raises(ConfigurationError, match="drive_mask: exists already"):
        call(*clip)
    call(*clip, "overwrite=true", "frames=3")
    assert len(list((tmp_path / "drive_mask").iterdir())) == 3  # nothing of the longer one is left


def test_a_video_that_breaks_off(run: Path, drive: Path, tmp_path: Path) -> None:
    """What was read is written and kept, and the error says how much."""
    long = tmp_path / "long.avi"
    writer = cv2.VideoWriter(str(long), cv2.VideoWriter.fourcc(*"MJPG"), 10, SIZE[::-1])
    for number in range(40):
        writer.write(np.full((*SIZE, 3), 6 * number, np.uint8))
    writer.release()
    data = long.read_bytes()
    long.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigurationError, match=r"long.avi: breaks off after (\d+) of 40 frames") as raised:
        call(run, f"input={long}", f"out={tmp_path}", "write=[overlay,mask]")
    count = int(str(raised.value).split("after ")[1].split()[0])
    assert 5 < count < 35
    assert len(read_video(tmp_path / "long_overlay.mp4")[0]) == count
    assert len(list((tmp_path / "long_mask").iterdir())) == count


def test_images_of_several_sizes_make_no_video(run: Path, photos: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(photos / "3.png"), np.zeros((50, 60, 3), np.uint8))
    with pytest.raises(ConfigurationError, match=r"^3: its picture has .*; bring the images to one size"):
        call(run, f"input={photos}", f"out={tmp_path}", "video=true", "legend=false")
    assert len(read_video(tmp_path / "photos_overlay.mp4")[0]) == 3  # kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["input=nothing.png"], "input: 'nothing.png' does not exist"),
        ([], "input: '' does not exist"),
        (["input=FOLDER"], "holds no images"),
        (["input=notes.txt"], "notes.txt: unknown ending; give an image"),
        (["input=cut.png"], "cut.png: is a truncated PNG"),
        (["input=text.jpg"], "text.jpg: is neither a PNG nor a JPEG"),
        (["input=text.mp4"], "text.mp4: cannot be opened as a video"),
        (["input=camera:99"], "input: there is no camera 99"),
        (["input=camera:left"], "input: camera:left names no camera"),
        (["input=twice"], "another image has the same name"),
        (["input=twice", "out=twice"], "out: twice is the folder of the images"),
        (["input=good.png", "write=[overlay,paintings]"], "write: 'paintings' is not possible"),
        (["input=good.png", "write=[]"], "write: "),
        (["input=good.png", "size=[0,4]"], "size: "),
        (["input=good.png", "opacity=2"], "opacity: "),
        (["input=good.png", "rate=0"], "rate: "),
        (["input=good.png", "frames=-1"], "frames: "),
        (["input=good.png", "out=notes.txt"], "out: can't write to notes.txt"),
        (["input=good.png", "out=/proc/nothing"], "out: can't write to /proc/nothing"),
        (["input=good.png", "runtime=openvino"], "runtime: is for exported files"),
    ],
)
def test_faults(
    arguments: list[str], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "twice").mkdir()
    whole = cv2.imencode(".png", np.zeros((*SIZE, 3), np.uint8))[1].tobytes()
    for name in ("good.png", "twice/a.png"):
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "twice/a.jpg").write_bytes(cv2.imencode(".jpg", np.zeros((*SIZE, 3), np.uint8))[1].tobytes())
    (tmp_path / "cut.png").write_bytes(whole[:-40])
    for name in ("notes.txt", "text.jpg", "text.mp4"):
        (tmp_path / name).write_text("no picture\n")
    with pytest.raises(ConfigurationError) as raised:
        call(run, "out=out", *arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "out").glob("*"))


def test_without_a_model_and_with_damaged_weights(run: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="run: no model is named"):
        call(f"input={photos}")
    damaged = tmp_path / "damaged"
    load_model(run).save_pretrained(damaged)
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(DamagedFileError, match=r"model.safetensors"):
        call(damaged, f"input={photos}", f"out={tmp_path / 'out'}")


def test_as_a_program_it_says_one_line_and_its_exit_code(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"\x00\x00\x00\x20ftypisom" + bytes(500))  # the video library has its own words for it
    command = [sys.executable, str(ROOT / "predict.py"), str(run), f"input={broken}", f"out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {broken}: cannot be opened")


def test_colours_of_classes() -> None:
    assert predict.colours_of(list(CAMVID.names)) == CAMVID.colours
    own = predict.colours_of(["road", "sky", "cow"])
    assert len(set(own)) == 3


@pytest.mark.parametrize("width", [20, 97, 480, 1919])
def test_a_legend_fits_its_picture(width: int) -> None:
    strip = legend(CITYSCAPES.names, CITYSCAPES.colours, width)
    assert strip.shape[1] == width
    assert strip.shape[0] % 2 == 0  # or the last line of a video would be lost
    shown = {tuple(colour) for colour in strip.reshape(-1, 3)}
    assert set(CITYSCAPES.colours) <= shown


def test_reading_ahead_keeps_order_and_errors() -> None:
    def broken() -> "predict.Iterator[int]":
        yield from range(1, 10)
        raise ConfigurationError("the end")

    seen: list[int] = []
    with pytest.raises(ConfigurationError, match="the end"):
        seen.extend(predict.ahead(broken()))
    assert seen == list(range(1, 10))


def test_work_behind_is_done_in_order_and_its_error_raised() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number == 12:
            raise ConfigurationError("twelve")
        done.append(number)

    def submit_all() -> None:
        with predict.Behind() as behind:
            for number in range(15):
                behind.submit(work, number)

    with pytest.raises(ConfigurationError, match="twelve"):
        submit_all()
    assert done == list(range(12))


@pytest.fixture(scope="module")
def exported(run: Path, frames: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run as ONNX, in a form given by options of the export."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")

    @cache
    def make(**options: Any) -> Path:
        config, folder = ExportConfig(formats=["onnx"], **options), tmp_path_factory.mktemp("export")
        return export(load_model(run), config, folder, frames[:2], colours=CITYSCAPES.colours)[0]

    return make


LOGITS: dict[str, Any] = {}
LABELS = {"uint8_input": True, "argmax": True}
ANY_SIZE = pytest.param({"dynamic": True}, marks=pytest.mark.slow)


@pytest.mark.parametrize("form", [LOGITS, LABELS, ANY_SIZE])
def test_a_run_and_its_exported_file_give_the_same_masks(
    form: dict[str, Any], exported: Callable[..., Path], run: Path, photos: Path, tmp_path: Path
) -> None:
    for name, model in (("run", run), ("file", exported(**form))):
        call(model, f"input={photos}", f"out={tmp_path / name}", "write=[mask,overlay]")
    for number in range(7):
        of_run, of_file = (read(tmp_path / name / f"{number}_mask.png") for name in ("run", "file"))
        assert (of_run == of_file).mean() > 0.999  # sums in another order may decide what is too close to call
    assert read(tmp_path / "file/0_overlay.png").shape == read(tmp_path / "run/0_overlay.png").shape


def test_images_are_resized_to_the_files_size_and_labels_back(
    exported: Callable[..., Path], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = draw_clip(1, seed=2, size=(128, 200), frames=1)[0][0]
    cv2.imwrite(str(tmp_path / "large.png"), large[..., ::-1])
    masks = {}
    for name, model in (("run", run), ("logits", exported()), ("labels", exported(**LABELS))):
        call(model, f"input={tmp_path / 'large.png'}", f"out={tmp_path / name}", "write=[mask]")
        masks[name] = read(tmp_path / name / "large_mask.png")
        assert masks[name].shape == (128, 200)
    assert "images are resized to 64x96, labels back" in capsys.readouterr().out
    assert (masks["run"] == masks["logits"]).mean() > 0.999
    small = cv2.resize(large, SIZE[::-1], interpolation=cv2.INTER_AREA)
    labels = open_exported(exported(**LABELS)).labels(small)
    np.testing.assert_array_equal(masks["labels"], resize_label(labels, (128, 200)))


def test_another_size_than_the_files(exported: Callable[..., Path], photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="takes 64x96 alone"):
        call(exported(), f"input={photos}", f"out={tmp_path / 'out'}", "size=[32,48]")


@pytest.mark.slow
def test_a_file_of_any_size(exported: Callable[..., Path], photos: Path, tmp_path: Path) -> None:
    call(exported(dynamic=True), f"input={photos}", f"out={tmp_path}", "size=[32,48]", "write=[mask]")
    assert read(tmp_path / "0_mask.png").shape == SIZE


def test_a_damaged_file(exported: Callable[..., Path], photos: Path, tmp_path: Path) -> None:
    path = exported()
    for file in (path, path.with_name(f"{path.name}.json")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = path.read_bytes()
    (tmp_path / path.name).write_bytes(data[:-100])
    with pytest.raises(DamagedFileError, match="not the file that was exported"):
        call(tmp_path / path.name, f"input={photos}", f"out={tmp_path / 'out'}")
