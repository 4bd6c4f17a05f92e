"""Whole training steps: forward, backward and AdamW of a model with LoRA on all its linears, random weights.

- ``encoder``: the shape of MiniLM-L6, the demo's model, on 16 sequences of 64 tokens, which is the demo's longest batch.
- ``decoder``: the shape of SmolLM-135M, on 3 sequences of 256 tokens. The vocabulary is cut from 49152 to 4096, so that the head,
  which LoRA leaves alone, does not hide the layers. ``short_decoder`` has ten of its thirty.
- ``demo``: the encoder as the demo trains it: float32, shortcuts, dynamic search. The median step is one between reallocations,
  in which no statistics are collected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

import heterolora_kernels as hlk
from bench.checks import WrongResult
from heterolora_kernels.backends import use_backend
from heterolora_kernels.state import state_of

RANK, ALPHA = 8, 16
_LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_TARGETS = {"encoder": ["query", "key", "value", "dense"], "decoder": _LLAMA_LINEARS, "short_decoder": _LLAMA_LINEARS}
#: Sequences and tokens of a batch.
BATCHES = {"encoder": (16, 64), "decoder": (3, 256), "short_decoder": (3, 256)}


@dataclass(frozen=True)
class StepCase:
    """One row: a model, a dtype, and what runs its steps in turn, the subject first.

    Contenders: ``op`` (patched, the backend under test), ``reference`` (patched, plain PyTorch), ``peft``, ``frozen``
    (forward and the gradient of the embeddings' output through the frozen model: the floor).
    """

    block: str
    name: str
    model: str
    dtype: str
    backend: str
    contenders: tuple[str, ...]
    mode: str = "step"
    rank: int = RANK

    @property
    def id(self) -> str:
        return ".".join([self.block, self.name, self.dtype, self.backend])


def step_cases(backend: str, quick: bool = False) -> Iterator[StepCase]:
    """The models, bfloat16 and float32."""
    everything = ("op", "reference", "peft", "frozen")
    yield StepCase("steps", "encoder", "encoder", "bfloat16", backend, everything)
    if quick:
        return
    yield StepCase("steps", "encoder", "encoder", "float32", backend, everything)
    yield StepCase("steps", "demo", "encoder", "float32", backend, ("op", "reference"))
    yield StepCase("steps", "decoder", "decoder", "bfloat16", backend, everything)


def build_model(kind: str, dtype: torch.dtype) -> nn.Module:
    """Random weights, the same at every call; no dropout."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "encoder":
        model = BertForSequenceClassification(BertConfig(
            vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    else:
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=4096, hidden_size=576, num_hidden_layers=30 if kind == "decoder" else 10, num_attention_heads=9,
            num_key_value_heads=3, intermediate_size=1536, max_position_embeddings=2048, tie_word_embeddings=True,
            use_cache=False))
    return model.to(dtype).requires_grad_(False)


def make_batch(kind: str, rows: int, tokens: int) -> dict[str, Tensor]:
    """Random tokens and labels."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 4096, (rows, tokens), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator) if kind == "encoder" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class StepContender:
    """A model with what trains it."""

    def __init__(self, case: StepCase, name: str):
        self.name, self.case = name, case
        self.batch = make_batch(case.model, *BATCHES[case.model])
        self.stack = ExitStack()
        self.optimizer = self.search = self.backend = None
        model = build_model(case.model, getattr(torch, case.dtype))
        if name == "frozen":
            model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
            self.model, self.adapters = model, {}
        elif name == "peft":
            self.model, self.adapters = _with_peft(model, case)
        else:
            self.backend = name if name == "reference" else case.backend
            self.model = hlk.apply_heterolora(model, self.config())
            self.adapters = _heterolora_adapters(self.model)
        _fill(self.adapters)
        self.model.train()

    def config(self) -> hlk.HeteroLoraConfig:
        """Of a patched model."""
        shared = dict(r=RANK, lora_alpha=ALPHA, adapter_dtype=self.case.dtype, modules_to_save=())
        if self.case.name == "demo":
            return hlk.HeteroLoraConfig(**shared, shortcuts="all", mode="separated", budget=0.25, interval=40)
        return hlk.HeteroLoraConfig(**shared, target_modules=_TARGETS[self.case.model], search="off")

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Of one batch; a patched model's forward picks the backend that its backward will use."""
        if self.backend is None:
            return self.model(**batch).loss
        with use_backend(self.backend):
            return self.model(**batch).loss

    def start(self) -> None:
        """From here on steps are taken: optimizer, statistics, search."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if trained:
            self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        if self.backend is not None and self.case.name == "demo":
            self.search = hlk.RankSearch(self.model, self.optimizer)
            self.search.start()
        elif self.backend is not None:
            self.stack.enter_context(hlk.collect_statistics(self.model))

    def step(self) -> dict[str, float]:
        """Seconds of one step and of its parts."""
        began = perf_counter()
        loss = self.loss(self.batch)
        forward = perf_counter()
        loss.backward()
        backward = perf_counter()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.search is not None:
            self.search.step()
        return {"forward": forward - began, "backward": backward - forward, "step": perf_counter() - began}

    def close(self) -> None:
        self.stack.close()

    def gradient(self, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
        """Loss and all adapters' gradients in one vector, float64."""
        loss = self.loss(batch)
        loss.backward()
        flat = torch.cat([self.adapters[name].grad.double().flatten() for name in sorted(self.adapters)])
        self.model.zero_grad()
        return loss.item(), flat


def _heterolora_adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    paths = state_of(model).paths
    return {f"{name}.{part}": getattr(path, part) for name, path in paths.items() for part in ("lora_A", "lora_B")}


def _with_peft(model: nn.Module, case: StepCase) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=_TARGETS[case.model], init_lora_weights=False)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    marks = {".lora_A.default.weight": ".lora_A", ".lora_B.default.weight": ".lora_B"}
    adapters = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.")
            for mark, short in marks.items():
                name = name.replace(mark, short)
            adapters[name] = parameter
    return model, adapters


