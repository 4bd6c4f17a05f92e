"""TRL's trainers on a patched model: they run unchanged, and the reference model is the base."""

from __future__ import annotations

import json
import random

import pytest
import torch
from datasets import Dataset
from helpers_search import llama_batch, plain_llama, same_bits, snapshot
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import heterolora_kernels as hlk
from heterolora_kernels.callback import HeteroLoraCallback

LETTERS = "abcdefghijklmnopqrst"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a base model, where TRL looks for the reference model."""
    folder = tmp_path_factory.mktemp("base")
    plain_llama().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def patched(folder, **config):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return hlk.apply_heterolora(model, hlk.HeteroLoraConfig(
        **{"r": 3, "interval": 2, "warmup": 1, "num_batches": 2, "budget": 0.5, "shortcuts": "all", **config}))


def tokenizer():
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *LETTERS])}
    letters = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def examples(*columns, count: int = 12) -> Dataset:
    draw = random.Random(0)
    return Dataset.from_list([{name: "".join(f" {draw.choice(LETTERS)}" for _ in range(4)) for name in columns}
                              for _ in range(count)])


def arguments(cls, folder, **values):
    """TRL's own defaults otherwise, activation checkpointing among them."""
    return cls(**{"output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 0.02,
                  "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
                  "bf16": False, "lr_scheduler_type": "constant", **values})


def dpo(folder, model, callback, ref_model=None, **values):
    return DPOTrainer(model, ref_model, args=arguments(DPOConfig, folder, **values), processing_class=tokenizer(),
                      train_dataset=examples("prompt", "chosen", "rejected"), callbacks=[callback])


def logits(model):
    # Without labels, which TRL's forward keeps from the model's.
    with torch.no_grad():
        return model.eval()(input_ids=llama_batch(3)["input_ids"]).logits


def test_sft_trains_saves_the_adapter_and_resumes(base, tmp_path):
    results = []
    for folder, steps in (("whole", (6,)), ("broken", (3, 6))):
        for last in steps:
            callback, model = HeteroLoraCallback(), patched(base, lora_dropout=0.1)
            trainer = SFTTrainer(model, arguments(SFTConfig, tmp_path / folder, save_strategy="steps", save_steps=3, bf16=True),
                                 train_dataset=examples("text"), processing_class=tokenizer(), callbacks=[callback])
            trainer.args.max_steps = last
            trainer.train(resume_from_checkpoint=last == 6 and folder == "broken")
        results.append((callback.search.history, snapshot(model)))
    (history, weights), (resumed, twin) = results
    assert [(entry["step"], entry["score"]) for entry in history] == [(0, None), (2, "in_step"), (4, "in_step"), (6, "in_step")]
    assert json.dumps(history) == json.dumps(resumed) and same_bits(weights, twin)
    saved = load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors")
    assert {name.rpartition(".")[2] for name in saved} == {"lora_A", "lora_B", "lora_mask"}
    loaded = hlk.load_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "whole" / "checkpoint-6")
    assert same_bits(snapshot(loaded), weights)


def test_dpo_measures_against_the_base_which_may_be_shared(base, tmp_path):
    """The reference that TRL loads, and the one that costs no memory, are the base: same losses, statistics and weights."""
    expected, runs = logits(AutoModelForCausalLM.from_pretrained(base)), []
    for shared in (False, True):
        model, callback = patched(base), HeteroLoraCallback()
        trainer = dpo(tmp_path, model, callback, hlk.reference_model(model) if shared else None)
        pointers = {parameter.data_ptr() for parameter in model.parameters()}
        assert {parameter.data_ptr() in pointers for parameter in trainer.ref_model.parameters()} == {shared}
        trainer.train()
        assert not trainer.ref_model.training and torch.equal(logits(trainer.ref_model), expected)
        assert not torch.equal(logits(model), expected)
        with hlk.disable_adapter(model):
            torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] != losses[0]
        runs.append((json.dumps(callback.search.history), losses, snapshot(model)))
        assert [entry["score"] for entry in callback.search.history] == [None, *["in_step"] * 3]
    (first, first_losses, first_weights), (second, second_losses, second_weights) = runs
    assert first == second and first_losses == second_losses and same_bits(first_weights, second_weights)


def test_statistics_of_dpo_are_those_without_a_reference_run(base, tmp_path):
    """With log probabilities computed beforehand nothing but the trained model runs."""
    histories = []
    for precompute in (False, True):
        callback = HeteroLoraCallback()
        trainer = dpo(tmp_path, patched(base), callback, precompute_ref_log_probs=precompute, max_steps=2)
        assert (trainer.ref_model is None) == precompute
        trainer.train()
        histories.append(callback.search.history)
    scores = [history[1]["scores"] for history in histories]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3) and max(scores[0].values()) > 0


def test_dropout_that_trl_turns_off_is_off_in_the_adapters(base, tmp_path):
    results = []
    for dropout in (0.0, 0.5):
        model = patched(base, lora_dropout=dropout, interval=5)
        dpo(tmp_path, model, HeteroLoraCallback(), max_steps=2).train()
        results.append(snapshot(model))
    assert same_bits(*results)


def test_grpo_trains_against_the_base(base, tmp_path):
    model, callback = patched(base), HeteroLoraCallback()
    trainer = GRPOTrainer(model, reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
                          args=arguments(GRPOConfig, tmp_path, beta=0.1, num_generations=2, max_completion_length=4, max_steps=4),
                          train_dataset=examples("prompt"), processing_class=tokenizer(), callbacks=[callback])
    trainer.train()
    assert torch.equal(logits(trainer.ref_model), logits(AutoModelForCausalLM.from_pretrained(base)))
    assert [(entry["step"], entry["score"]) for entry in callback.search.history] == [(0, None), (2, "in_step"), (4, "in_step")]
    assert max(callback.search.history[1]["scores"].values()) > 0


def test_a_probe_of_dpo_names_in_step(base, tmp_path):
    trainer = dpo(tmp_path, patched(base, score="probe", search="static"), HeteroLoraCallback())
    with pytest.raises(ValueError, match=r"loss_fn: .*completion_mask.*score='in_step'.*DPO"):
        trainer.train()


def test_what_trl_would_do_wrong_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="sync_ref_model"):
        dpo(tmp_path, patched(base), HeteroLoraCallback(), sync_ref_model=True)
    with pytest.raises(ValueError, match="target_modules.*lm_head"):
        dpo(tmp_path, patched(base, target_modules=["q_proj", "lm_head"], shortcuts=()), HeteroLoraCallback())


def test_a_server_of_vllm_would_get_weights_without_the_adapters(base, tmp_path):
    with pytest.raises(ValueError, match="use_vllm=True: .*without the adapters.*accelerate_peft"):
        GRPOTrainer(patched(base), reward_funcs=lambda completions, **_: [0.0] * len(completions),
                    args=arguments(GRPOConfig, tmp_path, use_vllm=True, num_generations=2, max_completion_length=4),
                    train_dataset=examples("prompt"), processing_class=tokenizer(), callbacks=[HeteroLoraCallback()])


def test_the_reference_model_comes_before_the_trainer(base, tmp_path):
    model = patched(base)
    dpo(tmp_path, model, HeteroLoraCallback())
    with pytest.raises(ValueError, match="before the trainer"):
        hlk.reference_model(model)
