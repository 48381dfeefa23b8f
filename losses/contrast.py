"""Contrast: with a memory of the teacher's embeddings, and of patches of channels and positions with one another.

Dimension letters: B images, N positions, C classes, D channels, M keys of one call, K keys to compare with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from errors import ConfigurationError
from losses.features import FeatureTerm
from losses.relations import block_elements, labels_at, row_divergence, unit_vectors
from losses.term import (
    IGNORE_INDEX,
    BatchNorm,
    Context,
    ModelOutput,
    TapsConfig,
    Term,
    TermConfig,
    full_precision,
    pair_taps,
    resize,
)


@dataclass
class CIRKDMemoryConfig(TermConfig):
    """CIRKD with a memory (Yang et al. 2022): similarities to embeddings of the teacher from many batches."""

    weight: float = 0.1
    """Factor of the term in the total loss: of its pixel part, and of its region part by `region_share`."""
    region_share: float = 1.0
    """Weight of the region part as a share of the pixel part's."""
    taps: list[str] = field(default_factory=lambda: ["last"])
    """One of `last` (what the classifiers see), `bottleneck`, a tap, or `student_tap:teacher_tap`."""
    pixel_memory: int = 20000
    """Embeddings of single positions that are kept of each class."""
    region_memory: int = 2000
    """Mean embeddings of a class in an image that are kept of each class."""
    pixel_contrast: int = 4096
    """Positions' embeddings to compare with at a step, over all classes."""
    region_contrast: int = 1024
    """Regions' embeddings to compare with at a step, over all classes."""
    pixel_update: int = 16
    """Positions of each class in each image that enter the memory."""
    contrast_temperature: float = 0.1
    """Divides the cosines."""
    temperature: float = 1.0
    """T of the divergence, which keeps its T²."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.taps) != 1:
            raise ConfigurationError(
                f"losses.cirkd_memory.taps: {len(self.taps)} taps; name one, as there is one memory"
            )
        for key in ("pixel_memory", "region_memory", "pixel_contrast", "region_contrast", "pixel_update"):
            if getattr(self, key) < 1:
                raise ConfigurationError(
                    f"losses.cirkd_memory.{key}: {getattr(self, key)} is too small; give 1 or more"
                )
        for key in ("contrast_temperature", "temperature"):
            if getattr(self, key) <= 0:
                raise ConfigurationError(
                    f"losses.cirkd_memory.{key}: {getattr(self, key)} is not positive; leave its default"
                )


class Queue(nn.Module):
    """The newest `size` keys of each class: buffers that are saved and restored with the term.

    Attributes:
        keys: [C, size, D].
        pointer: int64 [C], where the next key goes.
        filled: int64 [C], how many places hold a key; the others are never compared with.
    """

    keys: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, classes: int, size: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(classes, size, channels))
        self.register_buffer("pointer", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros(classes, dtype=torch.int64))

    @torch.no_grad()
    def write(self, keys_MD: Tensor, classes_M: Tensor) -> None:
        """Puts each key behind the last of its class, in their order, round to the start where the queue ends."""
        classes, size = self.keys.shape[:2]
        order = torch.argsort(classes_M, stable=True)
        counts_C = torch.bincount(classes_M, minlength=classes)
        ordered = classes_M[order]
        rank = _rank(counts_C, ordered)
        kept = rank >= counts_C[ordered] - size  # of more than fit, the newest
        place = (self.pointer[ordered] + rank) % size
        self.keys[ordered[kept], place[kept]] = keys_MD[order[kept]].to(self.keys)
        self.pointer.copy_((self.pointer + counts_C) % size)
        self.filled.copy_((self.filled + counts_C).clamp(max=size))

    @torch.no_grad()
    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        """Up to `number` different keys of each class at random, [C, k, D], and which there are, [C, k]."""
        classes, size = self.keys.shape[:2]
        places = torch.arange(size, device=self.keys.device)
        score = torch.rand(classes, size, device=self.keys.device)
        score = torch.where(places < self.filled[:, None], score, -1.0)
        best, index = score.topk(min(number, size), dim=1)
        return self.keys[torch.arange(classes, device=index.device)[:, None], index], best >= 0


def _rank(counts: Tensor, ordered: Tensor) -> Tensor:
    """Place of each element in its group; `ordered` lists the elements' groups in order, of `counts` each."""
    start = counts.cumsum(0) - counts
    return torch.arange(len(ordered), device=ordered.device) - start[ordered]


