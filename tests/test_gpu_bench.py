"""The GPU benchmark and the tuner as far as they go without a GPU: arguments, cases, checks, tables, JSON, exit codes."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, gpu_cases, gpu_report, gpu_timing, run_gpu, tune_gpu
from bench.cases import Case
from bench.contenders import Op
from bench.problem import make_problem
from heterolora_kernels import _env

if _env.triton_not_installed() is not None:
    pytest.skip(_env.triton_not_installed(), allow_module_level=True)

from heterolora_kernels.backends.triton import configs  # noqa: E402 - needs triton

ROOT = Path(__file__).resolve().parent.parent
no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
TINY = Case("squares", "4096", 9, 19, (13,), "bfloat16", "reference",
            ("op", "op_again", "no_statistics", "no_path", "frozen", "peft", "peft_compiled", "mm_addmm"), rank=5)


def _shell(*arguments, **environment):
    env = {**os.environ, "PYTHON": sys.executable, "TRITON_INTERPRET": "", **environment}
    command = ["sh", str(ROOT / "bench/run_gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


# ---- the command ----

@no_device
def test_command_without_a_device_says_so_in_one_line_and_writes_nothing(tmp_path):
    done = _shell("--out", str(tmp_path / "results"))
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "bench/run_gpu.sh: no CUDA device\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_interpreter_without_torch_is_told(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    done = _shell(PYTHON=str(tmp_path / "python"))
    assert done.returncode == 3 and "has no torch" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments, expected", [
    (["--parts", "bench,build"], ("build", "bench")), (["--parts", "tests"], ("tests",)), ([], None)],
    ids=["order", "one", "all"])
def test_parts_are_run_in_their_order(arguments, expected):
    assert run_gpu.parser().parse_args(arguments).parts == expected


def test_unknown_part_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_gpu.main(["--parts", "tests,paint"])
    assert stopped.value.code == 2 and "must be some of build,tests,bench, got 'paint'" in capsys.readouterr().err


def test_out_is_the_variable_where_none_is_given(monkeypatch):
    monkeypatch.setenv("OUT", "/somewhere")
    assert run_gpu.parser().parse_args([]).out == Path("/somewhere")
    monkeypatch.delenv("OUT")
    assert run_gpu.parser().parse_args([]).out == ROOT / "bench" / "results"


def test_budget_is_under_nine_minutes():
    assert run_gpu.TOTAL < 9 * 60 and run_gpu.QUICK_TOTAL < 5 * 60 and run_gpu.RESERVE < run_gpu.QUICK_TOTAL


@pytest.fixture
def no_parts(monkeypatch):
    """The command on a machine that has a device, its parts replaced; what they were given."""
    given = {}
    monkeypatch.setattr(run_gpu, "_why_not", lambda: None)

    def part(name, state="well"):
        def run(args, seconds):
            given[name] = seconds
            if name == "bench":
                (args.out / "gpu-part.json").write_text(json.dumps(_found()))
            return {"state": state, "outcome": f"{name} was {state}"}
        monkeypatch.setattr(run_gpu, f"_{name}", run)

    for name in run_gpu.PARTS:
        part(name)
    return given, part


def test_command_writes_one_json_and_one_table(tmp_path, no_parts, capsys):
    assert run_gpu.main(["--out", str(tmp_path / "new" / "folder")]) == 0
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["gpu-test-card-9000.json", "gpu-test-card-9000.md"]
    found = json.loads((folder / "gpu-test-card-9000.json").read_text())
    assert list(found["parts"]) == ["build", "tests", "bench"] and found["results"]
    table = (folder / "gpu-test-card-9000.md").read_text()
    assert "| tests | tests was well |" in table and table in capsys.readouterr().out


def test_results_of_an_earlier_run_are_not_taken_for_this_one(tmp_path, no_parts):
    (tmp_path / "gpu-part.json").write_text(json.dumps(_found()))
    assert run_gpu.main(["--out", str(tmp_path), "--parts", "tests"]) == 0
    assert json.loads((tmp_path / "gpu-unmeasured.json").read_text()).keys() == {"parts"}
    assert "No GPU was measured" in (tmp_path / "gpu-unmeasured.md").read_text()


def test_what_a_part_leaves_over_goes_to_the_next(tmp_path, no_parts):
    given, _ = no_parts
    run_gpu.main(["--out", str(tmp_path), "--seconds", "100"])
    assert given["build"] == pytest.approx(20, abs=1) and given["tests"] == pytest.approx(55, abs=1)
    assert given["bench"] == pytest.approx(100, abs=1)
    run_gpu.main(["--out", str(tmp_path), "--seconds", "100", "--parts", "tests"])
    assert given["tests"] == pytest.approx(100, abs=1)


@pytest.mark.parametrize("part, state, code", [("tests", "failed", 1), ("tests", "cut", 4), ("bench", "failed", 1)])
def test_exit_codes(tmp_path, no_parts, part, state, code):
    no_parts[1](part, state)
    assert run_gpu.main(["--out", str(tmp_path), "--quick"]) == code
    assert "build" not in no_parts[0]


def test_process_that_takes_too_long_is_stopped_with_its_children(tmp_path):
    code, tail = run_gpu._run(["sh", "-c", "echo begun; sleep 60 & wait"], 1.0, tmp_path / "log")
    assert code is None and tail == "begun"
    assert run_gpu._run(["sh", "-c", "echo first; echo '= last ='; exit 5"], 60.0, tmp_path / "log") == (5, "last")


def test_build_part_takes_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(run_gpu, "_run", lambda command, seconds, log, **environment: (0, environment["HETEROLORA_BUILD"]))
    monkeypatch.delenv("HETEROLORA_BUILD", raising=False)
    monkeypatch.setattr(run_gpu.importlib.util, "find_spec", lambda name: None)
    args = SimpleNamespace(out=tmp_path)
    assert run_gpu._build(args, 9.0) == {"state": "well", "outcome": "without compiled CPU kernels"}
    for code, state, text in ((None, "cut", "not built in 9 s"), (2, "failed", "exit code 2: auto")):
        monkeypatch.setattr(run_gpu, "_run", lambda command, seconds, log, **environment: (code, environment["HETEROLORA_BUILD"]))
        found = run_gpu._build(args, 9.0)
        assert found["state"] == state and text in found["outcome"]


def test_test_files_are_there():
    assert all((ROOT / file).is_file() for file in run_gpu._TEST_FILES)


@no_device
def test_tests_part_tells_why_nothing_ran(tmp_path):
    found = run_gpu._tests(SimpleNamespace(out=tmp_path, quick=True), 60.0)
    # pytest's code for "no tests ran": a suite that skips everything is no proof.
    assert found["state"] == "failed" and "skipped" in found["outcome"]
    assert "no CUDA device" in (tmp_path / "gpu-tests-1.log").read_text()


# ---- the benchmark ----

@no_device
@pytest.mark.parametrize("module", [gpu, tune_gpu], ids=["bench", "tuner"])
def test_modules_refuse_without_a_device(module, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    target = tmp_path / "file.json"
    assert module.main(["--json" if module is gpu else "--out", str(target)]) == 3
    assert capsys.readouterr().err == f"{module.__name__}: no CUDA device\n"
    assert not target.exists()


def test_the_interpreter_is_never_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter" in gpu.why_not()


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_cases_begin_with_the_promise_and_have_names_of_their_own(quick):
    cases = list(gpu_cases.gpu_cases(quick))
    assert len({case.id for case in cases}) == len(cases)
    assert (cases[0].m, cases[0].k, cases[0].outs, cases[0].rank, cases[0].dropout_p) == (8192, 4096, (4096,), 16, 0.0)
    assert {case.block for case in cases} == set(gpu_report.TITLES) - ({"ranks"} if quick else set())
    assert all("mm_addmm" not in case.contenders for case in cases if case.dropout_p)
    known = {name for pair in gpu_report.RATIOS.values() for name in pair} | {"op_again"}
    assert {name for case in cases for name in case.contenders} <= known


def test_cases_cover_what_is_published_and_three_models():
    cases = list(gpu_cases.gpu_cases())
    squares = {(case.k, case.m, case.dropout_p) for case in cases if case.block == "squares"}
    assert squares == {(k, m, p) for k in (4096, 5120, 8192) for m in (2048, 4096, 8192) for p in (0.0, 0.1)}
    assert {case.name for case in cases if case.block == "models"} == set(gpu_cases.LINEARS)


@pytest.fixture
def eager_compile(monkeypatch):
    """torch.compile without a compiler."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))


