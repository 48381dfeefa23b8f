"""inspect_data.py from end to end on small sets: its exit codes, its page, its tables and pictures."""

import io
import os
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data.streets import write_bdd100k, write_cityscapes
from evaluation.data_report import html_list, html_page, html_table, outlined, share, write_csv

ROOT = Path(__file__).resolve().parents[2]
SIZE = (72, 128)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bdd100k")
    write_bdd100k(folder, scenes={"train": 8, "val": 4}, size=SIZE, seed=4)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGDISTILL_CACHE", str(tmp_path / "cache"))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the script."""
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", "workers=1", *arguments])
    try:
        runpy.run_path(str(ROOT / "inspect_data.py"), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


class Page(HTMLParser):
    """What a page refers to, its headings and its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.images = 0
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.images += tag == "img"
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def is_self_contained(path: Path) -> Page:
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?:|//[a-z]|@import|url\(|file:/", re.sub(r'src="data:[^"]*"', "", text))
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in page.references)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    return page


def test_a_data_set_from_end_to_end(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "data.name=bdd100k", f"data.root={root}", f"out={out}") == 0
    printed = capsys.readouterr().out
    assert "bdd100k: 0 faults" in printed
    assert re.search(r"\| bicycle +\|", printed)
    page = is_self_contained(out / "report.html")
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == sorted(
        ["areas.png", "brightness.png", "classes.png", "shift_train_val.png"]
        + [f"{kind}_{split}.png" for kind in ("cooccurrence", "places", "samples") for split in ("train", "val")]
    )
    assert page.images == len(pictures)
    for name in pictures:
        pixels = np.asarray(Image.open(out / name))
        assert min(pixels.shape[:2]) > 100
        assert pixels.std() > 5
    classes = pd.read_csv(out / "classes_train.csv", index_col="class")
    assert len(classes) == 19
    assert classes["pixel_share"].sum() == pytest.approx(1)
    whole = pd.read_csv(out / "splits.csv", index_col="split")
    assert whole.loc["train", "images"] == 8
    assert classes["pixels"].sum() == pytest.approx(8 * 72 * 128 * (1 - whole.loc["train", "void_share"]))
    together = pd.read_csv(out / "cooccurrence_val.csv", index_col="class")
    assert together.loc["road", "road"] == 1
    instances = pd.read_csv(out / "instances_train.csv", index_col="class")
    assert instances["instances"].sum() == whole.loc["train", "instances"]
    moved = pd.read_csv(out / "shift_train_val.csv")
    assert len(moved) == 4 * 19 + 2
    faults = pd.read_csv(out / "faults.csv")
    assert list(faults.columns) == ["split", "check", "severity", "file", "problem", "fix"]
    assert (faults["severity"] == "notice").all()
    assert not list(out.glob("*.tmp"))


def test_faults_end_with_code_2_after_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bdd100k(tmp_path / "d", scenes={"train": 4, "val": 2}, size=SIZE)
    broken = sorted((tmp_path / "d").rglob("images/10k/train/*.jpg"))[1]
    broken.write_bytes(broken.read_bytes()[:-300])
    out = tmp_path / "out"
    assert run(monkeypatch, "data.name=bdd100k", f"data.root={tmp_path / 'd'}", f"out={out}") == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("error: bdd100k: 1 faults")
    assert f"{out}/report.html" in captured.err
    assert "statistics are left out" in captured.out
    assert str(broken) in captured.out
    assert str(broken) in (out / "report.html").read_text()
    is_self_contained(out / "report.html")
    faults = pd.read_csv(out / "faults.csv")
    assert faults[faults["severity"] == "fault"]["file"].tolist() == [str(broken)]
    assert not list(out.glob("*.png"))


def test_two_data_sets_side_by_side(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cityscapes(tmp_path / "city", scenes={"val": 3}, size=SIZE, seed=9)
    out = tmp_path / "out"
    both = [
        "data.name=bdd100k",
        f"data.root={root}",
        "against.name=cityscapes",
        f"against.root={tmp_path / 'city'}",
    ]
    assert run(monkeypatch, *both, "splits=[val]", f"out={out}") == 0
    assert "cityscapes val against bdd100k val" in capsys.readouterr().out
    assert (out / "shift_bdd100k_val_cityscapes_val.csv").exists()
    assert (out / "classes_cityscapes_val.csv").exists()
    is_self_contained(out / "report.html")


def test_other_classes_cannot_be_compared(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    for kind in ("images", "masks"):
        (own / kind / "val").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(own / "images" / "val" / "a.png")
    Image.new("L", (8, 8)).save(own / "masks" / "val" / "a.png")
    (own / "classes.yaml").write_text("names: [all]\n")
    arguments = ["data.name=bdd100k", f"data.root={root}", "against.name=folder", f"against.root={own}"]
    assert run(monkeypatch, *arguments, "splits=[val]", "doctor=false", f"out={tmp_path / 'out'}") == 2
    assert "against: has other classes" in capsys.readouterr().err


def test_streets_have_nothing_to_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "data.scenes=4", "data.size=[64,128]", "splits=[train]", f"out={out}") == 0
    assert "streets: has no files of images and labels, there is nothing to check" in capsys.readouterr().out
    assert len(pd.read_csv(out / "faults.csv")) == 0
    assert not list(out.glob("shift_*"))
    is_self_contained(out / "report.html")


def test_parts_can_be_left_out(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    data = ["data.name=bdd100k", f"data.root={root}", f"out={out}"]
    assert run(monkeypatch, *data, "statistics=false") == 0
    assert sorted(path.name for path in out.iterdir()) == ["faults.csv", "report.html"]
    assert run(monkeypatch, *data, "doctor=false", "statistics=false", "out=" + str(tmp_path / "none")) == 0
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["report.html"]


def test_packing_only_packs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["data.name=bdd100k", f"data.root={root}", f"data.packed_folder={tmp_path / 'packed'}"]
    assert run(monkeypatch, *data, "pack=true", f"out={tmp_path / 'out'}") == 0
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [
        "bdd100k_train_raw",
        "bdd100k_val_raw",
    ]
    assert not (tmp_path / "out").exists()
    assert run(monkeypatch, *data, "pack=true", "against.name=cityscapes") == 2
    assert "against: is not packed" in capsys.readouterr().err
    # what was packed has the statistics of its source
    for name, packed in (("source", "false"), ("packed", "true")):
        more = [f"data.packed={packed}", "doctor=false", "splits=[train]", f"out={tmp_path / name}"]
        assert run(monkeypatch, *data, *more) == 0
    for table in ("classes_train.csv", "instances_train.csv"):
        assert (tmp_path / "source" / table).read_text() == (tmp_path / "packed" / table).read_text()


def test_a_pack_without_its_source_has_nothing_to_check(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["data.name=bdd100k", f"data.packed_folder={tmp_path / 'packed'}", "splits=[val]"]
    assert run(monkeypatch, *data, f"data.root={root}", "pack=true") == 0
    assert run(monkeypatch, *data, "data.packed=true", f"out={tmp_path / 'out'}") == 0
    assert "bdd100k: is a pack without its source, there is nothing to check" in capsys.readouterr().out
    assert (tmp_path / "out" / "classes_val.csv").exists()


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_file_in_the_way_of_the_report_is_found_before_the_work(
    below: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("")
    out = f"{tmp_path / 'out'}{below}"
    assert run(monkeypatch, "data.name=bdd100k", f"data.root={root}", f"out={out}") == 2
    captured = capsys.readouterr()
    assert f"error: out: can't write to {out} (" in captured.err
    assert captured.err.rstrip().endswith("); name another folder")
    assert "faults" not in captured.out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_found_before_the_work(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    assert run(monkeypatch, "data.name=bdd100k", f"data.root={root}", f"out={tmp_path / 'out'}") == 2
    assert f"out: can't write to {tmp_path / 'out'} (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("splits=[train,vall]", "splits: 'vall' is unknown"),
        ("splits=[]", "name each split once"),
        ("splits=[val,val]", "name each split once"),
        ("workers=-1", "workers: -1"),
    ],
)
def test_wrong_keys(
    argument: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, argument) == 2
    assert said in capsys.readouterr().err


# the page's parts


def test_html_is_escaped() -> None:
    evil = '<script src="http://x">&"'
    page = html_page(evil, evil, {evil: [html_table([{evil: evil}], {}), html_list([evil])]})
    assert "<script" not in page
    assert "&lt;script" in page
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page


def test_a_table_shows_the_classes_colours() -> None:
    text = html_table([{"class": "car", "n": 1}, {"class": "all", "n": 2}], {"car": (1, 2, 3)})
    assert text.count("swatch") == 1
    assert "rgb(1,2,3)" in text


def test_csv_leaves_nan_empty(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"a": float("nan"), "b": 'x,"y"'}, {"a": 0.25, "b": "z"}])
    found = pd.read_csv(io.StringIO((tmp_path / "a.csv").read_text()))
    assert np.isnan(found.loc[0, "a"])
    assert found.loc[0, "b"] == 'x,"y"'
    assert found.loc[1, "a"] == 0.25


def test_shares_in_words() -> None:
    assert [share(value) for value in (0.12345, 0.000123, 0.0, 1.0, float("nan"))] == [
        "12.3",
        "0.0123",
        "0",
        "100",
        "–",
    ]


def test_an_outline_surrounds_the_class_even_if_it_is_one_pixel() -> None:
    image, label = np.full((100, 1000, 3), 90, np.uint8), np.zeros((100, 1000), np.uint8)
    label[53, 503] = 1
    drawn = outlined(image, label, [(90, 90, 90), (0, 0, 0)], 1, width=200)
    assert drawn.shape == (20, 200, 3)
    assert (drawn[10, 100] == 255).all()
    assert (drawn[0, 0] == 90).all()
