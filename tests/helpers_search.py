"""Tiny models, data and an eager twin for the tests of scoring, allocation and search."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import heterolora_kernels as hlk

VOCAB = 23
ALL_PROXIES = ("constant", "grad_norm", "snip", "taylor", "fisher", "gate")


class Net(nn.Module):
    """Four linears of unequal widths; ``forward(x, target).loss`` is what the default loss function reads."""

    widths = (7, 9, 10, 6, 5)

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(k, n, dtype=dtype) for k, n in zip(self.widths, self.widths[1:]))
        self.norm = nn.BatchNorm1d(self.widths[1], dtype=dtype)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x, target=None):
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == 0:
                x = self.norm(x)
            if index + 1 < len(self.layers):
                x = self.dropout(F.gelu(x))
        return SimpleNamespace(out=x, loss=None if target is None else F.mse_loss(x, target))


NET_PATHS = tuple(f"layers.{index}" for index in range(4))


def make_net(weights: int = 0, zero_B: bool = False, dtype: torch.dtype = torch.float32, **config) -> Net:
    """A patched Net with lora_B != 0 unless ``zero_B``; r = 4. ``weights``: seed of the base's weights."""
    torch.manual_seed(weights)
    model = Net(dtype)
    hlk.apply_heterolora(model, hlk.HeteroLoraConfig(**{"r": 4, "interval": 4, "budget": 0.5, **config}))
    return model if zero_B else fill_B(model)


def net_batch(seed: int, size: int = 5, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(1000 + seed)
    return {"x": torch.randn(size, Net.widths[0], generator=generator, dtype=dtype),
            "target": torch.randn(size, Net.widths[-1], generator=generator, dtype=dtype)}


def plain_llama(weights: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(weights)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=20, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, use_cache=False, initializer_range=0.2)).to(dtype)


def make_llama(weights: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32, zero_B: bool = False, **config):
    """A patched Llama with all shortcuts (unless the config says otherwise) and lora_B != 0.

    The scalings, 4 and 2, are exact in the float32 in which the op holds them: gates' gradients cancel.
    """
    model = plain_llama(weights, layers, dtype)
    hlk.apply_heterolora(model, hlk.HeteroLoraConfig(
        **{"r": 3, "lora_alpha": 12, "shortcuts": "all", "shortcut_r": 2, "interval": 4, **config}))
    return model if zero_B else fill_B(model)


def llama_batch(seed: int, size: int = 2, length: int = 5) -> dict:
    ids = torch.randint(VOCAB, (size, length), generator=torch.Generator().manual_seed(2000 + seed))
    return {"input_ids": ids, "labels": ids.clone()}


def path_names(model: nn.Module) -> list[str]:
    """Names of all paths, read from the parameters' names."""
    return [name.removesuffix(".lora_A") for name, _ in model.named_parameters() if name.endswith(".lora_A")]


def adapter(model: nn.Module, path: str) -> nn.Module:
    """The module that holds a path's lora_A, lora_B and lora_mask."""
    return model.get_submodule(path)


@torch.no_grad()
def fill_B(model: nn.Module, seed: int = 5) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for path in path_names(model):
        lora_B = adapter(model, path).lora_B
        lora_B.copy_(torch.empty_like(lora_B).uniform_(-0.3, 0.3, generator=generator))
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train_step(model, optimizer, batch, search=None, set_to_none: bool = True) -> None:
    optimizer.zero_grad(set_to_none=set_to_none)
    model(**batch).loss.backward()
    optimizer.step()
    if search is not None:
        search.step()


def is_collecting(model: nn.Module) -> bool:
    return model.__dict__["_heterolora_state"].switches.ledger.collecting


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def build(lr: float = 0.05, dataloader=None, steps_per_epoch=None, **config):
    """``(model, optimizer, search)`` on the Net, with AdamW."""
    model = make_net(**config)
    optimizer = torch.optim.AdamW(trainable(model), lr=lr)
    return model, optimizer, hlk.RankSearch(model, optimizer, dataloader, steps_per_epoch)


def train(model, optimizer, search, steps: int, first: int = 0) -> None:
    """``steps`` optimizer steps on the Net's batches from number ``first`` on."""
    for step in range(first, first + steps):
        train_step(model, optimizer, net_batch(step), search)


