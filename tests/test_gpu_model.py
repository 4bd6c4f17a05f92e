"""The modelled cost of the Triton backend: against the interpreter, against sums by hand, and the page that shows it."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from heterolora_kernels import _env

if _env.triton_not_installed():
    pytest.skip(f"{_env.triton_not_installed()}", allow_module_level=True)

from bench import gpu_model, kernel_costs
from heterolora_kernels.backends.triton import configs
from heterolora_kernels.backends.triton.builds import SCENARIOS, Launch, Scenario, launches

TESTS = Path(__file__).parent
MAIN = Scenario("main", 8192)


@pytest.fixture(scope="module")
def rows():
    return list(gpu_model.rows_of_table())


def test_bytes_launches_and_flops_are_those_of_the_interpreter():
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1",
           "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-o", "addopts=", "-x", "tests/triton_model_interpreted.py"],
                          capture_output=True, text=True, env=env, timeout=300, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout


def test_every_kernel_that_the_backend_compiles_has_a_model():
    sources = "".join(path.read_text() for path in (TESTS.parent / "heterolora_kernels/backends/triton").glob("*.py"))
    assert set(re.findall(r"launch\(\w+\.(_lora_\w+_kernel)", sources)) == set(kernel_costs.MODELS)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_scenario_of_the_builds_has_a_cost(arch):
    for scenario in SCENARIOS:
        for cost in gpu_model.costs_of(scenario, arch):
            assert cost.issued > 0 and cost.compulsory > 0, (scenario.name, cost.role)


@dataclass
class _Kernel:
    __name__ = "_lora_new_kernel"
    arg_names = ()


def test_unknown_kernel_is_refused(monkeypatch):
    launch = Launch(_Kernel(), "new", torch.bfloat16, (1,), (), {}, {})
    with pytest.raises(kernel_costs.UnknownKernel, match=r"no model of the kernel _lora_new_kernel \(role new\)"):
        kernel_costs.cost_of(launch, kernel_costs.structure_of(MAIN))
    found = launches(MAIN, 90)
    monkeypatch.setattr(gpu_model, "launches", lambda scenario, arch: [*found, launch])
    with pytest.raises(kernel_costs.UnknownKernel):
        gpu_model.costs_of(MAIN)


def test_cost_of_the_main_call_by_hand():
    size, rank = 4096, 16
    costs = {cost.role: cost for cost in gpu_model.costs_of(MAIN)}
    assert list(costs) == ["hidden", "forward", "q_grad_B", "q_sum", "grad_x", "grad_A", "finalize"]
    hidden, fused = costs["hidden"], costs["forward"]
    assert hidden.compulsory == 2 * 8192 * size + 4 * rank * size + 2 * 8192 * rank
    assert hidden.flops == 2 * 8192 * size * rank
    # Tiles of 128 x 256: x is read by 16 columns of tiles, the weight by 64 rows of them.
    assert fused.flops == 2 * 8192 * size * (size + rank)
    assert fused.compulsory == 2 * (2 * 8192 * size + size * size) + 2 * 8192 * rank + 4 * size * rank
    wide = 2 * (16 * 8192 * size + 64 * size * size + 8192 * size)
    assert wide < fused.issued < 1.05 * wide
    assert fused.seconds == fused.flops / 800e12 and hidden.seconds == hidden.compulsory / 3.0e12


def test_bound_by_hand():
    scenario = replace(MAIN, rows=100, width=24, out_features=(40, 16), paths=((3, 0, -1), (5, 1, -1)), dropout_p=0.1,
                       source_widths=())
    forward, backward = gpu_model.two_pass_bound(scenario)
    base = 2 * (100 * 24 + 56 * 24 + 100 * 56)
    size_A, size_B, mask = 8 * 24, 3 * 40 + 5 * 16, 100 * 3
    assert forward == base + 2 * 100 * 24 + 2 * 2 * 100 * 8 + 4 * (size_A + size_B) + mask
    assert backward == base + 2 * 100 * 56 + 2 * 100 * 24 + 4 * 2 * 100 * 8 + 2 * 4 * (size_A + size_B) + 2 * mask


def test_only_partial_sums_exceed_the_bound(rows):
    for row in rows:
        if not row.scenario.statistics:
            assert row.over_bound("without_partials") == pytest.approx(1.0, abs=0.002)
            assert row.over_bound() <= row.over_bound("swept")


def test_at_most_five_percent_above_the_two_pass_bound(rows):
    over = {(row.shape, row.scenario.paths[0][0], row.scenario.dropout_p, row.scenario.statistics): row.over_bound()
            for row in rows}
    assert len(over) == 48 and {case: ratio for case, ratio in over.items() if ratio > 1.05} == {}


def test_statistics_cost_at_most_one_percent_and_one_launch(rows):
    for off, on in zip(rows[::2], rows[1::2]):
        assert on.over_base(False) <= 1.01 * off.over_base(False)
        assert sum(on.launches()) == sum(off.launches()) + 1


def test_a_change_of_tiles_is_seen(monkeypatch):
    before = {cost.role: cost for cost in gpu_model.costs_of(MAIN)}
    choose = configs.choose
    monkeypatch.setattr(configs, "choose", lambda role, *shape: {**choose(role, *shape), "PROGRAMS": 264}
                        if role == "q_grad_B" else choose(role, *shape))
    after = {cost.role: cost for cost in gpu_model.costs_of(MAIN)}
    assert after["q_grad_B"].writes["grad_B_parts"] == 2 * before["q_grad_B"].writes["grad_B_parts"]
    assert after["finalize"].compulsory > before["finalize"].compulsory
    assert after["forward"].issued == before["forward"].issued


def test_page_shows_what_the_model_says(rows):
    page = (TESTS.parent / "docs/gpu_model.md").read_text()
    command = "python -m bench.gpu_model --markdown docs/gpu_model.md"
    assert page == gpu_model.replaced(page, gpu_model.page_of(rows)), f"run: {command}"


def test_command_writes_json_and_prints_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_model, "RANKS", (16,))
    file = tmp_path / "model.json"
    assert gpu_model.main(["--rows", "300", "--arch", "80", "--kernels", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "modelled fwd+bwd / base" in printed and "| q_grad_B |" in printed
    found = json.loads(file.read_text())
    assert found["modelled"] and found["arch"] == 80 and len(found["cases"]) == 16
    assert {"role", "issued_bytes", "compulsory_bytes", "flops", "microseconds"} <= set(found["cases"][0]["kernels"][0])
    assert gpu_model.main(["--rows", "300", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["modelled"]


def test_wrong_rows_are_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_model.main(["--rows", "0"])
    assert stopped.value.code == 2 and "argument --rows: must be at least 1, got 0" in capsys.readouterr().err


def test_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="one pair of markers"):
        gpu_model.replaced("nothing", "text")
