"""Two gloo processes whose model is sharded by FSDP2. One job runs all scenarios, and one process the same without shards.

Run as a script, this file is one of those processes.
"""

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from helpers_jobs import WAIT, WORLD, Lost, assert_like_one_process, fit, full_parameters, joined, launch, work
from helpers_search import (
    ALL_PROXIES,
    assert_scores_close,
    llama_batch,
    make_llama,
    plain_llama,
    train_step,
    trainable,
)
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForSequenceClassification

import heterolora_kernels as hlk
from heterolora_kernels.patching import reset_adapters

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(model, per_layer=True, mesh=None, **options):
    """Every layer, and the root, as README and docs have it."""
    mesh = init_device_mesh("cpu", (WORLD,)) if mesh is None else mesh
    for layer in model.model.layers if per_layer else ():
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def root(model):
    return shard(model, per_layer=False)


def every_linear(model):
    """Linears in groups of their own; a shortcut stays in its layer's."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            fully_shard(module, mesh=init_device_mesh("cpu", (WORLD,)))
    return shard(model)


def bf16_policy(model):
    return shard(model, mp_policy=BF16)


#: How the model is wrapped, and what is asked of the search; each trains as one process does.
TRAININGS = {
    "in_step": (shard, {}),
    "in_step-root": (root, {}),
    "probe": (shard, {"score": "probe"}),
    "probe-root": (root, {"score": "probe"}),
    "graded": (shard, {"ranks": "graded", "proxy": "taylor"}),
    # An evaluation between backward and step leaves the root's parameters gathered, and with them all adapters.
    "graded-reset-probe-root": (root, {"ranks": "graded", "on_reactivate": "reset", "score": "probe", "evaluates": True}),
    "reset-separated": (shard, {"on_reactivate": "reset", "mode": "separated"}),
    # One process holds the row, the other none.
    "rank-one": (shard, {"r": 1, "shortcut_r": 1, "score": "probe", "on_reactivate": "reset"}),
    "graded-every-linear": (every_linear, {"ranks": "graded"}),
    "accumulate": (shard, {"accumulate": 2}),
    "checkpointing": (shard, {"reentrant": False}),
}


def training(name):
    wrap, config = TRAININGS[name]
    return lambda rank: fit(wrap, rank, **config)


def shards(rank):
    module = shard(make_llama()).model.layers[0].self_attn.q_proj
    return {name: list(parameter.to_local().shape) for name, parameter in module.named_parameters()}


def mixed(wrap):
    """float32 adapters beside a bfloat16 base."""
    def run(rank):
        result = fit(wrap, rank, dtype=torch.bfloat16, score="probe")
        return {**result, "dtypes": {name: value.dtype for name, value in result["parameters"].items()}}
    return run


def probe_scores(rank):
    search = hlk.RankSearch(shard(make_llama(dtype=torch.float64)))
    return {proxy: search.score(batches(rank), proxy=proxy, score="probe", per_rank=True) for proxy in ALL_PROXIES}


def hybrid_scores(rank):
    """Shards that are replicated: the first copy counts."""
    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard"))
    search = hlk.RankSearch(shard(make_llama(dtype=torch.float64), mesh=mesh))
    return search.score(batches(rank), proxy="grad_norm", score="probe", per_rank=True)


def batches(rank, count=2):
    return [llama_batch(WORLD * number + rank) for number in range(count)]


def negative_loss(model, batches):
    return -sum(float(model(**batch).loss) for batch in batches)


def alpha_test(rank):
    search = hlk.RankSearch(shard(make_llama(dtype=torch.float64)), metric=negative_loss, tolerance=0.02)
    return search.score(batches(rank), proxy="alpha_test")


def static(rank, early=False):
    """A static search, built after the model was sharded or before it, and a training step."""
    model = make_llama(dtype=torch.float64, search="static")
    model = model if early else shard(model)
    search = hlk.RankSearch(model, dataloader=batches(rank))
    model = shard(model) if early else model
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    search.start()
    train_step(model, optimizer, llama_batch(rank), search)
    return search.ranks, full_parameters(model)


def probe_leaves_no_trace(rank):
    """Half accumulated gradients and a hook on a parameter: before and after a probe."""
    model = shard(make_llama())
    search, calls = hlk.RankSearch(model), []
    trainable(model)[0].register_post_accumulate_grad_hook(lambda parameter: calls.append(1))
    model(**llama_batch(rank)).loss.backward()
    grads = [p.grad for p in trainable(model)]
    values = [grad.to_local().clone() for grad in grads]
    search.score(batches(rank), score="probe", proxy="grad_norm")
    kept = all(p.grad is grad and torch.equal(grad.to_local(), value) for p, grad, value in zip(trainable(model), grads, values))
    model(**llama_batch(rank)).loss.backward()
    return kept, len(calls)


def messages(rank):
    """``{what: error}`` of what cannot be done; and whether a probe after all of it gives the scores of the one before."""
    model = shard(make_llama())
    search = hlk.RankSearch(model)
    before = search.score(batches(rank), score="probe")

    def not_finite(model, batch):
        return model(**batch).loss * (float("nan") if rank == 1 else 1.0)

    def broken_loader():
        yield llama_batch(rank)
        if rank == 1:
            raise KeyError("no such file")

    def shortcut_alone():
        patched = make_llama()
        fully_shard(patched.model.layers[0].residual_1, mesh=init_device_mesh("cpu", (WORLD,)))
        hlk.RankSearch(shard(patched))

    def unreduced():
        model.set_requires_gradient_sync(False)
        try:
            search.score(batches(rank), score="probe")
        finally:
            model.set_requires_gradient_sync(True)

    hlk.save_adapter(model, f"{sys.argv[2]}/files")
    found = {}
    for name, attempt in {
        "nan": lambda: search.score(batches(rank), score="probe", loss_fn=not_finite),
        "nan-streaming": lambda: search.score(batches(rank), score="probe", proxy="fisher", loss_fn=not_finite),
        "loader": lambda: search.score(broken_loader(), score="probe"),
        "unequal": lambda: search.score(batches(rank, 1 + rank), score="probe"),
        "unequal-metric": lambda: search.score(batches(rank, 1 + rank), proxy="alpha_test", metric=negative_loss),
        "empty": lambda: search.score([], score="probe"),
        "unreduced": unreduced,
        "shortcut": shortcut_alone,
        "synflow": lambda: search.score(batches(rank), proxy="synflow"),
        "remove": lambda: hlk.remove_heterolora(model),
        "merge": lambda: hlk.merge_heterolora(model, drop_shortcuts=True),
        "apply": lambda: hlk.apply_heterolora(shard(plain_llama()), hlk.HeteroLoraConfig(r=2)),
        "no-file": lambda: hlk.load_adapter(model, f"{sys.argv[2]}/{'files' if rank == 0 else 'nowhere'}"),
    }.items():
        try:
            attempt()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found, search.score(batches(rank), score="probe") == before


def files(rank):
    """Saves in every format after some steps, with the parameters that were saved, and loads the native one."""
    folder = sys.argv[2]
    model = shard(make_llama(search="off"))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train_step(model, optimizer, llama_batch(rank))
    search = hlk.RankSearch(model, optimizer)
    search.apply({name: 1 for name in search.paths[:5]})
    with torch.no_grad():
        model(**llama_batch(0))
    for format in ("native", "peft", "vllm", "merged"):
        options = {"search": search} if format == "native" else {"drop_shortcuts": True}
        hlk.save_adapter(model, f"{folder}/{format}", format, **options)
    dist.barrier()
    other = shard(make_llama(search="off"))
    loaded = hlk.RankSearch(other)
    with torch.no_grad():
        other(**llama_batch(0))
    hlk.load_adapter(other, f"{folder}/native", search=loaded)
    return folder, full_parameters(model), full_parameters(other), search.ranks == loaded.ranks


def heads(rank):
    """A trained head is gathered too, and comes back."""
    folder = f"{sys.argv[2]}/head"

    def build():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(LlamaConfig(
            vocab_size=23, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, num_labels=3,
            pad_token_id=0))
        return shard(hlk.apply_heterolora(model, hlk.HeteroLoraConfig(r=3, search="off")))

    model, other = build(), build()
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.to_local().add_(1.0)
    hlk.save_adapter(model, folder)
    dist.barrier()
    hlk.load_adapter(other, folder)
    first, second = full_parameters(model), full_parameters(other)
    return all(torch.equal(first[name], second[name]) for name in first), bool((first["score.weight"] > 0.5).all())


def resumed(rank):
    """An unbroken run, and one that goes on from its files: adapter and search, each process's optimizer; torch's checkpoint."""
    folder, runs = sys.argv[2], []

    def build():
        model = shard(make_llama(warmup=1, interval=2))
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        return model, optimizer, hlk.RankSearch(model, optimizer)

    def go(run, steps):
        model, optimizer, search = run
        for step in steps:
            train_step(model, optimizer, llama_batch(WORLD * step + rank), search)

    run = build()
    run[2].start()
    go(run, range(4))
    go(run, [4])
    hlk.save_adapter(run[0], f"{folder}/resumed", search=run[2])
    checkpoint.save(get_model_state_dict(run[0]), checkpoint_id=f"{folder}/dcp")
    torch.save(run[1].state_dict(), f"{folder}/optimizer-{rank}.pt")
    dist.barrier()
    for source in ("native", "dcp"):
        model, optimizer, search = build()
        if source == "native":
            hlk.load_adapter(model, f"{folder}/resumed", search=search)
        else:
            state = get_model_state_dict(model)
            checkpoint.load(state, checkpoint_id=f"{folder}/dcp")
            set_model_state_dict(model, state)
            search.load_state_dict(hlk.save_and_load.load_search_state(f"{folder}/resumed"))
        optimizer.load_state_dict(torch.load(f"{folder}/optimizer-{rank}.pt", weights_only=False))
        runs.append((model, optimizer, search))
    for each in (run, *runs):
        go(each, range(5, 8))
    parameters = [full_parameters(model) for model, _, _ in (run, *runs)]
    return [(all(torch.equal(parameters[0][name], values[name]) for name in values), search.history == run[2].history)
            for values, (_, _, search) in zip(parameters[1:], runs)]


def resumed_by_state_dicts(rank):
    """An unbroken run and one resumed by torch's sharded state dicts, which ask for the state of paths that were never on."""
    def build():
        model = shard(make_llama(warmup=1, interval=2))
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        return model, optimizer, hlk.RankSearch(model, optimizer)

    def go(run, steps):
        model, optimizer, search = run
        for step in steps:
            train_step(model, optimizer, llama_batch(WORLD * step + rank), search)

    def begun():
        run = build()
        run[2].start()
        go(run, range(3))
        return run

    whole, broken, fresh = begun(), begun(), build()
    without = [parameter for parameter in trainable(broken[0]) if not broken[1].state.get(parameter)]
    states, search = get_state_dict(*broken[:2]), broken[2].state_dict()
    set_state_dict(*fresh[:2], model_state_dict=states[0], optim_state_dict=states[1])
    fresh[2].load_state_dict(search)
    for run in (whole, fresh):
        go(run, range(3, 7))
    one, other = (full_parameters(run[0]) for run in (whole, fresh))
    return len(without), all(torch.equal(one[name], other[name]) for name in one), whole[2].ranks == fresh[2].ranks


