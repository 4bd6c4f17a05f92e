"""synflow against autograd on an eager copy of the absolute network, and that it leaves no trace, whatever happens."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from families import FAMILIES, EagerTwin, make_inputs, make_model, patch, reference_backend  # noqa: F401
from fuzzing import fuzz
from helpers_search import NET_PATHS, adapter, llama_batch, make_llama, make_net, net_batch, same_bits, train_step, trainable
from helpers_search import snapshot as bits_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import heterolora_kernels as hlk
from heterolora_kernels import _env, synflow

TESTED = [name for name in FAMILIES if name in ("llama", "gemma2", "opt_norm_first", "gpt2", "bert")]


def absolute_twin(family: str, patched: nn.Module) -> EagerTwin:
    """The unpatched model in float64 with absolute parameters, and absolute adapters in hooks."""
    base = copy.deepcopy(make_model(family)).double()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.abs_()
    twin = EagerTwin(base, patched, FAMILIES[family])
    twin.adapters = {name: p.detach().double().abs().requires_grad_() for name, p in twin.adapters.items()}
    return twin


def eager_rows(family: str, patched: nn.Module, batch: dict, target: str) -> dict[str, torch.Tensor]:
    """``{path: score of each row}`` by autograd."""
    twin = absolute_twin(family, patched)
    width = twin.model.get_input_embeddings().weight.shape[1]
    ones = torch.ones(1, batch["input_ids"].shape[1], width, dtype=torch.float64)
    if target == "loss":
        twin.model(inputs_embeds=ones, labels=batch["labels"][:1]).loss.backward()
    else:
        twin.model(inputs_embeds=ones).logits.sum().backward()
    rows = {}
    for name in [name.removesuffix(".lora_A") for name in twin.adapters if name.endswith("lora_A")]:
        a, b = (twin.adapters[f"{name}.{leaf}"] for leaf in ("lora_A", "lora_B"))
        rows[name] = ((a * a.grad).abs().sum(1) + (b * b.grad).abs().sum(0)).detach()
    return rows


@pytest.mark.parametrize("target", ["outputs", "loss"])
@pytest.mark.parametrize("family", TESTED)
def test_scores_are_those_of_autograd_on_the_absolute_network(family, target):
    patched = patch(make_model(family), synflow_target=target)
    batch = make_inputs()
    expected = eager_rows(family, patched, batch, target)
    search = hlk.RankSearch(patched)
    scores = search.score([batch], proxy="synflow")
    rows = search.score([batch], proxy="synflow", per_rank=True)
    assert scores.keys() == expected.keys()
    largest = max(float(row.max()) for row in expected.values())
    assert largest > 0
    for name, row in expected.items():
        # q and k get next to nothing, where all positions are fed alike: what is left is rounding.
        assert rows[name] == pytest.approx(row.tolist(), rel=1e-5, abs=1e-9 * largest), name
        assert scores[name] == pytest.approx(float(row.sum()), rel=1e-5, abs=1e-9 * largest), name


def test_float_inputs_of_a_model_without_embeddings_become_ones():
    model = make_net()
    plain = copy.deepcopy(hlk.remove_heterolora(copy.deepcopy(model))).double().eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.abs_()
    leaves = {}
    for name in NET_PATHS:
        leaves[name] = [getattr(adapter(model, name), leaf).detach().double().abs().requires_grad_()
                        for leaf in ("lora_A", "lora_B")]
        plain.get_submodule(name).register_forward_hook(
            lambda module, args, out, pair=leaves[name]: out + 4.0 * (args[0] @ pair[0].t()) @ pair[1].t())
    plain(torch.ones(1, 7, dtype=torch.float64)).out.sum().backward()
    scores = hlk.RankSearch(model).score([net_batch(0)], proxy="synflow")
    for name, (a, b) in leaves.items():
        assert scores[name] == pytest.approx(float(((a * a.grad).abs().sum() + (b * b.grad).abs().sum()).detach()), rel=1e-6)


def test_only_the_length_of_the_first_batch_counts():
    search = hlk.RankSearch(make_llama())
    first = search.score([llama_batch(0)], proxy="synflow")
    masked = {**llama_batch(7), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]] * 2)}
    assert search.score([masked, llama_batch(3, length=9)], proxy="synflow") == first
    assert search.score([llama_batch(0, length=9)], proxy="synflow") != first


def test_dropout_mode_masks_and_autocast_change_nothing():
    model = make_llama(lora_dropout=0.3)
    search = hlk.RankSearch(model)
    expected = search.score([llama_batch(0)], proxy="synflow")
    search.apply({"model.layers.0.mlp.up_proj": 0, "model.layers.1.residual_1": [True, False]})
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert search.score([llama_batch(0)], proxy="synflow") == expected


def deep_net(scale: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(30)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net(x)

    return hlk.apply_heterolora(Model(), hlk.HeteroLoraConfig(r=2, lora_alpha=1e-4, search="off", init_B="kaiming_uniform"))


@pytest.mark.parametrize("scale", [1e-2, 1e3], ids=["underflow", "overflow"])
def test_float64_where_float32_is_of_no_use(scale, monkeypatch):
    search = hlk.RankSearch(deep_net(scale))
    values = list(search.score([{"x": torch.ones(2, 4)}], proxy="synflow").values())
    assert len(set(values)) == len(values) and min(values) > 0 and max(values) < float("inf")
    monkeypatch.setattr(_env, "available_memory", lambda device: 0)
    if scale < 1:
        assert set(search.score([{"x": torch.ones(2, 4)}], proxy="synflow").values()) == {0.0}
    else:
        with pytest.raises(FloatingPointError, match="synflow"):
            search.score([{"x": torch.ones(2, 4)}], proxy="synflow")


# ---- memory ----


def needs(model: nn.Module, dtype: torch.dtype) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return sum(t.numel() for t in tensors.values()) * dtype.itemsize


@pytest.mark.parametrize("dtype, room, used", [
    (torch.float32, torch.float64, torch.float64), (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float64, torch.float64), (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, None, torch.bfloat16), (torch.float16, torch.float32, torch.float32),
], ids=["fp32", "fp32-in-place", "bf16", "bf16-in-float32", "bf16-in-place", "fp16-in-float32"])
def test_what_fits_is_used(dtype, room, used, monkeypatch):
    model = make_llama(dtype=dtype)
    expected = hlk.RankSearch(model).score([llama_batch(0)], proxy="synflow")
    free = 0 if room is None else int(needs(model, room) / 0.8) + 1
    seen = []
    monkeypatch.setattr(_env, "available_memory", lambda device: free)
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].dtype), with_kwargs=True)
    before = bits_of(model)
    scores = hlk.RankSearch(model).score([llama_batch(0)], proxy="synflow")
    assert seen == [used]
    assert same_bits(before, bits_of(model))
    largest = max(expected.values())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[used]
    for name, score in scores.items():
        assert score == pytest.approx(expected[name], rel=tolerance, abs=tolerance * 1e-2 * largest), name


def test_float16_without_room_for_a_copy_is_refused(monkeypatch):
    search = hlk.RankSearch(make_llama(dtype=torch.float16))
    monkeypatch.setattr(_env, "available_memory", lambda device: 0)
    with pytest.raises(MemoryError, match="float16"):
        search.score([llama_batch(0)], proxy="synflow")


def test_a_quantised_parameter_is_named():
    model = make_net()
    model.register_parameter("packed", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    with pytest.raises(ValueError, match="'packed' is quantised"):
        hlk.RankSearch(model).score([net_batch(0)], proxy="synflow")


def test_available_memory_is_a_number_of_bytes_here():
    assert 2**20 < _env.available_memory(torch.device("cpu")) < 2**50


# ---- no trace ----

ROOM = {"float64": 2**40, "in place": 0}


@pytest.fixture(params=list(ROOM))
def room(request, monkeypatch):
    monkeypatch.setattr(_env, "available_memory", lambda device: ROOM[request.param])


class Net(nn.Module):
    """Tied linears, a buffer, a parameter of odd values that nothing reads, half accumulated gradients, mixed modes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.second.weight
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)
        odd = torch.tensor([-0.0, 0.0, float("inf"), -float("inf"), float("nan"), -1e-45])
        odd[4] = torch.tensor([-4194305], dtype=torch.int32).view(torch.float32)[0]  # a NaN with its sign and a payload
        self.odd = nn.Parameter(odd, requires_grad=False)
        self.fails = ""

    def forward(self, x):
        out = self.head(self.drop(self.norm(self.second(self.first(x)))))
        if self.fails == "forward":
            raise RuntimeError("on purpose")
        if self.fails == "interrupt":
            raise KeyboardInterrupt
        return out * float("inf") if self.fails == "inf" else out


