import functools
import importlib
import os
import pickle
import subprocess
import warnings
import zipfile

import pytest
import torch
import torch.utils.collect_env
from torch import nn

from retinanet.anchors import Anchors
from retinanet.errors import UserError
from retinanet.model import ARCHITECTURES, resnet, resnet18
from retinanet.training import checkpoint, weights

CONTENT = {"weights": torch.arange(6.0).reshape(2, 3), "names": ["a", "b"], "nested": {"lr": 0.5, "none": None}}


pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture(scope="module")
def net(small_network):
    return resnet18(2, anchors=Anchors(ratios=[1.0, 3.0], scales=[1.0]))


@pytest.fixture(scope="module")
def saved(net, tmp_path_factory):
    """A checkpoint of `net`, and what is in it."""
    path = tmp_path_factory.mktemp("checkpoint") / "net.pt"
    content = checkpoint.model_entries(net, ["cat", "dog"], 64, 96) | {"epoch": 7}
    checkpoint.save(path, content)
    return path, content


def names(folder):
    return [path.name for path in folder.iterdir()]


# Files


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint.save(tmp_path / "a.pt", CONTENT)
    content = checkpoint.load(tmp_path / "a.pt")
    assert torch.equal(content.pop("weights"), CONTENT["weights"])
    assert content == {"names": ["a", "b"], "nested": {"lr": 0.5, "none": None}}
    checkpoint.save(tmp_path / "a.pt", {"epoch": 2})
    assert checkpoint.load(tmp_path / "a.pt") == {"epoch": 2}
    assert names(tmp_path) == ["a.pt"]


def write_half(content, file):
    file.write(b"half a checkpoint")
    raise OSError(28, "No space left on device")


def fail(*args):
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize(("module", "name", "failure"), [(torch, "save", write_half), (os, "fsync", fail)])
def test_a_failing_write_leaves_the_old_file_intact(tmp_path, monkeypatch, module, name, failure):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"epoch": 1})
    before = path.read_bytes()
    monkeypatch.setattr(module, name, failure)
    with pytest.raises(UserError, match=r"a\.pt: cannot be saved \(\[Errno .*an earlier file, if any, is intact"):
        checkpoint.save(path, {"epoch": 2})
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.pt"]  # no temporary files are left


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError])
def test_an_interrupted_write_leaves_the_old_file_intact(tmp_path, monkeypatch, error):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"epoch": 1})

    def interrupted(content, file):
        file.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(error):
        checkpoint.save(path, {"epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"epoch": 1}
    assert names(tmp_path) == ["a.pt"]


def test_the_file_is_flushed_to_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda _: events.extend(names(tmp_path)))
    for _ in range(2):
        checkpoint.save(tmp_path / "a.pt", {"epoch": 1})
    temporary = [name for name in events if name != "a.pt"]
    assert len({*temporary}) == 2 and all(name.startswith("a.pt.") for name in temporary)  # each has a name of its own


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"a\.pt: cannot be saved"):
        checkpoint.save(tmp_path / folder / "a.pt", CONTENT)


