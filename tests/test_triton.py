"""The Triton backend without a GPU: its numbers in the interpreter, its builds ahead of time, its place among the backends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heterolora_kernels import _env, backends
from heterolora_kernels.cli import compile as command
from heterolora_kernels.cli import main

TESTS = Path(__file__).parent
TABLE = json.loads((TESTS.parent / "heterolora_kernels/backends/triton/configs.json").read_text())

needs_triton = pytest.mark.skipif(_env.triton_not_installed() is not None, reason=f"{_env.triton_not_installed()}")
#: Every build for every architecture takes some ten minutes: `make compile-kernels` sets this.
EVERY_BUILD = os.environ.get("HETEROLORA_EVERY_BUILD") == "1"


def _run(arguments, timeout, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=timeout,
                          cwd=TESTS.parent)


@needs_triton
def test_numbers_in_the_interpreter():
    done = _run(["-m", "pytest", "-q", "-x", "tests/triton_interpreted.py"], 1500, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What `heterolora compile` reports: the main call for sm_90 and sm_80, or everything."""
    file = tmp_path_factory.mktemp("builds") / "builds.json"
    chosen = [] if EVERY_BUILD else ["--scenario", "main"]
    code = main(["compile", "--arch", "sm_80,sm_90,sm_100" if EVERY_BUILD else "sm_80,sm_90", "--json", str(file), *chosen])
    return code, json.loads(file.read_text())


@needs_triton
def test_no_build_spills_or_exceeds_the_chip(report):
    code, found = report
    faults = [fault for build in found["builds"] for fault in command.faults_of(build)]
    assert not faults and code == 0, "\n".join(faults)
    assert {build["arch"] for build in found["builds"]} >= {"sm_80", "sm_90"}
    assert found["triton"] and found["ptxas"]


@needs_triton
def test_sixteen_bit_matmuls_use_wgmma(report):
    for dtype in ("bfloat16", "float16"):
        for role in ("forward", "grad_x"):
            builds = [b for b in report[1]["builds"] if (b["arch"], b["dtype"], b["role"]) == ("sm_90", dtype, role)]
            assert any(b["requires_wgmma"] and b["uses_wgmma"] for b in builds), (dtype, role)
    assert not any(b["uses_wgmma"] or b["requires_wgmma"] for b in report[1]["builds"] if b["arch"] == "sm_80")


@needs_triton
def test_every_kernel_is_compiled(report):
    sources = "".join(path.read_text() for path in (TESTS.parent / "heterolora_kernels/backends/triton").glob("*.py"))
    launched = {name.split(",")[0].split(".")[1] for name in sources.split("launch(")[1:] if name.split(",")[0].count(".") == 1}
    assert len(launched) == 8
    assert launched == {build["kernel"] for build in report[1]["builds"]}


@needs_triton
def test_fields_of_a_build(report):
    for build in report[1]["builds"]:
        assert build["kernel"].startswith("_lora_") and build["kernel"].endswith("_kernel")
        assert 0 < build["registers"] <= 255 and build["stack_bytes"] >= 0 and build["shared_bytes"] >= 0
        assert build["dtype"] in ("bfloat16", "float16", "float32") and isinstance(build["role"], str)
        assert {"num_warps", "num_stages"} <= set(build["config"])


@pytest.mark.parametrize("change, expected", [
    ({"spills": 3, "stack_bytes": 24}, "3 accesses to local memory"),
    ({"shared_bytes": 200_000}, "200000 bytes of shared memory"),
    ({"requires_wgmma": True}, "no wgmma")], ids=["spills", "shared", "wgmma"])
def test_faults_are_named(change, expected):
    build = {"arch": "sm_80", "kernel": "_k", "dtype": "bfloat16", "config": {}, "spills": 0, "stack_bytes": 0,
             "shared_bytes": 0, "shared_limit": 166_912, "requires_wgmma": False, "uses_wgmma": False}
    assert command.faults_of(build) == []
    fault, = command.faults_of({**build, **change})
    assert expected in fault


def test_unknown_architecture_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compile", "--arch", "sm_90,gfx942"])
    assert stopped.value.code == 2
    assert "must be names like sm_90 with commas between them, got 'gfx942'" in capsys.readouterr().err


@needs_triton
def test_json_on_standard_output_is_only_json(monkeypatch, capfd):
    build = {"arch": "sm_90", "kernel": "_k", "dtype": "bfloat16", "config": {}, "spills": 1, "stack_bytes": 8, "shared_bytes": 0,
             "shared_limit": 1, "requires_wgmma": False, "uses_wgmma": False, "registers": 9, "role": "forward"}
    monkeypatch.setattr(command, "_compile", lambda arch, names: {"triton": "0", "ptxas": "0", "builds": [build]})
    assert main(["compile", "--arch", "sm_90", "--json", "-"]) == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["builds"] == [build]
    assert "1 accesses to local memory" in err


@pytest.mark.parametrize("role", TABLE)
def test_table_ends_with_a_rule_for_everything(role):
    rules = TABLE[role]
    assert rules[-1]["when"] == {} and all(rule["when"] for rule in rules[:-1])
    for rule in rules:
        assert set(rule["when"]) <= {"arch", "itemsize", "aligned", "tf32", "dropout", "rows", "n", "k", "rank"}
        for name, value in rule["use"].items():
            # Every tile is a power of two: Triton takes no other.
            assert value in ("two_pass", "one_pass", "cublas") if name == "variant" else (
                name in ("num_stages", "PROGRAMS") or value & (value - 1) == 0), (name, value)


@needs_triton
def test_every_rule_for_a_gpu_is_met_by_a_scenario_of_the_builds(monkeypatch):
    from heterolora_kernels.backends.triton import configs
    from heterolora_kernels.backends.triton.builds import SCENARIOS, SHARED_LIMITS, launches

    choose, met, precision = configs.choose, set(), torch.backends.cuda.matmul.fp32_precision
    monkeypatch.setattr(configs, "choose", lambda *args: (use := choose(*args), met.add(id(use)))[0])
    for arch in SHARED_LIMITS:
        for scenario in SCENARIOS:
            launches(scenario, arch)
    unmet = {(role, str(rule["when"])) for role, rules in configs.rules().items() for rule in rules
             if rule["when"].get("arch") != ["interpreter"] and id(rule["use"]) not in met}
    assert unmet == set() and torch.backends.cuda.matmul.fp32_precision == precision


def _missing(**environment):
    code = "from heterolora_kernels import backends; print(backends.unavailable_backends().get('triton'))"
    return _run(["-c", code], 120, **environment).stdout.strip()


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_backend_says_what_it_misses():
    assert _missing(TRITON_INTERPRET="") == "torch sees no CUDA device"
    assert _missing(TRITON_INTERPRET="1") == "None"


def test_missing_triton_is_said(monkeypatch):
    monkeypatch.setattr(_env.importlib.util, "find_spec", lambda name: None)
    assert _env.triton_missing() == "triton is not installed; on Linux: pip install triton"


def test_backend_takes_cuda_and_never_float64():
    backend = backends._backends["triton"]
    assert backend.takes("cuda", torch.bfloat16) and not backend.takes("cuda", torch.float64) and not backend.takes("cpu")
