"""HeteroLoraCallback: the Trainer does what a plain loop does, its logs tell of the search, and what it refuses."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers_search import caught, make_llama, plain_llama, same_bits, snapshot, trainable
from helpers_trainer import make_bert, make_trainer, same_history, sentences, texts
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, default_data_collator

import heterolora_kernels as hlk
from heterolora_kernels.callback import HeteroLoraCallback
from heterolora_kernels.patching import count_parameters


class Recorder(Trainer):
    """Keeps what each training step was given."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen = [*getattr(self, "seen", []), (copy.deepcopy(inputs), num_items_in_batch)]
        return super().training_step(model, inputs, num_items_in_batch)


def plain_loop(model, recorder: Recorder, accumulation: int = 1, precision: str | None = None, **search):
    """RankSearch in a loop of one's own, on the batches that the Trainer saw."""
    def loss_of(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model(**batch).loss

    optimizer = torch.optim.AdamW(trainable(model), lr=0.02, weight_decay=0.1)
    found = hlk.RankSearch(model, optimizer, loss_fn=loss_of, **search)
    torch.manual_seed(3)
    found.start()
    for step in range(0, len(recorder.seen), accumulation):
        model.train()
        for inputs, items in recorder.seen[step:step + accumulation]:
            loss_of(model, {**inputs, "num_items_in_batch": items}).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.step()
    return found


def adamw(model):
    """The loop's optimizer, for the Trainer: its own has no decay on some parameters, and another implementation."""
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02, weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


MODELS = {"bert": (make_bert, sentences), "llama": (lambda **config: make_llama(zero_B=True, **config), texts)}


@pytest.mark.parametrize("kind,score,accumulation,precision", [
    *((kind, score, accumulation, None) for kind in MODELS for score in ("in_step", "probe") for accumulation in (1, 2)),
    ("llama", "in_step", 2, "bf16"), ("llama", "probe", 1, "bf16")], ids=lambda value: str(value or "float32"))
def test_trainer_equals_a_plain_loop(kind, score, accumulation, precision, tmp_path):
    make, make_data = MODELS[kind]
    # Without dropout: the loop does not draw what the Trainer draws for the order of the data.
    config = {"score": score, "num_batches": 2, "interval": 0.5, **({"dropout": 0.0} if kind == "bert" else {})}
    model, data = make(**config), make_data(24)
    callback = HeteroLoraCallback()
    trainer = make_trainer(tmp_path, model, data, callback, Recorder, eval_data=make_data(6, seed=100), max_steps=20,
                           gradient_accumulation_steps=accumulation, eval_strategy="steps", eval_steps=4,
                           **({precision: True} if precision else {}))
    trainer.optimizer, trainer.lr_scheduler = adamw(model)
    trainer.train()

    twin = make(**config)
    loader = DataLoader(data, 4, shuffle=True, collate_fn=default_data_collator)
    search = plain_loop(twin, trainer, accumulation, precision, dataloader=loader, steps_per_epoch=6 // accumulation)
    scored = [entry for entry in search.history if not entry["warmup"]]
    assert scored and all(entry["score"] == score for entry in scored)
    assert same_history(callback.search.history, search.history)
    assert callback.search.ranks == search.ranks
    assert same_bits(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_gradient_checkpointing_changes_no_bit(use_reentrant, tmp_path):
    runs = []
    for arguments in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}):
        model = make_llama(zero_B=True, lora_dropout=0.1, interval=2, warmup=1, num_batches=1)
        callback, calls = HeteroLoraCallback(), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        make_trainer(tmp_path, model, texts(24), callback, max_steps=6, **arguments).train()
        runs.append((len(calls), callback.search.history, snapshot(model)))
    (once, history, weights), (twice, *others) = runs
    assert twice == 2 * once and len(history) == 4
    assert same_history(history, others[0]) and same_bits(weights, others[1])


def test_loss_of_the_trainer_is_the_loss_of_a_probe(tmp_path):
    """Label smoothing is seen without more ado, any loss of the Trainer's once the callback is attached."""
    def halved(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) / 2

    class Halving(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs) / 2

    def scores(cls=Trainer, loss=None, is_attached=False, **arguments):
        callback = HeteroLoraCallback()
        trainer = make_trainer(tmp_path, make_llama(search="static", num_batches=2), texts(12), callback, cls, max_steps=1,
                               **arguments)
        trainer.compute_loss_func = loss
        if is_attached:
            callback.attach(trainer)
        trainer.train()
        return callback.search.history[0]["scores"]

    own = scores()
    assert scores(is_attached=True) == own
    smoothed = scores(label_smoothing_factor=0.3)
    assert smoothed == scores(label_smoothing_factor=0.3, is_attached=True) != own
    # grad_norm is of first degree in the loss.
    half = {name: pytest.approx(score / 2, rel=1e-4) for name, score in own.items()}
    assert scores(cls=Halving, is_attached=True) == half
    assert scores(loss=halved, is_attached=True) == half
    with pytest.raises(ValueError, match=r"loss_fn: .*compute_loss_func.*attach.*in_step"):
        scores(loss=halved)


def test_probe_reads_the_head_of_the_training_set_and_leaves_the_order_alone(tmp_path):
    """accelerate's sampler shuffles anew after each full reading: a probe must not be one."""
    read = {}
    for score in ("probe", "in_step"):
        trainer = make_trainer(tmp_path, make_bert(score=score, num_batches=50, interval=2), sentences(12), HeteroLoraCallback(),
                               Recorder, max_steps=9)
        trainer.train()
        read[score] = [inputs["input_ids"].tolist() for inputs, _ in trainer.seen]
    assert read["probe"] == read["in_step"]


def test_own_dataloader_and_measures_reach_the_search(tmp_path):
    used = []

    def loss_fn(model, batch):
        used.append(batch["labels"].tolist())
        return model(**batch).loss

    own = DataLoader(sentences(4, seed=7), 2, collate_fn=default_data_collator)
    callback = HeteroLoraCallback(loss_fn=loss_fn, dataloader=own, metric=lambda model, batches: 0.5, greater_is_better=False,
                                  tolerance=0.2, eval_batches=own)
    make_trainer(tmp_path, make_bert(search="static"), sentences(8), callback, max_steps=2).train()
    assert used == [batch["labels"].tolist() for batch in own]
    measures = callback.search._measures
    assert (measures.tolerance, measures.greater_is_better, measures.eval_batches) == (0.2, False, own)
    assert len(callback.search.history) == 1 and callback.search.history[0]["step"] == 0


def test_a_stream_counts_as_one_epoch(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(sentences(64))

    callback = HeteroLoraCallback()
    model = make_bert(interval=0.25, score="probe", num_batches=1, warmup=1)
    make_trainer(tmp_path, model, Stream(), callback, max_steps=8).train()
    assert [entry["step"] for entry in callback.search.history] == [0, 2, 4, 6, 8]


def test_search_off_trains_everything(tmp_path):
    callback = HeteroLoraCallback()
    make_trainer(tmp_path, make_bert(search="off"), sentences(8), callback, max_steps=2).train()
    assert callback.search.history == [] and set(callback.search.ranks.values()) == {4}


def test_the_loss_scale_of_accelerate_reaches_the_search(tmp_path):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model = make_bert()
    callback = HeteroLoraCallback()
    trainer = make_trainer(tmp_path, model, sentences(8), callback)
    optimizer = SimpleNamespace(param_groups=[{"params": trainable(model)}], scaler=scaler)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model, optimizer=optimizer,
                            train_dataloader=trainer.get_train_dataloader())
    assert callback.search._scaler is scaler


# ---- logs ----


class Reporter(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_scalars_join_the_logs(tmp_path):
    callback, early, late = HeteroLoraCallback(), Reporter(), Reporter()
    model = make_bert(warmup=2)
    trainer = make_trainer(tmp_path, model, sentences(8), None, callbacks=[early, callback, late], eval_data=sentences(4),
                           eval_strategy="steps", eval_steps=5)
    trainer.train()
    names = {f"heterolora/{name}" for name in ("active_parameters", "reallocations", "paths_on", "churn", "threshold")}
    assert not any(name.startswith("heterolora/") for logs in early.logs for name in logs)
    training = [logs for logs in late.logs if "loss" in logs]
    assert len(training) == 10 and names <= training[-1].keys()
    assert "heterolora/threshold" not in training[0]  # a warm-up has none
    assert all(not name.startswith("heterolora/") for logs in late.logs if "loss" not in logs for name in logs)
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["heterolora/reallocations"] == len(callback.search.history) == 4
    assert last["heterolora/active_parameters"] == count_parameters(model)["active"]
    assert last["heterolora/paths_on"] == sum(rank > 0 for rank in callback.search.ranks.values())
    assert last["heterolora/churn"] == callback.search.history[-1]["churn"]


@pytest.mark.parametrize("is_given", [True, False], ids=["given", "not given"])
def test_attached_callback_comes_first(is_given, tmp_path):
    callback, reporter = HeteroLoraCallback(), Reporter()
    trainer = make_trainer(tmp_path, make_bert(), sentences(8), callback if is_given else None, callbacks=[reporter], max_steps=2)
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks[0] is callback and trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    assert "heterolora/paths_on" in reporter.logs[0]


# ---- errors ----


def test_model_that_is_not_patched_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"call apply_heterolora\(model, config\) first; do so before building the Trainer"):
        make_trainer(tmp_path, plain_llama(), texts(4), HeteroLoraCallback())


def test_float_interval_counts_the_trainers_steps(tmp_path):
    """9 batches of 4 and 2 to a step: five steps an epoch, of which the last is a short one."""
    callback = HeteroLoraCallback()
    make_trainer(tmp_path, make_bert(interval=0.4, warmup=20), sentences(36), callback, gradient_accumulation_steps=2).train()
    assert [entry["step"] for entry in callback.search.history] == [0, 2, 4, 6, 8, 10]


def test_several_gpus_in_one_process_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, make_bert(), sentences(4))
    with pytest.raises(ValueError, match="torchrun"):
        HeteroLoraCallback()._enter(trainer.model, SimpleNamespace(n_gpu=2, fsdp="", deepspeed=None))