def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "a.pt"
    for new_format in (True, False):
        torch.save(CONTENT, path, _use_new_zipfile_serialization=new_format)
        whole = path.read_bytes()
        for length in range(0, len(whole) - 1, len(whole) // 40):
            path.write_bytes(whole[:length])
            with pytest.raises(UserError, match=r"a\.pt: "):
                checkpoint.load(path)


@pytest.mark.parametrize("content", [b"", b".", b"a few words", b"hello", b"q\n1,2,3\n", bytes(range(256))])
def test_a_file_that_is_not_a_checkpoint_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pt: is (not a checkpoint|damaged)"):
        checkpoint.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (bytes(5000), r"it starts with b'\\x00"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it is text that starts with 'version https://git-lfs"),
        (b"a.jpg,1,2,3,4,cat\n", "it is text that starts with 'a.jpg,1,2"),
        (b"exec", "it is text that starts with 'exec'"),
        (b"PK\3\4" + bytes(100), "it is a truncated zip file"),
        (b"\x80\2e", "it is truncated, or not from torch.save"),
        (b"\x80\2", "it is truncated, or not from torch.save"),
    ],
)
def test_the_message_says_what_a_file_is_instead(tmp_path, content, message):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.pt: is not a checkpoint, or is damaged \({message}"):
        checkpoint.load_model(tmp_path / "a.pt")


def test_a_missing_checkpoint_or_a_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.pt: the checkpoint does not exist"):
        checkpoint.load(tmp_path / "none.pt")
    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoint.load(tmp_path)


def test_a_list_is_not_a_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: holds a list"):
        checkpoint.load_model(tmp_path / "a.pt")


# Models


@pytest.mark.parametrize("depth", ARCHITECTURES)
def test_the_depth_follows_from_the_weights(depth):
    with torch.device("meta"):
        state = resnet(depth, 3).state_dict()
    assert checkpoint.infer_depth(state) == depth


def test_other_weights_have_no_depth(net):
    assert checkpoint.infer_depth({}) is None
    assert checkpoint.infer_depth({f"backbone.{key}": value for key, value in net.state_dict().items()}) is None
    assert checkpoint.infer_depth({key: 0 for key in net.state_dict() if not key.startswith("layer3.")}) is None


def test_a_model_comes_back_with_all_that_describes_it(net, saved):
    path, _ = saved
    again, info = checkpoint.load_model(path)
    assert not again.training
    assert info == {
        "depth": 18,
        "class_names": ["cat", "dog"],
        "anchors": net.anchors.settings(),
        "best_match_iou": None,
        "min_side": 64,
        "max_side": 96,
        "limits": checkpoint.LIMITS,
        "score_thresholds": {},
        "pixel_range": None,
        "tile": None,
        "tile_overlap": 0.25,
        "path": str(path),
        "epoch": 7,
    }
    assert again.num_classes == 2 and again.anchors.settings() == net.anchors.settings()
    assert again.state_dict().keys() == net.state_dict().keys()
    for key, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("key", ["model", "class_names", "anchors", "min_side", "max_side"])
def test_a_checkpoint_that_lacks_something_is_an_error(saved, tmp_path, key):
    content = {**saved[1], "model": {}}
    del content[key]
    checkpoint.save(tmp_path / "a.pt", content)
    with pytest.raises(UserError, match=rf"a\.pt: .* lacks {key}$"):
        checkpoint.load_model(tmp_path / "a.pt")


def test_weights_of_another_network_are_an_error(saved, tmp_path):
    checkpoint.save(tmp_path / "a.pt", {**saved[1], "model": {"fc.weight": torch.zeros(2)}})
    with pytest.raises(UserError, match=r"a\.pt: holds no RetinaNet of depth 18, 34, 50, 101, 152"):
        checkpoint.load_model(tmp_path / "a.pt")


def test_weights_that_do_not_fit_the_classes_are_an_error(saved, tmp_path):
    checkpoint.save(tmp_path / "a.pt", {**saved[1], "class_names": ["cat", "dog", "bird"]})
    with pytest.raises(UserError, match=r"a\.pt: .*classificationModel\.output\.bias"):
        checkpoint.load_model(tmp_path / "a.pt")


def test_the_matching_rule_comes_back(net, tmp_path):
    net.focalLoss.best_match_iou = 0.4
    checkpoint.save(tmp_path / "a.pt", checkpoint.model_entries(net, ["cat", "dog"], 64, 96))
    net.focalLoss.best_match_iou = None
    assert checkpoint.load_model(tmp_path / "a.pt")[0].focalLoss.best_match_iou == 0.4


# Files that must not run code


def test_a_whole_model_of_old_torch_is_refused(tmp_path):
    torch.save(nn.Conv2d(3, 8, 3), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"a\.pt: .* was not loaded\. .* save model\.state_dict\(\) instead"):
        checkpoint.load_model(tmp_path / "a.pt")


def test_exported_models_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.script(nn.ReLU()).save(str(tmp_path / "a.pt"))
    torch.export.save(torch.export.export(nn.ReLU(), (torch.zeros(1),)), tmp_path / "b.pt2")
    for name in ("a.pt", "b.pt2"):
        with pytest.raises(
            UserError, match=rf"{name}: is not a checkpoint, .*\(an exported model, or another zip file\)$"
        ):
            checkpoint.load_model(tmp_path / name)


class Call:
    """An object that is pickled as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __call__(self):
        """Needed so that pickle accepts one call as the function of another."""

    def __reduce__(self):
        return self.call


def write_hub(folder, target):
    """A folder that torch.hub.load takes code from."""
    folder.mkdir(exist_ok=True)
    (folder / "hubconf.py").write_text(f"def run():\n    open({str(target)!r}, 'w').close()\n")
    return str(folder)


ATTACKS = {
    "os.system": lambda target: Call(os.system, f"touch {target}"),
    "subprocess": lambda target: Call(subprocess.check_call, ["touch", str(target)]),
    "eval": lambda target: Call(eval, f"open({str(target)!r}, 'w').close()"),
    "exec": lambda target: Call(exec, f"open({str(target)!r}, 'w').close()"),
    "getattr": lambda target: Call(Call(getattr, Call(__import__, "os"), "system"), f"touch {target}"),
    "torch's shell": lambda target: Call(torch.utils.collect_env.run, f"touch {target}"),
    "torch.hub": lambda target: Call(
        functools.partial(torch.hub.load, write_hub(target.parent / "hub", target), "run", source="local")
    ),
}
ENTRIES = {"model": {}, "class_names": ["cat"], "anchors": {}, "min_side": 64, "max_side": 96}
PLACES = {
    "bare": lambda attack: attack,
    "as the weights": lambda attack: {**ENTRIES, "model": attack},
    "beside the weights": lambda attack: {**ENTRIES, "optimizer": [attack]},
    "deep": lambda attack: {"state_dict": {"a": ({"b": [[attack]]},)}},
    "in a module": lambda attack: hide(nn.Sequential(nn.ReLU()), attack),
}
WRITERS = {
    "zip": torch.save,
    "legacy": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
}


def hide(module, attack):
    module.extra = attack
    return module


def assert_refused(path, target, net):
    for read in (checkpoint.load, checkpoint.load_model, functools.partial(weights.load_weights, net)):
        with pytest.raises(UserError, match=r"hostile\.pt: "):
            read(path)
    assert not target.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_loading_path_runs_code(net, tmp_path, attack):
    target, path = tmp_path / "was-run", tmp_path / "hostile.pt"
    torch.save({"state_dict": ATTACKS[attack](target)}, path)
    assert_refused(path, target, net)
    torch.load(path, weights_only=False)
    assert target.exists()  # the trap does work


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("writer", WRITERS)
def test_code_is_found_wherever_it_hides(net, tmp_path, place, writer):
    target, path = tmp_path / "was-run", tmp_path / "hostile.pt"
    WRITERS[writer](PLACES[place](ATTACKS["os.system"](target)), path)
    assert_refused(path, target, net)


def test_the_message_names_what_was_not_loaded(tmp_path):
    torch.save(ATTACKS["eval"](tmp_path / "was-run"), tmp_path / "hostile.pt")
    message = r"hostile\.pt: .* more than tensors and plain types \(eval\), and was not loaded"
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load_model(tmp_path / "hostile.pt")
    assert "weights_only" not in str(error.value)  # torch's own message advises running it


@pytest.mark.parametrize("script", ["train", "validate", "visualize"])
def test_the_scripts_run_no_code(tmp_path, script, capsys):
    target, path = tmp_path / "was-run", tmp_path / "hostile.pt"
    torch.save({"state_dict": ATTACKS["os.system"](target)}, path)
    flags = ["--dataset", "shapes", "--shapes_val", "1", "--device", "cpu", "--workers", "0"]
    if script == "train":
        flags += ["--weights", str(path), "--depth", "18", "--shapes_train", "2", "--out_dir", str(tmp_path / "out")]
    else:
        flags += ["--model", str(path)]
    assert importlib.import_module(script).main(flags) == 1
    assert "hostile.pt: is damaged, or holds more than tensors" in capsys.readouterr().err
    assert not target.exists()


# Files that are not what they seem


def changed_weights(**weights):
    return lambda content: content | {"model": content["model"] | {k.replace("__", "."): v for k, v in weights.items()}}


BIAS, BOX_BIAS = "classificationModel__output__bias", "regressionModel__output__bias"
ODD = {
    "no number": changed_weights(**{BIAS: torch.zeros(0)}),
    "five numbers": changed_weights(**{BIAS: torch.zeros(5)}),
    "a number": changed_weights(**{BIAS: torch.tensor(1.0)}),
    "another box head": changed_weights(**{BOX_BIAS: torch.zeros(7)}),
    "P6 of no dimension": changed_weights(fpn__P6__weight=torch.tensor(1.0)),
    "P6 of one": changed_weights(fpn__P6__weight=torch.zeros(256)),
    "an expanded tensor": changed_weights(conv1__weight=torch.zeros(1).expand(10**6, 10**6)),
    "a sparse tensor": changed_weights(conv1__weight=torch.zeros(64, 3, 7, 7).to_sparse()),
    "a meta tensor": changed_weights(conv1__weight=torch.zeros(64, 3, 7, 7, device="meta")),
    "a text among the weights": changed_weights(conv1__weight="x"),
    **{
        f"{key} {value!r:.40}": lambda content, key=key, value=value: content | {key: value}
        for key, values in {
            "class_names": [
                *("ab", [], ["cat", 1], ["cat", ""], ["cat", " "], {"cat": 0}, 5, ["cat", "cat"], ["x"] * 10**5),
                torch.zeros(2),
            ],
            "anchors": [
                *(None, [], 3, {"sizes": 1}, {"other": []}, {"cells": [[[1.0]]]}, {"cells": "x"}, {"scales": [1e300]}),
                *({"pyramid_levels": [10**9]}, {"sizes": ["x"] * 5}, {"sizes": [float("nan")] * 5}),
                *({"scales": [1.0] * 5000, "ratios": [1.0] * 5000}, {"strides": [1, 2, 3, 4, 5]}),
            ],
            "min_side": [None, 0, -3, 1.5, "64", 10**9, True],
            "max_side": [[64]],
            "best_match_iou": ["x", float("nan"), 99.0, -0.1],
            "metrics": [[1]],
            "limits": [
                *(None, 5, "x", {}, checkpoint.LIMITS | {"other": 1}, checkpoint.LIMITS | {"top_k": 1.5}),
                *(checkpoint.LIMITS | {name: 0} for name in ("top_k", "max_detections")),
                *(checkpoint.LIMITS | {name: -1} for name in checkpoint.LIMITS),
                *(checkpoint.LIMITS | {name: float("nan")} for name in checkpoint.LIMITS),
                *(checkpoint.LIMITS | {"score_threshold": 1.5}, checkpoint.LIMITS | {"max_detections": 10**9}),
            ],
            "score_thresholds": [
                *(5, "x", [0.5], {"all": 0.5}, {"classes": {}}, {"all": "x", "classes": {}}),
                *({"all": 2.0, "classes": {}}, {"all": 0.5, "classes": [0.5]}, {"all": 0.5, "classes": {"cat": "x"}}),
                *({"all": float("nan"), "classes": {}}, {"all": 0.5, "classes": {"cat": -0.5}}),
            ],
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("odd", ODD)
def test_a_checkpoint_of_odd_content_is_one_message(net, saved, tmp_path, odd):
    torch.save(ODD[odd](dict(saved[1])), tmp_path / "odd.pt")
    for read in (checkpoint.load_model, functools.partial(weights.load_weights, net)):
        with pytest.raises(UserError, match=r"odd\.pt: "):
            read(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(("conv1__weight", torch.ones(64, 3, 7, 7, dtype=dtype), "is of type") for dtype in (
            torch.bool, torch.int8, torch.int64, torch.complex64, torch.float8_e4m3fn)),
        ("bn1__num_batches_tracked", torch.tensor(True), "is of type bool"),
        *(("fpn__P6__bias", torch.full((16,), value), "is not finite") for value in (float("nan"), float("inf"))),
        ("fpn__P6__bias", torch.full((16,), 1e300, dtype=torch.float64), "is not finite"),
        ("bn1__running_var", torch.full((64,), -1e-3), "is below 0"),
    ],
)  # fmt: skip
def test_impossible_weights_are_named(net, saved, tmp_path, name, value, message):
    torch.save(changed_weights(**{name: value})(dict(saved[1])), tmp_path / "odd.pt")
    for read in (checkpoint.load_model, functools.partial(weights.load_weights, net)):
        with pytest.raises(UserError, match=rf"odd\.pt: .*{name.replace('__', '.')} {message}"):
            read(tmp_path / "odd.pt")


def test_weights_of_half_precision_are_taken(saved, tmp_path):
    half = {key: value.half() if value.is_floating_point() else value for key, value in saved[1]["model"].items()}
    checkpoint.save(tmp_path / "half.pt", saved[1] | {"model": half})
    assert torch.equal(checkpoint.load_model(tmp_path / "half.pt")[0].conv1.weight, half["conv1.weight"].float())


def deep_module(depth):
    """A module whose two children are the same module, and so on: 2^depth paths lead through it."""
    module = nn.Sequential()
    for _ in range(depth):
        module = nn.Sequential(module, module)
    return module


HUGE = {
    "a key of dots": lambda: {"." * 100_000: torch.zeros(1)},
    "a prefix of dots": lambda: {"a." * 50_000 + "b": torch.zeros(1)},
    "shared modules": lambda: deep_module(60),
    "many modules": lambda: nn.Sequential(*[nn.ReLU()] * 20_000),
}


@pytest.mark.parametrize("huge", HUGE)
def test_a_small_file_does_not_keep_the_program_busy(tmp_path, huge):
    torch.save(HUGE[huge](), tmp_path / "huge.pt")
    with pytest.raises(UserError, match=r"huge\.pt: holds "):
        checkpoint.load_model(tmp_path / "huge.pt")


def test_a_compressed_file_is_not_unpacked(tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for part in source.infolist():
            bomb.writestr(part.filename, source.read(part))
    with pytest.raises(UserError, match=r"bomb\.pt: .*its parts are larger than the file"):
        checkpoint.load(tmp_path / "bomb.pt")


@pytest.mark.parametrize("path", ["/dev/zero", "fifo"])
def test_what_never_ends_is_not_read(tmp_path, path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match=r"is not a checkpoint, or is damaged \(not a file\)"):
        checkpoint.load(tmp_path / path)


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("precious")
    (tmp_path / "a.pt").symlink_to(tmp_path / "other")
    (tmp_path / "a.pt.tmp").symlink_to(tmp_path / "other")
    checkpoint.save(tmp_path / "a.pt", {"epoch": 1})
    assert (tmp_path / "other").read_text() == "precious" and checkpoint.load(tmp_path / "a.pt") == {"epoch": 1}