@torch.no_grad()
def _fill(adapters: dict[str, nn.Parameter]) -> None:
    """The same random values under the same names, B not zero."""
    for i, name in enumerate(sorted(adapters)):
        parameter, generator = adapters[name], torch.Generator().manual_seed(i)
        values = torch.randn(parameter.shape, generator=generator) * (parameter.shape[1] ** -0.5 if name.endswith("A") else 0.02)
        parameter.copy_(values)


def _off(actual: tuple[float, Tensor], truth: tuple[float, Tensor]) -> tuple[float, float]:
    return abs(actual[0] - truth[0]) / abs(truth[0]), ((actual[1] - truth[1]).norm() / truth[1].norm()).item()


def check_steps(case: StepCase, contenders: list[StepContender], tolerance: float = 1.0) -> None:
    """Loss and gradients of a small batch against the model in float64 on the reference backend.

    A network multiplies rounding errors: at most twice the error of plain PyTorch in the case's dtype is allowed, in the loss and
    in the norm of all adapters' gradients together.

    Raises:
        WrongResult: a contender is further off.
    """
    batch = make_batch(case.model, 2, 33)
    exact = StepContender(case, "reference")
    usual = exact.gradient(batch)
    exact.model.double()
    exact.adapters = _heterolora_adapters(exact.model)
    truth = exact.gradient(batch)
    # Four units in the last place where PyTorch happens to be exact.
    slack = 4 * torch.finfo(getattr(torch, case.dtype)).eps
    loss_limit, grad_limit = (2 * tolerance * error + slack for error in _off(usual, truth))
    for contender in contenders:
        if contender.name == "frozen":
            continue
        if set(contender.adapters) != set(exact.adapters):
            raise WrongResult(f"{contender.name}: other adapters than the patched model's: "
                              f"{sorted(set(contender.adapters) ^ set(exact.adapters))[:4]}")
        loss, grad = _off(contender.gradient(batch), truth)
        # Not `>`, which lets NaN pass.
        if not (loss <= loss_limit and grad <= grad_limit):
            raise WrongResult(f"{contender.name}: loss off by {loss:.3g} (at most {loss_limit:.3g}), gradients by {grad:.3g} "
                              f"(at most {grad_limit:.3g}), relative to float64")
