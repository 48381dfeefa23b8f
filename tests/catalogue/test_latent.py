"""Knowledge adaptation: the autoencoder of stage 1, and what stage 2 compares in its latent space."""

import pytest
import torch
import torch.nn.functional as F
from cases import STUDENT_TAPS, TEACHER_TAPS, Answer, Shape, answers
from torch import Tensor

from errors import ConfigurationError
from losses import DistillationLoss, LossConfig
from losses.latent import (
    AffinityConfig,
    AutoencoderConfig,
    Decoder,
    Encoder,
    KTAConfig,
    Reconstruction,
    adaptation,
)
from losses.relations import affinity


def objective(**options: AutoencoderConfig | KTAConfig | AffinityConfig) -> DistillationLoss:
    torch.manual_seed(0)
    return DistillationLoss(LossConfig(cross_entropy=None, **options), STUDENT_TAPS, TEACHER_TAPS).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_adaptation_by_hand(p: int, masked: bool) -> None:
    """Position by position: normalised over its channels, never over space."""
    torch.manual_seed(0)
    ours, theirs = (torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 3, 4) < 0.6 if masked else None
    images = []
    for b in range(2):
        distances = []
        for y in range(3):
            for x in range(4):
                if mask is None or mask[b, y, x]:
                    a, t = ours[b, :, y, x], theirs[b, :, y, x]
                    distances.append((a / a.norm() - t / t.norm()).norm(p=p))
        images.append(sum(distances) / len(distances))
    expected = sum(images) / 2
    found = adaptation(ours, theirs, mask=mask, p=p)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(expected, ours)
    found.backward()
    torch.testing.assert_close(ours.grad, gradient)
    assert theirs.grad is None


def test_adaptation_of_positions_that_are_zero() -> None:
    ours = torch.zeros(1, 3, 2, 2, requires_grad=True)
    theirs = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    loss = adaptation(ours, theirs)
    loss.backward()
    assert float(loss.detach()) == 1.0
    assert not ours.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("halvings", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(16, 24), (7, 9), (1, 1)])
