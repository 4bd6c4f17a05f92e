"""The benchmarks' own machinery on tiny sizes: nothing here is about speed."""

from __future__ import annotations

import io
import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from bench import bench_linear, contenders, search_cost, training
from bench.cases import GROUPS, SHAPES, Case, isa_cases, linear_cases
from bench.checks import WrongResult, check
from bench.problem import Results, make_problem, run_reference
from bench.timing import Others, interleave, quartiles, take_sample
from heterolora_kernels.backends import available_backends, resolve
from heterolora_kernels.cli import bench, main

BACKEND = resolve(torch.device("cpu"), None, torch.float32)
TINY = Case("shapes", "tiny", 21, 40, (27,), "float32", BACKEND, ("op",), rank=5)
ALL = ("op", "no_statistics", "layer", "frozen", "peft", "mm_addmm")
MACHINE = {"processor": "AMD EPYC", "model": "AuthenticAMD, family 25, model 17", "threads": 2, "isa": "avx512_bf16",
           "torch_isa": "AVX512", "versions": {"torch": "2.13.0"}, "commit": "abc"}


# ---- cases ----

@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_cases_have_names_of_their_own_and_known_contenders(quick):
    cases = list(linear_cases("cpu", ("reference",), quick)) + list(isa_cases("cpu", quick))
    ids = [case.id for case in cases]
    assert len(set(ids)) == len(ids)
    assert {case.block for case in cases} == set(bench._TITLES) - {"steps", "search"} - ({"backends"} if quick else set())
    known = {"op", "no_statistics", "no_path", "layer", "separate", "frozen", "peft", "mm_addmm", "two_matmuls"}
    assert {name for case in cases for name in case.contenders} <= known


def test_quick_cases_are_cases_of_the_full_run():
    full = {case.id for case in linear_cases("cpu")}
    assert {case.id for case in linear_cases("cpu", quick=True)} < full


def test_cases_cover_what_the_tables_promise():
    cases = list(linear_cases("cpu"))
    assert {case.m for case in cases if case.block == "tokens"} == {1, 16, 128, 1024, 8192}
    assert {case.rank for case in cases if case.block == "ranks"} == {0, 1, 5, 8, 13, 16, 24, 40, 64}
    assert {(case.adapters, case.dropout_p) for case in cases if case.block == "options"} == {("float32", 0.0), ("", 0.1),
                                                                                           ("float32", 0.1)}
    assert bench.TARGET == tuple(SHAPES)[:5]
    assert all(768 <= m <= 1536 and 576 <= min(k, n) and max(k, n) <= 2048 for m, k, n in map(SHAPES.get, bench.TARGET))


# ---- the check ----

@pytest.fixture(scope="module")
def solved():
    problem = make_problem(TINY)
    return run_reference(problem.to(torch.float64)), run_reference(problem)


def _copy(results):
    return Results([out.clone() for out in results.outs], {name: grad.clone() for name, grad in results.grads.items()},
                   results.statistics.clone())


def test_check_accepts_plain_pytorch(solved):
    truth, usual = solved
    check(usual, truth, usual, torch.float32)


def _spoil_out(results):
    results.outs[0][3, 4] += 1e-4


def _spoil_last(results):
    results.outs[0][-1, -1] = float("nan")


def _spoil_x(results):
    results.grads["x"][20, 39] *= 1.01


def _spoil_A(results):
    results.grads["lora_A[0]"][4] = 0


def _spoil_B(results):
    results.grads["lora_B[0]"] *= 1.001


def _drop_B(results):
    del results.grads["lora_B[0]"]


def _spoil_statistics(results):
    results.statistics[2, 5] += 1e-3 * results.statistics[:, 5].abs().max()


def _shorten(results):
    results.outs[0] = results.outs[0][:-1]


def _round(results):
    results.grads["x"] = results.grads["x"].bfloat16()


