"""HeteroLoraCallback: the Trainer does what a plain loop does, checkpoints hold the adapter, a resumed run is the same run."""

from __future__ import annotations

import copy
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from helpers_search import VOCAB, caught, llama_batch, make_llama, plain_llama, same_bits, snapshot, trainable
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import heterolora_kernels as hlk
from heterolora_kernels.callback import HeteroLoraCallback
from heterolora_kernels.patching import count_parameters

LENGTH = 5


def make_bert(dropout: float = 0.1, **config):
    """A patched classifier with dropout in base and adapters, so that the order of random draws matters."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, num_labels=3,
        max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout))
    return hlk.apply_heterolora(model, hlk.HeteroLoraConfig(
        **{"r": 4, "interval": 3, "budget": 0.5, "lora_dropout": dropout, "shortcuts": "all", **config}))


def sentences(count: int, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(VOCAB, (LENGTH,), generator=generator),
             "labels": torch.randint(3, (1,), generator=generator)[0]} for _ in range(count)]


def texts(count: int, seed: int = 0) -> list[dict]:
    return [{name: value[0] for name, value in llama_batch(seed + i, size=1).items()} for i in range(count)]


class Recorder(Trainer):
    """Keeps what each training step was given."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen = [*getattr(self, "seen", []), (copy.deepcopy(inputs), num_items_in_batch)]
        return super().training_step(model, inputs, num_items_in_batch)


def make_trainer(folder, model, data, callback=None, cls=Trainer, eval_data=None, callbacks=(), **arguments):
    values = {"per_device_train_batch_size": 4, "max_steps": 10, "learning_rate": 0.02, "report_to": "none", "max_grad_norm": 0.0,
              "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
              "seed": 3, "weight_decay": 0.1, **arguments}
    return cls(model=model, args=TrainingArguments(str(folder), **values), train_dataset=data, eval_dataset=eval_data,
               data_collator=default_data_collator, callbacks=[*([] if callback is None else [callback]), *callbacks])


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


def same_history(first: list[dict], second: list[dict]) -> bool:
    return json.dumps(first) == json.dumps(second)


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


# ---- resuming ----

RESUME = {"max_steps": 14, "save_strategy": "steps", "save_steps": 7, "logging_steps": 7, "eval_strategy": "steps",
          "eval_steps": 5}
SEARCHES = {"warm-up": {}, "in_step": {"warmup": 1, "interval": 4, "num_batches": 3},
            "probe": {"warmup": 0, "score": "probe", "num_batches": 2},
            "graded": {"warmup": 2, "ranks": "graded", "proxy": "taylor", "score_decay": 0.5, "on_reactivate": "reset"}}


def run(folder, callback, resume=None, search=None, stop=None, **arguments):
    model = make_bert(**(search or {}))
    stopper = [Stopper(stop)] if stop else []
    trainer = make_trainer(folder, model, sentences(20), callback, eval_data=sentences(5, seed=9), callbacks=stopper,
                           **{**RESUME, **arguments})
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


