"""The command line: what is read, what each mistake says, help, saving, exit codes."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.config as config_module
from engine.config import help_text, list_keys, parse, run_script, save, to_yaml
from errors import ConfigurationError, DamagedFileError, MachineError, NonFiniteError, Terminated


@dataclass
class Term:
    weight: float = 1.0
    """Factor of the term in the sum."""
    start: int | float = 0
    """First step; an integer is steps, a float a fraction of training."""


@dataclass
class Affinity(Term):
    taps: list[str] = field(default_factory=lambda: ["bottleneck"])
    """Pairs of taps."""


@dataclass
class Losses:
    cross_entropy: Term | None = field(default_factory=Term)
    affinity: Affinity | None = None
    """Similarities of all pairs of pixels."""


@dataclass
class Train:
    lr: float = 0.1
    """Learning rate at the
    start."""
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigurationError(f"train.lr: {self.lr} is not possible; give a number above 0")


@dataclass
class Teacher:
    run: str = ""
    """The teacher's run."""


@dataclass
class Sample:
    run_dir: str = "runs/x"
    """Folder of the run."""
    seed: int = 0
    resume: bool = False
    note: str | None = None
    runs: list[str] = field(default_factory=list)
    crop: list[int] | None = None
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    teacher: Teacher = field(default_factory=Teacher)
    losses: Losses = field(default_factory=Losses)
    train: Train = field(default_factory=Train)


def read(*arguments: str, runs: str | None = None) -> Sample:
    return parse(Sample, list(arguments), runs=runs)


