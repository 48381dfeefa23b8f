"""Look a data set over: the doctor checks every file, the statistics tell what it holds, a pack makes it fast.

CamVid           python inspect_data.py data.name=camvid data.root=FOLDER splits=[train,val,test]
two data sets    python inspect_data.py data.name=bdd100k data.root=FOLDER against.name=cityscapes against.root=…
faults alone     python inspect_data.py data.name=cityscapes data.root=FOLDER statistics=false
packing          python inspect_data.py data.name=cityscapes data.root=FOLDER pack=true

Writes OUT/report.html, one page that needs nothing beside it, and its tables and pictures as OUT/*.csv and *.png.
Faults end it with exit code 2, after the report; what is a notice only does not. Sources in data.mix are left out:
inspect them by themselves.
"""

import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np

from data import DataConfig
from data.build import STREETS_FIRST, Split
from data.check import Fault, find_faults, nothing_to_check
from data.packed import write_pack
from data.survey import (
    DAY,
    LARGE,
    NIGHT,
    RESAMPLES,
    SMALL,
    SPECK,
    Survey,
    class_rows,
    cooccurrence,
    findings,
    instance_rows,
    priors,
    shares,
    shift,
    shift_findings,
    split_row,
    survey,
)
from engine.config import run_script
from errors import ConfigurationError
from evaluation import data_report as page
from evaluation.report import table

SHOWN = 20  # faults of each check in the terminal


@dataclass
class Config:
    """What inspect_data.py can be told."""

    data: DataConfig = field(default_factory=DataConfig)
    """The data set."""
    splits: list[str] = field(default_factory=lambda: ["train", "val"])
    """Its splits: some of train, val and test."""
    against: DataConfig | None = None
    """Another data set of the same classes, to compare with."""
    doctor: bool = True
    """Check every file: missing, damaged, of the wrong size or values, twice, or in two splits."""
    statistics: bool = True
    """Count classes, objects, places and brightness, and what shifts between the splits."""
    pack: bool = False
    """Only pack the splits, for data.packed=true."""
    workers: int = 0
    """Processes; 0 takes as many as there are cores."""
    out: str = "runs/inspection"
    """Folder of the report, its tables and its pictures."""

    def __post_init__(self) -> None:
        for split in self.splits:
            if split not in STREETS_FIRST:
                raise ConfigurationError(f"splits: {split!r} is unknown; choose among train, val and test")
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise ConfigurationError(f"splits: {self.splits} is not possible; name each split once")
        if self.workers < 0:
            raise ConfigurationError(f"workers: {self.workers} is not possible; give 0 or more")
        if self.pack and self.against is not None:
            raise ConfigurationError("against: is not packed; leave it out, and pack that data set by itself")


def main(config: Config) -> None:
    if config.pack:
        for split in config.splits:
            write_pack(config.data, cast(Split, split), config.workers)
        return
    out, faults = make_folder(config.out), []
    sections: dict[str, list[str]] = {"What one should know": []}
    sets = data_sets(config)
    if config.doctor:
        faults = examine_files(config, sets, out, sections)
    broken = sum(fault.severity == "fault" for fault in faults)
    if config.statistics and broken:
        line = f"{broken} faults: the statistics are left out, for they would be of files that cannot be trusted."
        print(f"\n{line}\n")
        sections["What one should know"].append(page.html_note(line, bad=True))
    elif config.statistics:
        describe(config, sets, out, sections)
    title = " and ".join(dict.fromkeys(data.name for data in sets.values()))
    subtitle = f"{date.today()}: python {' '.join(sys.argv)}"
    page.write_whole(out / "report.html", page.html_page(title, subtitle, sections).encode())
    print(f"written: {out}/report.html, its tables {out}/*.csv and pictures {out}/*.png")
    if broken:
        raise ConfigurationError(f"{title}: {broken} faults in its files; {out}/report.html tells the fix of each")


def make_folder(name: str) -> Path:
    """The folder, made if need be. Raises ConfigurationError, before all the work, where no file can be made."""
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=name):
            return Path(name)
    except OSError as error:
        raise ConfigurationError(f"out: can't write to {name} ({error.strerror}); name another folder") from error


def data_sets(config: Config) -> dict[str, DataConfig]:
    """The data sets by what their splits' names begin with: nothing, if there is one."""
    if config.against is None:
        return {"": config.data}
    same = config.against.name == config.data.name
    names = ("data ", "against ") if same else (f"{config.data.name} ", f"{config.against.name} ")
    return dict(zip(names, (config.data, config.against), strict=True))


# ------------------------------------------------------------------------------------------------- doctor


