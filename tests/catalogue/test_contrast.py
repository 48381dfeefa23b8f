"""Contrast with a memory of the teacher's embeddings, and of patches, value by value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, STUDENT_TAPS, TEACHER_TAPS, VOID, Answer, Shape, answers, changed, gradients, objective
from forks import Forks
from torch import Tensor

from errors import ConfigurationError
from losses import DistillationLoss, LossConfig, relations
from losses.contrast import AfDCDConfig, CIRKDMemory, CIRKDMemoryConfig, Queue, af_dcd, sample_keys
from losses.term import Context

# ----------------------------------------------------------------------------------------------------- the queue


def numbered(numbers: list[int], classes: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(numbers, dtype=torch.float32)[:, None], torch.tensor(classes, dtype=torch.int64)


def kept(queue: Queue, label: int) -> list[int]:
    return queue.keys[label, :, 0].int().tolist()


def test_queue_goes_round() -> None:
    """Keys that reach over the end go on at the start, in each class for itself."""
    queue = Queue(3, 5, 1)
    queue.write(*numbered([1, 10, 2, 3, 11], [0, 2, 0, 0, 2]))
    assert (kept(queue, 0), kept(queue, 1), kept(queue, 2)) == ([1, 2, 3, 0, 0], [0] * 5, [10, 11, 0, 0, 0])
    assert queue.pointer.tolist() == [3, 0, 2]
    assert queue.filled.tolist() == [3, 0, 2]
    queue.write(*numbered([4, 5, 6, 7], [0, 0, 0, 0]))
    assert kept(queue, 0) == [6, 7, 3, 4, 5]
    assert queue.pointer.tolist() == [2, 0, 2]
    assert queue.filled.tolist() == [5, 0, 2]


def test_queue_of_more_than_fits() -> None:
    """The newest stay, as if they had come one by one; keys up to the very end leave the pointer at the start."""
    for before in range(5):
        at_once, singly = Queue(2, 4, 1), Queue(2, 4, 1)
        first, then = [*range(1, before + 1)], [*range(10, 20)]
        for queue in (at_once, singly):
            queue.write(*numbered(first, [1] * before))
        at_once.write(*numbered(then, [1] * 10))
        for number in then:
            singly.write(*numbered([number], [1]))
        assert kept(at_once, 1) == kept(singly, 1)
        assert sorted(kept(at_once, 1)) == [16, 17, 18, 19]
        assert at_once.pointer.tolist() == singly.pointer.tolist()
        assert at_once.filled.tolist() == [0, 4]
    whole = Queue(1, 4, 1)
    whole.write(*numbered([1, 2, 3, 4], [0] * 4))
    assert (kept(whole, 0), whole.pointer.tolist()) == ([1, 2, 3, 4], [0])
    whole.write(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))
    assert (kept(whole, 0), whole.pointer.tolist()) == ([1, 2, 3, 4], [0])


def test_queue_draws_what_it_holds() -> None:
    """Different keys of each class, at random, and none of the empty places."""
    queue = Queue(3, 8, 1)
    queue.write(*numbered([*range(1, 6), 21, *range(31, 41)], [0] * 5 + [1] + [2] * 10))
    drawn: list[set[int]] = [set(), set(), set()]
    for seed in range(30):
        torch.manual_seed(seed)
        keys, held = queue.draw(3)
        assert keys.shape == (3, 3, 1)
        assert held.sum(1).tolist() == [3, 1, 3]
        for label in range(3):
            found = keys[label, held[label], 0].int().tolist()
            assert len(set(found)) == len(found)
            drawn[label] |= set(found)
    assert drawn == [{1, 2, 3, 4, 5}, {21}, set(range(33, 41))]
    keys, held = queue.draw(100)
    assert held.sum(1).tolist() == [5, 1, 8]


# ------------------------------------------------------------------------------------------------------- the keys


def test_keys_are_of_their_class() -> None:
    """The trap: a permutation of a class's pixels used as an index into the image's."""
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (3, 6, 8))
    labels[torch.rand(labels.shape) < 0.3] = VOID
    labels[0][labels[0] == 2] = VOID
    labels[1] = VOID
    place = torch.arange(labels.numel()).double()
    embeddings = torch.stack([place.cos(), place.sin()], 1)  # each position has a direction of its own
    (pixels, pixel_classes), (regions, region_classes) = sample_keys(embeddings, labels, 5, 3)
    flat = labels.flatten()
    counts = [[int((labels[i] == c).sum()) for c in range(5)] for i in range(3)]
    expected = [c for i in range(3) for c in range(5) for _ in range(min(3, counts[i][c]))]
    assert pixel_classes.tolist() == expected
    found = [int((embeddings - key).abs().sum(1).argmin()) for key in pixels]
    assert len(set(found)) == len(found)
    assert flat[found].tolist() == expected
    assert region_classes.tolist() == [c for i in range(3) for c in range(5) if counts[i][c]]
    means = [
        F.normalize(embeddings.view(3, 48, 2)[i][labels[i].flatten() == c].mean(0), dim=0)
        for i in range(3)
        for c in range(5)
        if counts[i][c]
    ]
    torch.testing.assert_close(regions, torch.stack(means))
    draws = [sample_keys(embeddings, labels, 5, 3)[0][0] for _ in range(2)]
    assert not torch.equal(*draws)


# ------------------------------------------------------------------------------------------------------- the term


def memory(**options: Any) -> CIRKDMemory:
    torch.manual_seed(0)
    config = CIRKDMemoryConfig(**({"taps": ["b"], "pixel_memory": 6, "region_memory": 4} | options))
    return CIRKDMemory(config, Context(STUDENT_TAPS, TEACHER_TAPS, CLASSES)).double()


def filled(**options: Any) -> CIRKDMemory:
    """In eval mode, with something in its memory, of which all is drawn: nothing is left to chance."""
    term = memory(pixel_contrast=1000, region_contrast=1000, **options).eval()
    for queue, number in ((term.pixels, 17), (term.regions, 7)):
        keys = F.normalize(torch.randn(number, 7, dtype=torch.float64), dim=1)
        queue.write(keys, torch.randint(0, CLASSES - 1, (number,)))  # nothing of the last class
    return term


def direct(term: CIRKDMemory, student: Answer, teacher: Answer, labels: Tensor) -> Tensor:
    """Image by image, with what the queues hold."""
    config = term.config
    stride = labels.shape[-1] // student.features["b"].shape[-1]
    head = term.head(student.features["b"])
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(labels)):
        labelled = labels[i, ::stride, ::stride].flatten() != VOID
        if not labelled.any():
            continue
        ours, theirs = (
            F.normalize(x[i].flatten(1).T[labelled], dim=1) for x in (head, teacher.features["b"].detach())
        )
        for queue, share in ((term.pixels, 1.0), (term.regions, config.region_share)):
            keys = torch.cat([queue.keys[c, : queue.filled[c]] for c in range(CLASSES)])
            logs = [
                F.log_softmax(x @ keys.T / config.contrast_temperature / config.temperature, 1)
                for x in (ours, theirs)
            ]
            divergence = F.kl_div(logs[0], logs[1], reduction="batchmean", log_target=True)
            total = total + share * config.temperature**2 * divergence
    return total / len(labels)


def test_memory_against_the_direct_form() -> None:
    """Value and gradient, of the student and of the head; T², the region's share; places that hold nothing."""
    term = filled(temperature=1.5, region_share=0.3)
    student, teacher, labels = answers(3)
    labels[1] = VOID
    denominator = torch.tensor(3.0, dtype=torch.float64)
    found, expected = term(student, teacher, labels, denominator), direct(term, student, teacher, labels)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    inputs = [student.features["b"], *term.head.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(loss, inputs) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


def test_a_filled_memory_adds_up_over_parts() -> None:
    term = filled()
    student, teacher, labels = answers(4)
    labels[0] = VOID
    denominator = torch.tensor(4.0, dtype=torch.float64)
    whole = term(student, teacher, labels, denominator)
    parts = torch.zeros_like(whole)
    for part in (slice(0, 1), slice(1, 4)):
        ours, theirs = (changed(answer, lambda x, part=part: x[part]) for answer in (student, teacher))
        parts = parts + term(ours, theirs, labels[part], denominator)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


def test_an_empty_memory_costs_nothing() -> None:
    term = memory().eval()
    student, teacher, labels = answers()
    loss = term(student, teacher, labels, torch.tensor(2.0))
    assert float(loss.detach()) == 0
    assert not any(gradient.any() for gradient in gradients(loss, student))


def test_memory_is_written_in_training_alone() -> None:
    """By the teacher, at its positions' labels; not in eval mode, and nothing of void images."""
    term = memory()
    student, teacher, labels = answers()
    before = {name: value.clone() for name, value in term.named_buffers() if "head" not in name}
    denominator = torch.tensor(2.0, dtype=torch.float64)
    for training, image_labels, written in (
        (False, labels, False),
        (True, torch.full_like(labels, VOID), False),
        (True, labels, True),
    ):
        term.train(training)(student, teacher, image_labels, denominator)
        assert (
            any(not torch.equal(value, dict(term.named_buffers())[name]) for name, value in before.items())
            == written
        )
    seen = labels[:, ::4, ::4]
    counts = torch.tensor([int((seen == c).sum()) for c in range(CLASSES)])
    assert torch.equal(term.pixels.filled, counts.clamp(max=6))
    embeddings = F.normalize(teacher.features["b"].detach(), dim=1)
    for c in range(CLASSES):
        own = embeddings.movedim(1, -1)[seen == c]
        for key in term.pixels.keys[c, : term.pixels.filled[c]]:
            assert (own - key).abs().sum(1).min() < 1e-12
    regions = sum(int((seen[i] == c).any()) for i in range(2) for c in range(CLASSES))
    assert int(term.regions.filled.sum()) == regions


def test_memory_is_restored_exactly() -> None:
    """A term that is saved and loaded in the midst goes on as the one that was not."""
    student, teacher, labels = answers(dtype=torch.float32)
    denominator = torch.tensor(2.0)

    def step(term: CIRKDMemory, number: int) -> Tensor:
        torch.manual_seed(number)
        return term(student, teacher, labels.roll(number, 2), denominator).detach()

    first, second = memory().float(), memory().float()
    step(first, 1), step(first, 2)
    second.load_state_dict(first.state_dict())
    assert torch.equal(step(first, 3), step(second, 3))
    for (name, ours), theirs in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_memory_names_its_buffers_and_its_size() -> None:
    """The objective's names of them are names of its buffers."""
    taps = {"a": Shape(256, 4)}
    config = LossConfig(cirkd_memory=CIRKDMemoryConfig(taps=["a"]))
    objective = DistillationLoss(config, taps, taps, classes=19)
    buffers = dict(objective.named_buffers())
    assert {name.rpartition(".")[2] for name in objective.memories} == {"keys", "pointer", "filled"}
    assert len(objective.memories) == 6
    assert set(objective.memories) <= set(buffers) == set(objective.state_dict()) & set(buffers)
    (line,) = [line for line in objective.describe() if line.startswith("cirkd_memory")]
    assert "memory: 19 classes × (20000 + 2000) × 256 channels = 408 MiB" in line


def test_processes_write_alike(forks: Forks, tmp_path: Path) -> None:
    """The keys of all, in the order of the processes."""
    outcomes = forks.call("catalogue.together:remember", str(tmp_path), ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    regions = 0
    for step in range(2):
        for rank in range(2 - step):
            labels = answers(1 + rank, seed=10 * step + rank)[2][:, ::4, ::4]
            regions += sum(len(set(image.flatten().tolist()) - {VOID}) for image in labels)
    assert int(first["regions.filled"].sum()) == regions


# ---------------------------------------------------------------------------------------------------------- af_dcd


def direct_af_dcd(student: Tensor, teacher: Tensor, groups: int, patch: int, tau: float) -> Tensor:
    """Piece by piece, on maps that need no pooling."""
    batch, channels, height, width = student.shape
    size, total = channels // groups, torch.zeros((), dtype=student.dtype)
    for b in range(batch):
        for top in range(0, height, patch):
            for left in range(0, width, patch):
                places = [(top + i, left + j) for i in range(patch) for j in range(patch)]
                for y, x in places:
                    for g in range(groups):
                        piece = student[b, g * size : (g + 1) * size, y, x]

                        def similarity(
                            place: tuple[int, int], other: int, b: int = b, piece: Tensor = piece
                        ) -> Tensor:
                            theirs = teacher[b, other * size : (other + 1) * size, place[0], place[1]]
                            return -(piece - theirs).abs().sum() / tau

                        negatives = [similarity(p, o) for p in places for o in range(groups) if o != g]
                        positive = similarity((y, x), g)
                        total = total + torch.stack([positive, *negatives]).logsumexp(0) - positive
    return total / (batch * height * width)


@pytest.mark.parametrize("patches", [1, 4, 100])
def test_af_dcd_against_the_direct_form(patches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many patches a block has."""
    monkeypatch.setitem(relations.BLOCK_ELEMENTS, "cpu", patches * 12**2)
    torch.manual_seed(0)
    student = torch.randn(2, 6, 4, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 6, 4, 6, dtype=torch.float64)
    found = af_dcd(student, teacher, groups=3, pool=1, patch=2, temperature=0.5)
    expected = direct_af_dcd(student, teacher, 3, 2, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    ours, theirs = (torch.autograd.grad(loss, student)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


def test_af_dcd_pools_and_cuts() -> None:
    """Whole windows and whole patches alone; of a map smaller than them there is still something."""
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 4, 19, 22), torch.randn(1, 4, 19, 22)
    pooled = [F.max_pool2d(x, 2)[..., :8, :8] for x in (student, teacher)]
    found = af_dcd(student, teacher, groups=2, pool=2, patch=4)
    torch.testing.assert_close(found, af_dcd(*pooled, groups=2, pool=1, patch=4))
    for height, width in ((1, 1), (3, 5), (1, 9)):
        cut = af_dcd(student[..., :height, :width], teacher[..., :height, :width], groups=2)
        assert torch.isfinite(cut)
        assert cut > 0


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CIRKDMemoryConfig(taps=["a", "b"]), "losses.cirkd_memory.taps: 2 taps; name one"),
        (lambda: CIRKDMemoryConfig(pixel_memory=0), "losses.cirkd_memory.pixel_memory: 0 is too small"),
        (lambda: CIRKDMemoryConfig(temperature=0.0), "losses.cirkd_memory.temperature: 0.0 is not positive"),
        (lambda: AfDCDConfig(taps=[]), "losses.af_dcd.taps: empty"),
        (lambda: AfDCDConfig(mask_ratio=1.0), "losses.af_dcd.mask_ratio: 1.0 is not in"),
        (lambda: AfDCDConfig(groups=1), "losses.af_dcd: groups must be 2 or more"),
    ],
)
def test_mistakes(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_what_the_models_must_be() -> None:
    config = LossConfig(cirkd_memory=CIRKDMemoryConfig(taps=["b"]))
    with pytest.raises(ConfigurationError, match="losses.cirkd_memory: needs the number of classes"):
        DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS)
    config = LossConfig(af_dcd=AfDCDConfig(taps=["b"]))
    with pytest.raises(ConfigurationError, match="losses.af_dcd.groups: 16 is no divisor of the 7 channels"):
        DistillationLoss(config, STUDENT_TAPS, TEACHER_TAPS)


def test_keys_that_are_not_finite_never_enter_the_memory() -> None:
    """They would stay there for thousands of steps."""
    student, teacher, labels = answers(dtype=torch.float32)
    term = objective("cirkd_memory")
    spoilt = changed(teacher, torch.clone)
    with torch.no_grad():
        spoilt.features["b"][0, :, 0] = torch.inf
        spoilt.features["b"][1, 0, 1] = torch.nan
    term(student, spoilt, labels)
    memory = term.terms["cirkd_memory"]
    assert memory.pixels.filled.any()
    assert memory.pixels.keys.isfinite().all()
    assert memory.regions.keys.isfinite().all()
    loss, _ = term(student, teacher, labels)
    assert torch.isfinite(loss)