@pytest.mark.parametrize("change", [{}, {"dropout_p": 0.3}, {"adapters": "float32"}, {"outs": (13, 21)}, {"mode": "infer"}],
                         ids=["plain", "dropout", "float32_adapters", "group", "infer"])
def test_every_contender_is_compared_before_it_is_timed(change, eager_compile):
    case = replace(TINY, **change)
    if case.dropout_p or case.adapters:
        case = replace(case, contenders=tuple(name for name in case.contenders if name != "mm_addmm"))
    made, failed, wrong = gpu.checked(make_problem(case))
    assert set(made) == set(case.contenders) and not failed and not wrong


@pytest.mark.parametrize("name", ["op", "peft", "frozen"])
def test_what_is_wrong_is_not_timed(name, monkeypatch):
    kind = type(gpu.make_contender(name, make_problem(TINY)))
    right = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self: [out * 1.2 for out in right(self)])
    others = ("frozen",) if kind is Op else ("op", "no_statistics", "frozen", "peft")
    case = replace(TINY, contenders=tuple(dict.fromkeys((name, *others))), dropout_p=0.3)
    made, failed, wrong = gpu.checked(make_problem(case))
    assert name not in made and not failed
    assert [line.split(":")[0] for line in wrong] == [name]


def test_baseline_that_does_not_run_is_a_gap_and_ours_a_fault(monkeypatch):
    make = gpu.make_contender

    def broken(name, problem):
        if name in ("peft", "op"):
            raise RuntimeError(f"no {name}\nand more")
        return make(name, problem)

    monkeypatch.setattr(gpu, "make_contender", broken)
    made, failed, wrong = gpu.checked(make_problem(replace(TINY, contenders=("op", "peft", "frozen"))))
    assert set(made) == {"frozen"} and failed == {"peft": "RuntimeError: no peft"} and wrong == ["op: RuntimeError: no op"]