def test_latent_has_the_students_resolution(halvings: int, size: tuple[int, int]) -> None:
    """Of odd sizes too, as ceil(H / stride) has it, and the decoder answers the size it began with."""
    features = torch.rand(2, 6, *size)
    latent = Encoder(6, 4, halvings)(features)
    assert latent.shape == (2, 4, *(-(-length // 2**halvings) for length in size))
    assert Decoder(6, 4, halvings)(latent, size).shape == features.shape


def test_student_that_adapts_to_the_latent_costs_nothing() -> None:
    term = objective(kta=KTAConfig(weight=1.0, taps=["b"]), affinity=AffinityConfig(weight=1.0, taps=["b"]))
    student, teacher, labels = answers()
    (encoder,) = term.latents.encoders.values()
    latent = encoder(teacher.features["b"]).detach()
    for name in ("kta", "affinity"):
        term.terms[name].adapters[0] = torch.nn.Identity()
        term.terms[name].widths[0] = (latent.shape[1], latent.shape[1])
    _, values = term(Answer(student.logits, {"b": latent}), teacher, labels)
    assert float(values["kta"]) == 0
    assert abs(float(values["affinity"])) < 1e-15
    other = torch.rand_like(latent)
    _, values = term(Answer(student.logits, {"b": other}), teacher, labels)
    torch.testing.assert_close(values["kta"], adaptation(other, latent))
    torch.testing.assert_close(values["affinity"], affinity(other, latent))


def test_terms_share_one_autoencoder() -> None:
    both = objective(
        kta=KTAConfig(taps=["b", "b:a"]),
        affinity=AffinityConfig(taps=["b"]),
        autoencoder=AutoencoderConfig(channels=2),
    )
    assert set(both.latents.taps) == {"b/latent4", "a/latent4"}
    assert [(tap.halvings, tap.channels) for tap in both.latents.taps.values()] == [(0, 2), (1, 2)]
    assert both.teacher_taps == ["a", "b"]  # what the teacher itself is asked for
    assert not any("encoders" in name for name, p in both.named_parameters() if p.requires_grad)
    raw = objective(affinity=AffinityConfig(taps=["b"], space="raw"))
    assert not raw.latents.taps
    assert not list(raw.parameters())


def test_frozen_encoder_stays_as_it_is() -> None:
    """Its batch-norm's statistics too, though the objective is trained."""
    term = objective(kta=KTAConfig(weight=1.0, taps=["b"])).train()
    before = {name: value.clone() for name, value in term.latents.state_dict().items()}
    student, teacher, labels = answers()
    loss, _ = term(student, teacher, labels)
    loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in term.latents.state_dict().items())
    assert all(parameter.grad is None for parameter in term.latents.parameters())


def test_strides_that_do_not_fit_are_named_with_both_taps() -> None:
    config = LossConfig(kta=KTAConfig(taps=["fine:coarse"]))
    with pytest.raises(ConfigurationError) as caught:
        DistillationLoss(config, {"fine": Shape(3, 4)}, {"coarse": Shape(3, 8)})
    said = "losses.kta.taps: the student's fine has stride 4 and the teacher's coarse 8;"
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channels": -1}, "losses.autoencoder.channels: -1 is negative"),
        ({"epochs": 0.0}, "losses.autoencoder: epochs and lr must be positive"),
        ({"lr": 0.0}, "losses.autoencoder: epochs and lr must be positive"),
    ],
)
def test_mistakes_are_named(options: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        AutoencoderConfig(**options)  # type: ignore[arg-type]


def stage(alpha: float = 0.0) -> tuple[Reconstruction, Answer, Tensor, Tensor]:
    config = AutoencoderConfig(channels=3, alpha=alpha)
    term = objective(kta=KTAConfig(taps=["b:a"]), autoencoder=config)
    _, teacher, labels = answers(4)
    return Reconstruction(term.latents, lambda *_: teacher).double(), teacher, labels, torch.zeros(4, 3, 8, 12)


def test_reconstruction_by_hand() -> None:
    """Eq. 1, both sums over the features' elements."""
    learner, teacher, labels, images = stage(alpha=0.01)
    learner.eval()
    loss, values = learner(images, labels, teacher, 0, learner.counts(labels))
    features = teacher.features["a"]
    latent = learner.encoders["a/latent4"](features)
    made = learner.decoders["a/latent4"](latent, (4, 6))
    squared = (features - made).square().sum((1, 2, 3))
    expected = (squared + 0.01 * latent.abs().sum((1, 2, 3))).mean() / features[0].numel()
    torch.testing.assert_close(loss, expected.to(loss.dtype))
    share = (squared / features.square().sum((1, 2, 3))).mean()
    torch.testing.assert_close(values["a/latent4.error"], share.detach())


def test_parts_of_a_batch_add_up() -> None:
    learner, teacher, labels, images = stage(alpha=0.01)
    learner.eval()
    whole, _ = learner(images, labels, teacher, 0, learner.counts(labels))
    pieces = []
    for part in (slice(0, 1), slice(1, 4)):
        some = Answer(teacher.logits[part], {name: f[part] for name, f in teacher.features.items()})
        pieces.append(learner(images[part], labels[part], some, 0, learner.counts(labels))[0])
    torch.testing.assert_close(sum(pieces), whole)


def test_stage_1_learns() -> None:
    """On features of low rank the error falls to a small share, and encoder and decoder both change."""
    learner, teacher, labels, images = stage()
    torch.manual_seed(1)
    basis = F.interpolate(torch.rand(4, 2, 2, 3, dtype=torch.float64), (4, 6), mode="bilinear")
    teacher.features["a"] = torch.einsum("bchw,cd->bdhw", basis, torch.rand(2, 6, dtype=torch.float64))
    before = {name: value.clone() for name, value in learner.named_parameters()}
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    errors = []
    for step in range(150):
        loss, values = learner(images, labels, teacher, step, learner.counts(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(values["a/latent4.error"]))
    assert errors[-1] < 0.05 * errors[0]
    assert errors[-1] < 0.05
    assert not any(torch.equal(value, before[name]) for name, value in learner.named_parameters())