@pytest.mark.parametrize(("spoil", "named"), [
    (_spoil_out, "outs[0]"), (_spoil_last, "outs[0]"), (_spoil_x, "gradient of x"), (_spoil_A, "gradient of lora_A[0]"),
    (_spoil_B, "gradient of lora_B[0]"), (_drop_B, "gradients: expected"), (_spoil_statistics, "statistic gate_grad"),
    (_shorten, "expected shape [21, 27]"), (_round, "expected torch.float32"),
], ids=lambda value: getattr(value, "__name__", None))
def test_check_refuses_a_wrong_result_by_name(solved, spoil, named):
    truth, usual = solved
    actual = _copy(usual)
    spoil(actual)
    with pytest.raises(WrongResult) as wrong:
        check(actual, truth, usual, torch.float32)
    assert named in str(wrong.value)


def test_check_tolerance_widens(solved):
    truth, usual = solved
    actual = _copy(usual)
    actual.outs[0] += 30 * (usual.outs[0] - truth.outs[0]).abs().max()
    with pytest.raises(WrongResult):
        check(actual, truth, usual, torch.float32)
    check(actual, truth, usual, torch.float32, tolerance=30)


# ---- contenders ----

@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", available_backends())
def test_every_contender_computes_the_same(backend, dtype, mode):
    case = replace(TINY, dtype=dtype, backend=backend, mode=mode, contenders=ALL)
    made = bench_linear.checked(case)
    assert [contender.name for contender in made] == list(ALL)
    for contender in made:
        contender.close()


@pytest.mark.parametrize("case", [
    replace(TINY, contenders=("op", "separate", "frozen", "peft"), outs=(27, 9, 14), block="groups"),
    replace(TINY, contenders=("op", "no_path", "frozen"), rank=0),
    replace(TINY, contenders=("op", "frozen", "peft"), dtype="bfloat16", adapters="float32"),
    replace(TINY, contenders=("op", "frozen", "peft"), dtype="bfloat16", adapters="float32", dropout_p=0.3),
    replace(TINY, contenders=("op", "layer", "two_matmuls", "peft"), m=1),
], ids=["group", "rank 0", "float32 adapters", "dropout", "one row"])
def test_special_cases_pass_their_check(case):
    for contender in bench_linear.checked(case):
        contender.close()


def test_wrong_kernel_is_named_and_not_timed(monkeypatch):
    right = contenders.Op.forward
    monkeypatch.setattr(contenders.Op, "forward", lambda self: [out * 1.001 for out in right(self)])

    def benchmark(*args, **kwargs):
        pytest.fail("it was timed")

    benchmark.pedantic = benchmark
    options = type("Options", (), {"quick": True, "lora_tolerance": 1.0})
    with pytest.raises(WrongResult, match=r"^op: outs\[0\]: off by"):
        bench_linear.test_linear(benchmark, replace(TINY, contenders=("op", "frozen")), None, options)


def test_layer_leaves_the_choice_of_backend_as_it_was():
    before = resolve(torch.device("cpu"), None, torch.float32)
    for contender in bench_linear.checked(replace(TINY, backend="reference", contenders=("layer",))):
        contender.close()
    assert resolve(torch.device("cpu"), None, torch.float32) == before


# ---- timing ----

class _Fake:
    def __init__(self, name, log):
        self.name, self.log = name, log
        self.leaf = torch.ones(3, requires_grad=True)
        self.grad_outs = [torch.ones(3)]

    def forward(self):
        self.log.append((self.name, torch.is_grad_enabled()))
        return [self.leaf * 2]

    def clear(self):
        self.leaf.grad = None


class _Benchmark:
    def pedantic(self, target, setup=lambda: None, rounds=1):
        for _ in range(rounds):
            setup()
            target()


def test_sample_of_training_splits_forward_and_backward():
    fake = _Fake("op", [])
    sample = take_sample(fake, "train", 3)
    assert sample["both"] == pytest.approx(sample["forward"] + sample["backward"]) and min(sample.values()) > 0
    assert fake.log == [("op", True)] * 3 and fake.leaf.grad.tolist() == [2.0] * 3
    fake.log.clear()
    assert set(take_sample(fake, "infer", 2)) == {"infer"} and fake.log == [("op", False)] * 2