def caught(function) -> list[str]:
    """The texts of all UserWarnings that a call gives."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        function()
    return [str(entry.message) for entry in seen if issubclass(entry.category, UserWarning)]


class EagerTwin:
    """A plain Llama whose low-rank paths are forward hooks, differentiated by autograd alone.

    An inactive row adds nothing to the forward pass and receives the gradient it would have with the network as it runs:
    its delta is added and taken away again, on a detached source. Every path has explicit gates, so that dLoss/d gate is a
    gradient of its own.
    """

    def __init__(self, patched: nn.Module, weights: int = 0, layers: int = 2, dtype: torch.dtype = torch.float64):
        config = patched.__dict__["_heterolora_state"].config
        self.patched, self.plain = patched, plain_llama(weights, layers, dtype)
        self.plain.requires_grad_(False)
        self.scaling = {path: config.shortcut_alpha / config.shortcut_r if self._is_shortcut(path)
                        else config.lora_alpha / config.r for path in path_names(patched)}
        self.leaves: dict[str, tuple] = {}
        self.h: dict[int, torch.Tensor] = {}
        self.f: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self.plain.model.layers):
            layer.input_layernorm.register_forward_pre_hook(self._capture(self.h, index))
            layer.post_attention_layernorm.register_forward_pre_hook(self._capture(self.f, index))
            name = f"model.layers.{index}"
            self._join(layer.self_attn.o_proj, f"{name}.residual_1", lambda index=index: self.h[index])
            self._join(layer.mlp.down_proj, f"{name}.residual_2", lambda index=index: self.f[index])
            self._join(layer.mlp.down_proj, f"{name}.shortcut_sa", lambda index=index: self.h[index])
            self._join(layer.self_attn.o_proj, f"{name}.shortcut_ffn", lambda index=index: self.f[index - 1])
        for path in self.scaling:
            if not self._is_shortcut(path):
                self._join(self.plain.get_submodule(path), path, None)

    @staticmethod
    def _is_shortcut(path: str) -> bool:
        return path.rpartition(".")[2] in ("residual_1", "residual_2", "shortcut_sa", "shortcut_ffn")

    @staticmethod
    def _capture(where: dict, index: int):
        def hook(module, args):
            where[index] = args[0]
        return hook

    def _join(self, linear: nn.Module, path: str, source) -> None:
        if path in self.scaling:
            linear.register_forward_hook(lambda module, args, out: out + self._delta(path, source() if source else args[0]))

    def _delta(self, path: str, u: torch.Tensor) -> torch.Tensor:
        lora_A, lora_B, gate = self.leaves[path]
        mask = adapter(self.patched, path).lora_mask if self.masked else torch.ones_like(gate, dtype=torch.bool)
        on = (u @ lora_A.t() * gate * mask) @ lora_B.t()
        off = (u.detach() @ lora_A.t() * gate * ~mask) @ lora_B.t()
        return self.scaling[path] * (on + off - off.detach())

    def gradients(self, batch: dict, masked: bool) -> dict[str, dict[str, torch.Tensor]]:
        """``{path: {A, B, grad_A, grad_B, grad_gate}}`` of one batch with the patched model's parameters of this moment.

        Args:
            masked: the network as it runs; False: every path on.
        """
        self.masked = masked
        for path in self.scaling:
            module = adapter(self.patched, path)
            self.leaves[path] = (module.lora_A.detach().clone().requires_grad_(),
                                 module.lora_B.detach().clone().requires_grad_(),
                                 torch.ones_like(module.lora_B[0]).detach().requires_grad_())
        self.plain(**batch).loss.backward()
        return {path: {"A": a.detach(), "B": b.detach(), "grad_A": a.grad, "grad_B": b.grad, "grad_gate": g.grad}
                for path, (a, b, g) in self.leaves.items()}


def sum_gradients(records: list[dict]) -> list[dict]:
    """The records of several batches at the same parameters as one record of the summed gradient."""
    return [{path: {**values, **{key: sum(record[path][key] for record in records)
                                 for key in ("grad_A", "grad_B", "grad_gate")}}
             for path, values in records[0].items()}]


def expected_scores(proxy: str, records: list[dict], per_rank: bool = False) -> dict:
    """Scores by the formulas of the papers; every record is one term of the sum over batches."""
    scores = {}
    for path in records[0]:
        entries = [record[path] for record in records]
        rows = []
        for j in range(entries[0]["A"].shape[0]):
            row = {"a2": 0.0, "b2": 0.0, "snip": 0.0, "taylor": 0.0, "gate": 0.0}
            for e in entries:
                a, b, ga, gb = e["A"][j], e["B"][:, j], e["grad_A"][j], e["grad_B"][:, j]
                row["a2"] += float(ga @ ga)
                row["b2"] += float(gb @ gb)
                row["snip"] += float((a * ga).abs().sum() + (b * gb).abs().sum())
                row["taylor"] += float(((a * ga) ** 2).sum() + ((b * gb) ** 2).sum())
                row["gate"] += float(e["grad_gate"][j])
            rows.append(row)
        units = rows if per_rank else [{key: sum(row[key] for row in rows) for key in rows[0]}]
        formula = {
            "constant": lambda u: 1.0,
            "grad_norm": lambda u: math.sqrt(u["a2"]) + math.sqrt(u["b2"]),
            "snip": lambda u: u["snip"],
            "taylor": lambda u: u["taylor"],
            "fisher": lambda u: u["a2"] + u["b2"],
            "gate": lambda u: abs(u["gate"]),
        }[proxy]
        values = [formula(unit) for unit in units]
        scores[path] = values if per_rank else values[0]
    return scores


def assert_scores_close(scores: dict, expected: dict, tolerance: float = 1e-5, floor: float = 0.0) -> None:
    """Relative error of every score; ``floor``: also allowed, as a part of the largest score (for sums that cancel)."""
    assert scores.keys() == expected.keys()
    flat = [value for entry in expected.values() for value in (entry if isinstance(entry, list) else [entry])]
    atol = floor * max(map(abs, flat))
    for path, value in expected.items():
        torch.testing.assert_close(torch.tensor(scores[path], dtype=torch.float64), torch.tensor(value, dtype=torch.float64),
                                   rtol=tolerance, atol=atol, msg=lambda text, path=path: f"{path}: {text}")
