"""Weights & Biases mirrors a run and never stops it."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import Forks

TINY = [
    "data.size=[32,64]",
    "data.scenes=8",
    "model.width=4",
    "model.depth=2",
    "train.batch_size=4",
    "train.steps=4",
    "train.log_every=2",
]

STUB = '''
"""A tracker that is broken."""

def fail(where):
    if where == {broken!r}:
        raise RuntimeError("no luck in " + where)

fail("import")

class Run:
    def log(self, values, step):
        fail("log")

    def finish(self):
        fail("finish")

def Settings(**options):
    return options

def init(**options):
    fail("init")
    return Run()
'''


def history(run: Path) -> list[dict[str, Any]]:
    """The rows that W&B has kept on the disk."""
    from wandb.proto import wandb_internal_pb2

    (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
    rows = []
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's form behind seven bytes of W&B's own."""
    position, record = 7, b""
    while position + 7 <= len(data):
        room = 2**15 - position % 2**15
        if room < 7:
            position += room
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)  # after a checksum
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_offline_leaves_a_folder_with_the_metrics(forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = forks.script("train_teacher.py", f"run_dir={run}", *TINY, "tracking.wandb=offline")
    assert outcome.code == 0, outcome.text
    rows = {row["_step"]: row for row in history(run)}
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        assert line["step"] in rows, f"W&B kept the steps {sorted(rows)}: {outcome.text}"
        for key, value in line.items():
            if key not in ("step", "epoch", "split", "iou", "system"):
                assert rows[line["step"]][f"{line['split']}/{key}"] == pytest.approx(value), key
    assert {"system/images_per_second", "system/process_memory_mib"} <= rows[2].keys()


@pytest.mark.parametrize("broken", ["import", "init", "log", "finish"])
def test_a_broken_tracker_does_not_stop_a_run(forks: Forks, tmp_path: Path, broken: str) -> None:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/wandb.py").write_text(STUB.format(broken=broken))
    run = tmp_path / "run"
    arguments = [f"run_dir={run}", *TINY, "tracking.wandb=offline"]
    outcome = forks.script("train_teacher.py", *arguments, first_on_path=str(tmp_path / "stub"))
    assert outcome.code == 0, outcome.text
    warning = f"tracking.wandb: RuntimeError: no luck in {broken}; the run goes on without it"
    assert outcome.text.count(warning) == 1
    assert (run / "results.json").exists()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_log_has_the_system_values(forks: Forks, tmp_path: Path) -> None:
    """And W&B leaves nothing where it is disabled."""
    run = tmp_path / "run"
    assert forks.script("train_teacher.py", f"run_dir={run}", *TINY).code == 0
    assert not (run / "wandb").exists()
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [(2, "train"), (4, "train"), (4, "val")]
    for line in lines:
        assert line["system"]["process_memory_mib"] > 50
        assert line["system"]["cpu_percent"] >= 0
        assert line["system"]["seconds"] > 0
    assert {"loss", "cross_entropy", "lr", "gradient_norm", "skipped"} <= lines[0].keys()
