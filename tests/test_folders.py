"""Folders that cannot be replaced as a whole, folders of one adapter, readers beside writers."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from families import make_inputs, make_model, patch
from helpers_search import make_net, same_bits, snapshot
from safetensors import SafetensorError

import heterolora_kernels as hlk
from heterolora_kernels import disk, files, folders

FORMATS = ["native", "peft", "merged"]


def contents(folder) -> dict:
    return {os.path.relpath(os.path.join(place, name), folder): open(os.path.join(place, name), "rb").read()
            for place, _, names in os.walk(folder) for name in names}


def write(directory, **texts) -> None:
    with folders.replaced_folder(directory) as folder:
        for name, text in texts.items():
            (folder / name.replace("_", ".")).write_text(text)


def dead_pid() -> int:
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    return process.pid


# ---- what cannot be replaced ----


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "deep").write_text("deep")
    (folder / "theirs").write_text("theirs")
    (folder / "ours.json").write_text("old")
    (folder / "weights").write_text("old")
    return folder


@pytest.fixture
def in_pieces(monkeypatch):
    monkeypatch.setattr(folders, "_can_be_replaced", lambda target: False)


def test_the_working_directory_is_written_into(run, monkeypatch):
    monkeypatch.chdir(run / "logs")
    inode = run.stat().st_ino
    write(run, ours_json="new", more="more")
    assert run.stat().st_ino == inode
    assert contents(run) == {"logs/deep": b"deep", "theirs": b"theirs", "ours.json": b"new", "weights": b"old", "more": b"more"}


def test_the_current_folder_by_its_short_name(run, monkeypatch):
    monkeypatch.chdir(run)
    hlk.save_adapter(make_net(search="off"), ".")
    assert (run / "heterolora.json").exists() and (run / "theirs").read_text() == "theirs"


def test_a_folder_whose_parent_may_not_be_written(run, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != run.parent and access(path, mode))
    inode = run.stat().st_ino
    write(run, ours_json="new")
    assert run.stat().st_ino == inode and (run / "ours.json").read_text() == "new"


_MOUNTED = """
import os, sys, torch
sys.path.insert(0, sys.argv[2])
from helpers_search import make_net
import heterolora_kernels as hlk
model = make_net(search="off")
for format in ("native", "peft", "native"):
    hlk.save_adapter(model, sys.argv[1], format)