def test_contenders_take_turns():
    log = []
    measured = interleave(_Benchmark(), [_Fake(name, log) for name in ("op", "frozen", "peft")], "train", 0.01, max_rounds=6)
    assert 5 <= measured["rounds"] <= 6
    assert set(measured["ms"]) == {"forward", "backward", "both"}
    calls = measured["calls"]
    turns = [name for name, _ in log[-3 * calls * measured["rounds"]:][::calls]]
    assert all(set(turns[i:i + 3]) == {"op", "frozen", "peft"} and turns[i + 2] == "op" for i in range(0, len(turns), 3))
    # What runs just before the subject is not always the same.
    assert {turns[i + 1] for i in range(0, len(turns), 3)} == {"frozen", "peft"}


def test_quartiles():
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == [2.0, 3.0, 4.0]
    assert quartiles([7.0]) == [7.0, 7.0, 7.0]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell what its processors do (/proc/stat)")
def test_others_are_what_other_processes_use(monkeypatch):
    others = Others()
    wall, busy, own = others.before
    monkeypatch.setattr(others, "_now", lambda: (wall + 2.0, busy + 3.0, own + 1.5))
    assert others.cores() == 0.75
    monkeypatch.setattr(others, "_now", lambda: (wall + 2.0, busy + 1.0, own + 1.5))
    assert others.cores() == 0.0


# ---- training steps ----

@pytest.fixture
def tiny_encoder(monkeypatch):
    def build(kind, dtype):
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(
            vocab_size=4096, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).to(dtype).requires_grad_(False)

    monkeypatch.setattr(training, "build_model", build)
    monkeypatch.setitem(training.BATCHES, "encoder", (2, 5))


def _steps(name, dtype):
    return next(case for case in training.step_cases(BACKEND) if case.name == name and case.dtype == dtype)


@pytest.mark.parametrize(("name", "dtype"), [("encoder", "bfloat16"), ("encoder", "float32"), ("demo", "float32")])
def test_steps_train_the_same_adapters(tiny_encoder, name, dtype):
    case = _steps(name, dtype)
    made = [training.StepContender(case, contender) for contender in case.contenders]
    training.check_steps(case, made, tolerance=2)
    for contender in made:
        contender.start()
        before = {key: p.detach().clone() for key, p in contender.adapters.items()}
        assert set(contender.step()) == {"forward", "backward", "step"}
        changed = [key for key, p in contender.adapters.items() if not torch.equal(p, before[key])]
        # The demo's search has most of the paths off.
        assert len(changed) == len(before) if name == "encoder" else changed
        contender.close()


def test_steps_with_other_adapters_are_refused(tiny_encoder):
    case = _steps("encoder", "float32")
    wrong = training.StepContender(case, "peft")
    with torch.no_grad():
        wrong.adapters["bert.encoder.layer.1.output.dense.lora_B"][0, 0] += 0.1
    with pytest.raises(WrongResult, match="^peft: loss off by"):
        training.check_steps(case, [wrong])
    wrong.adapters.pop("bert.encoder.layer.1.output.dense.lora_B")
    with pytest.raises(WrongResult, match="other adapters"):
        training.check_steps(case, [wrong])


# ---- what a search costs ----

@pytest.fixture
def search_case():
    return next(case for case in search_cost.search_cases(BACKEND) if case.dtype == "float32")


def test_search_is_timed_by_phases_with_one_active_set(tiny_encoder, monkeypatch, search_case):
    monkeypatch.setattr(search_cost, "SHORT", 12)
    made = [search_cost.SearchContender(search_case, name, interval=12, warmup=1) for name in search_case.contenders]
    training.check_steps(search_case, made, tolerance=2)
    by_name = {contender.name: contender for contender in made}
    measured = search_cost.time_search(_Benchmark(), made, 50, seconds=0.0)
    assert measured["rounds"] == 1 and set(measured["ms"]) == {"plain", "window", "reallocation", "step"}
    assert all(set(phase) == set(search_case.contenders) for phase in measured["ms"].values())
    ranks = by_name["in_step"].search.ranks
    assert sum(rank > 0 for rank in ranks.values()) == len(ranks) // 4
    assert by_name["off"].search.ranks == by_name["probe"].search.ranks == ranks and not by_name["off"].search.history
    assert [entry["score"] for entry in by_name["in_step"].search.history] == [None, "in_step"]
    assert by_name["in_step"].search.history[-1]["batches"] == search_cost.WINDOW
    assert [entry["score"] for entry in by_name["probe"].search.history] == [None, "probe"]