class Stopper(TrainerCallback):
    """Ends the training as a kill after a checkpoint would."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("search,steps,stop,accumulation,precision", [
    ("warm-up", 7, 7, 1, "float32"), ("in_step", 7, 7, 1, "float32"), ("in_step", 5, 10, 1, "float32"),
    ("in_step", 3, 9, 2, "bf16"), ("probe", 3, 9, 2, "float32"), ("graded", 7, 7, 1, "float32")],
    ids=["warm-up", "in_step", "in_step-after an epoch", "in_step-accumulated-bf16", "probe-accumulated", "graded"])
def test_resumed_run_equals_the_unbroken_one(search, steps, stop, accumulation, precision, tmp_path):
    search = SEARCHES[search]
    arguments = {"save_steps": steps, "gradient_accumulation_steps": accumulation, "bf16": precision == "bf16"}
    whole, broken, resumed = HeteroLoraCallback(), HeteroLoraCallback(), HeteroLoraCallback()
    model, _ = run(tmp_path / "whole", whole, search=search, **arguments)
    run(tmp_path / "broken", broken, search=search, stop=stop, **arguments)
    assert broken.search._steps == stop
    checkpoint = str(tmp_path / "broken" / f"checkpoint-{stop}")
    twin, _ = run(tmp_path / "broken", resumed, resume=checkpoint, search=search, **arguments)
    assert same_history(resumed.search.history, whole.search.history) and len(whole.search.history) > len(broken.search.history)
    assert resumed.search.ranks == whole.search.ranks
    assert same_bits(snapshot(model), snapshot(twin))


def test_a_resumed_run_can_be_resumed(tmp_path):
    whole, last = HeteroLoraCallback(), HeteroLoraCallback()
    model, _ = run(tmp_path / "whole", whole, save_steps=4)
    run(tmp_path / "broken", HeteroLoraCallback(), save_steps=4, stop=4)
    run(tmp_path / "broken", HeteroLoraCallback(), save_steps=4, stop=8, resume=True)
    twin, _ = run(tmp_path / "broken", last, save_steps=4, resume=True)
    assert same_history(last.search.history, whole.search.history) and same_bits(snapshot(model), snapshot(twin))


def test_a_trainer_can_go_back_to_its_own_checkpoint(tmp_path):
    callback = HeteroLoraCallback()
    model, trainer = run(tmp_path, callback, search=SEARCHES["in_step"])
    history, weights = callback.search.history, snapshot(model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert callback.search.history is not history and same_history(callback.search.history, history)
    assert same_bits(snapshot(model), weights)


def test_a_run_that_is_at_its_end_leaves_no_hook(tmp_path):
    callback, search = HeteroLoraCallback(), {"search": "static", "score": "probe", "num_batches": 1}
    model, trainer = run(tmp_path, callback, search=search, max_steps=5, save_steps=5, eval_strategy="no")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert not model._forward_hooks


def test_training_again_is_a_search_from_the_start(tmp_path):
    callback = HeteroLoraCallback()
    model, trainer = run(tmp_path, callback, search=SEARCHES["in_step"], save_strategy="no")
    first = callback.search
    trainer.train()
    assert callback.search is not first and [entry["step"] for entry in callback.search.history] == [0, 4, 8, 12]
    # The first one does not read the second one's steps.
    assert [entry["batches"] for entry in callback.search.history[1:]] == [3, 3, 3] and len(first.history) == 4


def test_smaller_batches_after_running_out_of_memory(tmp_path):
    """auto_find_batch_size begins again: nothing of the step that failed is counted."""
    class Greedy(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if len(inputs["labels"]) > 3:
                raise RuntimeError("CUDA out of memory. Tried to allocate more than there is")
            return loss

    histories = []
    for cls, size in ((Greedy, 4), (Trainer, 3)):
        model, callback = make_bert(dropout=0.0, warmup=1), HeteroLoraCallback()
        trainer = make_trainer(tmp_path, model, sentences(24), callback, cls, per_device_train_batch_size=size, max_steps=7,
                               auto_find_batch_size=cls is Greedy)
        trainer.train()
        assert trainer._train_batch_size == 3
        histories.append(callback.search.history)
    assert same_history(*histories)


def test_restored_callback_is_the_users(tmp_path):
    """restore_callback_states_from_checkpoint builds a new callback from the checkpoint."""
    def loss_fn(model, batch):
        calls.append(batch)
        return model(**batch).loss

    calls = []
    search = {"warmup": 0, "score": "probe", "num_batches": 2}
    whole, resumed = HeteroLoraCallback(loss_fn=loss_fn), HeteroLoraCallback(loss_fn=loss_fn)
    model, _ = run(tmp_path / "whole", whole, search=search)
    run(tmp_path / "broken", HeteroLoraCallback(loss_fn=loss_fn), search=search, stop=7)
    calls.clear()
    twin, trainer = run(tmp_path / "broken", resumed, resume=True, search=search, restore_callback_states_from_checkpoint=True)
    assert resumed not in trainer.callback_handler.callbacks
    assert calls and resumed.search is not None and same_history(resumed.search.history, whole.search.history)
    assert same_bits(snapshot(model), snapshot(twin))


def test_resuming_is_quiet_about_the_base(tmp_path, caplog):
    run(tmp_path, HeteroLoraCallback(), stop=7)
    with caplog.at_level("WARNING"):
        run(tmp_path, HeteroLoraCallback(), resume=True)
    assert "missing keys" not in caplog.text


def test_checkpoint_without_a_search_is_refused(tmp_path):
    run(tmp_path, None, stop=7)
    with pytest.raises(ValueError, match="no state of a search under 'HeteroLoraCallback'"):
        run(tmp_path, HeteroLoraCallback(), resume=True)


def test_checkpoint_of_other_paths_is_refused(tmp_path):
    run(tmp_path, HeteroLoraCallback(), search={"shortcuts": "residual_1"}, stop=7)
    with pytest.raises(ValueError, match="other paths"):
        run(tmp_path, HeteroLoraCallback(), search={"shortcuts": "residual_2"}, resume=True)


# ---- checkpoints ----


def test_checkpoint_holds_the_adapter_alone(tmp_path):
    model, trainer = run(tmp_path, HeteroLoraCallback())
    folder = tmp_path / "checkpoint-14"
    tensors = load_file(folder / "model.safetensors")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert tensors.keys() == model.state_dict().keys() - frozen - {"bert.embeddings.position_ids"}
    assert {"heterolora.json", "model.safetensors", "optimizer.pt", "trainer_state.json"} <= {f.name for f in folder.iterdir()}
    # With a config beside these weights from_pretrained would make a model of random ones.
    assert not (folder / "config.json").exists()
    full = sum(value.numel() for value in model.state_dict().values())
    assert sum(value.numel() for value in tensors.values()) < 0.6 * full
    assert not [entry for entry in folder.iterdir() if entry.name.startswith(".")]


def test_checkpoint_is_an_adapter_with_its_search(tmp_path):
    callback = HeteroLoraCallback()
    model, _ = run(tmp_path, callback)
    plain = make_bert()
    hlk.remove_heterolora(plain)
    loaded = hlk.load_adapter(plain, tmp_path / "checkpoint-14")
    with torch.no_grad():
        for (name, value), other in zip(model.classifier.named_parameters(), loaded.classifier.parameters()):
            assert torch.equal(value, other), name
    batch = default_data_collator(sentences(3, seed=5))
    assert torch.equal(model.eval()(**batch).logits, loaded.eval()(**batch).logits)
    search = hlk.RankSearch(loaded)
    search.load_state_dict(hlk.load_search_state(tmp_path / "checkpoint-14"))
    assert search.ranks == callback.search.ranks and same_history(search.history, callback.search.history)


def test_load_best_model_at_end_brings_its_ranks_back(tmp_path):
    callback = HeteroLoraCallback()
    scores = iter([3.0, 9.0, 1.0, 2.0])
    seen, searches = {}, {}

    class Keeper(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            seen[state.global_step], searches[state.global_step] = snapshot(model), callback.search.state_dict()

    trainer = make_trainer(tmp_path, make_bert(), sentences(20), callback, eval_data=sentences(5), callbacks=[Keeper()],
                           max_steps=16,
                           eval_strategy="steps", save_strategy="steps", eval_steps=4, save_steps=4, load_best_model_at_end=True,
                           metric_for_best_model="luck", greater_is_better=True)
    trainer.compute_metrics = lambda predictions: {"luck": next(scores)}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-8")
    assert same_bits(snapshot(trainer.model), seen[8]) and not same_bits(seen[8], seen[16])
    masks = {name: trainer.model.get_submodule(name).lora_mask for name in callback.search.paths}
    assert callback.search.ranks == {name: int(mask.sum()) for name, mask in masks.items()}
    # So does what the search says of itself.
    assert len(callback.search.history) == 3 and same_history(callback.search.history, searches[8]["history"])
    assert callback.search.history[-1]["ranks"] == callback.search.ranks and callback.search.state_dict()["steps"] == 8
    trainer.save_model(str(tmp_path / "best"))
    assert hlk.load_search_state(tmp_path / "best")["masks"] == searches[8]["masks"]


def test_save_model_writes_beside_checkpoints_and_into_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, trainer = run(tmp_path, HeteroLoraCallback())
    trainer.save_model()
    assert {"checkpoint-14", "heterolora.json", "model.safetensors"} <= {entry.name for entry in tmp_path.iterdir()}
    assert same_bits(load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "checkpoint-14" / "model.safetensors"))


def test_only_the_main_process_writes(tmp_path):
    model, _ = run(tmp_path / "run", HeteroLoraCallback(), save_strategy="no")
    model.save_pretrained(tmp_path / "other", is_main_process=False, max_shard_size="1GB")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "other", push_to_hub=True)


def test_adapter_only_false_leaves_the_trainer_alone(tmp_path):
    model, _ = run(tmp_path, HeteroLoraCallback(adapter_only=False))
    assert load_file(tmp_path / "checkpoint-14" / "model.safetensors").keys() == model.state_dict().keys()
    assert "save_pretrained" not in model.__dict__


def test_copies_save_themselves(tmp_path):
    model, _ = run(tmp_path / "run", HeteroLoraCallback(), save_strategy="no")
    for name, twin in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            twin.classifier.weight.fill_(7.0)
        twin.save_pretrained(tmp_path / name)
        assert torch.equal(load_file(tmp_path / name / "model.safetensors")["classifier.weight"], twin.classifier.weight)
        # The search belongs to the model that was trained.
        assert json.loads((tmp_path / name / "heterolora.json").read_text())["search"] is None
    assert not bool((model.classifier.weight == 7.0).any())


def test_overrides_go_with_the_patch(tmp_path):
    model, _ = run(tmp_path / "run", HeteroLoraCallback(), save_strategy="no")
    # The last is accelerate's own mark.
    before = {*make_bert().__dict__, "_is_accelerate_prepared"}
    hlk.remove_heterolora(model)
    assert set(model.__dict__) <= before
    model.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "config.json").exists()


def test_merged_weights_can_still_be_saved(tmp_path):
    model, _ = run(tmp_path / "run", HeteroLoraCallback(), search={"shortcuts": ()}, save_strategy="no")
    hlk.save_adapter(model, tmp_path / "merged", format="merged")
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    batch = default_data_collator(sentences(3, seed=5))
    torch.testing.assert_close(merged.eval()(**batch).logits, model.eval()(**batch).logits, rtol=1e-5, atol=1e-6)


def test_missing_adapters_are_still_reported(tmp_path):
    model, _ = run(tmp_path, HeteroLoraCallback(), save_strategy="no")
    own = {name: value for name, value in model.state_dict().items() if name.endswith("lora_A")}
    missing = model.load_state_dict(own, strict=False).missing_keys
    assert missing and {name.rpartition(".")[2] for name in missing} == {"lora_B", "lora_mask", "weight", "bias"}
    assert {name.rpartition(".")[0] for name in missing if name.endswith(("weight", "bias"))} == {"classifier"}
    base = {**own, "bert.pooler.dense.bias": model.bert.pooler.dense.bias}
    assert "bert.pooler.dense.weight" in model.load_state_dict(base, strict=False).missing_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(own)


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
    with pytest.raises(ValueError, match=r"call apply_heterolora\(model, config\) before building the Trainer"):
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
