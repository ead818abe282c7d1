import json
import multiprocessing
import os
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import detections, in_memory
from PIL import Image

from retinanet.errors import UserError
from retinanet.evaluation import voc
from retinanet.training import files
from retinanet.training.log import RunLog, read_log

RUN_FILES = ("last.pt", "log.jsonl", "args.json", "curves.png")


def test_a_new_run_moves_an_earlier_one_to_a_folder_of_its_own(tmp_path):
    for number in (1, 2):
        for name in RUN_FILES:
            (tmp_path / name).write_text(f"run {number}")
        for name in ("data.csv", "cat.png"):
            (tmp_path / name).write_text("the user's")
        RunLog(tmp_path, None, 0, False, 1)
        assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
            "log.jsonl", "data.csv", "cat.png", "run.lock",
        }  # fmt: skip
        assert (tmp_path / "log.jsonl").read_text() == ""
    for number in (1, 2):
        assert {(tmp_path / f"old_{number}" / name).read_text() for name in RUN_FILES} == {f"run {number}"}
    RunLog(tmp_path, None, 0, False, 1)  # nothing is kept of a run that saved nothing
    assert not (tmp_path / "old_3").exists()


def test_a_run_that_cannot_start_leaves_the_earlier_one_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "last.pt").write_text("earlier")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard needs tensorboard"):
        RunLog(tmp_path, None, 0, True, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_run_that_is_resumed_in_the_folder_of_another_moves_that_one(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        for name in ("last.pt", "best.pt"):
            (folder / name).write_text(folder.name)
        (folder / "log.jsonl").write_text(json.dumps({"epoch": 0, folder.name: 1}) + "\n")
    size = (tmp_path / "a/log.jsonl").stat().st_size
    RunLog(tmp_path / "b", tmp_path / "a/last.pt", size, False, 1)
    assert read_log(tmp_path / "b/log.jsonl") == [{"epoch": 0, "a": 1}] and (tmp_path / "b/best.pt").read_text() == "a"
    assert read_log(tmp_path / "b/old_1/log.jsonl") == [{"epoch": 0, "b": 1}]
    assert (tmp_path / "b/old_1/best.pt").read_text() == "b"


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path):
    first = RunLog(tmp_path, None, 0, False, 10)
    first.write({"epoch": 0, "step": 1, "lr": 0.5})
    size = first.flush()
    first.write({"epoch": 0, "step": 2, "lr": 0.4})
    RunLog(tmp_path, tmp_path / "last.pt", size, False, 10).write({"epoch": 0, "step": 2, "lr": 0.3})
    assert [(entry["step"], entry["lr"]) for entry in read_log(tmp_path / "log.jsonl")] == [(1, 0.5), (2, 0.3)]


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda content: bytes(len(content)), []),
        (lambda content: content[:25], [0]),
        (lambda content: content[:10] + bytes(9) + content[19:], [1]),
        (lambda content: b"[" * 10**5 + b"\n" + content, []),
        (lambda content: b'{"epoch": "x"}\n3\n' + content, [0]),
        (lambda content: b"", []),
    ],
)
def test_a_damaged_log_is_put_aside(tmp_path, caplog, damage, left):
    content = b'{"epoch": 0, "lr": 1}\n{"epoch": 1, "lr": 2}\n'
    damaged = damage(content)
    (tmp_path / "log.jsonl").write_bytes(damaged)
    log = RunLog(tmp_path, tmp_path / "last.pt", len(content), False, 1)
    assert [entry["epoch"] for entry in read_log(tmp_path / "log.jsonl")] == left
    assert (tmp_path / "log_damaged.jsonl").read_bytes() == damaged[: len(content)]
    assert caplog.text.count("log.jsonl is damaged") == 1
    log.write({"epoch": 2})
    assert read_log(tmp_path / "log.jsonl")[-1] == {"epoch": 2}


@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: path.symlink_to(path.parent / "other")])
def test_a_log_is_a_regular_file(tmp_path, plant):
    plant(tmp_path / "log.jsonl")
    with pytest.raises(UserError, match=r"log\.jsonl: exists and is not a regular file"):
        RunLog(tmp_path, None, 0, False, 1)
    RunLog(tmp_path, tmp_path / "last.pt", 0, False, 1)  # what is resumed replaces it
    assert (tmp_path / "log.jsonl").is_file() and not (tmp_path / "other").exists()