def test_search_step_has_its_share_of_window_and_reallocation():
    same = [1.0, 2.0, 3.0]
    ms = {"plain": {"in_step": same, "off": same}, "window": {"in_step": [2.0, 4.0, 6.0], "off": same},
          "reallocation": {"in_step": [10.0, 10.0, 10.0]}}
    assert search_cost.amortise(ms, 20) == {"in_step": [1.9, 3.3, 4.7], "off": same}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell how much memory is used (/proc)")
def test_process_that_measures_memory_reads_a_task_and_answers(tiny_encoder, monkeypatch, capsys, search_case):
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(
        {"case": {**vars(search_case), "mode": "memory"}, "name": "in_step", "threads": 1, "ranks": None})))
    runpy.run_module("bench.search_cost", run_name="__main__")
    answer = json.loads(capsys.readouterr().out)
    assert answer["mib"] >= 0 and sum(rank > 0 for rank in answer["ranks"].values()) == len(answer["ranks"]) // 4


def test_search_table_joins_time_and_memory():
    time = {"block": "search", "name": "encoder", "dtype": "float32", "backend": "cpu", "mode": "time", "rank": 8, "interval": 50,
            "isa": "avx2", "rounds": 2, "calls": 1, "others": 0.0,
            "ms": {"step": {"in_step": [0, 212.0, 0], "off": [0, 200.0, 0]},
                   "reallocation": {"in_step": [0, 20.0, 0], "off": [0, 200.0, 0]}}}
    memory = {**time, "mode": "memory", "others": None, "ms": {}, "mib": {"in_step": 330.0, "off": 300.0, "probe": 600.0}}
    header, row = bench._table(bench.rows_of(_found(time, memory)), "search")
    values = dict(zip(header, row))
    assert (values["off ms"], values["in_step"], values["reallocation"]) == ("200", "1.06", "0.10")
    assert (values["memory"], values["memory with probe"]) == ("1.10", "2.00")
    (limit,) = _cells(bench.markdown(_found(time, memory)), "float32 step of a search")
    assert limit[1:] == ["<= 1.05", "1.06", "missed"]


# ---- results and tables ----

def _result(name="BERT-base_attention", dtype="bfloat16", mode="train", block="shapes", isa="avx512_bf16", **ms):
    """Of ``contender=(median by phase)``; quartiles that must not matter."""
    phases = {phase: {contender: [0.5 * value, value, 9 * value] for contender, value in times.items()}
              for phase, times in ms.items()}
    return {"block": block, "name": name, "m": 768, "k": 768, "outs": [768], "dtype": dtype, "backend": "cpu", "mode": mode,
            "rank": 8, "adapters": "", "dropout_p": 0.0, "isa": isa, "torch_isa": "AVX512", "rounds": 9, "calls": 1,
            "others": 0.0, "ms": phases}


def _found(*results, **machine):
    return {"machine": {**MACHINE, **machine}, "tolerance": 1.0, "results": list(results)}


def _cells(lines, first):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith(f"| {first}")]


def test_table_joins_modes_and_shows_ratios_of_medians():
    found = _found(_result(both={"op": 3.0, "frozen": 2.0, "peft": 6.0}), _result(mode="infer", infer={"op": 1.0, "frozen": 4.0}))
    lines = bench.markdown(found)
    header = _cells(lines, "shape")[0]
    (row,) = _cells(lines, "BERT-base attention")
    values = dict(zip(header, row))
    assert values["M x K x N"] == "768 x 768 x 768" and values["frozen ms"] == "2"
    assert values["infer"] == "0.25" and values["fwd+bwd"] == "1.50" and values["PEFT/op"] == "2.00"
    assert "backward" not in header and "statistics" not in header
    assert "AMD EPYC" in lines[0] and "2 threads" in lines[0] and "abc" in lines[0]


