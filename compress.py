"""Make a trained model smaller and faster in stages: prune, fine-tune with distillation, quantise, export.

prune, fine-tune, int8   python compress.py runs/distilled configs/camvid_compress/kd.yaml
another teacher          python compress.py runs/distilled teacher.run=runs/teacher stages=[prune,finetune]
to a measured latency    python compress.py runs/distilled prune.target=latency prune.share=0.5 prune.round_to=8
in three rounds          python compress.py runs/distilled prune.rounds=3
files alone              python compress.py runs/distilled stages=[export] export.formats=[onnx,openvino]
go on                    python compress.py runs/compressed/config.yaml resume=true

Each stage takes the model of the one before it, and is a run of its own in RUN_DIR/NUMBER-NAME, which evaluate.py
and profile_latency.py take. What each came to stands in RUN_DIR/stages.md and stages.json. The accuracy of int8
and of exported files is that of the file in its runtime.
"""

import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from yaml import YAMLError

from data import DataConfig, SegmentationData, build_dataset
from data.dataset import EVALUATION
from data.sampling import Key, class_uniform_order
from data.transforms import resize_image
from deploy import search
from deploy.export import ExportConfig, export
from deploy.exported import RUNTIMES, Exported, open_exported
from deploy.int8 import Int8Config, quantise
from deploy.npu import check, findings_table
from deploy.profiling import count_flops, count_parameters
from deploy.prune import PruneConfig, prune
from deploy.runtimes import Work, measure
from distill import learn_from_frozen, need_a_taught_term, need_no_latents, objective_for
from engine.checkpoint import sync
from engine.config import run_script, save
from engine.loop import add_up, evaluate, fit, summarise, to_device
from engine.player import Learner, TrainConfig
from engine.run import Run, environment, on_main_process, read_json, start_accelerator, start_chain, start_run
from engine.teachers import OwnTeacher, TeacherConfig
from engine.tracking import TrackingConfig, write_json
from errors import ConfigurationError, DamagedFileError, Terminated
from evaluation.metrics import ConfusionMatrix
from evaluation.report import duration, percent, quantity, significant, table
from losses import LossConfig
from losses.logits import KDConfig
from losses.upsampled import upsampled_loss
from models import SegmentationModel, load_model

RECORD = "stages.json"
STAGES = ("prune", "finetune", "int8", "qat", "export")
PARENT = "parent"


