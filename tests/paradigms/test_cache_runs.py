"""Runs of distill.py with a cached teacher: written once, refused if another's, killed while it is written."""

import shutil
from pathlib import Path

import pytest
from forks import Forks, Outcome

TINY = ["data.size=[32,64]", "data.crop=[32,48]", "data.scenes=12", "train.batch_size=4", "train.steps=4"]
TINY += ["train.log_every=1", "train.checkpoint_every=2"]
TEACHER = [*TINY, "model.width=4", "model.depth=2"]
CACHED = [*TINY, "student.width=4", "student.depth=2", "teacher.source=cache", "teacher.cache.shard=5"]
CACHED += ["losses.fitnet.taps=[bottleneck]"]


def completed(outcomes: list[Outcome], code: int = 0) -> str:
    assert {outcome.code for outcome in outcomes} == {code}, "\n".join(
        outcome.text[-3000:] for outcome in outcomes
    )
    return outcomes[0].text


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def teacher(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    completed([forks.script("train_teacher.py", f"run_dir={run}", *TEACHER)])
    return run


@pytest.fixture(scope="module")
def whole(forks: Forks, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that filled the teacher's cache and trained."""
    run = tmp_path_factory.mktemp("whole") / "run"
    text = completed([forks.script("distill.py", str(teacher), f"run_dir={run}", *CACHED)])
    assert "its answers to 12 images are written" in text
    return run


def weights(run: Path) -> bytes:
    return (run / "best" / "model.safetensors").read_bytes()


def test_another_run_takes_what_is_there(forks: Forks, teacher: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = contents(teacher / "cache")
    text = completed([forks.script("distill.py", str(teacher), f"run_dir={run}", *CACHED)])
    assert "are written" not in text
    assert "answers to 12 images as uint8" in text
    assert contents(teacher / "cache") == before
    assert weights(run) == weights(whole)


def test_what_the_cache_has_not_seen_is_refused(forks: Forks, teacher: Path, tmp_path: Path) -> None:
    outcome = forks.script(
        "distill.py", str(teacher), f"run_dir={tmp_path / 'run'}", *CACHED, "data.copy_paste=0.5"
    )
    assert "error: data.copy_paste: the cache has not seen what is pasted; " in completed([outcome], 2)


def test_another_teacher_is_refused_before_the_first_step(
    forks: Forks, teacher: Path, whole: Path, tmp_path: Path
) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    completed([forks.script("train_teacher.py", f"run_dir={other}", *TEACHER, "seed=1")])
    shutil.copytree(teacher / "cache", other / "cache")
    text = completed([forks.script("distill.py", str(other), f"run_dir={run}", *CACHED)], 3)
    assert text.splitlines()[-1].startswith(
        f"error: teacher.cache.folder: {other / 'cache'}: made for other teacher ("
    )
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("ranks", "point"), [(1, ["write", "bottleneck.npy", 8]), (2, ["replace", ".shard_00001.tmp", 0])], ids=str
)
def test_killed_while_writing(
    forks: Forks, teacher: Path, whole: Path, tmp_path: Path, ranks: int, point: list[object]
) -> None:
    """In a map's bytes or in a rename; gone on with by one process or two, to the same cache."""
    cache, run = tmp_path / "cache", tmp_path / "run"
    settings = [f"run_dir={run}", *CACHED, f"teacher.cache.folder={cache}"]
    killed = forks.script("distill.py", str(teacher), *settings, kill_at_operation=[str(cache), *point])
    completed([killed], -9)
    assert sorted(path.name for path in cache.iterdir()) == [".shard_00001.tmp", "key.json", "shard_00000"]
    arguments = ["distill.py", str(run / "config.yaml"), "resume=true"]
    text = completed(forks.call("forks:run_script_file", *arguments, ranks=ranks))
    assert "are written" in text
    assert contents(cache) == contents(teacher / "cache")
    if ranks == 1:
        assert weights(run) == weights(whole)


def test_a_flipped_bit_ends_the_run_before_the_first_step(
    forks: Forks, teacher: Path, whole: Path, tmp_path: Path
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(teacher / "cache", cache)
    file = cache / "shard_00002" / "logits.npy"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    settings = [f"run_dir={run}", *CACHED, f"teacher.cache.folder={cache}"]
    text = completed([forks.script("distill.py", str(teacher), *settings)], 3)
    assert f"error: {file}: damaged, its SHA-256" in text
    assert not (run / "metrics.jsonl").exists()