def test_mean_is_geometric_and_over_the_promised_shapes():
    found = _found(*[_result(name, both={"op": op, "frozen": 1.0}) for name, op in (
        ("BERT-base_attention", 4.0), ("SmolLM-135M_down", 1.0), ("MiniLM-L6_attention", 100.0))])
    (row,) = _cells(bench.markdown(found), "mean of 2")
    assert row[-1] == "2.00"


def test_limits_say_what_is_missed():
    found = _found(_result(both={"op": 1.2, "frozen": 1.0, "peft": 1.8}),
                   _result(dtype="float32", both={"op": 0.8, "frozen": 1.0}))
    lines = bench.markdown(found)
    (missed,), (kept,) = _cells(lines, "bfloat16 fwd+bwd / frozen"), _cells(lines, "bfloat16 fwd+bwd, PEFT")
    assert missed[1:] == ["<= 1.00", "1.20", "missed"] and kept[1:] == [">= 1.25", "1.50", ""]
    assert _cells(lines, "float32 fwd+bwd / frozen")[0][1:] == ["<= 0.85", "0.80", ""]
    assert not _cells(lines, "decoder"), "nothing of it was measured"
    assert any("missed" in line for line in bench.text(found))


def _bounds(**machine):
    return {limit.title: limit.bound for limit in bench.limits({**MACHINE, **machine})}


def test_limits_follow_the_processor():
    title = "bfloat16 fwd+bwd / frozen linear, mean"
    intel = {"processor": "Intel(R) Xeon(R)", "model": "GenuineIntel, family 6, model 143"}
    assert _bounds()[title] == 1.0 and _bounds(isa="amx_bf16", **intel)[title] == 1.15
    assert title not in _bounds(isa="avx2") and title not in _bounds(isa=None)
    assert _bounds()["float32 fwd+bwd / frozen linear, mean"] == 0.85
    assert _bounds(**intel)["float32 fwd+bwd / frozen linear, mean"] == 1.10


def test_table_says_when_the_check_was_widened():
    found = _found(_result(both={"op": 3.0, "frozen": 2.0}))
    assert "allowed" not in bench.markdown(found)[0]
    assert "allowed 4 times" in bench.markdown({**found, "tolerance": 4.0})[0]


def test_table_warns_where_the_machine_was_shared():
    found = _found(_result(both={"op": 3.0, "frozen": 2.0}), _result(dtype="float32", both={"op": 3.0, "frozen": 2.0}))
    assert "NOT ALONE" not in bench.text(found)[0]
    found["results"][1]["others"] = 0.8
    assert "NOT ALONE: beside 1 of 2 cases (*) other processes kept up to 0.8 cores busy" in bench.text(found)[0]
    marked = {row[2]: row[0] for row in _cells(bench.markdown(found), "BERT")}
    assert marked == {"bfloat16": "BERT-base attention", "float32": "BERT-base attention *"}
    assert _cells(bench.markdown(found), "bfloat16 fwd+bwd / frozen")[0][-1] == "missed"
    assert _cells(bench.markdown(found), "float32 fwd+bwd / frozen")[0][-1] == "not alone"


def test_file_has_a_line_for_each_result_and_comes_back(tmp_path):
    found = _found(_result(both={"op": 1.0}), _result(mode="infer", infer={"op": 1.0}))
    path = tmp_path / "new" / "cpu.json"
    bench.write_results(path, found)
    assert bench.read_results(path) == found
    assert sum('"block"' in line for line in path.read_text().splitlines()) == 2


def test_added_results_replace_the_same_cases_only():
    old = _found(_result(both={"op": 1.0}), _result(dtype="float32", both={"op": 2.0}))
    new = _found(_result(both={"op": 7.0}))
    both = bench.add_results(old, new)["results"]
    assert [(r["dtype"], r["ms"]["both"]["op"][1]) for r in both] == [("float32", 2.0), ("bfloat16", 7.0)]
    with pytest.raises(ValueError, match="--add: not the same as in the file: commit"):
        bench.add_results(old, _found(_result(), commit="other"))
    # Another instruction set is another row, not another machine.
    assert len(bench.add_results(old, _found(_result(isa="avx2"), isa="avx2"))["results"]) == 3