@dataclass
class LearningConfig:
    """A training of a compressed model."""

    losses: LossConfig = field(default_factory=lambda: LossConfig(kd=KDConfig()))
    """Its objective: any that distill.py knows; without a term that compares with a teacher, labels alone."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=1e-3))
    """The training."""


@dataclass
class LatencyConfig:
    """How the latencies of the table are measured, after the last stage."""

    threads: int = 1
    """CPU threads of every runtime."""
    rounds: int = 10
    """Turns of the parent and each stage; 0: no latencies."""
    passes: int = 3
    """Timed passes of a turn."""

    def __post_init__(self) -> None:
        for key, least in (("threads", 1), ("rounds", 0), ("passes", 1)):
            if getattr(self, key) < least:
                raise ConfigurationError(f"latency.{key}: {getattr(self, key)} is too small; give {least} or more")


@dataclass
class Config:
    """What compress.py can be told; each part is documented where it is defined."""

    run_dir: str = "runs/compressed"
    """Folder of the stages."""
    seed: int = 0
    """Seed of the trainings and of the calibration images."""
    resume: bool = False
    """Go on with the stages in `run_dir`."""
    model: str = ""
    """The parent: run to compress; a run directory among the arguments names it."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Who teaches in finetune and qat; the parent, if no other is named."""
    data: dict[str, Any] = field(default_factory=dict)
    """Keys of the data set that are not to be as the parent's, data.workers=2 say; distill.py --help has them."""
    stages: list[str] = field(default_factory=lambda: ["prune", "finetune", "int8"])
    """Stages in their order, some of prune, finetune, int8, qat, export; each may come several times."""
    prune: PruneConfig = field(default_factory=PruneConfig)
    """Taking out channels."""
    finetune: LearningConfig = field(default_factory=LearningConfig)
    """Training the pruned model."""
    int8: Int8Config = field(default_factory=Int8Config)
    """Quantisation after training; qat begins with it too."""
    qat: LearningConfig = field(
        default_factory=lambda: LearningConfig(train=TrainConfig(steps=100, lr=1e-4, warmup=0.1))
    )
    """Training the quantised model (quantisation-aware)."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """Files of the stage before."""
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    """How latency is measured."""
    max_loss: dict[str, float] = field(default_factory=dict)
    """Points of mIoU on val that a stage may lose, {finetune: 1.0, int8: 0.5}: prune and finetune against the
    parent, int8 and qat against the newest stage before them in floating point, export against what it exports."""
    stop_on_loss: bool = False
    """End with exit code 2 after a stage that loses more."""
    split: Literal["", "val", "test"] = ""
    """Split on which all stages are evaluated once more in the end."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where to report."""

    def __post_init__(self) -> None:
        for key, names in (("stages", self.stages), ("max_loss", self.max_loss)):
            unknown = [name for name in names if name not in STAGES]
            if unknown:
                raise ConfigurationError(f"{key}: {unknown[0]!r} is no stage; give some of {', '.join(STAGES)}")
        if not self.stages:
            raise ConfigurationError(f"stages: none is named; give some of {', '.join(STAGES)}")
        pairs = list(zip(self.stages, [*self.stages[1:], ""], strict=True))
        if self.prune.rounds > 1 and ("prune", "finetune") not in pairs:
            raise ConfigurationError(
                f"prune.rounds: {self.prune.rounds} rounds need a finetune behind prune; add it to stages"
            )
        whole = [number for number, name in enumerate(self.stages) if name in ("int8", "qat")]
        for number, name in enumerate(self.stages):
            if whole and number > whole[0] and name in ("prune", "finetune", "int8"):
                raise ConfigurationError(
                    f"stages: {name} stands behind {self.stages[whole[0]]}, whose model is quantised; put it "
                    "before, or take qat to train on"
                )

    @property
    def train(self) -> TrainConfig:
        """What processes are started by."""
        return self.finetune.train


@dataclass
class Stage:
    """One stage, where each round of pruning and fine-tuning is two of its own."""

    number: int
    name: str
    round: int = 1
    rounds: int = 1
    origin: str = PARENT
    """The stage before the first of its rounds."""
    previous: str = PARENT
    """The stage whose model it takes."""

    @property
    def folder(self) -> str:
        return f"{self.number}-{self.name}"


@dataclass
class StageConfig:
    """What a stage is made of, its config.yaml; evaluate.py reads the data set off it."""

    run_dir: str
    seed: int
    stage: str
    model: str
    """The parent."""
    previous: str
    """The stage whose model it takes."""
    data: DataConfig
    settings: dict[str, Any]
    """Its part of the configuration."""


@dataclass
class TrainingStageConfig(StageConfig):
    """The same of a stage that trains."""

    resume: bool
    teacher: TeacherConfig
    losses: LossConfig
    train: TrainConfig
    tracking: TrackingConfig


