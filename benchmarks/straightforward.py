"""The losses as their formulas are commonly written: everything at label size, every matrix whole.

`FORMS` has them by their key under `losses`; each takes a `Problem` and answers with a scalar. What would be
written in no other way than it is in `losses` has none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import DistillationLoss
from losses.relations import labels_at
from losses.supervised import boundary_weight

VOID = 255


@dataclass
class Answer:
    """A model's output."""

    logits: Tensor
    features: dict[str, Tensor]


@dataclass
class Problem:
    """What a loss is asked.

    Args:
        objective: with this loss alone, of weight 1.
        config: the loss's own configuration.
        tap: where the feature losses compare.
        labels: int64 [B, H, W], 255 ignored.
        images: [B, 3, H, W].
    """

    objective: DistillationLoss
    config: Any
    tap: str
    student: Answer
    teacher: Answer
    labels: Tensor
    images: Tensor

    @property
    def term(self) -> Any:
        return next(iter(self.objective.terms.values()))

    @property
    def features(self) -> tuple[Tensor, Tensor]:
        return self.student.features[self.tap], self.teacher.features[self.tap]

    @property
    def enlarged(self) -> tuple[Tensor, Tensor]:
        """Both logits at label size."""
        size, logits = self.labels.shape[-2:], (self.student.logits, self.teacher.logits)
        ours, theirs = (F.interpolate(x, size, mode="bilinear", align_corners=False) for x in logits)
        return ours, theirs

    @property
    def labelled(self) -> Tensor:
        return self.labels != VOID

    @property
    def target(self) -> Tensor:
        """The labels with 0 in place of void."""
        return torch.where(self.labelled, self.labels, 0)

    @property
    def one_hot(self) -> Tensor:
        """Float [B, C, H, W], all 0 where void."""
        made = F.one_hot(self.target, self.student.logits.shape[1]).movedim(-1, 1)
        return made.to(self.student.logits) * self.labelled[:, None]

    def mean(self, values: Tensor) -> Tensor:
        """Over the labelled pixels of [B, H, W]."""
        return values[self.labelled].mean()


def divergence(student: Tensor, teacher: Tensor, temperature: float, dimension: int = 1) -> Tensor:
    """T² KL along a dimension, which is summed."""
    ours, theirs = (F.log_softmax(x / temperature, dimension) for x in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dimension)


def cross_entropies(logits: Tensor, problem: Problem) -> Tensor:
    return F.cross_entropy(logits, problem.labels, ignore_index=VOID, reduction="none")