assert open(os.path.join(sys.argv[1], "inner", "theirs")).read() == "theirs"
print(sorted(os.listdir(sys.argv[1])))
"""


@pytest.mark.parametrize("kind", ["tmpfs", "bind", "inside"])
def test_real_mounts(kind, tmp_path):
    target, script = tmp_path / "out", tmp_path / "script.py"
    (target / "inner").mkdir(parents=True)
    script.write_text(_MOUNTED)
    mount = {"tmpfs": f"mount -t tmpfs none {target} && mkdir {target}/inner",
             "bind": f"mkdir {tmp_path}/real && mkdir {tmp_path}/real/inner && mount --bind {tmp_path}/real {target}",
             "inside": f"mount -t tmpfs none {target}/inner"}[kind]
    run = f"exec {sys.executable} {script} {target} {os.path.dirname(__file__)}"
    command = f"{mount} && echo -n theirs > {target}/inner/theirs && {run}"
    found = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True)
    if "unshare:" in found.stderr or "mount:" in found.stderr:
        pytest.skip(f"nothing can be mounted here: {found.stderr.splitlines()[0]}")
    assert found.returncode == 0, found.stderr[-1500:]
    assert "['adapter.safetensors', 'heterolora.json', 'inner']" in found.stdout


def test_mounts_are_found_by_their_names(tmp_path, monkeypatch):
    table = tmp_path / "mountinfo"
    table.write_text("36 35 98:0 / /data/with\\040space rw - ext4 /dev/sda rw\n")
    monkeypatch.setattr(disk, "_MOUNTS", str(table))
    for name, expected in (("/data/with space", True), ("/data", True), ("/data/with", False), ("/data/with space/below", False)):
        assert disk.has_mounts(disk.Path(name)) == expected, name


def test_a_folder_in_the_place_of_a_file_is_named(run, in_pieces):
    before = contents(run)
    with pytest.raises(ValueError, match="has a folder called 'logs'"):
        write(run, logs="new")
    assert contents(run) == before


# ---- failures and kills, file by file ----


STEPS = {"mkdir": (os, "mkdir"), "fsync": (os, "fsync"), "rename": (os, "rename"), "replace": (os, "replace"), "unlink": (os,
                                                                                                                          "unlink"),
         "rmdir": (os, "rmdir")}


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_at_any_step_leaves_one_or_the_other(run, tmp_path, error, done, in_pieces, monkeypatch):
    before = contents(run)
    after = {**before, "ours.json": b"new", "fresh": b"new"}
    after.pop("weights")
    backup = shutil.copytree(run, tmp_path / "backup")
    seen = []
    for at in itertools.count(1):
        calls = 0

        def wrap(real, at=at):
            def step(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls != at:
                    return real(*args, **kwargs)
                if done:
                    real(*args, **kwargs)
                raise error
            return step

        with monkeypatch.context() as patched:
            for owner, name in STEPS.values():
                patched.setattr(owner, name, wrap(getattr(owner, name)))
            try:
                with folders.replaced_folder(run, stale=lambda folder: {"weights"}) as folder:
                    (folder / "ours.json").write_text("new")
                    (folder / "fresh").write_text("new")
            except type(error):
                pass
        found = {name: text for name, text in contents(run).items()}
        assert found in (before, after), f"step {at}: {sorted(found)}"
        seen.append(found == after)
        if calls < at:
            break
        # Whatever came of it, the next save is right.
        write(run, ours_json="again")
        assert (run / "ours.json").read_text() == "again" and not any(name.startswith(".") for name in os.listdir(run))
        shutil.rmtree(run)
        shutil.copytree(backup, run)
    assert False in seen and seen[-1] and len(seen) > 8


def test_what_a_kill_committed_is_finished_by_the_reader(run):
    ready = run / f".heterolora.ready-{dead_pid()}-00ff"
    ready.mkdir()
    (ready / "ours.json").write_text("new")
    (ready / ".goes.json").write_text('["weights", "../run/theirs"]')
    half = run / f".heterolora.saving-{dead_pid()}-00ff"
    half.mkdir()
    assert folders.find_folder(run) == run
    assert (run / "ours.json").read_text() == "new" and not (run / "weights").exists() and not ready.exists()
    assert (run / "theirs").exists() and half.exists()
    write(run, ours_json="newer")
    assert not half.exists()


def save_in_turns(models, directory, formats) -> None:
    folders._can_be_replaced = lambda target: False
    for model, format in itertools.cycle(zip(models, formats)):
        hlk.save_adapter(model, directory, format)


@pytest.mark.parametrize("formats", [("native", "native"), ("peft", "peft"), ("native", "peft")], ids="-".join)
def test_kills_at_any_moment_lose_nothing(formats, tmp_path):
    models = [make_net(weights=0, search="off"), make_net(weights=0, search="off")]
    with torch.no_grad():
        models[1].layers[2].lora_A.add_(1)
    expected = [snapshot(hlk.load_adapter(make_net(weights=0, search="off"), _saved(model, tmp_path / f"only{i}", formats[i])))
                for i, model in enumerate(models)]
    directory, moments, seen = tmp_path / "adapter", random.Random(0), set()
    _saved(models[0], directory, formats[0])
    for _ in range(25):
        process = multiprocessing.get_context("fork").Process(target=save_in_turns, args=(models, directory, formats))
        process.start()
        time.sleep(moments.uniform(0.005, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        now = snapshot(hlk.load_adapter(make_net(weights=0, search="off"), directory))
        assert any(same_bits(now, each) for each in expected)
        seen.add(same_bits(now, expected[0]))
    assert seen == {True, False}


def _saved(model, directory, format):
    hlk.save_adapter(model, directory, format)
    return directory


# ---- a reader beside a writer ----


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "in_pieces"])
@pytest.mark.parametrize("formats", [("native", "native"), ("peft", "peft"), ("native", "peft")], ids="-".join)
def test_a_reader_gets_one_save_or_an_error(formats, whole, tmp_path):
    models = [make_net(weights=0, search="off"), make_net(weights=0, search="off")]
    with torch.no_grad():
        models[1].layers[2].lora_A.add_(1)
        models[1].layers[0].lora_B.add_(1)
    directory = _saved(models[0], tmp_path / "adapter", formats[0])
    expected = [snapshot(hlk.load_adapter(make_net(weights=0, search="off"), _saved(model, tmp_path / f"only{i}", formats[i])))
                for i, model in enumerate(models)]
    process = multiprocessing.get_context("fork").Process(target=_write_in_turns, args=(models, directory, formats, whole))
    process.start()
    target, seen, refused = make_net(weights=0, search="off"), set(), 0
    try:
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            try:
                hlk.load_adapter(target, directory)
            except (ValueError, FileNotFoundError):
                refused += 1
                continue
            now = snapshot(target)
            assert any(same_bits(now, each) for each in expected)
            seen.add(same_bits(now, expected[0]))
    finally:
        process.kill()
        process.join()
    assert seen == {True, False}


def _write_in_turns(models, directory, formats, whole) -> None:
    if not whole:
        folders._can_be_replaced = lambda target: False
    for model, format in itertools.cycle(zip(models, formats)):
        hlk.save_adapter(model, directory, format)
        time.sleep(0.02)


def test_a_folder_that_never_rests_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_PAUSE", 0.0)
    (tmp_path / "file").write_text("0")
    counts = itertools.count()

    def read(folder):
        files.write_file(folder / "file", str(next(counts)).encode())

    with pytest.raises(ValueError, match="another process is writing"):
        folders.settled(tmp_path, read)
    assert next(counts) == 20


# ---- one adapter in a folder ----


def llama():
    return patch(make_model("llama"), shortcuts=())


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: value for name, value in make_inputs().items() if name != "labels"}).logits


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", ["native", "peft"])
def test_what_was_saved_last_is_loaded(first, second, tmp_path):
    old, new = llama(), llama()
    with torch.no_grad():
        new.model.layers[0].self_attn.q_proj.lora_B.add_(0.5)
    (tmp_path / "pytorch_model.bin").write_text("theirs")
    hlk.save_adapter(old, tmp_path, first)
    hlk.save_adapter(new, tmp_path, second)
    torch.testing.assert_close(outputs(hlk.load_adapter(make_model("llama"), tmp_path)), outputs(new), rtol=1e-5, atol=1e-5)
    kinds = {name: (tmp_path / name).exists() for name in ("heterolora.json", "adapter.safetensors", "adapter_config.json",
                                                           "adapter_model.safetensors")}
    assert kinds == {"heterolora.json": second == "native", "adapter.safetensors": second == "native",
                     "adapter_config.json": second == "peft", "adapter_model.safetensors": second == "peft"}
    assert (tmp_path / "pytorch_model.bin").read_text() == "theirs"


@pytest.mark.parametrize("first", ["native", "peft"])
def test_a_merged_model_replaces_an_adapter(first, tmp_path):
    model = llama()
    hlk.save_adapter(model, tmp_path, first)
    hlk.save_adapter(model, tmp_path, "merged")
    assert not any("adapter" in name or "heterolora" in name for name in os.listdir(tmp_path))
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-4, atol=1e-4)


def test_shards_of_an_earlier_merged_model_go(tmp_path):
    model = llama()
    make_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "model-of-theirs.safetensors").write_text("theirs")
    assert (tmp_path / "model.safetensors.index.json").exists()
    hlk.save_adapter(model, tmp_path, "merged")
    assert sorted(name for name in os.listdir(tmp_path) if name.startswith("model")) == ["model-of-theirs.safetensors",
                                                                                        "model.safetensors"]
    torch.testing.assert_close(outputs(transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()), outputs(model),
                               rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["native", "merged"])
def test_an_adapter_of_pefts_own_is_not_removed(format, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    peft.get_peft_model(make_model("llama"), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds an adapter that PEFT wrote"):
        hlk.save_adapter(llama(), tmp_path, format)
    assert contents(tmp_path) == before


# ---- full disks ----


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"),
                                   SafetensorError("I/O error: No space left on device (os error 28)")],
                         ids=["full", "quota", "safetensors"])
@pytest.mark.parametrize("format", ["native", "peft"])
def test_a_full_disk_names_the_folder(format, error, tmp_path, monkeypatch):
    hlk.save_adapter(llama(), tmp_path / "run", format)
    before = contents(tmp_path)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(files.safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="directory: no space is left for .*run, which is as it was"):
        hlk.save_adapter(llama(), tmp_path / "run", format)
    assert contents(tmp_path) == before


def test_the_trainers_checkpoint_keeps_what_is_there(tmp_path):
    from heterolora_kernels.save_and_load import write_native

    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "state").write_text("state")
    (tmp_path / f".heterolora.saving-{dead_pid()}-00ff").mkdir()
    inode = tmp_path.stat().st_ino
    write_native(llama(), tmp_path, weights_name="model.safetensors", keep_folder=True)
    assert tmp_path.stat().st_ino == inode and json.loads((tmp_path / "heterolora.json").read_text())["weights"]["file"] == (
        "model.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "heterolora.json", "model.safetensors"]
