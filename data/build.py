"""From a configuration to a data set: DataConfig and build_dataset."""

import hashlib
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data import bdd100k, camvid, cityscapes, folder
from data.dataset import FileData, SegmentationData, Settings, count_classes
from data.files import Pair
from data.huggingface import open_huggingface
from data.labels import CAMVID, CITYSCAPES, Labels, camvid_table, label_id_table, train_id_table
from data.mixed import MixConfig, MixedData, Name, Source
from data.transforms import Size
from errors import ConfigurationError

Split = Literal["train", "val", "test"]

STREETS_SIZE = (128, 256)
STREETS_FIRST = {"train": 0, "val": 10_000_000, "test": 20_000_000}  # so that no scene is in two splits


@dataclass
class DataConfig:
    """Which images, and how training samples are made of them."""

    name: Name = "streets"
    """The data set; streets is drawn by the program and needs no files, folder is one of your own, huggingface one
    of the library datasets."""
    root: str = ""
    """Folder of the data set; camvid takes the environment variable CAMVID_ROOT if this is empty, huggingface a
    folder of save_to_disk or a name on the Hub, owner/name."""
    classes: str = ""
    """folder, huggingface: YAML file with the names of the classes; folder takes classes.yaml in data.root if this
    is empty. See data/folder.py."""
    mix: list[MixConfig] = field(default_factory=list)
    """Further sources of training images, [{name: bdd100k, root: FOLDER, weight: 0.5}, {root: FOLDER, unlabelled:
    true}]; validation and test are those of `name` alone."""
    mix_weight: float = 1.0
    """Share of `name` itself in an epoch, relative to the weights in data.mix."""
    size: list[int] | None = None
    """[height, width] that images are resized to before all else (streets: drawn at, 128x256 if null); labels stay
    at their own size in evaluation."""
    crop: list[int] | None = None
    """[height, width] of the training crop, padded where the scaled image is smaller; null is the whole image."""
    augment: bool = True
    """Whether training samples are scaled, cropped at random, flipped, jittered and blurred."""
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Smallest and largest factor of the random resize before the crop, drawn uniformly."""
    flip: float = 0.5
    """Probability of mirroring left and right."""
    jitter: float = 0.3
    """Strength of the random brightness, contrast and saturation, 0 for none."""
    blur: float = 0.1
    """Probability of a slight Gaussian blur."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean of red, green and blue in 0..1 that is subtracted (the default is ImageNet's)."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of red, green and blue in 0..1 that is divided by (the default is ImageNet's)."""
    workers: int = 0
    """Loader processes per training process; 0 loads in the training process itself."""
    packed: bool = False
    """Read the packed files that `inspect_data.py pack=true` wrote, in place of the originals."""
    packed_form: Literal["raw", "jpeg"] = "raw"
    """Form of packed images: pixels as they are, or JPEGs end to end, where raw is too large."""
    packed_folder: str = ""
    """Folder of packed files; empty: `packed` in data.root. With data.root empty nothing but them is needed."""
    reduced_decoding: bool = False
    """Decode a JPEG at a half, a quarter or an eighth of its size where data.size leaves no more of it: faster,
    and other pixels by a little."""
    finish_on_device: bool = False
    """Change colours, blur and normalise on the training's device: loaders hand over bytes, a quarter of the
    memory, and a GPU does in no time what costs a core as much as the crop."""
    sampling: Literal["uniform", "rare_class", "class_uniform", "repeat_factor"] = "uniform"
    """Order of the training images: each once an epoch; drawn by the rarity of the classes they show (DAFormer); a
    share of them by classes drawn uniformly; or repeated by the rarest class that they show (LVIS)."""
    rare_class_temperature: float = 0.01
    """Temperature of rare_class: the smaller, the more often the rarest classes (0.01 in DAFormer)."""
    class_uniform_share: float = 0.5
    """class_uniform: share of an epoch's images that are drawn by class; the others are drawn uniformly."""
    repeat_threshold: float = 0.5
    """repeat_factor: a class that less than this share of the images show has them repeated, sqrt(threshold/share)
    times."""
    rare_share: float = 0.01
    """rare_crop, copy_paste: classes with less than this share of the labelled pixels are the rare ones."""
    rare_classes: list[str] = field(default_factory=list)
    """rare_crop, copy_paste: names of the rare classes, in place of those by rare_share."""
    rare_crop: float = 0.0
    """Share of a training crop that is to be of the class that the sampler drew, or of rare ones if it drew none:
    the crop is drawn anew up to ten times until it is, else the best of them is taken. 0: the first is."""
    copy_paste: float = 0.0
    """Probability that objects of a rare class, cut out of another training image, are pasted onto a sample."""
    scenes: int = 400
    """streets: number of training scenes; val and test have a quarter as many each."""
    streets_seed: int = 0
    """streets: seed of the scenes, apart from the training's seed."""

    def __post_init__(self) -> None:
        for key in ("size", "crop"):
            value = getattr(self, key)
            if value is not None and (len(value) != 2 or min(value) < 1):
                _fail(key, value, "give [height, width] in pixels")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            _fail("scale", self.scale, "give [smallest, largest] factor, both above 0")
        for key in ("flip", "blur", "class_uniform_share", "rare_crop", "copy_paste"):
            if not 0 <= getattr(self, key) <= 1:
                _fail(key, getattr(self, key), "give a number from 0 to 1")
        if not 0 <= self.jitter <= 1:
            _fail("jitter", self.jitter, "give a strength from 0 to 1")
        if len(self.mean) != 3:
            _fail("mean", self.mean, "give three numbers, for red, green and blue")
        if len(self.std) != 3 or min(self.std) <= 0:
            _fail("std", self.std, "give three numbers above 0, for red, green and blue")
        for key in ("rare_class_temperature", "repeat_threshold", "rare_share"):
            if not getattr(self, key) > 0:
                _fail(key, getattr(self, key), "give a number above 0")
        for key in ("rare_crop", "copy_paste"):
            if getattr(self, key) and not self.augment:
                _fail(key, getattr(self, key), "it does nothing with data.augment=false, so leave one of them out")
        for key, least in (("workers", 0), ("scenes", 4), ("streets_seed", 0)):
            if getattr(self, key) < least:
                _fail(key, getattr(self, key), f"give a whole number of at least {least}")
        self.mix = [MixConfig(**one) if isinstance(one, dict) else one for one in self.mix]
        for number, one in enumerate(self.mix):
            _check_mix(f"data.mix[{number}]", one)
        if not 0 < self.mix_weight < math.inf:
            _fail("mix_weight", self.mix_weight, "give a number above 0")


def _check_mix(key: str, one: MixConfig) -> None:
    if not 0 < one.weight < math.inf:
        raise ConfigurationError(f"{key}.weight: {one.weight} is not possible; give a number above 0")
    if one.name is None and not one.unlabelled:
        raise ConfigurationError(f"{key}.name: is missing; name the data set, or say unlabelled: true")
    if one.unlabelled:  # or all files of a data set, its masks too, would be taken for images
        for other in ("name", "classes", "split"):
            if getattr(one, other) != getattr(MixConfig(), other):
                raise ConfigurationError(
                    f"{key}.{other}: says nothing of unlabelled images, which are all those in the folder `root` "
                    "and below it; leave it out"
                )


def _fail(key: str, value: object, advice: str) -> None:
    raise ConfigurationError(f"data.{key}: {value} is not possible; {advice}")


def build_dataset(config: DataConfig, split: Split) -> SegmentationData:
    """One split, checked: names, headers, ends and sizes of all files and values of all labels.

    Raises ConfigurationError with one line naming the key, folder or file that is wrong.
    """
    settings = Settings(
        size=_size(config.size),
        crop=_size(config.crop),
        augment=config.augment,
        scale=(config.scale[0], config.scale[1]),
        flip=config.flip,
        jitter=config.jitter,
        blur=config.blur,
        mean=tuple(config.mean),
        std=tuple(config.std),
        finish_on_device=config.finish_on_device,
        reduced_decoding=config.reduced_decoding,
        sampling=config.sampling,
        rare_class_temperature=config.rare_class_temperature,
        class_uniform_share=config.class_uniform_share,
        repeat_threshold=config.repeat_threshold,
        rare_share=config.rare_share,
        rare_classes=tuple(config.rare_classes),
        rare_crop=config.rare_crop,
        copy_paste=config.copy_paste,
    )
    if split not in STREETS_FIRST:
        raise ConfigurationError(f"split: {split!r} is unknown; choose train, val or test")
    if split == "train" and config.mix:
        return _mix(config, settings)
    if config.packed:
        from data.packed import PackedData  # which writes what this module reads

        return PackedData(config, split, settings)
    if config.name == "streets":
        if config.root:
            raise ConfigurationError(
                "data.root: data.name=streets is drawn and has no folder; name the data set, as "
                "data.name=cityscapes"
            )
        return StreetsData(config, split, settings)
    if config.name == "huggingface":
        return open_huggingface(config.root, config.classes, split, settings)
    files = find_files(config, split)
    return FileData(split, files.labels, files.pairs, files.table, settings, files.root)


def _mix(config: DataConfig, settings: Settings) -> MixedData:
    """The training images of the data set itself and of all others that are mixed with it."""
    first = build_dataset(replace(config, mix=[]), "train")
    sources = [Source(config.name, first, config.mix_weight)]
    for number, one in enumerate(config.mix):
        key = f"data.mix[{number}]"
        if one.unlabelled:
            called, path = "unlabelled", Path(one.root).expanduser()
            if not one.root or not path.is_dir():
                raise ConfigurationError(f"{key}.root: there is no folder {one.root!r}; name that of the images")
            data: SegmentationData = folder.UnlabelledData(path, first.labels, settings)
        else:
            assert one.name is not None
            called = one.name
            packed = config.packed and called not in ("streets", "huggingface")
            part = replace(config, name=called, root=one.root, classes=one.classes, mix=[])
            part = replace(part, packed=packed, packed_folder="")
            try:
                data = build_dataset(part, one.split)
            except ConfigurationError as error:
                raise ConfigurationError(re.sub(r"^data\.", f"{key}.", str(error))) from error
        again = sum(source.called.partition("-")[0] == called for source in sources)
        sources.append(Source(f"{called}-{again + 1}" if again else called, data, one.weight))
    return MixedData(sources, settings)


class Files(NamedTuple):
    """The files of a split, paired but not opened."""

    root: Path
    pairs: list[Pair]
    labels: Labels
    table: np.ndarray
    """uint8 [256], from a label file's values to trainIds; see data/labels.py."""


def find_files(config: DataConfig, split: Split) -> Files:
    """The images of a split with their labels. Raises ConfigurationError naming the key, file or folder."""
    if config.name == "huggingface":
        raise ConfigurationError("data.name: huggingface has no files of images and labels; export it as a folder")
    root = find_root(config)
    if config.name == "camvid":
        return Files(root, camvid.find_pairs(root, split), CAMVID, camvid_table())
    if config.name == "folder":
        file = Path(config.classes).expanduser() if config.classes else root / "classes.yaml"
        return Files(root, folder.find_pairs(root, split), *folder.read_classes(file))
    if config.name == "cityscapes":
        pairs, label_ids = cityscapes.find_pairs(root, split)
        table = label_id_table() if label_ids else train_id_table(len(CITYSCAPES))
        return Files(root, pairs, CITYSCAPES, table)
    return Files(root, bdd100k.find_pairs(root, split), CITYSCAPES, train_id_table(len(CITYSCAPES)))


def _size(value: list[int] | None) -> Size | None:
    return None if value is None else (value[0], value[1])


def find_root(config: DataConfig) -> Path:
    """The folder of a data set. Raises ConfigurationError where none is named or there."""
    root = config.root
    if not root and config.name == "camvid":
        root = os.environ.get("CAMVID_ROOT", "")
        if not root:
            raise ConfigurationError("data.root: is empty and CAMVID_ROOT is not set; give the folder of CamVid")
    if not root:
        raise ConfigurationError(f"data.root: is empty; give the folder of {config.name}")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise ConfigurationError(f"data.root: there is no folder {root}; give the folder of {config.name}")
    return path


class StreetsData(SegmentationData):
    """The drawn scenes. A scene is a function of (streets_seed, index, size); it is drawn when first asked for
    and kept in memory, up to half a gigabyte."""

    def __init__(self, config: DataConfig, split: Split, settings: Settings) -> None:
        from data import streets  # the drawing alone; a reader of files does without

        number = config.scenes if split == "train" else max(1, config.scenes // 4)
        super().__init__(split, CITYSCAPES, [f"{split}_{i:06d}" for i in range(number)], settings)
        self.size = settings.size or STREETS_SIZE
        self.seed = config.streets_seed
        self.first = STREETS_FIRST[split]
        self._streets = streets
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._room = 2**29 // (4 * self.size[0] * self.size[1])

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index in self._kept:
            return self._kept[index]
        pair = self._streets.draw_scene(self.first + index, seed=self.seed, size=self.size)
        if len(self._kept) < self._room:
            self._kept[index] = pair
        return pair

    def manifest_hash(self) -> str:
        digest = hashlib.sha256(f"streets {self.split} {len(self)} {self.seed} {self.size}\n".encode())
        for path in sorted(Path(__file__).parent.rglob("*.py")):
            if "streets" in path.name or path.parent.name == "streets":  # another drawing is another data set
                digest.update(path.read_bytes())
        return digest.hexdigest()

    def _count_one(self, index: int) -> np.ndarray:
        return count_classes(self.read(index)[1], len(self.labels))
