"""Files that are broken or mean harm: right, or a ValueError that names the file, soon and without the memory they claim."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
import warnings
from pathlib import Path

import pytest
import torch
from families import make_inputs, make_model, patch
from fuzzing import fuzz
from helpers_saving import assert_untouched
from helpers_search import same_bits, snapshot
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import heterolora_kernels as hlk
from heterolora_kernels import _env, files
from heterolora_kernels.matching import matches, pattern_value
from heterolora_kernels.search_state import check_search_state


def model():
    return patch(make_model("llama"), shortcuts="all", search="dynamic", interval=1, budget=0.5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A native adapter with the state of a search in the middle of a window, and a PEFT one."""
    folder = tmp_path_factory.mktemp("saved")
    patched = model()
    search = hlk.RankSearch(patched)
    optimizer = torch.optim.AdamW([p for p in patched.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(12):
        patched(**make_inputs()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            search.step()
    hlk.save_adapter(patched, folder / "native", search=search)
    hlk.save_adapter(patched, folder / "peft", "peft", drop_shortcuts=True)
    return folder


def rewritten(source: Path, target: Path, change_record=None, change_tensors=None) -> Path:
    """A copy with changes; the checksum is that of the changed tensors."""
    target.mkdir(exist_ok=True)
    record = json.loads((source / "heterolora.json").read_text())
    tensors = load_file(source / "adapter.safetensors")
    if change_tensors is not None:
        change_tensors(tensors)
    save_file(tensors, target / "adapter.safetensors")
    record["weights"]["sha256"] = hashlib.sha256((target / "adapter.safetensors").read_bytes()).hexdigest()
    if change_record is not None:
        change_record(record)
    (target / "heterolora.json").write_text(json.dumps(record))
    return target


# ---- sizes and kinds of files ----


@pytest.mark.parametrize("field, value", [("r", 10**8), ("r", 10**12), ("shortcut_r", 10**9), ("lora_alpha", 10**400),
                                          ("shortcut_alpha", 10**400), ("rank_pattern", {"q_proj": 10**9})],
                         ids=lambda value: str(value)[:20])
def test_ranks_are_compared_before_memory_is_taken(field, value, saved, tmp_path):
    folder = rewritten(saved / "native", tmp_path / "a", lambda record: record["config"].update({field: value}))
    base = make_model("llama")
    begun = time.monotonic()
    assert_untouched(base, lambda: hlk.load_adapter(base, folder), "heterolora.json: field 'config'")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("name", ["heterolora.json", "adapter.safetensors"])
def test_a_pipe_is_no_file(name, saved, tmp_path):
    folder = rewritten(saved / "native", tmp_path / "a")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    base = make_model("llama")
    assert_untouched(base, lambda: hlk.load_adapter(base, folder), "must be a file, and is a pipe")


@pytest.mark.parametrize("name", ["heterolora.json", "adapter.safetensors"])
def test_a_file_larger_than_memory_is_not_read(name, saved, tmp_path):
    folder = rewritten(saved / "native", tmp_path / "a")
    os.truncate(folder / name, 1 << 42)
    base = make_model("llama")
    assert_untouched(base, lambda: hlk.load_adapter(base, folder), f"{name} has .* bytes, and may have")


def test_memory_that_nobody_knows_is_no_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "available_memory", lambda device: None)
    (tmp_path / "file").write_bytes(b"text")
    assert files._read(tmp_path / "file") == b"text"
    assert _env.available_memory(torch.device("cpu")) > 0


# ---- patterns ----


_BACKTRACKS = r"(([a-z0-9_]+)*\.?)*(x|xx)+[!?]"


def test_a_pattern_that_backtracks_is_stopped(monkeypatch):
    monkeypatch.setattr("heterolora_kernels.matching._PATIENCE", 0.05)
    name = "a" * 40 + "b"
    for call in (lambda: matches(name, r"(?:(a+)+\1)+[0-9]"), lambda: pattern_value(name, {r"(?:(a+)+\3)+[0-9]": 3}, 1)):
        begun = time.monotonic()
        with pytest.raises(ValueError, match="takes too long"):
            call()
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
def test_patterns_of_a_file_end(field, saved, tmp_path):
    value = {_BACKTRACKS: 2} if field.endswith("pattern") else _BACKTRACKS
    folder = rewritten(saved / "native", tmp_path / "a", lambda record: record["config"].update({field: value}))
    base = make_model("llama")
    begun = time.monotonic()
    try:
        hlk.load_adapter(base, folder)
    except ValueError as error:
        assert "heterolora.json" in str(error)
    assert time.monotonic() - begun < 60


# ---- values ----


TENSORS = {
    "int8": (lambda t: t.to(torch.int8), "must be float16, .*got torch.int8"), "bool": (lambda t: t.bool(), "got torch.bool"),
    "complex": (lambda t: t.to(torch.complex64), "got torch.complex64"), "float8": (lambda t: t.to(torch.float8_e4m3fn),
                                                                                    "got torch.float8"),
    "nan": (lambda t: torch.full_like(t, torch.nan), "not finite"), "inf": (lambda t: t.index_fill(0, torch.tensor([0]),
                                                                                                   torch.inf), "not finite"),
}


@pytest.mark.parametrize("leaf", ["lora_A", "lora_B"])
@pytest.mark.parametrize("change, named", TENSORS.values(), ids=TENSORS)
def test_tensors_that_no_adapter_has(change, named, leaf, saved, tmp_path):
    name = f"model.layers.0.self_attn.q_proj.{leaf}"
    folder = rewritten(saved / "native", tmp_path / "a", change_tensors=lambda t: t.update({name: change(t[name])}))
    base = make_model("llama")
    assert_untouched(base, lambda: hlk.load_adapter(base, folder), f"adapter.safetensors: tensor '{name}' .*{named}")


@pytest.mark.parametrize("change, named", [TENSORS[name] for name in ("nan", "int8", "float8")], ids=["nan", "int8", "float8"])
def test_tensors_that_no_adapter_of_peft_has(change, named, saved, tmp_path):
    tensors = load_file(saved / "peft" / "adapter_model.safetensors")
    first = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file({**tensors, first: change(tensors[first])}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((saved / "peft" / "adapter_config.json").read_text())
    base = make_model("llama")
    assert_untouched(base, lambda: hlk.load_adapter(base, tmp_path), "adapter_model.safetensors: tensor .*(not "
                                                                     "finite|floating matrix)")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
                                  "model.layers.1.mlp.up_proj.weight",
                                  "model.layers.0.input_layernorm.weight"])
def test_every_weight_of_the_base_is_compared(name, saved):
    base = make_model("llama")
    with torch.no_grad():
        base.get_parameter(name).mul_(1.5)
    assert_untouched(base, lambda: hlk.load_adapter(base, saved / "native"), "trained on another base")
    hlk.load_adapter(base, saved / "native", check_base=False)


def test_samples_of_earlier_versions_name_modules(saved, tmp_path):
    def as_before(record):
        weights = record["base"]["weights"]
        record["base"]["weights"] = {name.removesuffix(".weight"): value for name, value in weights.items() if "proj" in name}
    folder = rewritten(saved / "native", tmp_path / "a", as_before)
    hlk.load_adapter(make_model("llama"), folder)
    base = make_model("llama")
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert_untouched(base, lambda: hlk.load_adapter(base, folder), "weight of 'model.layers.0.mlp.up_proj' has other values")


# ---- the state of a search ----


STATES = {
    "steps": -1, "last": 10**6, "reallocations": 1.5, "started": 1, "covered": None, "times_on": {"nowhere": [1]},
    "average": {"model.layers.0.self_attn.q_proj": float("nan")}, "generator": torch.zeros(3, dtype=torch.uint8), "history": {},
    "warned": [1], "masks": {}, "window": {"committed": torch.zeros(3), "steps": 1}, "reset": {"model.norm": [True]}, "ranks": 3,
    "version": 1, "unreached": ["nowhere"],
}


@pytest.mark.parametrize("field, value", STATES.items(), ids=STATES)
def test_a_damaged_state_is_refused_by_its_field(field, value, saved):
    patched = model()
    search = hlk.RankSearch(patched)
    state = hlk.load_search_state(saved / "native")
    before = copy.deepcopy(search.state_dict())
    with pytest.raises(ValueError, match=f"state.*{field}|state belongs to a model with other paths|with ranks="):
        search.load_state_dict({**state, field: value})
    after = search.state_dict()
    assert {name: after[name] for name in after if name != "generator"} == {name: before[name] for name in before
                                                                            if name != "generator"}


def test_a_state_without_a_field_is_refused(saved):
    state = hlk.load_search_state(saved / "native")
    check_search_state(state)
    for name in state.keys() - {"unreached"}:
        with pytest.raises(ValueError, match=name):
            check_search_state({key: value for key, value in state.items() if key != name})


# ---- every field ----


def _places(value, path=()):
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _places(each, (*path, key))
    elif isinstance(value, list):
        for index, each in enumerate(value[:3]):
            yield from _places(each, (*path, index))


def _put(value, path, new):
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = _put(value[path[0]], path[1:], new)
    return changed


_ODD = st.one_of(st.none(), st.booleans(), st.integers(-2**70, 2**70), st.floats(), st.text(max_size=6), st.just([]), st.just({}),
                 st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
                 st.just(10**400), st.just("../heterolora.json"), st.just({"__kind__": "tensor"}))


def _loads_or_refuses(folder: Path, file: str, through_search: bool) -> None:
    target = model()
    search = hlk.RankSearch(target) if through_search else None
    before = snapshot(target)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hlk.load_adapter(target, folder, search=search)
    except (ValueError, FileNotFoundError) as error:
        assert file in str(error) or "adapter" in str(error), str(error)
        assert same_bits(snapshot(target), before)
        return
    # Accepted: then it can go on.
    target(**make_inputs()).loss.backward()
    if search is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            search.step()


@fuzz(60)
@given(data=st.data())
def test_every_field_of_the_record(saved, tmp_path_factory, data):
    record = json.loads((saved / "native" / "heterolora.json").read_text())
    place = data.draw(st.sampled_from(sorted(_places(record), key=str)))
    odd = data.draw(_ODD)
    folder = tmp_path_factory.mktemp("record")
    rewritten(saved / "native", folder)
    content = _put(json.loads((folder / "heterolora.json").read_text()), place, odd)
    (folder / "heterolora.json").write_text(json.dumps(content))
    _loads_or_refuses(folder, "heterolora.json", data.draw(st.booleans()))


@fuzz(40)
@given(data=st.data())
def test_every_field_of_pefts_config(saved, tmp_path_factory, data):
    config = json.loads((saved / "peft" / "adapter_config.json").read_text())
    place = data.draw(st.sampled_from(sorted(_places(config), key=str)))
    folder = tmp_path_factory.mktemp("config")
    (folder / "adapter_model.safetensors").write_bytes((saved / "peft" / "adapter_model.safetensors").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(_put(config, place, data.draw(_ODD))))
    base = make_model("llama")
    before = snapshot(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hlk.load_adapter(base, folder)
    except (ValueError, FileNotFoundError) as error:
        assert "adapter" in str(error), str(error)
        assert same_bits(snapshot(base), before)


@fuzz(60)
@given(data=st.data())
def test_every_byte_of_a_header(saved, tmp_path_factory, data):
    format, name = data.draw(st.sampled_from([("native", "adapter.safetensors"), ("peft", "adapter_model.safetensors")]))
    content = bytearray((saved / format / name).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("header")
    for other in (saved / format).iterdir():
        (folder / other.name).write_bytes(other.read_bytes())
    (folder / name).write_bytes(content)
    if format == "native":
        record = json.loads((folder / "heterolora.json").read_text())
        record["weights"]["sha256"] = hashlib.sha256(content).hexdigest()
        (folder / "heterolora.json").write_text(json.dumps(record))
    base = make_model("llama")
    before = snapshot(base)
    try:
        hlk.load_adapter(base, folder)
    except ValueError as error:
        assert "adapter" in str(error)
        assert same_bits(snapshot(base), before)