def reset(rank):
    """Adapters drawn anew while their parameters were gathered."""
    model = root(make_llama(search="off"))
    with torch.no_grad():
        model(**llama_batch(0))
    reset_adapters(model)
    return full_parameters(model)


def killed(rank):
    """The second process is killed between two steps."""
    model = shard(make_llama())
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    train_step(model, optimizer, llama_batch(rank))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        train_step(model, optimizer, llama_batch(rank))
    except RuntimeError as error:
        return Lost(error), time.monotonic() - began


SCENARIOS = {
    "shards": shards,
    **{name: training(name) for name in TRAININGS},
    "bfloat16": mixed(shard),
    "bfloat16-policy": mixed(bf16_policy),
    "scores": probe_scores,
    "hybrid": hybrid_scores,
    "alpha_test": alpha_test,
    "static": static,
    "static-early": lambda rank: static(rank, early=True),
    "trace": probe_leaves_no_trace,
    "messages": messages,
    "files": files,
    "heads": heads,
    "resumed": resumed,
    "resumed_by_state_dicts": resumed_by_state_dicts,
    "reset": reset,
    "killed": killed,
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """``job(scenario)``: the results of process 0 and process 1."""
    return launch(__file__, tmp_path_factory.mktemp("job"))


def test_rows_are_sharded_unevenly(job):
    assert job("shards") == [{"weight": [8, 16], "lora_A": [2, 16], "lora_B": [8, 3]},
                             {"weight": [8, 16], "lora_A": [1, 16], "lora_B": [8, 3]}]


@pytest.mark.parametrize("name", list(TRAININGS))
def test_training_chooses_and_freezes_as_one_process(job, name):
    assert_like_one_process(job(name), fit(**TRAININGS[name][1]))


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16-policy"])
def test_float32_adapters_beside_a_bfloat16_base(job, name):
    first, second = job(name)
    alone = fit(dtype=torch.bfloat16, score="probe")
    assert first["history"] == second["history"] and len(first["history"]) == 3
    for parameter, dtype in first["dtypes"].items():
        assert dtype == (torch.float32 if "lora_" in parameter else torch.bfloat16)
        assert torch.equal(first["parameters"][parameter], second["parameters"][parameter])
    # Three AdamW steps of 0.01, most of the way in the same direction: what bfloat16 leaves of exactness.
    distance = sum(float((first["parameters"][p] - v).square().sum()) for p, v in alone["parameters"].items())
    start = full_parameters(make_llama(dtype=torch.bfloat16))
    moved = sum(float((start[p] - v).square().sum()) for p, v in alone["parameters"].items())
    assert distance < 0.3 * moved
    assert_scores_close(first["history"][1]["scores"], alone["history"][1]["scores"], tolerance=0.3)


# Gradients are averaged: one process sums over WORLD times as many batches, and its gradients are WORLD times as large.
FACTORS = {"constant": 1, "grad_norm": WORLD, "snip": WORLD, "gate": WORLD, "taylor": WORLD ** 2, "fisher": 1}


@pytest.mark.parametrize("proxy", ALL_PROXIES)
def test_scores_of_rows_are_those_of_one_process(job, proxy):
    search = hlk.RankSearch(make_llama(dtype=torch.float64))
    alone = search.score(batches(0) + batches(1), proxy=proxy, score="probe", per_rank=True)
    first, second = (result[proxy] for result in job("scores"))
    assert first == second
    assert_scores_close(first, {path: [score / FACTORS[proxy] for score in rows] for path, rows in alone.items()})


def test_replicated_shards_count_once(job):
    first, second = job("hybrid")
    assert first == second
    assert_scores_close(first, job("scores")[0]["grad_norm"])


def test_alpha_test_measures_the_sharded_model(job):
    first, second = job("alpha_test")
    search = hlk.RankSearch(make_llama(dtype=torch.float64), metric=negative_loss, tolerance=0.02)
    alone = search.score([joined(pair) for pair in zip(batches(0), batches(1))], proxy="alpha_test")
    assert first == second == alone and 0 < sum(alone.values()) < 10 * len(alone)


@pytest.mark.parametrize("name", ["static", "static-early"])
def test_static_search_is_that_of_one_process(job, name):
    model = make_llama(dtype=torch.float64, search="static")
    search = hlk.RankSearch(model, dataloader=[joined(pair) for pair in zip(batches(0), batches(1))])
    search.start()
    train_step(model, torch.optim.SGD(trainable(model), lr=0.1), joined([llama_batch(0), llama_batch(1)]), search)
    for ranks, parameters in job(name):
        assert ranks == search.ranks and len(set(ranks.values())) > 1
        for parameter, values in full_parameters(model).items():
            torch.testing.assert_close(parameters[parameter], values, rtol=1e-9, atol=1e-12)


def test_a_probe_leaves_gradients_and_hooks(job):
    assert job("trace") == [(True, 2), (True, 2)]


@pytest.mark.parametrize("name, first, second", [
    pytest.param("nan", "FloatingPointError: the loss of a scoring batch is not finite", None, id="nan"),
    pytest.param("nan-streaming", "FloatingPointError: the loss of a scoring batch is not finite", None, id="nan-streaming"),
    pytest.param("loader", "RuntimeError: scoring failed on another process", "KeyError: 'no such file'", id="loader"),
    pytest.param("unequal", "ValueError: batches must hold as many batches on every process", None, id="unequal"),
    pytest.param("unequal-metric", None, "ValueError: eval_batches must be as many", id="unequal-metric"),
    pytest.param("empty", "ValueError: batches is empty", None, id="empty"),
    pytest.param("unreduced", "RuntimeError: model accumulates gradients without reducing them", None, id="unreduced"),
    pytest.param("shortcut", "ValueError: model: the shortcut 'model.layers.0.residual_1' is a fully_shard group", None,
                 id="shortcut"),
    pytest.param("synflow", "ValueError: synflow puts absolute copies", None, id="synflow"),
    pytest.param("remove", "ValueError: model is sharded", None, id="remove"),
    pytest.param("merge", "ValueError: model is sharded", None, id="merge"),
    pytest.param("apply", "ValueError: model is already sharded (FSDP2): call apply_heterolora first", None, id="apply"),
    pytest.param("no-file", "RuntimeError: the adapter was not read on another process", "FileNotFoundError", id="no-file"),
])
def test_what_cannot_be_done_ends_on_both(job, name, first, second):
    found = [result[0][name] for result in job("messages")]
    for message, expected in zip(found, (first or second, second or first)):
        assert message.startswith(expected)


def test_scores_after_errors_are_as_before(job):
    assert [result[1] for result in job("messages")] == [True, True]


def test_native_adapter_is_whole_and_loads_into_any_model(job):
    (folder, saved, loaded, same_ranks), (_, _, other, _) = job("files")
    alone = full_parameters(hlk.load_adapter(plain_llama(), f"{folder}/native"))
    for name, values in saved.items():
        assert torch.equal(values, alone[name]) and torch.equal(values, loaded[name]) and torch.equal(values, other[name])
    assert same_ranks


@pytest.mark.parametrize("format", ["peft", "vllm", "merged"])
def test_exports_are_those_of_a_whole_model(job, format, tmp_path):
    folder = job("files")[0][0]
    model = hlk.load_adapter(plain_llama(), f"{folder}/native")
    with pytest.warns(UserWarning, match="left out"):
        hlk.save_adapter(model, tmp_path, format, drop_shortcuts=True)
    (name,) = [file.name for file in tmp_path.iterdir() if file.suffix == ".safetensors"]
    assert (tmp_path / name).read_bytes() == open(f"{folder}/{format}/{name}", "rb").read()


def test_heads_are_gathered_and_loaded(job):
    assert job("heads") == [(True, True)] * WORLD


def test_resumed_runs_are_the_unbroken_one(job):
    assert job("resumed") == [[(True, True), (True, True)]] * WORLD


def test_state_dicts_of_torch_resume_paths_that_were_never_on(job):
    for without, same, ranks in job("resumed_by_state_dicts"):
        assert without > 0 and same and ranks


def test_adapters_are_drawn_anew_in_shards(job):
    fresh = full_parameters(make_llama(zero_B=True))
    for result in job("reset"):
        assert all(torch.equal(result[name], values) for name, values in fresh.items())


def test_a_killed_process_ends_the_other(job):
    (message, seconds), = job("killed", ranks=[0])
    assert isinstance(message, Lost) and seconds < WAIT.total_seconds()


def test_flattened_parameters_are_refused():
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    # Its constructor wants an accelerator.
    wrapper._fsdp_wrapped_module = make_llama()
    with pytest.raises(ValueError, match="FullyShardedDataParallel, which flattens parameters"):
        hlk.RankSearch(wrapper)


def test_a_model_moved_by_its_data_computes_where_it_is():
    """As FSDP2 brings a model to its devices."""
    model = make_llama(search="off").eval()
    expected = model(**llama_batch(0)).logits
    linear = model.model.layers[0].self_attn.q_proj
    linear._heterolora.derived.gate = linear._heterolora.derived.gate.to("meta")
    assert torch.equal(model(**llama_batch(0)).logits, expected)
    assert linear._heterolora.derived.gate.device.type == "cpu"


if __name__ == "__main__":
    work(SCENARIOS, int(sys.argv[1]), sys.argv[2])