def examine_files(
    config: Config, sets: dict[str, DataConfig], out: Path, sections: dict[str, list[str]]
) -> list[Fault]:
    """The doctor's findings, printed, in faults.csv and in the page."""
    faults: list[Fault] = []
    lines = []
    for called, data in sets.items():
        if reason := nothing_to_check(data):
            lines.append(f"{data.name}: {reason}.")
            continue
        found = find_faults(data, config.splits, workers=config.workers)
        faults += [fault._replace(split=called + fault.split) for fault in found]
        number = Counter(fault.severity for fault in found)
        lines.append(f"{data.name}: {number['fault']} faults and {number['notice']} notices in its files.")
    page.write_csv(out / "faults.csv", [fault._asdict() for fault in faults], Fault._fields)
    parts = [page.html_list(lines)]
    print("\n" + "\n".join(lines) + "\n")
    by_check = sorted(faults, key=lambda fault: (fault.severity, fault.check))
    for (severity, check), group in groupby(by_check, key=lambda fault: (fault.severity, fault.check)):
        rows = [{"split": f.split, "file": f.file, "problem": f.problem, "fix": f.fix} for f in group]
        heading = f"{check}: {len(rows)} {severity}{'s' if len(rows) > 1 else ''}"
        more = f"\n… and {len(rows) - SHOWN} more in {out}/faults.csv" if len(rows) > SHOWN else ""
        print(f"{heading}\n\n{table(rows[:SHOWN])}{more}\n")
        parts += [page.html_heading(heading), page.html_table(rows[:SHOWN], text=True)]
        if len(rows) > SHOWN:
            rest = page.html_table(rows[SHOWN:], text=True)
            parts.append(page.html_details(f"{len(rows) - SHOWN} more", rest))
    sections["What one should know"].append(page.html_list(lines))
    sections["Doctor"] = parts
    return faults


# --------------------------------------------------------------------------------------------- statistics


def describe(config: Config, sets: dict[str, DataConfig], out: Path, sections: dict[str, list[str]]) -> None:
    """The statistics of all splits and the shifts between them, printed, as files and in the page."""
    surveys = {
        (called, split): survey(data, cast(Split, split), name=called + split, workers=config.workers)
        for called, data in sets.items()
        for split in config.splits
    }
    every = list(surveys.values())
    for other in every[1:]:
        if other.labels.names != every[0].labels.names:
            raise ConfigurationError("against: has other classes than data; compare data sets of the same classes")
    summary = sections["What one should know"]
    rows = [split_row(s) for s in every]
    page.write_csv(out / "splits.csv", rows)
    print(f"\n{table(page.split_table(rows))}\n")
    for (_, split), s in surveys.items():
        lines = findings(s, advice=split == "train")
        summary += [page.html_heading(s.name), page.html_list(lines)]
        print("\n".join([f"{s.name}:", *(f"- {line}" for line in lines), ""]))
    sections["The splits"] = [page.html_table(page.split_table(rows)), page.html_note(SPLITS_NOTE)]
    sections["The splits"] += pictures_of_all(every, out)
    for s in every:
        sections[s.name.capitalize()] = describe_split(s, out)
    moved = []
    for a, b in compared(config, sets):
        parts, lines = describe_shift(surveys[a], surveys[b], out)
        sections.setdefault("Shifts", [page.html_note(SHIFT_NOTE)]).extend(parts)
        moved += lines
    if moved:
        summary += [page.html_heading("Shifts"), page.html_list(moved)]