def test_report_is_reduced_and_cases_without_times_are_left_out():
    extra = {"case": {"block": "shapes", "name": "a", "contenders": ["op"], "mode": "train"}, "machine": MACHINE,
             "tolerance": 1.0, "rounds": 5, "calls": 2, "others": 0.0, "ms": {"both": {"op": [1, 2, 3]}}}
    report = {"benchmarks": [{"extra_info": extra, "stats": {"data": [1.0] * 1000}}, {"extra_info": {}}]}
    found = bench.reduce_reports([report])
    assert found["results"] == [{"block": "shapes", "name": "a", "mode": "train", "isa": "avx512_bf16", "torch_isa": "AVX512",
                                 "rounds": 5, "calls": 2, "others": 0.0, "ms": {"both": {"op": [1, 2, 3]}}}]


# ---- the command ----

def _fails(capsys, *arguments):
    assert main(["bench", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1
    return captured.err


def test_command_measures_prints_and_writes(tmp_path, capfd):
    path = tmp_path / "cpu.json"
    arguments = ["bench", "--quick", "--filter", "overhead and float32 and infer", "--threads", "1", "--tolerance", "2",
                 "--json", str(path), "--debug"]
    assert main(arguments) == 0
    out = capfd.readouterr().out
    assert "Overhead" in out and "1 x 64 x 64" in out and "allowed 2 times" in out
    found = json.loads(path.read_text())
    (result,) = found["results"]
    assert found["machine"]["threads"] == 1 and result["dtype"] == "float32" and result["ms"]["infer"]["op"][1] > 0
    assert main(["bench", "--markdown", str(path)]) == 0
    # The mark of a shared machine may stand behind the name.
    assert re.search(r"\| tiny( \*)? \| 1 x 64 x 64 \| float32 \|", capfd.readouterr().out)


def test_command_fails_where_a_check_does(capfd):
    assert main(["bench", "--quick", "--filter", "overhead and bfloat16 and infer", "--tolerance", "1e-12", "--debug"]) == 1
    captured = capfd.readouterr()
    assert "FAILED bench/bench_linear.py::test_linear[overhead.tiny" in captured.err
    assert "outs[0]: off by" in captured.err and captured.out == ""


def test_command_with_a_filter_that_matches_nothing_says_so(capfd):
    assert main(["bench", "--quick", "--filter", "nothing_is_called_so"]) == 1
    assert "--filter 'nothing_is_called_so' matches no case" in capfd.readouterr().err


def test_installed_package_says_where_the_benches_are(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "_ROOT", tmp_path)
    assert "checkout" in _fails(capsys)


def test_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr(bench, "_NEEDED", ("pytest", "no_such_module"))
    error = _fails(capsys)
    assert "[bench]" in error and "no_such_module" in error


@pytest.mark.parametrize(("arguments", "named"), [
    (["--threads", "0"], "--threads"), (["--tolerance", "0"], "--tolerance"), (["--add"], "--add needs --json"),
    (["--backend", "abacus"], "abacus"), (["--isa", "abacus"], "--isa"), (["--markdown", "/nowhere/x.json"], "there is no file"),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_wrong_arguments_are_named(capsys, arguments, named):
    assert named in _fails(capsys, *arguments)


def test_other_json_is_no_results_file(capsys, tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[1, 2]")
    assert "no results file" in _fails(capsys, "--markdown", str(path))


def test_instruction_sets_run_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(bench, "_available_isas", lambda: ["portable", "avx2", "best"])
    monkeypatch.setattr(torch.ops.heterolora_kernels, "cpu_isa", lambda: "best", raising=False)
    arguments = type("Arguments", (), {"isa": None, "quick": False, "backend": None, "filter": None})
    assert bench._processes(arguments) == [None, "avx2", "portable"]
    arguments.filter = "shapes"
    assert bench._processes(arguments) == [None]
    arguments.isa = "avx2"
    assert bench._processes(arguments) == ["avx2"]


def test_groups_are_those_of_models():
    assert all(len(outs) > 1 for _, _, outs in GROUPS.values())