def _args(path, seconds=100.0):
    return SimpleNamespace(json=path, seconds=seconds, quick=True)


def test_results_are_written_after_every_case_and_what_is_left_is_told(tmp_path, monkeypatch, eager_compile):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(gpu, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(gpu, "interleaved", lambda sets, mode, seconds: ({"graph": {name: [1.0, 2.0, 3.0] for name in sets}}, {}))
    measure = gpu.measure
    monkeypatch.setattr(gpu, "measure", lambda case, seconds: measure(case, seconds, "cpu"))
    path, cases = tmp_path / "part.json", [TINY, replace(TINY, m=7, mode="infer"), replace(TINY, m=8)]
    found = {"machine": {}, "results": [], "wrong": [], "left_out": []}
    assert gpu.run_cases(cases, found, _args(path, 75.0)) == 0
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    assert [list(result["ms"]) for result in found["results"]] == [["forward", "both"], ["infer"]]
    assert found["left_out"] == [cases[2].id] and gpu_report.case_of(json.loads(path.read_text())["results"][0]) == TINY


def test_wrong_contender_is_exit_code_one(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "measure", lambda case, seconds: {"ms": {}, "failed": {}, "wrong": ["op: off by 1"]})
    found = {"results": [], "wrong": [], "left_out": []}
    assert gpu.run_cases([TINY], found, _args(tmp_path / "a.json")) == 1
    assert found["wrong"] == [f"{TINY.id}: op: off by 1"]


def test_both_is_every_gradient_and_leaves_nothing_behind():
    contender = gpu.make_contender("op", make_problem(TINY))
    grads = gpu_timing.one_call(contender, "both")()
    assert len(grads) == 4 and all(grad.any() for grad in grads)
    assert all(leaf.grad is None for leaf in contender.leaves())
    out, = gpu_timing.one_call(contender, "infer")()
    assert out.grad_fn is None and gpu_timing.one_call(contender, "forward")()[0].grad_fn is not None


@pytest.fixture
def no_device_clock(monkeypatch):
    """Runs instead of graphs and a clock that counts; what ran, by name."""
    ran = []

    def graph_of(calls):
        if calls[0].keywords["name"] == "peft":
            raise RuntimeError("a capture forbids this\nand more")
        return SimpleNamespace(replay=lambda: [call() for call in calls])

    def milliseconds(run, times=1):
        before = len(ran)
        for _ in range(times):
            run()
        return float(len(ran) - before)

    monkeypatch.setattr(gpu_timing, "one_call", lambda copy, mode: functools.partial(lambda name: ran.append(name), name=copy))
    monkeypatch.setattr(gpu_timing, "graph_of", graph_of)
    monkeypatch.setattr(gpu_timing, "milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return ran


def test_samples_are_in_turn_and_what_cannot_be_captured_is_told(no_device_clock):
    found, failed = gpu_timing.interleaved({"op": ["op", "op"], "peft": ["peft", "peft"]}, "both", 0.0)
    assert failed == {"peft": "not captured: RuntimeError: a capture forbids this"}
    # A call is one tick of this clock, however many a sample holds.
    assert found == {"graph": {"op": [1.0, 1.0, 1.0]}, "events": {"op": [1.0, 1.0, 1.0], "peft": [1.0, 1.0, 1.0]}}
    rounds = gpu_timing._MIN_ROUNDS
    turns = "".join(name[0] for name in no_device_clock[-4 * rounds:])
    assert turns == "".join("ooppppoo"[4 * (turn % 2):][:4] for turn in range(rounds))


@pytest.mark.parametrize("size, cache, copies", [(100, 40, 1), (10, 40, 8), (30, 40, 3), (1, 0, 1)])
def test_copies_exceed_the_cache_twice(size, cache, copies):
    assert gpu_timing.copies_for(size, cache) == copies


# ---- the table ----

MS = {"op": 1.2, "op_again": 1.206, "no_statistics": 1.195, "no_path": 1.15, "frozen": 1.0, "peft": 2.4, "mm_addmm": 1.8}


def _result(times=MS, case=None, failed=None):
    case = case or next(gpu_cases.gpu_cases())
    quartiles = {name: [0.9 * ms, ms, 1.1 * ms] for name, ms in times.items()}
    kinds = {"graph": quartiles, "events": {name: [3 * q for q in values] for name, values in quartiles.items()}}
    modes = gpu_timing.modes_of(case.mode)
    return {"case": json.loads(json.dumps(asdict(case))), "ms": {mode: kinds for mode in modes}, "copies": 1,
            "failed": failed or {}}


def _found(*results, **more):
    about = {"card": "Test Card 9000", "capability": "9.0", "commit": "abc", "versions": {"torch": "2", "peft": None}}
    return {"machine": about, "ceilings": {"copy_gb_per_s": 3000.0, "bf16_tflop_per_s": 790.0},
            "results": list(results) or [_result()], "wrong": [], "left_out": [], **more}


def test_promises_are_judged_beside_what_was_measured():
    words = {(limit.ratio, limit.mode): (round(value, 3), word) for limit, value, word in gpu_report.judged(_found())}
    assert words == {("op / frozen", "forward"): (1.2, "missed"), ("op / frozen", "both"): (1.2, "met"),
                     ("op / own matmul", "forward"): (1.043, "met"), ("op / own matmul", "both"): (1.043, "met"),
                     ("statistics on / off", "both"): (1.004, "met"), ("PEFT / op", "both"): (2.0, "met")}
    lines = gpu_report.markdown(_found()).splitlines()
    assert "| op / frozen | forward | 1.200 | at most 1.18 | 1.08 | missed |" in lines
    assert "| PEFT / op | forward + backward | 2.000 | at least 1.35 |  | met |" in lines


@pytest.mark.parametrize("found", [{}, {"parts": {"tests": {"outcome": "34 passed", "seconds": 3.0}}},
                                   _found(_result({"op": 1.0}))], ids=["nothing", "tests_alone", "op_alone"])
def test_nothing_is_promised_where_nothing_was_measured(found):
    assert {word for _, _, word in gpu_report.judged(found)} == {"not measured"}
    assert "| op / frozen | forward |  | at most 1.18 | 1.08 | not measured |" in gpu_report.markdown(found)


def test_other_cases_do_not_stand_for_the_promise():
    case = next(gpu_cases.gpu_cases())
    for other in (replace(case, dropout_p=0.1), replace(case, adapters="float32"), replace(case, m=4096), replace(case, rank=8)):
        assert gpu_report.main_result(_found(_result(case=other))) is None


def test_tables_hold_every_case_and_the_gaps():
    cases = list(gpu_cases.gpu_cases())
    failed = {"peft_compiled": "not captured: why"}
    found = _found(*[_result(case=case, failed=failed if case is cases[0] else None) for case in cases],
                   left_out=["a.case"], wrong=["b.case: op: off"])
    text = gpu_report.markdown(found)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "| op ms |" not in line]
    assert sum("1.200 (1.20)" in line for line in rows) == sum(len(gpu_timing.modes_of(case.mode)) for case in cases)
    assert all(f"## {title}" in text for title in gpu_report.TITLES.values())
    assert f"{cases[0].id}: peft_compiled: not captured: why" in text and "no time was left for a.case" in text
    assert "wrong, and not timed: b.case: op: off" in text and "measured twice in one case: 1.005" in text


def test_file_is_swapped_in(tmp_path):
    path = tmp_path / "new" / "file.json"
    gpu_report.write_whole(path, "one")
    gpu_report.write_whole(path, "two")
    assert path.read_text() == "two" and [other.name for other in path.parent.iterdir()] == ["file.json"]


# ---- the tuner ----

def _row(role="hidden", **use):
    return {"when": tune_gpu.conditions(role, 90, 8192, 16, 2, 4096), "use": {**configs.rules()[role][-1]["use"], **use}}


def test_shipped_table_is_in_the_form_that_the_tuner_writes():
    text = tune_gpu.TABLE.read_text()
    assert json.loads(tune_gpu.as_text(json.loads(text))) == json.loads(text)
    assert tune_gpu.as_text(json.loads(text)).splitlines() == text.splitlines()


def test_rows_are_merged_before_the_general_and_replace_their_like(tmp_path, monkeypatch):
    table, rows = tmp_path / "configs.json", tmp_path / "rows.json"
    table.write_text(tune_gpu.TABLE.read_text())
    for block in (32, 128):
        rows.write_text(json.dumps({"hidden": [_row(BLOCK_M=block)]}))
        assert tune_gpu.main(["--merge", str(rows), "--table", str(table)]) == 0
    found = json.loads(table.read_text())
    # The interpreter's, and the row that was merged last.
    assert [rule["use"]["BLOCK_M"] for rule in found["hidden"][:2]] == [32, 128]
    assert len(found["hidden"]) == len(configs.rules()["hidden"]) + 1
    assert {role: rules for role, rules in found.items() if role != "hidden"} == {
        role: rules for role, rules in configs.rules().items() if role != "hidden"}
    monkeypatch.setattr(configs, "rules", lambda: found)
    choose = configs.choose.__wrapped__
    assert choose("hidden", 90, 2, True, False, False, 8192, 16, 4096, 16)["BLOCK_M"] == 128
    for other in ((80, 2, True, False, False, 8192), (90, 2, False, False, False, 8192), (90, 2, True, False, False, 64)):
        assert choose("hidden", *other, 4096, 4096, 16) == configs.choose("hidden", *other, 4096, 4096, 16)


@pytest.mark.parametrize("rows, message", [
    ({"painting": [_row()]}, "role must be one of"), ({"hidden": [{"when": {}, "use": _row()["use"]}]}, "has no conditions"),
    ({"hidden": [{"when": {"arch": [90]}, "use": {"BLOCK_M": 16}}]}, r"lacks \['BLOCK_K'")], ids=["role", "always", "entries"])
def test_rows_that_do_not_belong_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        tune_gpu.merged(configs.rules(), rows)


@pytest.mark.parametrize("arguments, message", [
    ([], "one of --out"), (["--out", "a", "--merge", "b"], "one of --out"),
    (["--out", "a", "--roles", "forward,paint"], "got 'paint'"), (["--out", "a", "--rank", "7"], "--rank")],
    ids=["nothing", "both", "role", "rank"])
def test_wrong_usage_of_the_tuner(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune_gpu.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("tokens, rank, rows, ranks", [(1, 16, [None, 32], [1, 16]), (512, 32, [33, 512], [17, 32]),
                                                       (8192, 64, [2049, None], [33, 64])])
def test_conditions_are_ranges_of_the_table(tokens, rank, rows, ranks):
    found = tune_gpu.conditions("forward", 80, tokens, rank, 2, 4096)
    assert found["rows"] == rows and found["rank"] == ranks and found["arch"] == [80] and found["n"] == [2048, 8192]


@pytest.mark.parametrize("role", tune_gpu.CANDIDATES)
def test_candidates_are_complete_and_today_comes_first(role):
    today = configs.choose(role, 90, 2, True, False, False, 8192, 4096, 4096, 16)
    found = list(tune_gpu.candidates(role, today, 16))
    assert found[0] == today and len(found) > 10 and all(set(config) >= set(today) for config in found)
    assert len({json.dumps(config, sort_keys=True) for config in found}) == len(found)
    assert all(config.get("persistent") for config in found if config.get("tma"))
    assert sum(config.get("variant") == "cublas" for config in found) == (role in ("forward", "grad_x"))


def test_a_configuration_holds_in_its_block_alone():
    shape = (90, 2, True, False, False, 8192, 16, 4096, 16)
    before = configs.choose("hidden", *shape)
    with tune_gpu.used("hidden", {"BLOCK_M": 1}):
        assert configs.choose("hidden", *shape) == {"BLOCK_M": 1} and configs.choose("grad_x", *shape)["BLOCK_M"] > 1
    assert configs.choose("hidden", *shape) == before


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Runs the tuner for one role on a device that is not there; candidates are timed by a function of them."""
    def run(time_of, faults=lambda config: [], seconds="100"):
        monkeypatch.setattr("bench.gpu.why_not", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(tune_gpu, "faults", lambda case, role, config, arch: faults(config))
        monkeypatch.setattr(tune_gpu, "measured", lambda case, role, config: time_of(config))
        arguments = ["--roles", "hidden", "--seconds", seconds, "--out", str(tmp_path / "rows.json")]
        assert tune_gpu.main(arguments) == 0
        return json.loads((tmp_path / "rows.json").read_text())

    return run


def test_tuner_writes_the_fastest_that_fits(tuned, capsys):
    rows = tuned(lambda config: 1.0 + config["BLOCK_M"] / 64, lambda config: ["it spills"] if config["BLOCK_M"] == 16 else [])
    row, = rows["hidden"]
    assert row["use"]["BLOCK_M"] == 32 and row["when"] == tune_gpu.conditions("hidden", 90, 8192, 16, 2, 4096)
    assert tune_gpu.merged(configs.rules(), rows)["hidden"][1] == row
    assert "it spills" in capsys.readouterr().out


def test_tuner_takes_no_gain_that_is_noise_and_nothing_wrong(tuned):
    today = configs.choose("hidden", 90, 2, True, False, False, 8192, 16, 4096, 16)
    assert tuned(lambda config: 1.0 if config == today else 0.995)["hidden"][0]["use"] == today
    assert tuned(lambda config: 1.0 if config == today else float("nan"))["hidden"][0]["use"] == today
    assert tuned(lambda config: float("nan")) == {}


def test_tuner_stops_when_its_time_is_up(tuned, capsys):
    rows = tuned(lambda config: 1.0, seconds="0")
    assert len(rows["hidden"]) == 1 and "no time was left for more than 1 candidates" in capsys.readouterr().out


def test_candidates_that_do_not_fit_the_chip_are_refused():
    code = """if True:
        from bench import tune_gpu
        from bench.cases import Case
        from heterolora_kernels.backends.triton import builds, configs
        builds.compile_for(90)
        case = Case("tune", "square", 8192, 4096, (4096,), "bfloat16", "triton", ("op",), rank=16)
        today = configs.choose("hidden", 90, 2, True, False, False, 8192, 16, 4096, 16)
        for change in ({}, {"BLOCK_M": 128, "BLOCK_K": 256, "num_stages": 4, "num_warps": 8}):
            print(tune_gpu.faults(case, "hidden", {**today, **change}, 90))
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=240,
                          env={**env, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    fits, exceeds = done.stdout.splitlines()
    assert fits == "[]" and "bytes of shared memory, the chip has" in exceeds