@dataclass
class Chain:
    """What all stages share.

    Args:
        entries: what each stage came to; the parent's is the first.
    """

    config: Config
    accelerator: Accelerator
    data: DataConfig
    train: SegmentationData
    val: SegmentationData
    entries: list[dict[str, Any]]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images of val as a model is given them."""
        height, width = self.val.sample(Key(EVALUATION, 0, 0), seed=0).images.shape[-2:]
        return int(height), int(width)

    def folder(self, stage: str) -> Path:
        """Where a stage's model is; the parent's is that of its run."""
        return Path(self.config.model) if stage == PARENT else Path(self.config.run_dir) / stage

    def entry(self, stage: str) -> dict[str, Any]:
        return next(entry for entry in self.entries if entry["stage"] == stage)

    def say(self, message: str) -> None:
        self.accelerator.print(message, flush=True)


def main(config: Config) -> None:
    if not config.model:
        raise ConfigurationError("model: no run is named; give the directory of the one to compress")
    data = data_of(config)
    start_chain(config)
    record = Path(config.run_dir) / RECORD
    known = read_json(record) if config.resume and record.exists() else {"entries": [], "finished": False}
    accelerator = start_accelerator(config.train)
    if known["finished"]:
        accelerator.print(f"{config.run_dir}: finished; see stages.md (delete the folder to begin anew)")
        return
    train, val = build_dataset(data, "train"), build_dataset(data, "val")
    chain = Chain(config, accelerator, data, train, val, known["entries"])
    if not chain.entries:
        add_entry(chain, PARENT, PARENT)
    for stage in expand(config):
        if not any(entry["stage"] == stage.folder for entry in chain.entries):
            MAKE[stage.name](chain, stage)
        check_loss(chain, stage)
    report(chain, finished=True)


def expand(config: Config) -> list[Stage]:
    """The stages one by one: prune and the finetune behind it as often as there are rounds."""
    found: list[Stage] = []
    names, rounds = list(config.stages), config.prune.rounds
    previous = PARENT
    while names:
        together = names[:2] if rounds > 1 and names[:2] == ["prune", "finetune"] else names[:1]
        origin, times = previous, rounds if len(together) == 2 else 1
        for number in range(1, times + 1):
            for name in together:
                found.append(Stage(len(found) + 1, name, number, times, origin, previous))
                previous = previous if name == "export" else found[-1].folder
        names = names[len(together) :]
    return found


def data_of(config: Config) -> DataConfig:
    """The data set of the parent, with what the configuration changes of it."""
    path = Path(config.model) / "config.yaml"
    if not path.is_file():
        raise ConfigurationError(f"model: {path}: no such file; name the directory of a run")
    try:
        saved: Any = OmegaConf.to_container(OmegaConf.load(path))
        whole = OmegaConf.merge(OmegaConf.structured(DataConfig), saved["data"])
    except (OmegaConfBaseException, YAMLError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise DamagedFileError(f"{path}: not the configuration of a run ({reason}); train it again") from error
    try:
        return OmegaConf.to_object(OmegaConf.merge(whole, config.data))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"data.{error.full_key}: {reason}; distill.py --help has the keys") from error


# ----------------------------------------------------------------------------------------------------- stages


def make_pruned(chain: Chain, stage: Stage) -> None:
    """Takes out channels, a round's part of the way to the target."""
    config, latency = chain.config.prune, chain.config.latency
    runtime = search.LatencyConfig(runtime=config.backend, threads=latency.threads)

    def write(folder: Path) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(latency.threads)
        pruned, reached = prune(
            open_model(chain, stage.previous),
            chain.size,
            config,
            losses=(lambda model: training_losses(chain, model)) if config.importance == "taylor" else None,
            ready=lambda model: search.make_ready(model, chain.size, runtime),
            whole=open_model(chain, stage.origin),
            fraction=stage.round / stage.rounds,
        )
        torch.set_num_threads(threads)
        pruned.save_pretrained(folder / "best")
        write_json(folder / "prune.json", reached)

    write_stage(chain, stage, asdict(config), write)
    met = read_json(chain.folder(stage.folder) / "prune.json")
    ms = f" ({met['reached_ms']:.3g} of {met['whole_ms']:.3g} ms, {met['backend']})" if "whole_ms" in met else ""
    note = f"; {met['note']}" if met["note"] else ""
    chain.say(f"{stage.folder}: {met['reached']:.3f} of the {met['target']} for {met['wanted']:.3f}{ms}{note}")
    add_entry(chain, stage.folder, stage.name, pruned=met)


def training_losses(chain: Chain, model: nn.Module) -> Iterator[Tensor]:
    """Cross-entropy of a model on some training batches."""
    loader = chain.train.train_loader(
        batch_size=chain.config.finetune.train.batch_size,
        seed=chain.config.seed,
        start_step=0,
        steps=chain.config.prune.batches,
    )
    for batch in loader:
        batch = chain.train.finish(to_device(batch, torch.device("cpu")))
        yield upsampled_loss(model(batch.images).logits, batch.labels)[0]


