"""RankSearch in a loop of one's own under accelerate: preparing, accumulating, autocast, loss scaling, saving and going on."""

from __future__ import annotations

import json
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from helpers_search import llama_batch, make_llama, same_bits, snapshot, trainable
from torch.utils.data import DataLoader
from transformers import default_data_collator

import heterolora_kernels as hlk


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps precision and accumulation for the process."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Loop:
    """What accelerate's guides show, with a search: two epochs of ten batches in a fixed order."""

    def __init__(self, accumulation: int = 1, precision: str = "no", scaler=None, **config):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        self.accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=accumulation, cpu=True)
        # On a CPU accelerate makes none of its own.
        self.accelerator.scaler = scaler
        self.model = make_llama(zero_B=True, **{"interval": 3, "num_batches": 2, "warmup": 1, "budget": 0.5, "lora_dropout": 0.1,
                                                **config})
        optimizer = torch.optim.AdamW(trainable(self.model), lr=0.02)
        # A generator of the loader's own: else each epoch draws from the global one, and a loop that goes on in the middle of an
        # epoch draws once more.
        loader = DataLoader(texts(), 2, collate_fn=default_data_collator, generator=torch.Generator())
        self.model, self.optimizer, self.loader = self.accelerator.prepare(self.model, optimizer, loader)
        self.search = hlk.RankSearch(self.model, self.optimizer, self.loader)
        self.accelerator.register_for_checkpointing(self.search)
        torch.manual_seed(5)
        self.search.start()

    def train(self, first: int = 0, last: int = 20, factors: dict[int, float] | None = None) -> Loop:
        """``factors``: of the losses of batches by number."""
        for number in range(first, last):
            if number in (first, 10):
                batches = iter(self.accelerator.skip_first_batches(self.loader, number % 10))
            with self.accelerator.accumulate(self.model):
                # accelerate's own autocast is off for float16 on a CPU.
                with torch.autocast("cpu", torch.float16, enabled=self.accelerator.scaler is not None):
                    loss = self.model(**next(batches)).loss * (factors or {}).get(number, 1.0)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.search.step()
        return self


def texts() -> list[dict]:
    return [{name: value[0] for name, value in llama_batch(i, size=1).items()} for i in range(20)]


def dtypes_of(model) -> list[torch.dtype]:
    """Of the output of a linear, call by call."""
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    return seen


@pytest.mark.parametrize("accumulation,precision,score", [(1, "no", "probe"), (2, "bf16", "in_step")],
                         ids=["probe", "in_step-accumulated-bf16"])
def test_a_loaded_state_goes_on_as_the_unbroken_loop(accumulation, precision, score, tmp_path):
    arguments = {"accumulation": accumulation, "precision": precision, "score": score}
    broken = Loop(**arguments).train(last=4)
    broken.accelerator.save_state(tmp_path)
    # In the middle of an epoch, and of a window where there is one.
    assert score == "probe" or broken.search.state_dict()["window"]["steps"] == 1
    whole = Loop(**arguments)
    seen = dtypes_of(whole.model)
    whole.train()
    resumed = Loop(**arguments)
    resumed.accelerator.load_state(tmp_path)
    resumed.train(first=4)
    scored = [entry for entry in whole.search.history if entry["score"]]
    assert [entry["batches"] for entry in scored] == [2] * len(scored) and len(scored) == 20 // accumulation // 3
    assert json.dumps(resumed.search.history) == json.dumps(whole.search.history)
    assert resumed.search.ranks == whole.search.ranks
    assert same_bits(snapshot(resumed.model), snapshot(whole.model))
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_a_step_inside_accumulate_counts_optimizer_steps():
    """The loop without accelerate, which calls search.step() after optimizer.step()."""
    loop = Loop(accumulation=2).train()
    model = make_llama(zero_B=True, interval=3, num_batches=2, warmup=1, budget=0.5, lora_dropout=0.1)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    search = hlk.RankSearch(model, optimizer)
    torch.manual_seed(5)
    search.start()
    for number, batch in enumerate(2 * list(DataLoader(texts(), 2, collate_fn=default_data_collator,
                                                       generator=torch.Generator()))):
        (model(**batch).loss / 2).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
            search.step()
    assert [entry["step"] for entry in search.history] == [0, 3, 6, 9]
    assert json.dumps(loop.search.history) == json.dumps(search.history)
    assert same_bits(snapshot(loop.model), snapshot(model))


def test_the_scale_of_a_prepared_optimizer_is_divided_out_and_an_overflow_leaves_no_trace():
    """float16: the step in which batch 4 gives infinities is one that was not taken."""
    plain = Loop(score="in_step").train(last=6)
    scaled = Loop(scaler=torch.amp.GradScaler("cpu", init_scale=2.0 ** 12), score="in_step")
    seen = dtypes_of(scaled.model)
    scaled.train(last=6)
    assert set(seen) == {torch.float16} and not scaled.optimizer.step_was_skipped
    for first, second in zip(plain.search.history[1:], scaled.search.history[1:], strict=True):
        assert first["batches"] == second["batches"] == 2
        assert second["scores"] == pytest.approx(first["scores"], rel=0.1, abs=1e-3)
    skipped = Loop(scaler=torch.amp.GradScaler("cpu", init_scale=2.0 ** 12), score="in_step").train(last=4)
    before = snapshot(skipped.model)
    skipped.train(first=4, last=5, factors={4: float("inf")})
    assert skipped.optimizer.step_was_skipped and same_bits(before, snapshot(skipped.model))
    skipped.train(first=5, last=6)
    last = skipped.search.history[-1]
    assert last["step"] == 6 and last["batches"] == 1 and all(map(math.isfinite, last["scores"].values()))
