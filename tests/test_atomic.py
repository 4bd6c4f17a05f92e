"""Folders that are replaced as a whole: after failures at every step, after kills, with the files of others in them."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import stat
import time

import pytest
import safetensors.torch
import torch
from helpers_search import make_net, same_bits, snapshot

import heterolora_kernels as hlk
from heterolora_kernels import files, folders

KILLS = {"exchange": 50, "two_renames": 20}


@pytest.fixture(params=["exchange", "two_renames"])
def way(request, monkeypatch):
    """How the system puts a folder in the place of another."""
    if request.param == "two_renames":
        monkeypatch.setattr(folders, "exchange", lambda first, second: False)
    return request.param


def contents(folder) -> dict:
    """Everything below a folder: bytes of files, targets of links, None for folders."""
    found = {}
    for place, below, names in os.walk(folder):
        for name in (*below, *names):
            path = os.path.join(place, name)
            key = os.path.relpath(path, folder)
            if os.path.islink(path):
                found[key] = ("link", os.readlink(path))
            else:
                found[key] = None if os.path.isdir(path) else open(path, "rb").read()
    return found


def dead_pid() -> int:
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    return process.pid


def write(directory, **texts) -> None:
    with folders.replaced_folder(directory) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text)


@pytest.fixture
def folder_of_others(tmp_path):
    """A saved folder with what others keep in it."""
    target = tmp_path / "run"
    write(target, ours="old", shared="old")
    (target / "tokenizer.json").write_text("{}")
    (target / "logs" / "deep").mkdir(parents=True)
    (target / "logs" / "deep" / "events").write_text("events")
    (target / "latest").symlink_to("logs/deep")
    (target / "dangling").symlink_to("nowhere")
    return target


def test_folder_is_made_with_its_parents(tmp_path, way):
    write(tmp_path / "a" / "b", ours="text")
    assert contents(tmp_path / "a") == {"b": None, "b/ours": b"text"}


def test_files_of_others_survive(folder_of_others, way):
    before, inode = contents(folder_of_others), (folder_of_others / "tokenizer.json").stat().st_ino
    folder_of_others.chmod(0o750)
    write(folder_of_others, ours="new", added="new")
    assert contents(folder_of_others) == {**before, "ours": b"new", "added": b"new"}
    # The very file: who has it open goes on writing into it.
    assert (folder_of_others / "tokenizer.json").stat().st_ino == inode
    assert (folder_of_others / "tokenizer.json").stat().st_nlink == 1
    assert stat.S_IMODE(folder_of_others.stat().st_mode) == 0o750
    assert os.listdir(folder_of_others.parent) == ["run"]


def test_files_of_others_are_copied_where_links_fail(folder_of_others, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "no links here")

    before = contents(folder_of_others)
    monkeypatch.setattr(os, "link", refuse)
    write(folder_of_others, ours="new")
    assert contents(folder_of_others) == {**before, "ours": b"new"}


def test_stale_files_are_left_behind(folder_of_others, way):
    before = contents(folder_of_others)
    with folders.replaced_folder(folder_of_others, stale=lambda old: {"shared"}) as folder:
        (folder / "ours").write_text("new")
    before.pop("shared")
    assert contents(folder_of_others) == {**before, "ours": b"new"}


def test_a_link_to_a_folder_is_followed(tmp_path, way):
    write(tmp_path / "real", ours="old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", ours="new")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == {"ours": b"new"}


def test_everything_is_on_the_disk_before_it_takes_its_place(folder_of_others, way, monkeypatch):
    events, fsync, put = [], os.fsync, folders._trade

    def record(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def trade(folder, target, aside):
        events.append("trade")
        put(folder, target, aside)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(folders, "_trade", trade)
    with folders.replaced_folder(folder_of_others) as folder:
        (folder / "ours").write_text("new")
        place = str(folder)
    before, after = events[:events.index("trade")], events[events.index("trade") + 1:]
    assert sorted(before) == sorted(place + below for below in ("", "/ours", "/logs", "/logs/deep"))
    assert after == [str(folder_of_others.parent)]


# ---- failures ----

STEPS = {"mkdir": (os, "mkdir"), "chmod": (os, "chmod"), "link": (os, "link"), "copytree": (shutil, "copytree"),
         "fsync": (os, "fsync"), "rename": (os, "rename"), "exchange": (folders, "exchange"),
         "save_file": (safetensors.torch, "save_file")}
ERRORS = {"disk_full": OSError(errno.ENOSPC, "no space left on device"), "interrupt": KeyboardInterrupt()}


class Fault:
    """Counts calls of every step and fails at one of them, before or after it was done."""

    def __init__(self, monkeypatch, at: int, error: BaseException, done: bool):
        self.at, self.error, self.done, self.calls, self.raised = at, error, done, 0, False
        for owner, name in STEPS.values():
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, real):
        def step(*args, **kwargs):
            self.calls += 1
            if self.calls != self.at:
                return real(*args, **kwargs)
            self.raised = True
            if self.done:
                real(*args, **kwargs)
            raise self.error
        return step


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("exists", [True, False], ids=["replaced", "new"])
def test_a_failure_at_any_step_leaves_the_old_folder(folder_of_others, tmp_path, way, error, done, exists, monkeypatch):
    target = folder_of_others if exists else tmp_path / "other"
    backup = shutil.copytree(folder_of_others, tmp_path / "backup", symlinks=True)
    before, beside = contents(target), sorted(os.listdir(tmp_path))
    failed = 0
    for at in itertools.count(1):
        with monkeypatch.context() as patched:
            fault = Fault(patched, at, error, done)
            try:
                with folders.replaced_folder(target) as folder:
                    files.write_tensors(folder / "weights", {"a": torch.ones(3)})
                    files.write_json(folder / "ours", {"new": 1})
            except type(error):
                failed += 1
                assert contents(target) == before and sorted(os.listdir(tmp_path)) == beside, f"step {at}"
                continue
        # Done in another way (a link that fails becomes a copy), or no step was left to fail.
        assert contents(target).keys() == before.keys() | {"weights", "ours"}
        assert not any(name.startswith(".") for name in os.listdir(tmp_path))
        if not fault.raised:
            break
        shutil.rmtree(target)
        if exists:
            shutil.copytree(backup, target, symlinks=True)
    assert failed >= 4


@pytest.mark.parametrize(("format", "step"), [(format, step) for format in ("native", "peft", "vllm")
                                              for step in ("write_tensors", "write_json")] + [("merged", "write_tensors")])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_an_adapter_that_cannot_be_written_leaves_the_old_one(tmp_path, format, step, error, monkeypatch):
    model = make_net(search="off")
    hlk.save_adapter(model, tmp_path / "adapter")
    before = contents(tmp_path)
    model.layers[0].lora_A.data.add_(1)

    def fail(path, content):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(files, step, fail)
    with pytest.raises(type(error)):
        hlk.save_adapter(model, tmp_path / "adapter", format)
    assert contents(tmp_path) == before


# ---- what killed processes leave ----


def test_leftovers_of_dead_processes_are_removed(tmp_path, way):
    target = tmp_path / "run"
    names = {"dead": f".run.saving-{dead_pid()}-00ff", "own_number": f".run.saving-{os.getpid()}-00ff",
             "alive": f".run.saving-{os.getppid()}-00ff", "aside": f".run.aside-{dead_pid()}-00ff",
             "others": f".runs.saving-{dead_pid()}-00ff", "no_number": ".run.saving-x-00ff"}
    write(target, ours="old")
    for name in names.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "ours").write_text("half")
    write(target, ours="new")
    assert sorted(os.listdir(tmp_path)) == sorted(["run", names["alive"], names["others"], names["no_number"]])
    assert contents(target) == {"ours": b"new"}


def test_a_folder_that_was_set_aside_is_found_and_comes_back(folder_of_others, way):
    before = contents(folder_of_others)
    aside = folder_of_others.with_name(f".run.aside-{dead_pid()}-00ff")
    folder_of_others.rename(aside)
    # The kill came before this one took its place.
    half = folder_of_others.with_name(f".run.saving-{dead_pid()}-00ff")
    half.mkdir()
    assert folders.find_folder(folder_of_others) == aside
    write(folder_of_others, ours="new")
    assert contents(folder_of_others) == {**before, "ours": b"new"} and os.listdir(folder_of_others.parent) == ["run"]


def save_in_turns(models, directory) -> None:
    for model in itertools.cycle(models):
        hlk.save_adapter(model, directory)


def test_a_folder_survives_kills_at_any_moment(tmp_path, way):
    models = [make_net(weights=0, search="off"), make_net(weights=0, search="off")]
    with torch.no_grad():
        for parameter in models[1].layers[2].lora_A, models[1].layers[0].lora_B:
            parameter.add_(1)
    saved, target = [snapshot(model) for model in models], make_net(weights=0, search="off")
    directory = tmp_path / "adapter"
    hlk.save_adapter(models[0], directory)
    (directory / "trainer_state.json").write_text("{}")
    moments, seen, interrupted = random.Random(0), set(), 0
    for _ in range(KILLS[way]):
        process = multiprocessing.get_context("fork").Process(target=save_in_turns, args=(models, directory))
        process.start()
        time.sleep(moments.uniform(0.01, 0.08))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        interrupted += any(name.startswith(".") for name in os.listdir(tmp_path))
        hlk.load_adapter(target, directory)
        now = snapshot(target)
        assert any(same_bits(now, each) for each in saved)
        seen.add(same_bits(now, saved[0]))
        assert (folders.find_folder(directory) / "trainer_state.json").read_text() == "{}"
    # It would see nothing if every kill came between two saves.
    assert seen == {True, False} and interrupted > KILLS[way] // 4
    hlk.save_adapter(models[0], directory)
    assert os.listdir(tmp_path) == ["adapter"]


# ---- refused ----


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("text")
    for call in (lambda: write(tmp_path / "file", ours="new"), lambda: folders.find_folder(tmp_path / "file")):
        with pytest.raises(ValueError, match="directory must be a folder.*is a file"):
            call()
    assert contents(tmp_path) == {"file": b"text"}


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere/run"):
        folders.find_folder(tmp_path / "nowhere" / "run")


# ---- values as JSON ----


def test_values_come_back_bit_for_bit():
    values = {
        "none": None, "bools": [True, False], "ints": [0, -1, 2**80], "text": "\u00e9\n\x00", "numbered": {3: "three", -1: {}},
        "floats": [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0], "empty": [{}, []], "__kind__": {"__kind__": "text"},
        "tensors": [torch.arange(5, dtype=torch.uint8), torch.randn(2, 3, dtype=torch.bfloat16), torch.tensor(3.5),
                    torch.zeros(0, 4, dtype=torch.float64), torch.tensor([True, False]), torch.randn(3, 4).t(),
                    torch.Generator().manual_seed(1).get_state()],
    }
    encoded = files.encode(values)
    assert encoded == json.loads(json.dumps(encoded, allow_nan=False))
    found = files.decode(encoded, "values")
    tensors, others = found.pop("tensors"), {**values}
    for tensor, expected in zip(tensors, others.pop("tensors")):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    assert found == others and str(found["floats"]) == str(others["floats"])


def test_floats_that_json_has_no_form_for():
    found = files.decode(files.encode([float("nan"), float("inf"), float("-inf")]), "values")
    assert str(found) == "[nan, inf, -inf]"


def test_what_has_no_written_form_is_said():
    with pytest.raises(TypeError, match="set"):
        files.encode({"a": [{1, 2}]})


@pytest.mark.parametrize("damaged", [
    {"__kind__": "tensor", "dtype": "float32", "shape": [2], "data": "AAAA"}, {"__kind__": "tensor", "dtype": "nn", "shape": [0],
                                                                               "data": ""},
    {"__kind__": "tensor", "dtype": "float32", "shape": [1], "data": "?"}, {"__kind__": "tensor"}, {"__kind__": "float"},
    {"__kind__": "dict", "items": [3]}, {"__kind__": "set"},
], ids=["short", "dtype", "base64", "no_fields", "no_value", "items", "kind"])
def test_damaged_values_are_named(damaged):
    with pytest.raises(ValueError, match=r"here\['a'\]\[1\]"):
        files.decode({"a": [0, damaged]}, "here")