def hold(folder, connection):
    log = RunLog(folder, None, 0, False, 1)
    connection.send(log.folder)
    time.sleep(60)


def test_one_program_writes_to_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0)
    here, there = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, there))
    holder.start()
    here.recv()
    (tmp_path / "last.pt.1-1.tmp").write_text("half a checkpoint")
    with pytest.raises(UserError, match=f"process {holder.pid} on .* is writing here; end it, or choose another"):
        RunLog(tmp_path, None, 0, False, 1)
    assert not (tmp_path / "old_1").exists()
    holder.kill()
    holder.join()
    RunLog(tmp_path, None, 0, False, 1)  # a dead process holds no lock
    assert not list(tmp_path.glob("*.tmp"))


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"epoch": 0}) + '\n{"epo')
    assert read_log(tmp_path / "log.jsonl") == [{"epoch": 0}]


def test_tensorboard_gets_every_entry_once(tmp_path, monkeypatch):
    class Writer:
        def __init__(self, folder):
            assert folder == tmp_path
            self.scalars = []

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def flush(self):
            (tmp_path / "events.out.tfevents.1").write_text("")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    first = RunLog(tmp_path, None, 0, True, 10)
    first.write({"epoch": 1, "step": 5, "lr": 0.5})
    first.write({"epoch": 1, "loss": 2.0})
    again = RunLog(tmp_path, tmp_path / "last.pt", first.flush(), True, 10)
    assert not list(tmp_path.glob("events*"))  # its entries are written again
    again.write({"epoch": 2, "step": 1, "lr": 0.25})
    assert again.board.scalars == [("step/lr", 0.5, 15), ("epoch/loss", 2.0, 20), ("step/lr", 0.25, 21)]


def test_tensorboard_shows_detections_and_precision_recall_curves(tmp_path):
    pytest.importorskip("tensorboard", reason="NO TEST OF PICTURES IN TENSORBOARD: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    dataset = in_memory([[0, 0, 10, 10, 0], [20, 20, 30, 30, 0], [0, 0, 10, 10, 1]])
    found = {0: detections((0.9, 0, 0, 0, 10, 10), (0.6, 0, 50, 50, 60, 60))}
    curves = voc.board_curves(voc.evaluate_detections(dataset, found), dataset)
    log = RunLog(tmp_path, None, 0, True, 10)
    for epoch in range(2):
        Image.new("RGB", (3000, 1500), "green").save(tmp_path / "detections.png")
        log.add_pictures(epoch, tmp_path / "detections.png", curves)
    log.add_pictures(2, tmp_path / "none.png", {})
    log.close()
    board = EventAccumulator(str(tmp_path), {"images": 0, "tensors": 0}).Reload()
    images = board.Images("detections")
    assert [(image.step, image.width, image.height) for image in images] == [(10, 1280, 640), (20, 1280, 640)]
    assert set(board.Tags()["tensors"]) == {"PR/a", "PR/b", "PR/all classes"}
    rows = make_ndarray(board.Tensors("PR/all classes")[-1].tensor_proto)  # right, false, true negatives, missed, ...
    above = [row.tolist() for row in rows[:, [0, 63, 88, 126]].T]  # scores above 0, 0.5, 0.698 and 1
    assert above == [pytest.approx(row) for row in ([1, 1, 0, 2, 1 / 2, 1 / 3],) * 2] + [
        pytest.approx([1, 0, 0, 2, 1, 1 / 3]), [0, 0, 0, 3, 0, 0]
    ]  # fmt: skip
    RunLog(tmp_path, None, 0, False, 10).add_pictures(0, tmp_path / "detections.png", curves)  # without TensorBoard


class FullDisk:
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_disk_that_is_full_is_reported(tmp_path):
    log = RunLog(tmp_path, None, 0, False, 10)
    log.file = FullDisk()
    with pytest.raises(UserError, match=r"log\.jsonl: cannot be written \(No space"):
        log.write({"epoch": 0})