def test_plain_module_trains(tmp_path):
    """No save_pretrained to override: the Trainer saves the whole state dict."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, labels=None):
            return {"loss": nn.functional.cross_entropy(self.second(self.first(x).relu()), labels)}

    torch.manual_seed(0)
    model = hlk.apply_heterolora(Net(), hlk.HeteroLoraConfig(r=2, interval=2, budget=0.5, score="probe"))
    data = [{"x": torch.randn(3), "labels": torch.tensor(i % 2)} for i in range(8)]
    callback = HeteroLoraCallback()
    make_trainer(tmp_path, model, data, callback, save_strategy="steps", save_steps=5).train()
    assert load_file(tmp_path / "checkpoint-5" / "model.safetensors").keys() == model.state_dict().keys()
    assert len(callback.search.history) > 3


def test_no_warning_that_nobody_drives_the_search(tmp_path):
    trainer = make_trainer(tmp_path, make_bert(dropout=0.0), sentences(8), HeteroLoraCallback(), max_steps=60)
    assert not [text for text in caught(trainer.train) if "never called" in text]


def test_a_run_of_one_step_without_its_last_one_is_not_reported_when_it_is_saved(tmp_path):
    model = make_bert()
    make_trainer(tmp_path, model, sentences(8), HeteroLoraCallback(at_last_step=False), max_steps=1).train()
    assert not caught(lambda: hlk.save_adapter(model, tmp_path / "adapter"))