def marked_net() -> Net:
    torch.manual_seed(3)
    model = hlk.apply_heterolora(Net(), hlk.HeteroLoraConfig(r=2, search="off", target_modules=["first", "second"],
                                                             init_B="kaiming_uniform"))
    model.train()
    model.norm.eval()
    model(torch.randn(5, 4)).sum().backward()
    return model


def everything(model: Net) -> dict:
    """Bits of all tensors, and who is where."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {
        "bits": {name: t.detach().flatten().view(torch.uint8).tolist() for name, t in tensors.items()},
        "identity": {name: id(t) for name, t in tensors.items()},
        "grads": {name: None if p.grad is None else (id(p.grad), p.grad.tolist()) for name, p in model.named_parameters()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        "gates": [path.active_rows() for path in model._heterolora_state.paths.values()],
        "rng": (torch.get_rng_state().tolist(), random.getstate()),
    }


@pytest.mark.parametrize("fails", ["", "forward", "inf", "interrupt"], ids=lambda fails: fails or "well")
def test_nothing_is_left_behind(fails, room):
    model = marked_net()
    search = hlk.RankSearch(model)
    search.apply({"first": [False, True]})
    waiting = model(torch.ones(3, 4))
    model.fails = fails
    before = everything(model)
    batches = [{"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(0))}]
    if fails:
        with pytest.raises({"inf": FloatingPointError, "interrupt": KeyboardInterrupt}.get(fails, RuntimeError)):
            search.score(batches, proxy="synflow")
    else:
        search.score(batches, proxy="synflow")
    assert everything(model) == before
    assert model.head.weight is model.second.weight
    waiting.sum().backward()


def test_a_graph_that_waits_gives_the_gradients_it_would_have_given(room):
    gradients = []
    for scores in (False, True):
        model = marked_net()
        model.zero_grad()
        search = hlk.RankSearch(model)
        torch.manual_seed(1)
        out = model(torch.ones(3, 4))
        if scores:
            search.score([{"x": torch.ones(2, 4)}], proxy="synflow")
        out.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and same_bits(*gradients)


@pytest.mark.parametrize("last", [0, 1, 3])
def test_signs_come_back_when_writing_them_fails_halfway(last, monkeypatch):
    model = marked_net()
    search = hlk.RankSearch(model)
    before = everything(model)
    monkeypatch.setattr(_env, "available_memory", lambda device: 0)
    calls, pack = [], synflow._pack_signs

    def failing(data):
        calls.append(data)
        if len(calls) > last:
            raise KeyboardInterrupt
        return pack(data)

    monkeypatch.setattr(synflow, "_pack_signs", failing)
    with pytest.raises(KeyboardInterrupt):
        search.score([{"x": torch.ones(2, 4)}], proxy="synflow")
    assert len(calls) == last + 1
    assert everything(model) == before


@fuzz(20)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=3),
       st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), st.booleans(), st.integers(0, 1000))
def test_signs_survive_packing(shape, dtype, transposed, seed):
    data = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    data = data.t() if transposed and data.dim() == 2 else data
    packed = synflow._pack_signs(data)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-data.numel() // 8)
    assert torch.equal(synflow._unpack_signs(packed, data), torch.signbit(data))


# ---- as a proxy of a search ----


def test_zero_B_gives_zeros_and_says_so_once():
    search = hlk.RankSearch(make_llama(zero_B=True))
    with pytest.warns(UserWarning, match="'synflow' is 0 for every path whose lora_B is 0"):
        scores = search.score([llama_batch(0)], proxy="synflow")
    assert set(scores.values()) == {0.0}


def test_a_dynamic_search_probes_for_it_and_one_in_step_is_refused():
    model = make_llama(proxy="synflow", interval=1, warmup=0)
    optimizer = torch.optim.SGD(trainable(model), lr=0.01)
    search = hlk.RankSearch(model, optimizer, [llama_batch(i) for i in range(3)])
    search.start()
    train_step(model, optimizer, llama_batch(0), search)
    assert [entry["score"] for entry in search.history] == ["probe", "probe"]
    with pytest.raises(ValueError, match="in_step"):
        search.score(score="in_step", proxy="synflow")
    with pytest.raises(ValueError, match="score='in_step'"):
        hlk.RankSearch(make_llama(proxy="synflow", score="in_step"))


@pytest.mark.parametrize("batch, error", [([1, 2], TypeError), ({"x": torch.ones(2, dtype=torch.long)}, ValueError)],
                         ids=["list", "ints"])
def test_batches_without_anything_to_set_to_one_are_refused(batch, error):
    with pytest.raises(error, match="synflow"):
        hlk.RankSearch(make_net()).score([batch], proxy="synflow")