def cross_entropy(problem: Problem) -> Tensor:
    ours = F.interpolate(problem.student.logits, problem.labels.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(ours, problem.labels, ignore_index=VOID)


def supervised(pixels: Callable[[Tensor, Problem], Tensor]) -> Callable[[Problem], Tensor]:
    """The mean over labelled pixels of a function of the student's logits at label size."""

    def form(problem: Problem) -> Tensor:
        size = problem.labels.shape[-2:]
        ours = F.interpolate(problem.student.logits, size, mode="bilinear", align_corners=False)
        return problem.mean(pixels(ours, problem))

    return form


def focal(logits: Tensor, problem: Problem) -> Tensor:
    log_p = F.log_softmax(logits, 1).gather(1, problem.target[:, None])[:, 0]
    return -((1 - log_p.exp()) ** problem.config.gamma) * log_p


def confidence_penalty(logits: Tensor, problem: Problem) -> Tensor:
    return (logits.softmax(1) * logits.log_softmax(1)).sum(1)


def margin(logits: Tensor, problem: Problem) -> Tensor:
    return F.relu(logits.max(1, keepdim=True).values - logits - problem.config.margin).mean(1)


def boundary(problem: Problem) -> Tensor:
    weight = boundary_weight(problem.labels, problem.config.strength, problem.config.width)
    return (cross_entropies(problem.enlarged[0], problem) * weight).sum() / weight.sum()


def dice(problem: Problem) -> Tensor:
    truth = problem.one_hot
    found = problem.enlarged[0].softmax(1) * problem.labelled[:, None]
    hits, squares, area = ((x).sum((2, 3)) for x in (found * truth, found.square(), truth))
    images = [
        (1 - 2 * h[there] / (s + a)[there]).mean()
        for h, s, a, there in zip(hits, squares, area, area > 0, strict=True)
    ]
    return torch.stack(images).mean()


def lovasz(problem: Problem) -> Tensor:
    images = []
    for probability, labels in zip(problem.enlarged[0].softmax(1), problem.labels, strict=True):
        probability, labels = probability[:, labels != VOID], labels[labels != VOID]
        classes = []
        for one in labels.unique():
            truth = (labels == one).float()
            errors, order = (truth - probability[one]).abs().sort(descending=True)
            sorted_truth = truth[order]
            total = sorted_truth.sum()
            jaccard = 1 - (total - sorted_truth.cumsum(0)) / (total + (1 - sorted_truth).cumsum(0))
            jaccard[1:] = jaccard[1:] - jaccard[:-1].clone()
            classes.append(errors @ jaccard)
        images.append(torch.stack(classes).mean())
    return torch.stack(images).mean()


def ohem(problem: Problem) -> Tensor:
    images = []
    for cost, labels in zip(cross_entropies(problem.enlarged[0], problem), problem.labels, strict=True):
        hardest = cost[labels != VOID].sort(descending=True).values
        limit = hardest[math.ceil(problem.config.least * len(hardest)) - 1]
        images.append(hardest[(hardest >= limit) | (hardest > -math.log(problem.config.threshold))].mean())
    return torch.stack(images).mean()


def kd(problem: Problem) -> Tensor:
    return problem.mean(divergence(*problem.enlarged, problem.config.temperature))


def cwd(problem: Problem) -> Tensor:
    ours, theirs = (x.masked_fill(~problem.labelled[:, None], -math.inf).flatten(2) for x in problem.enlarged)
    temperature = problem.config.temperature
    p, q = ((x / temperature).log_softmax(2) for x in (ours, theirs))
    different = torch.where(problem.labelled.flatten(1)[:, None], q - p, 0.0)
    return temperature**2 * (q.exp() * different).sum(2).mean()


def dist(problem: Problem) -> Tensor:
    temperature = problem.config.temperature

    def correlation(x: Tensor, y: Tensor, dimension: int) -> Tensor:
        x, y = x - x.mean(dimension, keepdim=True), y - y.mean(dimension, keepdim=True)
        return F.cosine_similarity(x, y, dim=dimension, eps=1e-12)

    images = []
    ours, theirs = ((x / temperature).softmax(1) for x in problem.enlarged)
    for x, y, labelled in zip(ours, theirs, problem.labelled, strict=True):
        x, y = x[:, labelled], y[:, labelled]
        inter, intra = 1 - correlation(x, y, 0).mean(), 1 - correlation(x, y, 1).mean()
        images.append(problem.config.beta * inter + problem.config.gamma * intra)
    return temperature**2 * torch.stack(images).mean()


def wsl(problem: Problem) -> Tensor:
    ours, theirs = problem.enlarged
    with torch.no_grad():
        costs = [cross_entropies(x, problem) for x in (ours, theirs)]
        weight = 1 - torch.exp(-costs[0] / (costs[1] + 1e-7))
    return problem.mean(weight * divergence(ours, theirs, problem.config.temperature))


def dkd(problem: Problem) -> Tensor:
    temperature, config = problem.config.temperature, problem.config
    ours, theirs = (x / temperature for x in problem.enlarged)
    target = problem.target[:, None]
    is_target = torch.zeros_like(ours).scatter_(1, target, 1.0)
    pairs = []
    for x in (ours, theirs):
        p = x.softmax(1).gather(1, target)
        pairs.append(torch.cat([p, 1 - p], 1).clamp(min=1e-12))
    pair = (pairs[1] * (pairs[1].log() - pairs[0].log())).sum(1)
    others = divergence(ours - 1000 * is_target, theirs - 1000 * is_target, 1.0)
    return temperature**2 * problem.mean(config.alpha * pair + config.beta * others)


def logit_std(problem: Problem) -> Tensor:
    ours, theirs = ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7) for x in problem.enlarged)
    return problem.mean(divergence(ours, theirs, problem.config.temperature))