def make_trained(chain: Chain, stage: Stage) -> None:
    """Fine-tuning and quantisation-aware training: the loop of all trainings, and a run that goes on by itself."""
    folder, config = chain.folder(stage.folder), training_config(chain, stage)
    if not (config.resume and (folder / "results.json").exists()):
        train_stage(chain, config)
    seconds = read_json(folder / "results.json")["train_seconds"]
    files = export_files(chain, stage.folder, folder / "export", ExportConfig()) if stage.name == "qat" else [""]
    add_entry(chain, stage.folder, stage.name, files, train_seconds=seconds)


def training_config(chain: Chain, stage: Stage) -> TrainingStageConfig:
    """The run of a stage that trains; the parent teaches if nobody else is named, and rounds share the steps."""
    part: LearningConfig = getattr(chain.config, stage.name)
    teacher, train = chain.config.teacher, part.train
    if not (teacher.run or teacher.hub or teacher.own):
        teacher = replace(teacher, run=chain.config.model)
    if stage.rounds > 1:
        steps = train.total_steps(chain.train)
        begun, ended = (steps * number // stage.rounds for number in (stage.round - 1, stage.round))
        train = replace(train, epochs=None, steps=max(1, ended - begun))
    return TrainingStageConfig(
        **vars(stage_config(chain, stage, asdict(chain.config.int8) if stage.name == "qat" else {})),
        resume=chain.config.resume,
        teacher=teacher,
        losses=part.losses,
        train=train,
        tracking=chain.config.tracking,
    )


def train_stage(chain: Chain, config: TrainingStageConfig) -> None:
    with start_run(config, more=True) as run:
        student = open_model(chain, config.previous)
        if config.stage == "qat" and student.precision != "int8":
            student = quantised(chain, student)
        run.finish(
            fit(
                run,
                [learner(chain, run, config, student)],
                chain.train,
                chain.val,
                config.train,
                workers=config.data.workers,
            )
        )
        ended = add_up(run.accelerator, torch.tensor([float(run.terminated)], device=run.accelerator.device))
        if ended > 0:
            raise Terminated(
                f"{run.folder}: finished, stopped by SIGTERM before the next stage; go on with resume=true"
            )


def learner(chain: Chain, run: Run, config: TrainingStageConfig, student: SegmentationModel) -> Learner:
    """The compressed model with its objective and its teacher, if it has one."""
    train = chain.train
    objective = objective_for(train, config.train.total_steps(train))
    if config.teacher.own:
        goal = objective(config.losses, student, student)
        need_a_taught_term(goal, f"teacher.source={config.teacher.source}")
        need_no_latents(goal, f"teacher.source={config.teacher.source}")
        run.describe({"student": student}, {"loss": goal}, train)
        return Learner(student, goal, OwnTeacher(run.accelerator.autocast, config.teacher))
    if any(term.taught for term in objective(config.losses, student, student).terms.values()):
        return learn_from_frozen(run, config, student, train, chain.val, objective)  # type: ignore[arg-type]
    if train.unlabelled:
        raise ConfigurationError("data.mix: unlabelled images need a term that compares with a teacher; add one")
    goal = objective(config.losses, student, None)
    run.describe({"student": student}, {"loss": goal}, train)
    return Learner(student, goal)


def make_int8(chain: Chain, stage: Stage) -> None:
    """Quantises without training; what counts is the ONNX file of it in its runtime."""

    def write(folder: Path) -> None:
        quantised(chain, open_model(chain, stage.previous)).save_pretrained(folder / "best")

    write_stage(chain, stage, asdict(chain.config.int8), write)
    files = export_files(chain, stage.folder, chain.folder(stage.folder) / "export", ExportConfig())
    add_entry(chain, stage.folder, stage.name, files)


def quantised(chain: Chain, model: SegmentationModel) -> SegmentationModel:
    images = calibration_sample(chain.train, chain.config.int8.images, chain.config.seed)
    return quantise(model, images, chain.config.int8)


def calibration_sample(data: SegmentationData, count: int, seed: int) -> list[Tensor]:
    """Images [3, H, W] as in evaluation, whole and not augmented, that show all classes alike.

    The classes take turns, each with another image that shows it, until there are `count` images, or all.
    """
    counts, found = data.label_counts(), dict[int, None]()
    for epoch in range(count):
        drawn = class_uniform_order(counts, count, share=1.0, seed=seed, epoch=epoch)
        found |= dict.fromkeys(drawn[:, 0].tolist())
        if len(found) >= min(count, len(data)):
            break
    return [data.sample(Key(EVALUATION, index, index), seed=0).images for index in list(found)[:count]]


def make_exported(chain: Chain, stage: Stage) -> None:
    """Writes files for runtimes."""
    config = chain.config.export
    write_stage(chain, stage, asdict(config), lambda folder: None)
    files = export_files(chain, stage.previous, chain.folder(stage.folder) / "export", config)
    add_entry(chain, stage.folder, stage.name, files, exports=stage.previous)


def export_files(chain: Chain, stage: str, folder: Path, config: ExportConfig) -> list[str]:
    """Exports the model of a stage; gives the files' places within the folder above `folder`."""

    def action() -> list[str]:
        indices = np.linspace(0, len(chain.val) - 1, min(config.images, len(chain.val))).round().astype(int)
        images = [evaluation_image(chain.val, int(index))[0] for index in indices]
        model, colours = open_model(chain, stage), chain.val.labels.colours
        paths = export(model, config, folder, images, run=str(chain.folder(stage)), colours=colours)
        if config.check_for:
            findings = check(model, config.check_for, config.size or images[0].shape[:2])
            print(f"\n{', '.join(config.check_for)}:\n{findings_table(findings)}\n", flush=True)
        return [str(path.relative_to(folder.parent)) for path in paths]

    return on_main_process(chain.accelerator, action)


MAKE: dict[str, Callable[[Chain, Stage], None]] = {
    "prune": make_pruned,
    "finetune": make_trained,
    "int8": make_int8,
    "qat": make_trained,
    "export": make_exported,
}


def open_model(chain: Chain, stage: str) -> SegmentationModel:
    """The model of a stage, for the images of the data set."""
    model = load_model(chain.folder(stage))
    if model.class_names != list(chain.val.labels.names):
        raise ConfigurationError(
            f"model: {chain.config.model} knows other classes than data.name={chain.data.name}; leave that out"
        )
    model.take_images(chain.data.mean, chain.data.std)
    return model


def stage_config(chain: Chain, stage: Stage, settings: dict[str, Any]) -> StageConfig:
    return StageConfig(
        run_dir=str(chain.folder(stage.folder)),
        seed=chain.config.seed,
        stage=stage.name,
        model=chain.config.model,
        previous=stage.previous,
        data=chain.data,
        settings=settings,
    )


def write_stage(chain: Chain, stage: Stage, settings: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Makes the folder of a stage that does not train: whole, or not at all. One that is there stays."""
    folder = chain.folder(stage.folder)

    def action() -> None:
        if folder.exists():
            return
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        save(stage_config(chain, stage, settings), temporary / "config.yaml")
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        temporary.replace(folder)
        sync(folder.parent)

    on_main_process(chain.accelerator, action)


# ----------------------------------------------------------------------------------------------------- figures


def add_entry(chain: Chain, stage: str, name: str, files: Sequence[str] = ("",), **known: Any) -> None:
    """Scores what a stage made on val, its model or each of its files, and writes that down."""
    against = {"prune": PARENT, "finetune": PARENT, "export": known.get("exports")}.get(name)
    if against is None and chain.entries:  # int8, qat
        against = next(e["stage"] for e in reversed(chain.entries) if e["name"] in (PARENT, "prune", "finetune"))
    for file in files:
        entry = {"stage": stage, "name": name, "file": file} | costs(chain, stage, file) | known
        entry["miou"] = miou = score(chain, stage, file, chain.val)
        if file:
            on_main_process(chain.accelerator, lambda file=file, miou=miou: tell_miou(chain, stage, file, miou))
        entry["lost"] = 100 * (chain.entry(against)["miou"] - miou) if against else 0.0
        change = f", {-entry['lost']:+.2f} points against {against}" if against else ""
        chain.entries.append(entry | {"against": against})
        chain.say(f"{stage}{f' {file}' if file else ''}: val mIoU {percent(miou)} %{change}")
    on_main_process(chain.accelerator, lambda: write_record(chain, finished=False))


def write_record(chain: Chain, finished: bool) -> None:
    write_json(Path(chain.config.run_dir) / RECORD, {"finished": finished, "entries": chain.entries})


def tell_miou(chain: Chain, stage: str, file: str, miou: float) -> None:
    """Puts the mIoU of an exported file into its metadata."""
    path = chain.folder(stage) / f"{file}.json"
    write_json(path, read_json(path) | {"miou": miou})


def costs(chain: Chain, stage: str, file: str) -> dict[str, Any]:
    """Parameters, FLOPs of an image of val, bytes on the disk, runtime and precision of a model or a file."""
    if file:
        exported = open_exported(chain.folder(stage) / file, threads=chain.config.latency.threads)
        kept = {key: getattr(exported.metadata, key) for key in ("parameters", "flops", "bytes", "precision")}
        return kept | {"runtime": exported.runtime}
    model, folder = load_model(chain.folder(stage)), chain.folder(stage)
    folder = folder / "best" if (folder / "best").is_dir() else folder
    return {
        "parameters": count_parameters(model),
        "flops": count_flops(model, chain.size),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "precision": model.precision,
        "runtime": "eager",
    }


def score(chain: Chain, stage: str, file: str, data: SegmentationData) -> float:
    """mIoU of a stage's model, or of one of its files as its runtime answers."""
    if file:
        exported = open_exported(chain.folder(stage) / file, threads=chain.config.latency.threads)
        matrix = evaluate_exported(chain.accelerator, exported, data)
    else:
        model = open_model(chain, stage).to(chain.accelerator.device)
        matrix = evaluate(chain.accelerator, model, data, workers=chain.data.workers)
    return float(summarise(matrix, data.labels.names)["miou"])


def evaluate_exported(accelerator: Accelerator, exported: Exported, data: SegmentationData) -> Tensor:
    """Confusion matrix [C, C] of an exported file over all of `data` at label size; see engine.loop.evaluate."""
    matrix = ConfusionMatrix(len(data.labels.names), accelerator.device)
    batch = exported.metadata.input["shape"][0] or 1
    indices = range(accelerator.process_index, len(data), accelerator.num_processes)
    for index in tqdm(indices, desc="evaluate", leave=False, dynamic_ncols=True):
        image, label = evaluation_image(data, index)
        if exported.metadata.size is not None:
            image = resize_image(image, (exported.metadata.size[0], exported.metadata.size[1]))
        answer = exported(exported.prepare(np.repeat(image[None], batch, 0)))
        labels = exported.finish(answer[:1], label.shape)[0]
        if labels.shape != label.shape:  # of a file that gives labels of its images' size
            labels = cv2.resize(labels, label.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        matrix.update_labels(torch.from_numpy(labels)[None], torch.from_numpy(label)[None])
    return matrix.reduce(accelerator)


def evaluation_image(data: SegmentationData, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [H, W, 3] RGB as in evaluation, and its label at its own size."""
    image, label = data.read(index)
    return (image if data.settings.size is None else resize_image(image, data.settings.size)), label


def check_loss(chain: Chain, stage: Stage) -> None:
    """Says that a stage lost more than it may, and ends there if that was asked for."""
    allowed = chain.config.max_loss.get(stage.name)
    for entry in chain.entries:
        if allowed is None or entry["stage"] != stage.folder or entry["lost"] <= allowed:
            continue
        message = (
            f"max_loss.{stage.name}: {stage.folder} lost {entry['lost']:.2f} points of mIoU against "
            f"{entry['against']}, and {allowed:g} are allowed"
        )
        if chain.config.stop_on_loss:
            report(chain, finished=False)
            raise ConfigurationError(f"{message}; compress less, train for longer, or allow more")
        chain.say(f"WARNING: {message}")


def report(chain: Chain, finished: bool) -> None:
    """Measures all latencies in turn, evaluates on `split`, and prints and writes the table."""
    config, split = chain.config, chain.config.split
    if split:
        data = chain.val if split == "val" else build_dataset(chain.data, split)
        for entry in chain.entries:
            entry[f"{split}_miou"] = score(chain, entry["stage"], entry["file"], data)
    if config.latency.rounds:
        for entry, latency in zip(
            chain.entries, on_main_process(chain.accelerator, lambda: latencies(chain)), strict=True
        ):
            entry["latency_ms"] = latency
    text = stages_table(chain.entries, split)
    chain.say(f"\n{text}\n")

    def write() -> None:
        folder = Path(config.run_dir)
        made_with = environment(chain.accelerator, chain.val.manifest_hash())
        revision = str(made_with["revision"])[:12] + (" with changes" if made_with["dirty"] else "")
        page = [
            f"# {folder}",
            f"{date.today()}, revision {revision}, {made_with['device']}, latency of one image of "
            f"{chain.size[0]}×{chain.size[1]} on {config.latency.threads} threads, torch "
            f"{made_with['packages']['torch']}.",
            f"```\npython {' '.join(sys.argv)}\n```",
            text,
        ]
        temporary = folder / "stages.md.tmp"
        temporary.write_text("\n\n".join(page) + "\n", encoding="utf-8")
        temporary.replace(folder / "stages.md")
        write_record(chain, finished)

    on_main_process(chain.accelerator, write)
    chain.say(f"written: {Path(config.run_dir) / 'stages.md'}")


def latencies(chain: Chain) -> list[float | None]:
    """Median milliseconds of one image for each entry, all measured in turn; None where one can't be measured."""
    config = chain.config.latency
    works = []
    for entry in chain.entries:
        path = chain.folder(entry["stage"]) / entry["file"]
        backend = RUNTIMES[path.suffix][0] if entry["file"] else "eager"
        precision = entry["precision"] if entry["file"] else "fp32"
        works.append(Work(f"{entry['stage']} {entry['file']}", backend, precision, 1, str(path), chain.size))
    with tqdm(total=len(works) * (config.rounds + 1), desc="latency", leave=False, dynamic_ncols=True) as bar:
        measured, failed = measure(
            works,
            threads=config.threads,
            rounds=config.rounds,
            passes=config.passes,
            progress=lambda _: bar.update(),
        )
    for work, reason in failed.items():
        print(f"{work.run}: no latency: {reason}", flush=True)
    return [statistics.median(measured[work].times_ms) if work in measured else None for work in works]


def stages_table(entries: Sequence[Mapping[str, Any]], split: str) -> str:
    """One row for each stage, and for each file of an export; Δ and × compare with the parent."""
    parent = entries[0]
    rows = []
    for entry in entries:
        row = {
            "stage": f"{entry['stage']} {Path(entry['file']).name}"
            if entry["name"] == "export"
            else entry["stage"],
            "val mIoU %": percent(entry["miou"]),
            "Δ": f"{100 * (entry['miou'] - parent['miou']):+.2f}",
            "params": quantity(entry["parameters"]),
            "FLOPs": quantity(entry["flops"]),
            "FLOPs ×": f"{entry['flops'] / parent['flops']:.2f}",
            "file": f"{significant(entry['bytes'] / 2**20)} MiB",
            "runtime": f"{entry['runtime']} {entry['precision']}",
        }
        if split:
            row[f"{split} mIoU %"] = percent(entry[f"{split}_miou"])
        if "latency_ms" in entry:
            latency, first = entry["latency_ms"], parent["latency_ms"]
            row["latency ms"] = significant(latency) if latency else None
            row["latency ×"] = f"{latency / first:.2f}" if latency and first else None
        if any("train_seconds" in other for other in entries):
            row["training"] = duration(entry["train_seconds"]) if "train_seconds" in entry else None
        rows.append(row)
    return table(rows)


if __name__ == "__main__":
    run_script(main, Config, runs="model")
