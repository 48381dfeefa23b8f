"""A model that knows other classes, answering in ours: partners by name, probabilities added up."""

import difflib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from errors import ConfigurationError
from models.interface import Output, SegmentationModel

# What classes of Cityscapes and of CamVid's 11 groups (Brostow et al. 2009) are called elsewhere, as in ADE20K.
# One that we have ourselves is never taken as part of another: a car includes buses only where we have no bus.
PARTNERS = {
    "bicycle": ("bike",),
    "bicyclist": ("rider", "bicycle"),
    "building": ("skyscraper", "house", "wall"),
    "car": ("van", "truck", "bus"),
    "motorcycle": ("minibike", "motorbike"),
    "pavement": ("sidewalk",),
    "pedestrian": ("person",),
    "person": ("pedestrian",),
    "pole": ("streetlight", "street lamp"),
    "sidewalk": ("pavement",),
    "signsymbol": ("traffic sign", "traffic light", "signboard"),
    "terrain": ("grass", "earth", "field"),
    "traffic sign": ("signsymbol", "signboard", "sign"),
    "tree": ("vegetation", "palm", "plant"),
    "vegetation": ("tree", "palm", "plant"),
}
ABSENT = math.log(1e6)  # a class that the model doesn't know gets a millionth of the probability


def map_classes(
    model: SegmentationModel, ours: Sequence[str], given: Mapping[str, str], absent: Sequence[str]
) -> SegmentationModel:
    """The model itself if its classes are ours in our order, else `Mapped` as `match_classes` has it."""
    if model.class_names == list(ours) and not given and not absent:
        return model
    return Mapped(model, ours, match_classes(model.class_names, ours, given, absent))


def names_of(name: str) -> set[str]:
    """The names in a class's name, which may be several with commas, in lower case and with plain blanks."""
    return {" ".join(part.lower().replace("_", " ").replace("-", " ").split()) for part in name.split(",")}


def match_classes(
    theirs: Sequence[str],
    ours: Sequence[str],
    given: Mapping[str, str] | None = None,
    absent: Sequence[str] = (),
) -> list[list[int]]:
    """For each of our classes the indices of theirs that it is made of; none for one of `absent`.

    Names are compared without regard to case, hyphens and underscores; else PARTNERS tells. What `given` says of a
    class, `{"bicyclist": "rider + bicycle"}`, comes before both.

    Raises:
        ConfigurationError: listing our classes without a partner, or naming what `given` and `absent` have wrong.
    """
    given = given or {}
    for key, named in (("classes", given), ("absent", absent)):
        unknown = [name for name in named if name not in ours]
        if unknown:
            meant = difflib.get_close_matches(unknown[0], ours, n=1)
            raise ConfigurationError(
                f"teacher.{key}: {unknown[0]!r} is no class of the data set; "
                + (f"did you mean {meant[0]}?" if meant else f"it has {', '.join(ours)}")
            )
    known = [names_of(name) for name in theirs]
    own = {name for our in ours for name in names_of(our)}
    groups: list[list[int]] = []
    for our in ours:
        if our in absent:
            groups.append([])
        elif our in given:
            groups.append(list(dict.fromkeys(find(name.strip(), theirs, known) for name in given[our].split("+"))))
        else:
            partners = {name for word in names_of(our) for name in PARTNERS.get(word, ())}
            alike = partners - own | names_of(our)
            groups.append([i for i, names in enumerate(known) if names & alike])
    if not any(groups):
        raise ConfigurationError("teacher.absent: names all classes; the teacher has to know one at least")
    missing = [our for our, group in zip(ours, groups, strict=True) if not group and our not in absent]
    if missing:
        raise ConfigurationError(
            f"teacher.classes: the teacher has none like {', '.join(missing)}; say which of its classes they are, "
            f"as in 'teacher.classes={{{missing[0]}: NAME + NAME}}', or that it lacks them, "
            f"'teacher.absent=[{','.join(missing)}]'; it has {', '.join(theirs)}"
        )
    taken = [i for group in groups for i in group]
    twice = [i for i in taken if taken.count(i) > 1]
    if twice:
        claim = [our for our, group in zip(ours, groups, strict=True) if twice[0] in group]
        raise ConfigurationError(
            f"teacher.classes: {' and '.join(claim)} both take the teacher's {theirs[twice[0]]}; give it to one, "
            f"and say teacher.absent=[{claim[-1]}] for the other"
        )
    return groups


def find(name: str, theirs: Sequence[str], known: Sequence[set[str]]) -> int:
    """The index of a class by its name, whole or one of its names."""
    found = [i for i, whole in enumerate(theirs) if whole == name]
    found = found or [i for i, names in enumerate(known) if names_of(name) & names]
    if not found:
        raise ConfigurationError(f"teacher.classes: the teacher has no {name!r}; it has {', '.join(theirs)}")
    return found[0]


class Mapped(SegmentationModel):
    """A model, its logits turned into those of our classes.

    The probability of one of our classes is the sum of its partners', so its logit is their log-sum-exp; the other
    classes of the model are left out, which shares their probability out in proportion. A class without a partner
    gets a millionth of the probability: a finite logit, and nothing to learn from.

    Args:
        model: what answers.
        class_names: ours.
        groups: of `match_classes`.
    """

    def __init__(self, model: SegmentationModel, class_names: Sequence[str], groups: list[list[int]]) -> None:
        super().__init__()
        self.model, self.groups, self.class_names = model, groups, list(class_names)
        partners = torch.tensor([i for group in groups for i in group])
        self.register_buffer("partners", partners, persistent=False)
        self.architecture, self.taps, self.stride = model.architecture, model.taps, model.stride
        self.mean, self.std = model.mean, model.std

    partners: Tensor

    def take_images(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.model.take_images(mean, std)

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> Output:
        answer = self.model(images, taps)
        logits = answer.logits.float().index_select(1, self.partners)  # float32 for sums of exponentials
        parts = iter(logits.split([len(group) for group in self.groups if group], 1))
        least = logits.logsumexp(1) - ABSENT
        mapped = torch.stack([next(parts).logsumexp(1) if group else least for group in self.groups], 1)
        return Output(mapped.to(answer.logits.dtype), answer.features)

    def notes(self) -> list[str]:
        """What the model itself says, and which of its classes became ours, where the names differ."""
        lines = self.model.notes()
        for our, group in zip(self.class_names, self.groups, strict=True):
            names = [self.model.class_names[i] for i in group]
            if names != [our]:
                lines.append(f"{our} is {' + '.join(names) or 'unknown to it'}")
        return lines
