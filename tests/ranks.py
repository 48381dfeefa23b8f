"""What the tests run in several processes that work together, each saving what the first of them found."""

from types import SimpleNamespace
from typing import Any

import torch

from data import DataConfig, build_dataset
from engine.loop import evaluate, train_step
from engine.player import Learner, Player, TrainConfig
from engine.run import start_accelerator
from engine.teachers import LiveTeacher, TeacherConfig
from losses import DistillationLoss, LossConfig
from losses.features import AttentionTransferConfig, FitnetConfig
from losses.latent import AffinityConfig
from losses.logits import KDConfig
from losses.supervised import CrossEntropyConfig
from models.unet import UNet

BATCH = 8
CLASSES = ["a", "b", "c", "d"]


def hold(module: torch.nn.Module) -> None:
    """Batch-norm stays in eval mode, so that an image's answer does not depend on its company."""
    module.eval()
    module.train = lambda mode=True: module  # type: ignore[method-assign]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels whose numbers of void pixels differ widely, one image without any label."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 16, 24, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, len(CLASSES), (BATCH, 16, 24), generator=generator)
    for image in range(BATCH):
        labels[image, 2 * image :] = 255
    return images, labels


def gradients(output: str, accumulate: int) -> None:
    """The gradient of one step of `train_step` on the batch, over all processes and accumulated parts."""
    config = TrainConfig(
        optimizer="sgd", momentum=0.0, clip=0.0, batch_size=BATCH, accumulate=accumulate, threads=1
    )
    accelerator = start_accelerator(config)
    torch.manual_seed(0)
    model, teacher = UNet(CLASSES, 4, 1, 2).double(), UNet(CLASSES, 6, 1, 4).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            hold(module)
    torch.nn.init.normal_(model.classifier.weight)
    terms = LossConfig(
        cross_entropy=CrossEntropyConfig(class_weights="median", label_smoothing=0.1),
        kd=KDConfig(temperature=2.0),
        attention_transfer=AttentionTransferConfig(weight=100.0, taps=["bottleneck"]),
        fitnet=FitnetConfig(weight=1.0, taps=["decoder.0", "bottleneck"], labelled_only=True),
        affinity=AffinityConfig(weight=1.0, space="raw"),
    )
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    objective = DistillationLoss(terms, model.taps, teacher.taps, class_weights=lambda scheme: weights).double()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    live = LiveTeacher([teacher], accelerator.device, accelerator.autocast, TeacherConfig())
    player = Player(Learner(model, objective, live), config, accelerator)
    found: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        named = player.learner.named_parameters()
        found.update({name: parameter.grad.clone() for name, parameter in named})  # type: ignore[union-attr]

    player.optimizer.optimizer.register_step_pre_hook(keep)
    images, labels = batch()
    size = BATCH // accumulate
    parts = []
    for part in range(accumulate):
        ours = range(part * size + accelerator.process_index, (part + 1) * size, accelerator.num_processes)
        parts.append(SimpleNamespace(images=images[ours], labels=labels[ours]))
    run: Any = SimpleNamespace(accelerator=accelerator, seed=0, terminated=False)
    torch.seed()  # whatever came before, the step has random numbers of its own
    logged, _ = train_step(run, player, parts, 0, 10)
    if accelerator.is_main_process:
        untouched = all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
        result = {"gradients": found, "logged": logged, "teacher_untouched": untouched, "draw": torch.rand(3)}
        torch.save(result | {"processes": accelerator.num_processes}, output)


def matrices(output: str, scenes: list[int]) -> None:
    """Confusion matrices over `n` images for each n of `scenes`."""
    accelerator = start_accelerator(TrainConfig(threads=1))
    found = {}
    for number in scenes:
        data = build_dataset(DataConfig(size=[32, 64], scenes=4 * number), "val")
        assert len(data) == number
        torch.manual_seed(0)
        model = UNet(list(data.labels.names), 4, 1, 4)
        torch.nn.init.normal_(model.classifier.weight)
        found[number] = evaluate(accelerator, model, data)
    if accelerator.is_main_process:
        torch.save({"matrices": found, "processes": accelerator.num_processes}, output)
