"""Several threads share a patched model that serves: each gets its own answer."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from families import every_family, make_model, patch
from torch import nn

import heterolora_kernels as hlk
from heterolora_kernels.running import Running

THREADS = 4
#: Answers of each thread.
ANSWERS = 25 * int(os.environ.get("FUZZ_EFFORT", "1"))


def requests(count: int = THREADS) -> list[torch.Tensor]:
    return [torch.randint(3, 61, (1, 5 + 2 * index), generator=torch.Generator().manual_seed(index)) for index in range(count)]


def serve(model: nn.Module, expected: list[torch.Tensor], inputs: list[torch.Tensor], mode=torch.no_grad) -> list[str]:
    """What went wrong."""
    wrong, barrier = [], threading.Barrier(len(inputs))

    def one(index: int) -> None:
        barrier.wait()
        with mode():
            for _ in range(ANSWERS):
                try:
                    found = model(input_ids=inputs[index]).logits
                    if not torch.allclose(found, expected[index], rtol=1e-4, atol=1e-5):
                        wrong.append(f"thread {index} got another answer")
                except Exception as error:  # noqa: BLE001
                    wrong.append(f"thread {index}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


OPTIONS = {"lora": {"shortcuts": ()}, "shortcuts": {}, "alone": {"group": "off"}, "dropped": {"lora_dropout": 0.5}}


@every_family
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_thread_gets_its_answer(family, options):
    model = patch(make_model(family), **options)
    inputs = requests()
    with torch.no_grad():
        expected = [model(input_ids=ids).logits for ids in inputs]
    assert serve(model, expected, inputs)[:3] == []
    # Nothing is left behind, for anybody.
    for module in model.modules():
        state = module.__dict__.get("_heterolora")
        if hasattr(state, "_running"):
            assert not state._running._others and state._running._owner is None and state._running._free == [True]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_threads_share_a_compiled_model(backend):
    model = patch(make_model("llama"), shortcuts="all")
    compiled = torch.compile(model, backend=backend)
    inputs = [requests(1)[0]] * 3
    inputs = [ids + index for index, ids in enumerate(inputs)]
    with torch.no_grad():
        expected = [model(input_ids=ids).logits for ids in inputs]
        compiled(input_ids=inputs[0])
    assert serve(compiled, expected, inputs)[:3] == []


def test_a_gradient_belongs_to_its_thread():
    model = patch(make_model("llama"), shortcuts="all")
    inputs, found = requests(), {}

    def gradient(ids: torch.Tensor) -> torch.Tensor:
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        return torch.autograd.grad(model(inputs_embeds=embedded).logits.square().sum(), embedded)[0]

    expected = [gradient(ids) for ids in inputs]

    def one(index: int) -> None:
        found[index] = [gradient(inputs[index]) for _ in range(ANSWERS // 5)]

    threads = [threading.Thread(target=one, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(THREADS):
        assert len(found[index]) == ANSWERS // 5
        for value in found[index]:
            torch.testing.assert_close(value, expected[index], rtol=1e-4, atol=1e-5)


def test_gradients_of_several_threads_add_up():
    """Training in threads is what torch makes of it: the sum."""
    def gradients(in_threads: bool) -> list[torch.Tensor]:
        model = patch(make_model("llama"), shortcuts="all")
        calls = [lambda ids=ids: model(input_ids=ids, labels=ids).loss.backward() for ids in requests()]
        threads = [threading.Thread(target=call) for call in calls] if in_threads else []
        for each in threads or calls:
            each.start() if in_threads else each()
        for thread in threads:
            thread.join()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for one, other in zip(gradients(True), gradients(False)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---- the records ----


class Box:
    def __init__(self):
        self.value = 0


def test_a_thread_without_a_call_sees_an_empty_record():
    running = Running(Box)
    running.begin().value = 3
    seen = []
    thread = threading.Thread(target=lambda: seen.append(running.now().value))
    thread.start()
    thread.join()
    assert seen == [0] and running.now().value == 3
    running.end()
    assert running._owner is None


def test_a_call_inside_a_call_shares_its_record():
    running = Running(Box)
    first = running.begin()
    assert running.begin() is first and running.now() is first
    running.end()
    running.end()
    assert running._free == [True]


def test_a_copy_has_its_own():
    import copy
    import pickle

    running = Running(Box)
    running.begin().value = 3
    for twin in (copy.deepcopy(running), pickle.loads(pickle.dumps(running))):
        assert twin.now().value == 0 and twin._owner is None


def test_switches_are_the_models():
    """``disable_adapter`` is for all threads, as in PEFT."""
    model = patch(make_model("llama"))
    ids, seen = requests(1)[0], []
    with torch.no_grad(), hlk.disable_adapter(model):
        thread = threading.Thread(target=lambda: seen.append(model(input_ids=ids).logits.detach()))
        thread.start()
        thread.join()
        assert torch.equal(seen[0], model(input_ids=ids).logits)
