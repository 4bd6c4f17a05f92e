"""Models that somebody changes after they were patched: found at the next use, named, nothing half done."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import transformers
from families import make_inputs, make_model, patch
from helpers_search import same_bits, snapshot
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import heterolora_kernels as hlk
from heterolora_kernels.state import state_of


def llama(**options) -> nn.Module:
    return patch(make_model("llama"), **{"shortcuts": (), **options})


def resize(model: nn.Module) -> None:
    model.resize_token_embeddings(70, mean_resizing=False)


def replace_linear(model: nn.Module) -> None:
    layer = model.model.layers[1].mlp
    layer.up_proj = nn.Linear(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)


def delete_layer(model: nn.Module) -> None:
    del model.model.layers[0]


def drop_last_layers(model: nn.Module) -> None:
    model.model.layers = model.model.layers[:1]


def replace_hooked_norm(model: nn.Module) -> None:
    model.model.layers[1].input_layernorm = nn.Identity()


CHANGES = {
    "resized_embeddings": (dict(target_modules=["q_proj", "lm_head"]), resize, "'lm_head' is another Linear now"),
    "replaced_linear": ({}, replace_linear, r"'model\.layers\.1\.mlp\.up_proj' is another Linear now"),
    "deleted_layer": ({}, delete_layer, r"'model\.layers\.0' is another LlamaDecoderLayer now"),
    "dropped_layers": ({}, drop_last_layers, r"'model\.layers\.1' is gone"),
    "replaced_source": (dict(shortcuts="all"), replace_hooked_norm, r"'model\.layers\.1\.input_layernorm' is another Identity "
                                                                    r"now"),
}
every_change = pytest.mark.parametrize("options, change, named", CHANGES.values(), ids=CHANGES)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


@every_change
@pytest.mark.parametrize("use", ["search", "score", "apply", "optimizer", "native", "peft", "merged", "merge", "load"])
def test_a_change_is_named_at_the_next_use(options, change, named, use, tmp_path):
    model = llama(**options)
    optimizer, search = optimizer_of(model), hlk.RankSearch(model)
    hlk.save_adapter(model, tmp_path / "before")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    change(model)
    values = snapshot(model)
    path = next(iter(state_of(model).paths))
    uses = {"search": lambda: hlk.RankSearch(model), "score": lambda: search.score([make_inputs()]),
            "apply": lambda: search.apply({path: 1}), "optimizer": optimizer.step, "merge": lambda: hlk.merge_heterolora(model),
            "load": lambda: hlk.load_adapter(model, tmp_path / "before")}
    call = uses.get(use) or (lambda: hlk.save_adapter(model, tmp_path / "after", format=use, drop_shortcuts=use != "native"))
    with pytest.raises(ValueError, match=f"changed after apply_heterolora: {named}.*remove_heterolora"):
        call()
    assert same_bits(snapshot(model), values)
    assert not (tmp_path / "after").exists()


@every_change
def test_a_changed_model_can_be_patched_anew(options, change, named, tmp_path):
    model = llama(**options)
    change(model)
    hlk.remove_heterolora(model)
    assert not any(hasattr(type(module), "_heterolora_key") for module in model.modules())
    if change is replace_hooked_norm:
        options = {**options, "shortcuts": ()}
    patch(model, **{"shortcuts": (), **options})
    model(**make_inputs()).loss.backward()
    optimizer_of(model).step()
    hlk.save_adapter(model, tmp_path / "after")


def test_wrappers_inside_are_no_change(tmp_path):
    model = llama()
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    model.model.layers[2] = torch.compile(model.model.layers[2], backend="eager")
    hlk.RankSearch(model)
    model(**make_inputs()).loss.backward()
    optimizer_of(model).step()
    hlk.save_adapter(model, tmp_path / "adapter")
    before = [path.name for path in state_of(model).paths.values()]
    del model.model.layers[0]
    with pytest.raises(ValueError, match=r"'model\.layers\.0' is another"):
        hlk.save_adapter(model, tmp_path / "other")
    assert len(before) == 21


def test_a_frozen_embedding_may_be_resized(tmp_path):
    model = llama(target_modules=["q_proj"])
    resize(model)
    model(**make_inputs()).loss.backward()
    optimizer_of(model).step()
    hlk.save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_know_their_own_modules(copied):
    model = llama()
    twin = copied(model)
    replace_linear(model)
    hlk.RankSearch(twin)
    replace_linear(twin)
    with pytest.raises(ValueError, match="up_proj"):
        hlk.RankSearch(twin)


def test_nothing_holds_a_model_that_is_dropped():
    model = llama(shortcuts="all")
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# ---- a part of a model ----


def test_the_patched_part_is_named(tmp_path):
    model = make_model("llama")
    patch(model.model, shortcuts=())
    calls = (lambda: hlk.save_adapter(model, tmp_path / "a"), lambda: hlk.merge_heterolora(model),
             lambda: hlk.remove_heterolora(model),
             lambda: hlk.reference_model(model))
    for call in calls:
        with pytest.raises(ValueError, match="its part 'model' is: pass that part"):
            call()
    hlk.save_adapter(model.model, tmp_path / "a")
    twin = make_model("llama")
    hlk.load_adapter(twin.model, tmp_path / "a")
    assert torch.equal(twin(**make_inputs()).logits, model(**make_inputs()).logits)
    hlk.remove_heterolora(model.model)


def test_several_patched_parts_are_named():
    model = nn.ModuleDict({"first": make_model("llama"), "second": make_model("bert")})
    patch(model["first"], shortcuts=())
    patch(model["second"], shortcuts=())
    with pytest.raises(ValueError, match=r"its parts \['first', 'second'\] are: pass one of them"):
        hlk.RankSearch(model)


class Dual(nn.Module):
    """Two encoders, of which one is trained; no PreTrainedModel."""

    def __init__(self):
        super().__init__()
        self.query, self.document = make_model("bert").bert, make_model("bert").bert
        self.document.requires_grad_(False)

    def forward(self, input_ids, other_ids):
        scores = self.query(input_ids).last_hidden_state[:, 0] @ self.document(other_ids).last_hidden_state[:, 0].t()
        return {"loss": nn.functional.cross_entropy(scores, torch.arange(len(scores))), "scores": scores}


@pytest.mark.parametrize("score", ["in_step", "probe"])
@pytest.mark.parametrize("part", [True, False], ids=["part", "whole"])
def test_a_part_under_the_trainer_resumes_as_the_unbroken_run(part, score, tmp_path):
    from heterolora_kernels.callback import HeteroLoraCallback

    ids = torch.randint(3, 61, (32, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": one, "other_ids": other} for one, other in zip(ids, ids.flip(0))]

    def run(resume=None):
        model = Dual()
        hlk.apply_heterolora(model.query if part else model, hlk.HeteroLoraConfig(r=2, budget=0.5, interval=2, warmup=1,
                                                                                  score=score))
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True, report_to="none",
            disable_tqdm=True, save_steps=3, remove_unused_columns=False)
        callback = HeteroLoraCallback()
        transformers.Trainer(model, args, train_dataset=data, callbacks=[callback]).train(resume_from_checkpoint=resume)
        return [p.detach() for p in model.parameters()], callback.search.history

    first, history = run()
    second, resumed = run(str(tmp_path / "checkpoint-3"))
    assert all(map(torch.equal, first, second)) and len(history) >= 3
    assert [entry["ranks"] for entry in history] == [entry["ranks"] for entry in resumed]


# ---- adapters of PEFT beside ours ----


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def test_a_search_refuses_a_model_with_adapters_of_peft(peft):
    model = llama()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for given in (wrapped, model):
        with pytest.raises(ValueError, match="PEFT.*accelerate_peft"):
            hlk.RankSearch(given)


def test_adapters_of_peft_beside_ours_still_answer(peft):
    model = llama()
    expected = model(**make_inputs()).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(wrapped(**make_inputs()).logits, expected)


@pytest.mark.parametrize("when", ["before", "by_the_trainer"])
def test_the_callback_refuses_adapters_of_peft(peft, when, tmp_path):
    from heterolora_kernels.callback import HeteroLoraCallback

    model, config = llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])
    args = dict(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    data = [{name: value[0] for name, value in make_inputs(batch=1, padding=False).items()}]
    with pytest.raises(ValueError, match="PEFT.*peft_config.*accelerate_peft"):
        if when == "before":
            transformers.Trainer(peft.get_peft_model(model, config), transformers.TrainingArguments(**args), train_dataset=data,
                                 callbacks=[HeteroLoraCallback()])
        else:
            trl = pytest.importorskip("trl")
            tokens = [{"input_ids": entry["input_ids"].tolist()} for entry in data]
            import datasets

            trl.SFTTrainer(model, trl.SFTConfig(**args, dataset_kwargs={"skip_prepare_dataset": True}), peft_config=config,
                           train_dataset=datasets.Dataset.from_list(tokens), callbacks=[HeteroLoraCallback()],
                           processing_class=_tokenizer())


def _tokenizer():
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "[EOS]": 2}, unk_token="[PAD]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]")