def sample_keys(
    embeddings_PD: Tensor, labels: Tensor, classes: int, number: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What of a batch enters the memory: keys [M, D] of unit length and classes [M], of pixels and of regions.

    Pixels: up to `number` positions at random of each class of each image. Regions: the mean over a class in an
    image. Images come in their order and classes by number within an image.

    Args:
        embeddings_PD: the teacher's [B h w, D], of unit length.
        labels: int64 [B, h, w], 255 unlabelled.
    """
    batch, channels = len(labels), embeddings_PD.shape[1]
    labels_BN, device = labels.flatten(1), labels.device
    image_BN = torch.arange(batch, device=device)[:, None].expand_as(labels_BN)
    group = torch.where(labels_BN == IGNORE_INDEX, batch * classes, image_BN * classes + labels_BN).flatten()
    counts = torch.bincount(group, minlength=batch * classes + 1)
    order = torch.argsort(group + torch.rand(group.shape, dtype=torch.float64, device=device))
    ordered = group[order]
    chosen = (_rank(counts, ordered) < number) & (ordered < batch * classes)
    pixels = embeddings_PD[order[chosen]], ordered[chosen] % classes

    sums = embeddings_PD.new_zeros(batch * classes + 1, channels).index_add_(0, group, embeddings_PD)[:-1]
    present = (counts[:-1] > 0).nonzero()[:, 0]
    return pixels, (F.normalize(sums[present], dim=1), present % classes)


def gather(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors [M, ...] of all processes one behind the other, where M may differ between processes."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return list(tensors)
    own = torch.tensor([len(tensors[0])], device=tensors[0].device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    sizes = [int(count) for count in counts]
    gathered = []
    for tensor in tensors:
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        gathered.append(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]))
    return gathered


class CIRKDMemory(Term):
    """Mean over images of the mean over labelled positions of `T² KL(p_t || p_s)`, to pixels, and so to regions.

    `p = softmax(cos(f, keys) / contrast_temperature / T)` over keys drawn from a memory of the teacher's
    embeddings, of all classes alike; the pixels' and the regions' memories give a part each, which are added up.
    The student's embedding is a learned projection to the teacher's width (1×1 convolution, batch-norm, ReLU, 1×1
    convolution); the teacher's is its feature. Cross-image relational distillation, Yang et al. 2022. In training
    the keys of a batch enter the memory first (`sample_keys`), of all processes in the same order, so that the
    memories of all stay the same; which of its keys a process compares with is its own choice.

    Where the authors' code departs, and what is done here:

    - It picks the pixels for a class's queue among the first of the image, whatever their class: here by class.
    - It overwrites the end of a queue when keys don't fit, here they go round to its start.
    - Its queues begin as random vectors that are compared with; here empty places never are.
    - It compares with the same places of each class; here each class draws its own, as the classes fill unevenly.
    - It takes the mean over the labelled positions of a batch, here over those of an image and then over images.

    The memory is of the local device's dtype float32, `classes × (pixel_memory + region_memory) × D`. A loss
    depends on what is in the memory and on chance, so parts of a batch don't add up to the batch.
    """

    def __init__(self, config: CIRKDMemoryConfig, context: Context) -> None:
        super().__init__()
        self.config, self.classes = config, context.classes
        self.pairs = pair_taps("cirkd_memory", config.taps, context)
        if len(self.pairs) != 1:
            raise ConfigurationError(
                f"losses.cirkd_memory.taps: {config.taps[0]} is {len(self.pairs)} taps; name one, say last"
            )
        ((ours, theirs),) = self.pairs
        self.student_taps, self.teacher_taps = [ours], [theirs]
        if not context.classes:
            raise ConfigurationError(
                "losses.cirkd_memory: needs the number of classes; give DistillationLoss its argument classes"
            )
        width = context.taught("cirkd_memory")[theirs].channels
        self.head = nn.Sequential(
            nn.Conv2d(context.student[ours].channels, width, 1, bias=False),
            BatchNorm(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
        )
        self.pixels = Queue(self.classes, config.pixel_memory, width)
        self.regions = Queue(self.classes, config.region_memory, width)

    def memories(self) -> list[str]:
        return [f"{queue}.{name}" for queue in ("pixels", "regions") for name, _ in self.pixels.named_buffers()]

    def note(self) -> str:
        size = sum(queue.keys.numel() * queue.keys.element_size() for queue in (self.pixels, self.regions))
        config, width = self.config, self.pixels.keys.shape[2]
        return (
            f"memory: {self.classes} classes × ({config.pixel_memory} + {config.region_memory}) × {width} "
            f"channels = {size / 2**20:.0f} MiB"
        )

    def forward(
        self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, denominator: Tensor
    ) -> Tensor:
        assert teacher is not None
        ((ours, theirs),) = self.pairs
        projected = full_precision(self.head(student.features[ours]))
        size = (projected.shape[-2], projected.shape[-1])
        target = labels_at(labels, size)
        taught = resize(full_precision(teacher.features[theirs].detach()), size)
        rows_PS, rows_PT = (unit_vectors(x).mT.flatten(0, 1) for x in (projected, taught))
        if self.training:
            self.remember(rows_PT, target)

        labelled_BN = (target != IGNORE_INDEX).flatten(1).to(rows_PS)
        weight_BN = labelled_BN / labelled_BN.sum(1, keepdim=True).clamp(min=1) / denominator
        config, total = self.config, torch.zeros((), device=labels.device)
        for queue, number, share in (
            (self.pixels, config.pixel_contrast, 1.0),
            (self.regions, config.region_contrast, config.region_share),
        ):
            keys_CKD, held_CK = queue.draw(number // self.classes + 1)
            keys_KD = keys_CKD.flatten(0, 1).to(rows_PS)
            divergence = row_divergence(
                rows_PS,
                rows_PT,
                keys_KD,
                keys_KD,
                weight=weight_BN.flatten(),
                counted=held_CK.flatten(),
                temperature=config.contrast_temperature * config.temperature,
            )
            total = total + share * config.temperature**2 * divergence
        return total

    def remember(self, embeddings_PD: Tensor, labels: Tensor) -> None:
        """Writes keys of the batches of all processes into the memory; none that are not finite, to stay there."""
        finite = embeddings_PD.isfinite().all(1)
        labels = torch.where(finite.view_as(labels), labels, IGNORE_INDEX)
        embeddings_PD = torch.where(finite[:, None], embeddings_PD, 0.0)
        found = sample_keys(embeddings_PD, labels, self.classes, self.config.pixel_update)
        for queue, keys in zip((self.pixels, self.regions), found, strict=True):
            queue.write(*gather(keys))


@dataclass
class AfDCDConfig(TapsConfig):
    """Augmentation-free dense contrastive distillation (Fan et al. 2023): a patch's pieces against one another."""

    contrast_weight: float = 0.005
    """Factor of the contrast (Cityscapes; the authors have 0.01 for CamVid)."""
    feature_weight: float = 0.016
    """Factor of the squared error of the generated features (2e-6 of the authors' sum over a map of 64×128)."""
    mask_ratio: float = 0.75
    """Share of the positions of the student's map that are blanked before the teacher's is generated from it."""
    groups: int = 16
    """Groups of channels, of the teacher's width."""
    pool: int = 4
    """Max-pooling before the contrast; 1: none."""
    patch: int = 4
    """Height and width of a patch, in pooled positions."""
    temperature: float = 0.07
    """Divides the distances."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask_ratio < 1:
            raise ConfigurationError(
                f"losses.af_dcd.mask_ratio: {self.mask_ratio} is not in [0, 1); give say 0.75"
            )
        if self.groups < 2 or self.pool < 1 or self.patch < 1 or self.temperature <= 0:
            raise ConfigurationError(
                "losses.af_dcd: groups must be 2 or more, pool and patch 1 or more, temperature positive"
            )


def af_dcd(
    student: Tensor, teacher: Tensor, *, groups: int = 16, pool: int = 4, patch: int = 4, temperature: float = 0.07
) -> Tensor:
    """Mean over images and positions of the sum over groups of channels of a contrastive loss within a patch.

    Both maps are max-pooled and cut into patches, and the channels of a position into groups; a piece is one group
    at one position. Its similarity to the teacher's pieces of its patch is the negative L1 distance / temperature.
    The positive is the same piece; the negatives are the pieces of the other groups, at all positions of the
    patch. The same group elsewhere is neither. Augmentation-free dense contrastive distillation, Fan et al. 2023,
    as in the authors' code (`OmniContrastiveFeatureLoss`), whose maps must fit: here what goes beyond whole
    windows and patches is cut off, and a map smaller than them has smaller ones.

    Args:
        student, teacher: [B, D, h, w], of the same width, of which `groups` is a divisor.
    """

    def pieces(features: Tensor) -> Tensor:
        window = [min(pool, size) for size in features.shape[-2:]]
        pooled = F.max_pool2d(full_precision(features), window)
        batch, channels, height, width = pooled.shape
        p, q = min(patch, height), min(patch, width)
        rows, columns = height // p, width // q
        cut = pooled[..., : rows * p, : columns * q]
        cut = cut.reshape(batch, groups, channels // groups, rows, p, columns, q).permute(0, 3, 5, 4, 6, 1, 2)
        return cut.reshape(batch * rows * columns, p * q * groups, channels // groups)

    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = pieces(student), pieces(teacher.detach())
        total = _PatchContrast.apply(ours, theirs, groups, temperature)
    return total * (groups / (ours.shape[0] * ours.shape[1]))


class _PatchContrast(torch.autograd.Function):
    """Sum over pieces [Q, P, D] of Q patches of their contrastive losses, a block of patches at a time."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, groups: int, temperature: float) -> Tensor:
        wanted, pieces = ctx.needs_input_grad[0], student.shape[1]
        group = torch.arange(pieces, device=student.device) % groups
        neither = (group[:, None] == group) & ~torch.eye(pieces, dtype=torch.bool, device=student.device)
        gradient = torch.empty_like(student) if wanted else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        # cdist's backward pass on a GPU makes all differences of a block, channel by channel.
        width = student.shape[2] if student.is_cuda else 1
        step = max(1, block_elements(student.device) // (pieces**2 * width))
        for start in range(0, len(student), step):
            block = slice(start, start + step)
            ours = student[block].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                similarity = torch.cdist(ours, teacher[block], p=1) / -temperature
                positive = similarity.diagonal(dim1=1, dim2=2)
                value = (similarity.masked_fill(neither, -torch.inf).logsumexp(2) - positive).sum()
            if gradient is not None:
                (gradient[block],) = torch.autograd.grad(value, ours)
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total.to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None, None


class AfDCD(FeatureTerm):
    """`af_dcd` between the teacher's features and those generated from the student's, and their squared error.

    The student's map goes through a 1×1 convolution to the teacher's width, random positions are blanked, and two
    3×3 convolutions with a ReLU between them generate the teacher's map. The value is `contrast_weight` times the
    contrast plus `feature_weight` times the mean over positions of the squared error, summed over channels: the
    authors sum it over positions too, which depends on the image's size. Their 1×1 convolution fails where the
    widths are equal. All positions count, labelled or not.
    """

    def __init__(self, config: AfDCDConfig, context: Context) -> None:
        super().__init__(config, context)
        self.config = config
        for (_, theirs), (_, width) in zip(self.pairs, self.widths, strict=True):
            if width % config.groups:
                raise ConfigurationError(
                    f"losses.af_dcd.groups: {config.groups} is no divisor of the {width} "
                    f"channels of the teacher's {theirs}; give one that is"
                )
        self.adapters = nn.ModuleList(nn.Conv2d(ours, theirs, 1) for ours, theirs in self.widths)
        self.generators = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _, width in self.widths
        )

    def project(self, pair: int, features: Tensor) -> Tensor:
        aligned = self.adapters[pair](features)
        blank = torch.rand(len(aligned), 1, *aligned.shape[-2:], device=aligned.device) < self.config.mask_ratio
        return full_precision(self.generators[pair](aligned.masked_fill(blank, 0.0)))

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        config = self.config
        contrast = af_dcd(
            student,
            teacher,
            groups=config.groups,
            pool=config.pool,
            patch=config.patch,
            temperature=config.temperature,
        )
        error = (student - teacher).square().sum(1).mean()
        return config.contrast_weight * contrast + config.feature_weight * error