def bpkd(problem: Problem) -> Tensor:
    config, (ours, theirs) = problem.config, problem.enlarged
    truth = problem.one_hot
    near = F.max_pool2d(truth, config.edge_width, stride=1, padding=config.edge_width // 2)
    edges = near * ((near.sum(1) > 1) & problem.labelled)[:, None]
    bodies = (problem.labelled[:, None] & (edges == 0)).flatten(2)
    at_pixels = divergence(ours * edges, theirs * edges, config.temperature)[:, None]
    edge = ((at_pixels * edges).sum((2, 3)) / edges.sum((2, 3)).clamp(min=1)).sum(1)
    body = []
    for s, t, inside in zip(ours.flatten(2), theirs.flatten(2), bodies, strict=True):
        classes = [
            divergence(a[here], b[here], config.temperature, 0) for a, b, here in zip(s, t, inside, strict=True)
        ]
        body.append(torch.stack(classes).mean())
    return (config.edge * edge + config.body * torch.stack(body)).mean()


def similarities(features: Tensor) -> Tensor:
    """Cosines of all positions [B, D, h, w] with all: [B, N, N]."""
    unit = F.normalize(features.flatten(2), dim=1)
    return unit.mT @ unit


def affinity(problem: Problem) -> Tensor:
    ours, theirs = (similarities(x) for x in problem.features)
    return (ours - theirs).square().mean()


def pairwise(problem: Problem) -> Tensor:
    nodes = []
    for features in problem.features:
        window = [math.ceil(size * problem.config.scale) for size in features.shape[-2:]]
        nodes.append(similarities(F.max_pool2d(features, window, stride=window, ceil_mode=True)))
    return (nodes[0] - nodes[1]).square().mean()


def ifvd(problem: Problem) -> Tensor:
    ours, theirs = problem.features
    target = labels_at(problem.labels, (ours.shape[-2], ours.shape[-1]))

    def cosines(features: Tensor) -> Tensor:
        centres = features.clone()
        for one in range(problem.student.logits.shape[1]):  # a map of each class's centre, as the authors fill it
            here = (target == one)[:, None].float()
            centre = (features * here).sum((2, 3), keepdim=True) / (here.sum((2, 3), keepdim=True) + 1e-6)
            centres = (1 - here) * centres + here * centre
        return F.cosine_similarity(features, centres, dim=1)

    difference = (cosines(ours) - cosines(theirs)).square()
    images = [d[here].mean() for d, here in zip(difference, target != VOID, strict=True)]
    return torch.stack(images).mean()


def cirkd_mini_batch(problem: Problem) -> Tensor:
    ours, theirs = (F.normalize(x.flatten(2), dim=1) for x in problem.features)
    pairs = [
        divergence(s.T @ other_s, t.T @ other_t, problem.config.temperature, 1).mean()
        for s, t in zip(ours, theirs, strict=True)
        for other_s, other_t in zip(ours, theirs, strict=True)
    ]
    return torch.stack(pairs).mean() / problem.config.temperature**2  # the formula has no T²


def cirkd_memory(problem: Problem) -> Tensor:
    """Same writing to the memory and same keys; the matrices of similarities whole."""
    term, config, (ours, theirs) = problem.term, problem.config, problem.features
    target = labels_at(problem.labels, (ours.shape[-2], ours.shape[-1]))
    s, t = (F.normalize(x, dim=1).permute(0, 2, 3, 1) for x in (term.head(ours), theirs))
    term.remember(t.flatten(0, 2), target)
    total = torch.zeros(())
    for queue, number in ((term.pixels, config.pixel_contrast), (term.regions, config.region_contrast)):
        keys, held = queue.draw(number // term.classes + 1)
        keys = keys[held]
        tau = config.contrast_temperature
        pixels = divergence(s @ keys.T / tau, t @ keys.T / tau, config.temperature, -1)
        total = (
            total + torch.stack([d[here != VOID].mean() for d, here in zip(pixels, target, strict=True)]).mean()
        )
    return total


FORMS: dict[str, Callable[[Problem], Tensor]] = {
    "cross_entropy": cross_entropy,
    "focal": supervised(focal),
    "dice": dice,
    "lovasz": lovasz,
    "ohem": ohem,
    "boundary": boundary,
    "confidence_penalty": supervised(confidence_penalty),
    "margin": supervised(margin),
    "kd": kd,
    "cwd": cwd,
    "dist": dist,
    "wsl": wsl,
    "dkd": dkd,
    "logit_std": logit_std,
    "bpkd": bpkd,
    "affinity": affinity,
    "pairwise": pairwise,
    "ifvd": ifvd,
    "cirkd_mini_batch": cirkd_mini_batch,
    "cirkd_memory": cirkd_memory,
}
