"""Tables and pictures."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import evaluation.pictures as pictures
from evaluation.pictures import colourise, denormalise, error_map, grid, overlay, save_png
from evaluation.report import (
    compare_runs,
    duration,
    method_name,
    per_class_table,
    quantity,
    seeds_by_class,
    seeds_table,
    significant,
    table,
)

COLOURS = ((128, 64, 128), (244, 35, 232), (70, 70, 70))

TEACHER = {
    "run": "teacher", "parameters": 4_412_331, "flops": 51.3e9, "miou": 0.457, "pixel_accuracy": 0.89,
    "class_accuracy": 0.61, "latency_ms": 123.4, "train_seconds": 7200,
    "iou": {"sky": 0.91, "pole": 0.1, "ship": None},
}  # fmt: skip
STUDENT = {
    "run": "student", "parameters": 491_000, "flops": 5.3e9, "miou": 0.4256, "pixel_accuracy": 0.87,
    "class_accuracy": math.nan, "latency_ms": None, "train_seconds": 42,
    "iou": {"sky": 0.9, "pole": 0, "ship": None},
}  # fmt: skip


def cells(text: str) -> list[list[str]]:
    """Rows of trimmed cells; the lines must all be equally wide."""
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# -------------------------------------------------------------------------------------------------- tables


def test_a_table_is_aligned_markdown() -> None:
    text = table([{"name": "a", "value": 0.123456}, {"name": "longer", "value": None}, {"name": "c", "value": 12}])
    assert text == (
        "| name   |  value |\n| ------ | -----: |\n| a      | 0.1235 |\n| longer |      – |\n| c      |     12 |"
    )


def test_a_table_takes_columns_and_headings() -> None:
    rows: list[dict[str, Any]] = [{"a": 1, "b": math.nan, "c": "x"}, {"a": 20_000_000, "b": 12345.0}]
    assert cells(table(rows, ["c", "a"]))[0] == ["c", "a"]
    assert cells(table(rows, {"a": "first", "b": "second"})) == [
        ["first", "second"], ["-------:", "-----:"], ["1", "–"], ["20000000", "12345"],
    ]  # fmt: skip
    assert table([], ["a"]) == "| a   |\n| --- |"


def test_a_cell_cannot_break_the_table() -> None:
    text = table([{"a": "x|y\nz", "b": "車"}, {"a": "", "b": "car"}])
    assert "x\\|y z" in text
    assert len(text.splitlines()) == 4
    assert text.splitlines()[2].endswith("| 車  |")  # as wide as two letters


def test_text_that_only_begins_with_digits_stays_left() -> None:
    assert table([{"a": "2024-run"}]).splitlines()[1] == "| -------- |"
    assert table([{"a": "4.40 M"}, {"a": "–"}]).splitlines()[1] == "| -----: |"


def test_runs_are_compared_with_the_first() -> None:
    rows = cells(compare_runs([TEACHER, STUDENT]))
    assert rows[0] == [
        "run", "params", "params ×", "FLOPs", "FLOPs ×", "mIoU %", "mIoU Δ", "pixel acc. %", "class acc. %",
        "latency ms", "latency ×", "training",
    ]  # fmt: skip
    assert rows[2] == [
        "teacher", "4.41 M", "1.00", "51.3 G", "1.00", "45.70", "+0.00", "89.00", "61.00", "123", "1.00", "2.00 h",
    ]  # fmt: skip
    assert rows[3] == [
        "student", "491 k", "0.111", "5.30 G", "0.103", "42.56", "-3.14", "87.00", "–", "–", "–", "42.0 s",
    ]  # fmt: skip


def test_one_run_has_no_ratios_and_unknown_columns_are_left_out() -> None:
    assert cells(compare_runs([{"run": "a", "miou": 0.5, "parameters": 7}]))[0] == ["run", "params", "mIoU %"]
    later = cells(compare_runs([{"run": "a", "miou": 0.5}, {"run": "a", "miou": 0.6, "parameters": 7}]))
    assert later[2:] == [["a (1)", "–", "–", "50.00", "+0.00"], ["a (2)", "7", "–", "60.00", "+10.00"]]


def test_seeds_of_a_method_are_summed_up() -> None:
    def result(run: str, method: str, miou: float) -> dict[str, Any]:
        scores = {"miou": miou, "pixel_accuracy": 0.5, "class_accuracy": 0.25}
        costs = (
            {"parameters": 491_000, "flops": 1.03e9, "latency_ms": 10.0 + scores["miou"]} if method == "a" else {}
        )
        seconds = 60.0 if method == "a" else None
        return {"run": run, "method": method, "train_seconds": seconds, **costs, **scores}

    runs = [result("x/kd-0", "a", 0.4), result("x/kta-0", "b", 0.5), result("x/kd-1", "a", 0.42)]
    lines = seeds_table(runs).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:3]] == ["method", "seeds"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    scores = ["41.00 ± 1.41", "50.00 ± 0.00", "25.00 ± 0.00"]
    assert cells[0] == ["x/kd", "2", "491 k", "1.03 G", *scores, "10.4", "1.00 min"]
    assert cells[1] == ["x/kta-0", "1", "–", "–", "50.00", "50.00", "25.00", "–", "–"]
    assert seeds_table(runs[:2]) == ""


def test_classes_over_seeds() -> None:
    def result(run: str, method: str, sky: float | None) -> dict[str, Any]:
        return {"run": run, "method": method, "miou": 0.5, "iou": {"sky": sky, "pole": 0.25}}

    runs = [
        result("x/a-0", "a", 0.4),
        result("x/a-1", "a", 0.42),
        result("x/b-0", "b", 0.3),
        result("c", "c", None),
    ]
    rows = cells(seeds_by_class(runs, ["sky", "pole"]))
    assert rows[0] == ["class", "x/a", "x/b-0", "c"]
    assert rows[2:] == [["sky", "41.0 ± 1.4", "30.0", "–"], ["pole", "25.0 ± 0.0", "25.0", "25.0"],
                        ["mean", "50.0 ± 0.0", "50.0", "50.0"]]  # fmt: skip
    assert seeds_by_class(runs[2:], ["sky"]) == ""
    # names that begin with nothing in common
    runs = [
        result("1_kd", "kd", 0.4),
        result("2_kd", "kd", 0.4),
        result("1_ce", "ce", 0.2),
        result("2_ce", "ce", 0.2),
    ]
    assert cells(seeds_by_class(runs, ["sky"]))[0] == ["class", "1_kd", "1_ce"]
    assert cells(seeds_by_class(runs, ["sky"]))[2] == ["sky", "40.0 ± 0.0", "20.0 ± 0.0"]


def test_classes_of_several_runs() -> None:
    rows = cells(per_class_table([TEACHER, STUDENT]))
    assert rows[0] == ["class", "teacher", "student"]
    assert rows[2:] == [["sky", "91.00", "90.00"], ["pole", "10.00", "0.00"], ["ship", "–", "–"],
                        ["mean", "45.70", "42.56"]]  # fmt: skip
    assert [row[0] for row in cells(per_class_table([TEACHER], ["pole"]))[2:]] == ["pole", "mean"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (999.6, "1.00 k"), (999_499, "999 k"), (999_500, "1.00 M"), (4.4e6, "4.40 M"),
     (12_345_678, "12.3 M"), (1e9, "1.00 G"), (2.5e12, "2.50 T"), (0.5, "0.500")],
)  # fmt: skip
def test_quantities(value: float, text: str) -> None:
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0012345, "0.00123"), (0.0999999, "0.100"), (9.999, "10.0"), (12345.6, "12346"), (-1.5, "-1.50")],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(42, "42.0 s"), (754, "12.6 min"), (3599, "60.0 min"), (5400, "1.50 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("as_tensor", [False, True])
def test_classes_are_coloured_and_the_rest_is_black(as_tensor: bool) -> None:
    label = np.array([[0, 1, 2], [3, 254, 255]])
    picture = colourise(torch.from_numpy(label) if as_tensor else label, COLOURS)
    assert picture.dtype == np.uint8
    assert picture.tolist() == [[list(c) for c in COLOURS], [[0, 0, 0]] * 3]


def test_errors_stand_out() -> None:
    label = torch.tensor([[0, 1, 255]])
    prediction = torch.tensor([[0, 2, 1]])
    assert error_map(prediction, label).tolist() == [[list(pictures.CORRECT), list(pictures.WRONG), [0, 0, 0]]]
    on_image = error_map(prediction, label, np.full((1, 3, 3), 200, np.uint8))
    assert on_image.tolist() == [[[120, 120, 120], list(pictures.WRONG), [0, 0, 0]]]
    with pytest.raises(ValueError, match="prediction of"):
        error_map(prediction[:, :2], label)


def test_overlay_leaves_pixels_without_a_class() -> None:
    image = np.full((1, 3, 3), 100, np.uint8)
    picture = overlay(image, np.array([[0, 2, 255]]), COLOURS, 0.5)
    assert picture.tolist() == [[[114, 82, 114], [85, 85, 85], [100, 100, 100]]]
    assert picture.dtype == np.uint8


def test_denormalising_gives_the_image_back() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    normalised = (torch.from_numpy(image).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    batch = normalised.permute(0, 3, 1, 2).float()
    np.testing.assert_array_equal(denormalise(batch, mean, std), image)
    np.testing.assert_array_equal(denormalise(batch[0], mean, std), image[0])
    assert denormalise(batch + 100, mean, std).min() == 255


def test_a_grid_holds_every_picture_under_a_title() -> None:
    red, blue = np.zeros((20, 40, 3), np.uint8), np.zeros((20, 40, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    small = blue[::2, ::2]
    picture = grid([[red, blue], [None, small], [red[:10], None]], ["one", "two"], cell_width=80, gap=4)
    assert picture.dtype == np.uint8
    assert picture.shape[1] == 4 + 2 * 84
    is_red = (picture == (255, 0, 0)).all(-1)
    is_blue = (picture == (0, 0, 255)).all(-1)
    assert is_red.sum() == 40 * 80 + 20 * 80
    assert is_blue.sum() == 2 * 40 * 80
    first = int(is_red.any(1).argmax())
    titles = picture[:first]
    for column in (titles[:, :88], titles[:, 88:]):
        assert (column < 100).any()  # ink
    with_rows = grid([[red], [blue]], ["one"], row_titles=["a", "b"])
    assert with_rows.shape[0] > grid([[red], [blue]], ["one"]).shape[0]


def test_a_title_never_runs_over_its_column() -> None:
    white = np.full((20, 300, 3), 255, np.uint8)
    picture = grid([[white]], ["a title of a good many letters"], gap=6)
    assert (picture[:, :6] == 255).all()
    assert (picture[:, -6:] == 255).all()


def test_a_grid_says_what_is_wrong() -> None:
    cell = np.zeros((2, 2, 3), np.uint8)
    for rows, titles in (([], ["a"]), ([[cell]], ["a", "b"]), ([[None]], ["a"])):
        with pytest.raises(ValueError, match="row"):
            grid(rows, titles)
    with pytest.raises(ValueError, match="row titles"):
        grid([[cell]], ["a"], row_titles=[])


def test_png_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "picture.png"
    old = np.zeros((3, 4, 3), np.uint8)
    save_png(path, old)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), old)

    def fails(*_: object) -> None:
        raise OSError("killed here")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="killed here"):
        save_png(path, np.full((3, 4, 3), 9, np.uint8))
    np.testing.assert_array_equal(np.asarray(Image.open(path)), old)


def test_method_name() -> None:
    assert method_name(["runs/a-0", "runs/a-1"]) == "runs/a"
    assert method_name(["runs/a-0/teacher", "runs/a-1/teacher"]) == "runs/a/teacher"
    assert method_name(["runs/a-0"]) == "runs/a-0"
