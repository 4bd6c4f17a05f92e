"""torchrun on two CPU processes: the examples of the guide as they are written, accelerate, and the HF Trainer.

Run as a script, this file is one of those processes.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from helpers_jobs import (
    JOB_TIMEOUT,
    WORLD,
    assert_gloo_has_ended,
    assert_like_one_process,
    environment,
    fit,
    full_parameters,
)
from helpers_search import llama_batch, make_llama, trainable
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import heterolora_kernels as hlk
from heterolora_kernels.callback import HeteroLoraCallback

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "distributed.md"


def rows(count):
    """A data set whose batches of two are ``llama_batch(0)``, ``llama_batch(1)``, ..."""
    return [{name: value[i] for name, value in llama_batch(seed).items()} for seed in range(count) for i in range(2)]


def torchrun(*arguments, folder):
    """Run a script in two processes; fails with their output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD),
               *map(str, arguments)]
    try:
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=JOB_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"no end within {JOB_TIMEOUT} s: {error.stderr}")
    if done.returncode != 0:
        pytest.fail(done.stdout + done.stderr)


def accelerated(rank, accumulate=2):
    """What ``fit`` does, in the words of accelerate."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = make_llama(dtype=torch.float64, warmup=1, interval=2)
    loader = DataLoader(rows(5 * WORLD * accumulate), batch_size=2)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    search = hlk.RankSearch(wrapped, optimizer, loader)
    search.start()
    for batch in loader:
        with accelerator.accumulate(wrapped):
            # accelerate divides by the number of micro-batches, which `fit` does not.
            accelerator.backward(accumulate * wrapped(**batch).loss)
            optimizer.step()
            if accelerator.sync_gradients:
                search.step()
            optimizer.zero_grad()
    return {"history": search.history, "ranks": search.ranks, "parameters": full_parameters(model)}


def trained(folder, accumulate, resume=None):
    """Six steps of the Trainer with checkpoints after every third, or the last three of them."""
    model, callback = make_llama(dtype=torch.float64, warmup=1, interval=2), HeteroLoraCallback()
    arguments = TrainingArguments(
        output_dir=folder, use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=accumulate, max_steps=6,
        save_steps=3, learning_rate=1e-2, report_to=[], disable_tqdm=True, logging_strategy="no")
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(12), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return {"history": callback.search.history, "ranks": callback.search.ranks, "parameters": full_parameters(model),
            "wrapper": type(trainer.model_wrapped).__name__, "search": callback.search, "model": model}


def trained_and_resumed(rank, folder):
    """A run under the Trainer, and its second half again from the checkpoint in between."""
    unbroken = trained(f"{folder}/trainer", 1)
    hlk.save_adapter(unbroken.pop("model"), f"{folder}/trainer-adapter", search=unbroken.pop("search"))
    again = trained(f"{folder}/again", 1, f"{folder}/trainer/checkpoint-3")
    return {**unbroken, "again": (again["history"], again["parameters"])}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The folder in which both processes have left their results."""
    folder = tmp_path_factory.mktemp("launched")
    torchrun(__file__, folder, folder=folder)
    return folder


def results(folder, name):
    return [torch.load(folder / f"{rank}.pt", weights_only=False)[name] for rank in range(WORLD)]


def test_accelerate_trains_and_chooses_as_one_process(job):
    assert_like_one_process(results(job, "accelerate"), fit(accumulate=2))


def test_trainer_chooses_as_one_process_that_accumulates(job, tmp_path):
    first, second = results(job, "trainer")
    alone = trained(str(tmp_path), WORLD)
    assert first["wrapper"] == "DistributedDataParallel" and alone["wrapper"] != first["wrapper"]
    assert first["history"] == second["history"] and len(first["history"]) == 4
    assert [entry["ranks"] for entry in first["history"]] == [entry["ranks"] for entry in alone["history"]]
    for name, values in alone["parameters"].items():
        assert torch.equal(first["parameters"][name], second["parameters"][name])
        torch.testing.assert_close(first["parameters"][name], values, rtol=1e-9, atol=1e-12)


def test_trainer_goes_on_from_a_checkpoint(job):
    for result in results(job, "trainer"):
        history, parameters = result["again"]
        assert history == result["history"]
        assert all(torch.equal(parameters[name], values) for name, values in result["parameters"].items())


def test_trainer_adapter_is_saved_once_and_loads(job):
    first = results(job, "trainer")[0]
    model = hlk.load_adapter(make_llama(dtype=torch.float64, warmup=1, interval=2), job / "trainer-adapter")
    assert all(torch.equal(first["parameters"][name], values) for name, values in full_parameters(model).items())
    assert hlk.RankSearch(model).paths and sorted(path.name for path in (job / "trainer-adapter").iterdir()) == [
        "adapter.safetensors", "heterolora.json"]


@pytest.mark.parametrize("name", ["train_ddp.py", "train_fsdp.py"])
def test_examples_of_the_guide_run_as_written(name, tmp_path):
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
                if block.startswith(f"# {name}\n")]
    # torch's own caches hold the group of a sharded model.
    ended = "import helpers_jobs\nhelpers_jobs.assert_gloo_has_ended()\n" if name == "train_ddp.py" else ""
    (tmp_path / name).write_text(block + ended)
    torchrun(name, folder=tmp_path)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2))
    model = hlk.load_adapter(base.to(torch.bfloat16) if name == "train_fsdp.py" else base, tmp_path / "adapter")
    search = hlk.RankSearch(model)
    hlk.load_adapter(model, tmp_path / "adapter", search=search)
    # 96 rows, 2 processes, 4 a batch: 12 steps, and one choice at the start.
    assert [entry["step"] for entry in search.history] == [0, 4, 8, 12]
    assert sum(rank > 0 for rank in search.ranks.values()) == 5 and not search.history[-1]["warmup"]


if __name__ == "__main__":
    place, process = sys.argv[1], int(os.environ["RANK"])
    found = {"accelerate": accelerated(process), "trainer": trained_and_resumed(process, place)}
    torch.save(found, f"{place}/{process}.pt")
    dist.destroy_process_group()
    assert_gloo_has_ended()
