"""HeteroLoraCallback: checkpoints hold the adapter, and a resumed run is the same run."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from helpers_search import same_bits, snapshot
from helpers_trainer import make_bert, make_trainer, same_history, sentences
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, default_data_collator

import heterolora_kernels as hlk
from heterolora_kernels.callback import HeteroLoraCallback

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