def complaint(*arguments: str, runs: str | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(*arguments, runs=runs)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------------------------- reading


def test_no_arguments_give_the_defaults() -> None:
    assert read() == Sample()


def test_values_are_instances_of_the_dataclasses() -> None:
    config = read("losses.affinity.weight=2", "train.precision=bf16", "train.lr=1e-3", "crop=[64,128]")
    assert config == Sample(
        crop=[64, 128],
        losses=Losses(affinity=Affinity(weight=2.0)),
        train=Train(lr=0.001, precision="bf16"),
    )
    assert type(config.losses.affinity) is Affinity
    assert type(config.crop) is list


def test_an_optional_part_is_switched_on_and_off() -> None:
    assert read("losses.affinity={}").losses.affinity == Affinity()
    assert read("losses.affinity={}", "losses.affinity=null").losses.affinity is None
    assert read("losses.cross_entropy=null").losses.cross_entropy is None


def test_whole_numbers_and_fractions_stay_apart() -> None:
    assert type(read("losses.affinity.start=5").losses.affinity.start) is int  # type: ignore[union-attr]
    assert type(read("losses.affinity.start=0.5").losses.affinity.start) is float  # type: ignore[union-attr]
    assert type(read("losses.affinity.start=1.0").losses.affinity.start) is float  # type: ignore[union-attr]


def test_a_list_replaces_the_default() -> None:
    assert read("scale=[1]").scale == [1.0]
    affinity = read("losses.affinity.taps=[decoder.0:decoder.1,bottleneck]").losses.affinity
    assert affinity is not None
    assert affinity.taps == ["decoder.0:decoder.1", "bottleneck"]


def test_a_file_does_not_take_the_place_of_a_run(tmp_path: Path) -> None:
    """Named before it: a file's own teacher is for those who name none."""
    file, runs = tmp_path / "x.yaml", [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        (run / "best").mkdir(parents=True)
    file.write_text("teacher: {run: from/file}\n")
    arguments = [str(runs[0]), str(file)]
    assert read(*arguments, runs="teacher.run").teacher.run == str(runs[0])
    assert read(*arguments, str(runs[1]), runs="teacher.run").teacher.run == str(runs[1])
    assert read(*arguments, "teacher.run=said", runs="teacher.run").teacher.run == "said"


def test_later_arguments_win(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yml"
    one.write_text("seed: 1\ntrain: {lr: 0.5, batch_size: 2}\nlosses: {affinity: {weight: 3}}\n")
    two.write_text("seed: 2\ntrain:\n  lr: 0.25\n")
    config = read(str(one), str(two), "train.batch_size=4")
    assert (config.seed, config.train.lr, config.train.batch_size) == (2, 0.25, 4)
    assert config.losses.affinity == Affinity(weight=3.0)
    assert read("seed=9", str(one)).seed == 1
    assert read(str(one), "seed=9").seed == 9


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read(str(tmp_path / "empty.yaml")) == Sample()


def test_run_directories(tmp_path: Path) -> None:
    a, b = tmp_path / "a=1", tmp_path / "b"  # an equals sign in the path does not make it a key
    (a / "best").mkdir(parents=True)
    b.mkdir()
    (b / "config.yaml").write_text("seed: 3\n")
    assert read(f"{a}/", runs="teacher.run").teacher.run == str(a)
    assert read(str(a), str(b), runs="teacher.run").teacher.run == str(b)
    assert read(str(a), str(b), runs="runs").runs == [str(a), str(b)]
    assert read("runs=[z]", str(b), runs="runs").runs == ["z", str(b)]
    assert read(str(b / "config.yaml")).seed == 3


def test_a_value_may_contain_an_equals_sign_and_refer_to_another_key() -> None:
    assert read("run_dir=runs/lr=0.1").run_dir == "runs/lr=0.1"
    assert read("run_dir=runs/${seed}", "seed=4").run_dir == "runs/4"


# ---------------------------------------------------------------------------------------------- complaints


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("losses.afinity.weight=1", "losses.afinity.weight: no such key; did you mean losses.affinity.weight?"),
        ("losses.affinity={weight: 3, wieght: 1}", "losses.affinity.wieght: no such key; did you mean"),
        ("lr=1", "lr: no such key; did you mean train.lr?"),
        ("quux=1", "quux: no such key; --help lists the keys"),
        ("seed=abc", "seed: expected int, got abc"),
        ("seed=1.5", "seed: expected int, got 1.5"),
        ("seed=true", "seed: expected int, got true"),
        ("seed=null", "seed: expected int, got nothing"),
        ("seed.x=1", "seed: expected int, got {x: 1}"),
        ("train.lr=fast", "train.lr: expected float, got fast"),
        ("train.precision=bf6", "train.precision: expected one of fp32, bf16, got bf6; did you mean bf16?"),
        ("train.precision=off", "train.precision: expected one of fp32, bf16, got false"),
        ("train.lr=0", "train.lr: 0.0 is not possible; give a number above 0"),
        ("run_dir=off", "run_dir: expected str, got false: YAML reads bare on, off, yes"),
        ("note=yes", "note: expected str or null, got true: YAML reads"),
        ("losses.affinity.taps=[no,a]", "losses.affinity.taps: expected list of str, got [false, a]: YAML reads"),
        ("run_dir=007", "run_dir: YAML reads 007 as the number 7; quote it"),
        ("run_dir=", "run_dir: expected str, got nothing; write ''"),
        ("run_dir=a: b", "run_dir: expected str, got {a: b}"),
        ("run_dir=[1,2", "run_dir: '[1,2' is not valid YAML (did not find expected"),
        ("run_dir=???", "run_dir: ??? stands for a missing value"),
        ("run_dir=${nope}", "run_dir: Interpolation key 'nope' not found"),
        ("run_dir=${", "run_dir: '${' cannot be read"),
        ("seed=${run_dir}", "seed: "),
        ("losses.affinity.start=true", "losses.affinity.start: expected int or float, got true"),
        ("losses.affinity.taps=bottleneck", "losses.affinity.taps: expected list of str, got bottleneck; write a"),
        ("crop=3", "crop: expected list of int or null, got 3; write a list as [a,b]"),
        ("crop=[a,b]", "crop: expected list of int or null, got [a, b]"),
        ("scale.0=3", "scale: expected list of float"),
        ("scale[0]=3", "scale: expected list of float"),
        ("losses=3", "losses: has keys of its own (cross_entropy, affinity); give losses.cross_entropy=..."),
        ("losses.affinity=3", "losses.affinity: has keys of its own (weight, start, taps); give losses."),
        ("train=null", "train: has keys of its own (lr, precision, batch_size)"),
        ("seed", "seed: has no value; write seed=VALUE"),
        ("sede", "sede: no such file or run directory, and as a key it needs a value; did you mean seed?"),
        ("=3", "=3: '' cannot be a key"),
        ("losses..x=3", "losses..x=3: 'losses..x' cannot be a key"),
        ("--seed=3", "--seed=3: not an option; keys are written key=value without dashes, as in seed=3"),
        ("", "'': no such file or run directory"),
        ("nowhere.yaml", "nowhere.yaml: no such file"),
        ("runs/nowhere", "runs/nowhere: no such file or run directory; check the path"),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(argument: str, expected: str) -> None:
    assert complaint(argument, runs="runs").startswith(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("seed: 1\nlosses:\n  afinity: {weight: 1}\n", "losses.afinity.weight: no such key; did you mean"),
        ("seed: abc\n", "seed: expected int, got abc"),
        ("run_dir: off\n", "run_dir: expected str, got false: YAML reads"),
        ("train: {precision: fp16}\n", "train.precision: expected one of fp32, bf16, got fp16"),
        ("seed: 1\nseed: 2\n", "line 2: found duplicate key seed"),
        ("seed: 1\ntrain: [1, 2\nrun_dir: x\n", "line 3: "),
        ("a: b: c\n", "line 1: mapping values are not allowed"),
        ("- 1\n- 2\n", "must be a mapping"),
        ("just words\n", ""),
        ("seed: ${\n", ""),
        ("1: 2\n", "1: no such key"),
        ("null: 2\n", ""),
    ],
)
def test_a_wrong_file_is_named_in_one_line(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    assert complaint(str(path)).startswith(f"{path}: {expected}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"seed: \xff\xfe\n")
    assert complaint(str(path)).startswith(f"{path}: cannot be read as YAML")
    text = tmp_path / "notes.txt"
    text.write_text("seed: 1\n")
    assert complaint(str(text)) == f"{text}: neither a .yaml file nor the directory of a run"


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    assert complaint(str(tmp_path), runs="runs").startswith(f"{tmp_path}: neither the directory of a run")
    (tmp_path / "best").mkdir()
    assert "takes no run" in complaint(str(tmp_path))
    assert read(str(tmp_path), runs="runs").runs == [str(tmp_path)]


def test_a_key_without_default_must_be_given() -> None:
    @dataclass
    class Needs:
        name: str
        part: Teacher | None = None

    with pytest.raises(ConfigurationError, match="^name: has no default; give name=VALUE$"):
        parse(Needs, [])
    assert parse(Needs, ["name=a"]) == Needs("a")


# --------------------------------------------------------------------------------------------- help, saving


def test_help_lists_every_key_with_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as ended:
            read("seed=1", flag, runs="teacher.run")
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 100
        assert __doc__ is not None
        assert __doc__.strip() in text
        assert "RUN_DIR, the directory of a run, is put into the key teacher.run." in text
        for key in list_keys(Sample):
            assert f"  {key.name}" in text
        lines = [" ".join(line.split()) for line in text.splitlines()]
        for line in (
            "run_dir (str; default runs/x)",
            "crop (list of int or null; default null)",
            "train.precision (one of fp32, bf16; default fp32)",
            "losses.affinity.* (not used by default; losses.affinity={} or any key below switches it on)",
            "losses.cross_entropy.* (used by default; losses.cross_entropy=null switches it off)",
            "losses.affinity.taps (list of str; default [bottleneck])",
        ):
            assert line in lines
        assert lines[lines.index("losses.affinity.weight (float; default 1.0)") + 1].startswith("Factor of the")
        assert lines[lines.index("train.lr (float; default 0.1)") + 1] == "Learning rate at the start."
    assert "RUN_DIR" not in help_text(Sample)


def test_help_shows_the_defaults_of_the_instance_not_of_the_class() -> None:
    @dataclass
    class Outer:
        train: Train = field(default_factory=lambda: Train(lr=0.7))

    assert "train.lr  (float; default 0.7)" in help_text(Outer)


def test_saving_leaves_resume_out(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save(Sample(resume=True, seed=5, losses=Losses(affinity=Affinity(start=0.25))), path)
    assert "resume" not in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    assert read(str(path)) == Sample(seed=5, losses=Losses(affinity=Affinity(start=0.25)))


texts = st.text(st.characters(blacklist_categories=("Cs", "Cc"), whitelist_characters="\t\n")).filter("???".__ne__)
words = ["off", "yes", "1e3", "007", "null", "", "~", "1_000", "a: b", "- a", "#x", "1:30", ".inf"]
pieces = ["\\", "$", "{", "}", "${", "${seed}", "a", "'", " "]
odd = st.sampled_from(words) | st.lists(st.sampled_from(pieces), max_size=6).map("".join)


@settings(max_examples=40, deadline=None)
@given(
    run_dir=texts | odd,
    note=st.none() | texts | odd,
    weight=st.floats(allow_nan=False),
    start=st.integers(-(10**9), 10**9) | st.floats(allow_nan=False),
    taps=st.lists(texts | odd, max_size=3),
    crop=st.none() | st.lists(st.integers(), max_size=3),
)
def test_saving_and_reading_gives_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    run_dir: str,
    note: str | None,
    weight: float,
    start: int | float,
    taps: list[str],
    crop: list[int] | None,
) -> None:
    affinity = Affinity(weight=weight, start=start, taps=taps)
    config = Sample(run_dir=run_dir, note=note, crop=crop, losses=Losses(None, affinity))
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    save(config, path)
    again = read(str(path))
    assert again == config
    assert again.losses.affinity is not None
    assert type(again.losses.affinity.start) is type(start)
    assert to_yaml(again) == to_yaml(config)


# ---------------------------------------------------------------------------------------------- exit codes


def out_of_memory() -> torch.cuda.OutOfMemoryError:
    return torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nDetails follow")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigurationError("a: wrong\n  and more"), 2, "error: a: wrong and more"),
        (DamagedFileError("f: bad"), 3, "error: f: bad"),
        (NonFiniteError("loss: nan"), 4, "error: loss: nan"),
        (MachineError("m: dead"), 5, "error: m: dead"),
        (Terminated("run: stopped"), 143, "error: run: stopped"),
        (KeyboardInterrupt(), 130, "error: stopped by the keyboard"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 5, "error: runs/x: No space left on device;"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 5, "error: disk: Disk quota exceeded; free"),
        (OSError(errno.EFBIG, "File too large", "f"), 5, "error: f: File too large; free"),
        (MemoryError(), 5, "error: train.batch_size: out of memory"),
        (out_of_memory(), 5, "error: train.batch_size: the GPU is out of memory (Tried to allocate 2.00 GiB.)"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal"), 5, "error: data.workers: DataLoader"),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: Sample) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_script(main, Sample)
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(text)


def test_cpu_memory_that_cannot_be_had_is_a_failure_of_the_machine() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert "out of memory" in (config_module.machine_failure(caught.value) or "")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), FileNotFoundError("y")])
def test_a_defect_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(config: Sample) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(type(error)):
        run_script(main, Sample)


def test_a_script_that_succeeds_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sample] = []
    monkeypatch.setattr(sys, "argv", ["script.py", "seed=7"])
    run_script(seen.append, Sample)
    assert seen == [Sample(seed=7)]


def test_another_rank_speaks_only_when_it_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said_before_waiting: list[str] = []
    monkeypatch.setattr(config_module.time, "sleep", lambda _: said_before_waiting.append(capsys.readouterr().err))
    monkeypatch.setattr(config_module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["script.py", "sed=1"])
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        run_script(lambda config: None, Sample)
    assert ended.value.code == 2
    assert said_before_waiting == [""]
    assert capsys.readouterr().err == "error: sed: no such key; did you mean seed? (rank 1)\n"


SCRIPT = '''
"""A script."""
from dataclasses import dataclass
from engine.config import run_script

@dataclass
class Config:
    seed: int = 0

def main(config):
    print(config.seed)

if __name__ == "__main__":
    run_script(main, Config)
'''


def test_a_process_ends_with_the_code_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "script.py")]
    wrong = subprocess.run([*command, "seed=x"], env=environment, capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: seed: expected int, got x\n"