def compared(config: Config, sets: dict[str, DataConfig]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Which are compared: a set's first split with its others, and each split with that of the other set."""
    pairs = [((called, config.splits[0]), (called, split)) for called in sets for split in config.splits[1:]]
    if config.against is not None:
        first, second = sets
        pairs += [((first, split), (second, split)) for split in config.splits]
    return pairs


SPLITS_NOTE = (
    "Void: pixels without a class. Boundary: labelled pixels that have another class among their eight "
    "neighbours; void is none. Imbalance: pixels of the most frequent class by those of the rarest that occurs. "
    f"Instances: connected components of a class (8-connectivity) of {SPECK} pixels or more. Brightness and "
    f"contrast: mean and standard deviation of the luma, 0 to 255. Night is a mean below {NIGHT}, day is {DAY} or "
    "more, and dusk is between; a dark tunnel is night by this measure."
)
AREAS_NOTE = (
    "Areas of objects in per cent of the image. "
    f"Small: below {100 * SMALL:.2g} % of it, large: {100 * LARGE:.2g} % or more, which at 640×480 are the "
    "32² and 96² pixels of COCO."
)
WEIGHTS_NOTE = (
    "Effective number: (1 − β^n) / (1 − β) of n pixels, with β = 1 − 1/N, N the mean of n over the classes that "
    "occur (Cui et al. 2019). Weights of the loss by each scheme of its key class_weights."
)
SHIFT_NOTE = (
    f"A star, or a filled mark, is what differs further than between any of {RESAMPLES} pairs of splits that were "
    "drawn from the images of both together; grey is how far those differed. Frames of one video are alike, and "
    "count as many images all the same: between clips much is marked. × is the ratio of shares or median areas; "
    "place is the Jensen-Shannon divergence (0 to 1 bit) of where a class stands."
)


def describe_split(s: Survey, out: Path) -> list[str]:
    """The tables and pictures of one split."""
    names, colours, slug = s.labels.names, s.labels.colours, s.name.replace(" ", "_")
    by_name = dict(zip(names, colours, strict=True))
    classes, instances, together, places = class_rows(s), instance_rows(s), cooccurrence(s), priors(s)
    page.write_csv(out / f"classes_{slug}.csv", classes)
    page.write_csv(out / f"instances_{slug}.csv", instances)
    page.write_csv(out / f"cooccurrence_{slug}.csv", page.matrix_rows(names, together))
    shown = page.class_table(classes, instances)
    print(f"{s.name}, {len(s.names)} images, {s.known} of them known from before\n\n{table(shown)}\n")
    height, width = s.sizes[0].tolist()
    page.draw_cooccurrence(out / f"cooccurrence_{slug}.png", names, together)
    page.draw_priors(out / f"places_{slug}.png", names, places, height / width)
    page.draw_samples(out / f"samples_{slug}.png", sample_cells(s))
    captions = {
        "cooccurrence": "Of the images that show the row's class, the per cent that show the column's.",
        "places": "Where each class is: share of the images that show it there.",
        "samples": "An image for each class, the rarest first, with the class in a white outline.",
    }
    return [
        page.html_table(shown, by_name),
        page.html_table(page.area_table(instances), by_name),
        page.html_note(AREAS_NOTE),
        page.html_table(page.weight_table(classes), by_name),
        page.html_note(WEIGHTS_NOTE),
        *(page.html_picture(out / f"{kind}_{slug}.png", caption) for kind, caption in captions.items()),
    ]


def pictures_of_all(every: list[Survey], out: Path) -> list[str]:
    """The pictures that hold all splits side by side."""
    labels = every[0].labels
    areas = {s.name: [s.object_share[s.object_class == c] for c in range(len(labels))] for s in every}
    page.draw_shares(out / "classes.png", labels.names, labels.colours, {s.name: shares(s) for s in every})
    page.draw_areas(out / "areas.png", labels.names, labels.colours, areas, (SMALL, LARGE))
    examples = {s.name: dark_to_bright(s, 8) for s in every}
    page.draw_brightness(out / "brightness.png", {s.name: s.brightness for s in every}, (NIGHT, DAY), examples)
    captions = {
        "classes": "Share of the labelled pixels, on a logarithmic scale.",
        "areas": "Areas of objects. Each class's histogram has a height of its own; the black line is the median, "
        "the number at the right how many there are.",
        "brightness": "Brightness of the images, and some of them from dark to bright.",
    }
    return [page.html_picture(out / f"{kind}.png", caption) for kind, caption in captions.items()]


def describe_shift(a: Survey, b: Survey, out: Path) -> tuple[list[str], list[str]]:
    """The tables and the picture of what differs between two splits, and that in words."""
    rows: list[dict[str, Any]] = shift(a, b)
    names, slug = a.labels.names, f"{a.name}_{b.name}".replace(" ", "_")
    page.write_csv(out / f"shift_{slug}.csv", rows)
    shown = page.shift_table(rows, names)
    lines = shift_findings(a, b, rows)
    page.draw_shift(out / f"shift_{slug}.png", names, a.labels.colours, rows, a.name, b.name)
    print(f"{b.name} against {a.name}; * is more than the choice of images explains\n\n{table(shown)}\n")
    print("\n".join(f"- {line}" for line in lines) + "\n")
    return [
        page.html_heading(f"{b.name} against {a.name}"),
        page.html_list(lines),
        page.html_table(shown, dict(zip(names, a.labels.colours, strict=True))),
        page.html_picture(out / f"shift_{slug}.png", f"What differs in {b.name} from {a.name}, by class."),
    ], lines


def dark_to_bright(s: Survey, number: int) -> list[tuple[float, np.ndarray]]:
    """Mean luma and thumbnail of images spread evenly over the order by brightness."""
    order = np.argsort(s.brightness, kind="stable")
    picked = order[np.unique(np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int))]
    return [(float(s.brightness[i]), page.shrink(s.read(i)[0], 240)) for i in picked.tolist()]


def sample_cells(s: Survey) -> list[tuple[str, np.ndarray]]:
    """For each class, the rarest first, an image that shows more of it than nine of ten that show it."""
    cells = []
    for c in np.argsort(shares(s)).tolist():
        order = np.argsort(s.pixels[:, c], kind="stable")
        order = order[s.pixels[order, c] > 0]
        if len(order):
            index = int(order[9 * (len(order) - 1) // 10])
            image, label = s.read(index)
            of_image = page.share(s.pixels[index, c] / s.pixels[index].sum())
            title = f"{s.labels.names[c]}, {of_image} % of {s.names[index][-32:]}"
            cells.append((title, page.outlined(image, label, s.labels.colours, c)))
    return cells


if __name__ == "__main__":
    run_script(main, Config)
