"""How a module is adapted follows from what it computes: as a plain linear, by its own output, or not at all."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import random
import re
import types
import warnings
from collections.abc import MutableMapping

import accelerate
import pytest
import torch
import transformers
from families import assert_restored, reference_backend, snapshot  # noqa: F401 - a fixture
from torch import nn
from torch.nn import functional as F
from transformers.integrations.bitnet import AutoBitLinear
from transformers.integrations.metal_quantization import MetalLinear
from transformers.models.falcon.modeling_falcon import FalconLinear

import heterolora_kernels as hlk
from heterolora_kernels.bases import features, looks_linear
from heterolora_kernels.heads import Heads
from heterolora_kernels.instances import is_swapped
from heterolora_kernels.layers import PatchedLinear, PatchedQuantised
from heterolora_kernels.planning import find_targets
from heterolora_kernels.state import state_of
from heterolora_kernels.trials import ANY_NAME, ITSELF, PLAIN, WRAPPED, forget, judge

IN, OUT = 6, 5


@pytest.fixture(autouse=True)
def _tried_anew():
    forget()


def patch(model: nn.Module, **config) -> nn.Module:
    config = {"r": 2, "lora_alpha": 4, "search": "off", "init_B": "kaiming_uniform", "shortcuts": (), **config}
    return hlk.apply_heterolora(model, hlk.HeteroLoraConfig(**config))


def patch_silently(model: nn.Module, **config) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return patch(model, **config)


def delta(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the LoRA path of a linear adds: alpha / r = 2."""
    return 2 * (x @ module.lora_A.t() @ module.lora_B.t())


class Straight(torch.autograd.Function):
    """Round, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


class RoundsInput(nn.Linear):
    """A linear that was trained with rounded inputs, as BitNet's."""

    def forward(self, input):
        return F.linear(Straight.apply(input), self.weight, self.bias)


class Scaled(nn.Linear):
    """A linear with a factor, which is 1 to begin with."""

    def __init__(self, *args):
        super().__init__(*args)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, input):
        return super().forward(input) * self.factor


class Drops(nn.Linear):
    """A linear with a dropout of its own."""

    def forward(self, input):
        return super().forward(F.dropout(input, 0.5, self.training))


class TakesMore(nn.Linear):
    """Plain as long as nobody asks for more."""

    def forward(self, input, scale=1.0):
        return super().forward(input) * scale


class HiddenStates(nn.Linear):
    """Plain, but calls its input something else."""

    def forward(self, hidden_states):
        return hidden_states @ self.weight.T + self.bias


class Router(nn.Linear):
    """As those of mixtures of experts: logits and choices."""

    def forward(self, hidden_states):
        logits = super().forward(hidden_states)
        return logits, logits.argmax(-1)


class Wider(nn.Linear):
    def forward(self, input):
        return super().forward(input).repeat_interleave(2, -1)


class Raises(nn.Linear):
    def forward(self, input):
        raise RuntimeError("not today")


class Detached(nn.Linear):
    def forward(self, input):
        return super().forward(input.detach() + 1)


# ---- the verdict ----

VERDICTS = {
    "linear": (lambda: nn.Linear(IN, OUT), PLAIN, None),
    "falcon": (lambda: FalconLinear(IN, OUT), PLAIN, None),
    "falcon_no_bias": (lambda: FalconLinear(IN, OUT, bias=False), PLAIN, None),
    "falcon_bfloat16": (lambda: FalconLinear(IN, OUT).bfloat16(), PLAIN, None),
    "falcon_float64": (lambda: FalconLinear(IN, OUT).double(), PLAIN, None),
    "falcon_meta": (lambda: FalconLinear(IN, OUT, device="meta"), PLAIN, None),
    "other_name": (lambda: HiddenStates(IN, OUT), ANY_NAME, None),
    "rounds_its_input": (lambda: RoundsInput(IN, OUT), ITSELF, None),
    "rounds_its_input_bfloat16": (lambda: RoundsInput(IN, OUT).bfloat16(), ITSELF, None),
    "bitnet": (lambda: AutoBitLinear(IN, OUT), ITSELF, None),
    "bitnet_online_with_norm": (lambda: AutoBitLinear(IN, OUT, online_quant=True, use_rms_norm=True), ITSELF, None),
    "metal_uint32": (lambda: MetalLinear(64, 8, group_size=32), ITSELF, None),
    "factor_of_one": (lambda: Scaled(IN, OUT), ITSELF, None),
    "dropout_of_its_own": (lambda: Drops(IN, OUT), ITSELF, None),
    "more_arguments": (lambda: TakesMore(IN, OUT), ITSELF, None),
    "returns_a_tuple": (lambda: Router(IN, OUT), None, "returns a tuple"),
    "another_shape": (lambda: Wider(IN, OUT), None, r"\[3, 6\] it makes \[3, 10\], not \[3, 5\]"),
    "raises": (lambda: Raises(IN, OUT), None, "RuntimeError: not today"),
    "no_gradient": (lambda: Detached(IN, OUT), None, "no gradient to its input"),
    "wrapped_linear": (lambda: fake_quantise(nn.Linear(IN, OUT)), WRAPPED, None),
    "wrapped_conv1d": (lambda: wrap(transformers.pytorch_utils.Conv1D(OUT, IN)), WRAPPED, None),
    "wrapped_falcon": (lambda: wrap(FalconLinear(IN, OUT)), WRAPPED, None),
    "wrapped_router": (lambda: wrap(Router(IN, OUT)), None, "TypeError"),
    "lazy": (lambda: nn.LazyLinear(OUT), None, "has not seen an input"),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT)), None, "computed from other parameters"),
    "embedding": (lambda: nn.Embedding(IN, OUT), None, "it is a Embedding"),
}


@pytest.mark.parametrize(("build", "way", "reason"), VERDICTS.values(), ids=VERDICTS)
def test_verdict(build, way, reason):
    torch.manual_seed(0)
    verdict = judge(build())
    assert verdict.way == way
    if reason is not None:
        assert re.search(reason, verdict.reason), verdict.reason


def test_modules_that_are_alike_are_tried_once():
    calls = []

    class Counts(nn.Linear):
        def forward(self, input):
            calls.append(1)
            return super().forward(input)

    modules = [Counts(IN, OUT) for _ in range(4)]
    assert {judge(module).way for module in modules} == {PLAIN}
    once = len(calls)
    assert once <= 4
    modules[0].epsilon = 2.0
    modules[1].list = [1, 2]
    modules[2].list, modules[2].weight = [1, 2], nn.Parameter(torch.ones(OUT, IN))
    for module in modules[:3]:
        judge(module)
    assert len(calls) == 3 * once
    # Objects that nothing is known of are told apart.
    modules[0].thing, modules[1].thing = object(), object()
    for module in modules[:2]:
        judge(module)
    assert len(calls) == 5 * once


def test_linears_with_alike_forwards_in_the_instance_are_tried_once(monkeypatch):
    calls = []
    monkeypatch.setattr(Straight, "apply", lambda x: (calls.append(1), x + 1)[1])
    patch_silently(nn.Sequential(*[fake_quantise(nn.Linear(IN, IN)) for _ in range(5)]))
    once = len(calls)
    assert 0 < once <= 4
    patch_silently(nn.Sequential(*[fake_quantise(nn.Linear(IN, IN)) for _ in range(3)]))
    assert len(calls) == 2 * once


# ---- no trace ----


class Traces(nn.Linear):
    """Whatever a forward can leave behind."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(IN))
        self.norm = nn.BatchNorm1d(IN)
        self.drop = nn.Dropout(0.5)
        self.seen, self.cache, self.fails = 0, torch.zeros(3), False

    def forward(self, input):
        self.calls += 1
        self.mean.data.add_(1)
        self.weight.data.mul_(2)
        self.cache += 1
        self.seen += 1
        self.register_buffer("made_late", torch.ones(2))
        self.extra = nn.Parameter(torch.rand(2))
        random.random()
        if self.fails:
            raise RuntimeError("after all that")
        input *= 1.5
        return super().forward(self.drop(self.norm(input.reshape(-1, IN))).reshape(input.shape))


@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
def test_trial_leaves_no_trace(fails):
    model = nn.Sequential(nn.Linear(IN, IN), Traces(IN, OUT)).train()
    module, hooked = model[1], []
    module.fails = fails
    for each in (module, module.norm):
        each.register_forward_hook(lambda *args: hooked.append(args))
    module.norm.eval()
    before, versions = snapshot(model), [t._version for t in (*model.parameters(), *model.buffers(), module.cache)]
    states, modes = (torch.get_rng_state(), random.getstate()), [m.training for m in model.modules()]
    assert judge(module).way == (None if fails else ITSELF)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert not hooked and module.seen == 0 and not module.cache.any() and not hasattr(module, "extra")
    assert [m.training for m in model.modules()] == modes
    assert [t._version for t in (*model.parameters(), *model.buffers(), module.cache)] == versions
    assert_restored(model, before)


def test_refused_model_is_as_before():
    model = nn.Sequential(nn.Linear(IN, IN), Traces(IN, OUT))
    model[1].fails = True
    before = snapshot(model)
    with pytest.raises(ValueError, match="target_modules selects.*1: its class Traces fails.*after all that.*exclude_modules"):
        patch(model, target_modules=["1"])
    assert_restored(model, before)


# ---- plain subclasses ----


@pytest.mark.parametrize("cls", [FalconLinear, HiddenStates])
def test_plain_subclass_runs_as_one_op(cls):
    torch.manual_seed(0)
    model, x = nn.Sequential(cls(IN, OUT)).double(), torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    base = model(x)
    patch_silently(model)
    assert isinstance(model[0], PatchedLinear) and type(model[0]).__name__ == cls.__name__
    torch.testing.assert_close(model(x), base + delta(model[0], x), rtol=1e-10, atol=1e-12)
    name = "input" if cls is FalconLinear else "hidden_states"
    assert torch.equal(model[0](**{name: x}), model(x))
    merged = hlk.merge_heterolora(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), model(x), rtol=1e-10, atol=1e-12)
    assert torch.equal(hlk.remove_heterolora(model)(x), base) and type(model[0]) is cls


def test_falcon():
    torch.manual_seed(0)
    config = transformers.FalconConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = transformers.FalconForCausalLM(config)
    patch_silently(model)
    assert len(state_of(model).paths) == 8 and not any(isinstance(m, PatchedQuantised) for m in model.modules())


# ---- models with routers ----

MIXTURES = {
    "llama4": lambda: transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, intermediate_size_mlp=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=3, num_experts_per_tok=1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, attn_implementation="eager")),
    "phimoe": lambda: transformers.PhimoeForCausalLM(transformers.PhimoeConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=3, num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_of_experts_is_adapted_but_for_routers_and_experts(name):
    torch.manual_seed(0)
    model = MIXTURES[name]().eval()
    ids = torch.randint(3, 31, (2, 8))
    base, before = model(input_ids=ids).logits, snapshot(model)
    with pytest.warns(UserWarning, match=r"4 modules with [\d.]+ % of the model's parameters stay without adapters") as caught:
        patch(model, init_B="zeros")
    message, = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    assert "router (2) [" in message and "returns a tuple" in message
    assert "experts (2) [" in message and "3-D" in message
    assert state_of(model).paths and not any("router" in path or "experts." in path for path in state_of(model).paths)
    torch.testing.assert_close(model(input_ids=ids).logits, base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    assert model(input_ids=ids, labels=ids).loss < loss
    hlk.remove_heterolora(model)
    assert_restored(model, before)
    assert torch.equal(model(input_ids=ids).logits, base)


# ---- what the default leaves ----


class Several(nn.Module):
    def __init__(self, *more: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(IN, IN), "router": Router(IN, 3)}) for _ in range(3))
        self.more = nn.ModuleList(more)


def test_one_warning_names_what_is_left_its_kinds_and_its_share():
    model = Several(nn.MultiheadAttention(4, 2), Wider(IN, OUT))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch(model)
    assert len(caught) == 1 and caught[0].filename == __file__.replace(".pyc", ".py")
    message = str(caught[0].message)
    total = sum(p.numel() for name, p in model.named_parameters() if "lora" not in name)
    left = total - 3 * (IN * IN + IN)
    assert message.startswith(f"6 modules with {100 * left / total:.3g} % of the model's parameters stay without adapters")
    for part in ("layers.*.router (3) [Router]:", "more.0 [MultiheadAttention]:", "more.0.out_proj [NonDynamicallyQuantizable",
                 "more.1 [Wider]: "):
        assert part in message


def test_what_is_excluded_is_not_told():
    patch_silently(Several(Wider(IN, OUT)), exclude_modules=["router", "more.0"])


def test_nothing_that_can_be_adapted_is_an_error_with_reasons():
    model = nn.Sequential(Router(IN, IN), Wider(IN, OUT))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"all-linear.*nothing.*0 \[Router\]: .*returns a tuple.*1 \[Wider\]"):
        patch(model)
    assert_restored(model, before)


@pytest.mark.parametrize("target", [["router"], r".*router"], ids=["list", "regex"])
def test_what_the_user_named_is_an_error_with_its_reason(target):
    model = Several()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.0\.router: .*Router.*returns a tuple"):
        patch(model, target_modules=target)
    assert_restored(model, before)


class KeepsSizes(nn.Module):
    """A linear of its own make, of which nothing is known."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.matrix = nn.Parameter(torch.randn(IN, OUT))

    def forward(self, x):
        return x @ self.matrix


def test_what_reads_like_a_linear_is_named():
    with pytest.warns(UserWarning, match=r"more\.0 \[KeepsSizes\]: it is a KeepsSizes, and only nn.Linear"):
        patch(Several(KeepsSizes()), exclude_modules=["router"])


# ---- bases that compute their output themselves ----


def test_base_that_rounds_keeps_its_forward_and_gets_paths():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(IN, IN), RoundsInput(IN, OUT)).double(), torch.randn(3, IN, dtype=torch.float64)
    before = snapshot(model)
    patch_silently(model, adapter_dtype=torch.float64)
    hidden = model[0](x)
    expected = RoundsInput.forward(model[1], hidden) + delta(model[1], hidden)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    model(x).square().sum().backward()
    assert all(p.grad.any() for p in (model[0].lora_A, model[0].lora_B, model[1].lora_A, model[1].lora_B))
    with pytest.raises(ValueError, match="'1'.*RoundsInput.*computes its output itself.*save the adapter"):
        hlk.merge_heterolora(model)
    hlk.remove_heterolora(model)
    assert_restored(model, before)


class EightBit(nn.Module):
    """As EETQ's: an int8 matrix with a scale per output, and no sizes."""

    def __init__(self, linear: nn.Linear, transposed: bool = True):
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(1) / 127
        steps = (weight / scales[:, None]).round().to(torch.int8)
        self.transposed = transposed
        self.weight = nn.Parameter(steps.t().contiguous() if transposed else steps, requires_grad=False)
        self.weight_scales = nn.Parameter(scales)
        self.bias = linear.bias

    def forward(self, input):
        weight = self.weight.to(input.dtype) * (self.weight_scales if self.transposed else self.weight_scales[:, None])
        return F.linear(input, weight.t() if self.transposed else weight, self.bias)


class EightBitNoBackward(EightBit):
    def forward(self, input):
        return super().forward(input.detach())


class EightBitLookup(EightBit):
    """An embedding of the same looks."""

    def forward(self, input):
        return self.weight[input] * self.weight_scales


@pytest.mark.parametrize("transposed", [True, False], ids=["in_out", "out_in"])
def test_quantised_linear_without_sizes_is_adapted(transposed):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(IN, IN), EightBit(nn.Linear(IN, OUT), transposed)), torch.randn(3, IN)
    before = snapshot(model)
    base = model(x)
    assert features(model[1]) == (IN, OUT)
    patch_silently(model, init_B="zeros")
    assert isinstance(model[1], PatchedQuantised) and torch.equal(model(x), base)
    with torch.no_grad():
        model[1].lora_B.fill_(0.5)
    torch.testing.assert_close(model(x), base + delta(model[1], model[0](x)))
    model(x).sum().backward()
    assert model[0].lora_B.grad.any() and model[1].lora_A.grad.any()
    hlk.remove_heterolora(model)
    assert_restored(model, before)


@pytest.mark.parametrize("cls", [EightBitNoBackward, EightBitLookup])
def test_quantised_module_that_cannot_be_taken_is_named(cls):
    module = cls(nn.Linear(IN, OUT))
    assert looks_linear(module)
    with pytest.warns(UserWarning, match=rf"more\.0 \[{cls.__name__}\]: "):
        patch(Several(module), exclude_modules=["router"])


class PackedWithNorm(nn.Module):
    """As BitNet's packed linears: sizes, a buffer for the weight, and a norm inside."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.weight = nn.Buffer(torch.randint(-1, 2, (OUT, IN), dtype=torch.int8))
        self.norm = nn.LayerNorm(IN)

    def forward(self, input):
        return F.linear(self.norm(input), self.weight.to(input.dtype))


def test_quantised_linear_with_a_norm_inside_is_adapted():
    model, x = nn.Sequential(PackedWithNorm()), torch.randn(3, IN)
    base = model(x)
    patch_silently(model)
    torch.testing.assert_close(model(x), base + delta(model[0], x))


# ---- forwards in the instance ----


def fake_quantise(linear: nn.Linear) -> nn.Linear:
    """What compressed-tensors does to a linear: a forward in the instance that rounds x and calls the class's."""
    @functools.wraps(linear.forward.__func__)
    def quantised_forward(self, input):
        return self.__class__.forward(self, Straight.apply(input))

    linear.forward = quantised_forward.__get__(linear)
    return linear


def wrap(linear: nn.Linear) -> nn.Linear:
    """A closure over the bound forward."""
    inner = linear.forward
    linear.forward = lambda *args, **kwargs: inner(*args, **kwargs) + 1
    return linear


WRAPPERS = pytest.mark.parametrize("wrapper", [fake_quantise, wrap])


@WRAPPERS
@pytest.mark.parametrize("target", ["all-linear", ["1"]], ids=["all_linear", "by_name"])
def test_forward_in_the_instance_is_called_once_and_restored(wrapper, target):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(IN, IN), wrapper(nn.Linear(IN, OUT))), torch.randn(3, IN)
    own, before = model[1].__dict__["forward"], snapshot(model)
    assert judge(model[1]).way == WRAPPED
    base = model(x)
    patch_silently(model, init_B="zeros", target_modules=target)
    assert is_swapped(model[1]) and torch.equal(model(x), base)
    with torch.no_grad():
        model[1].lora_B.fill_(0.5)
    torch.testing.assert_close(model(x), base + delta(model[1], model[0](x)))
    with hlk.disable_adapter(model):
        assert torch.equal(model(x), base)
    model(x).sum().backward()
    assert model[1].lora_A.grad.any()
    hlk.remove_heterolora(model)
    assert model[1].__dict__["forward"] is own
    assert_restored(model, before)
    assert torch.equal(model(x), base)


def test_copies_of_a_wrapped_linear_are_on_their_own():
    torch.manual_seed(0)
    model, x = patch_silently(nn.Sequential(fake_quantise(nn.Linear(IN, OUT)))), torch.randn(3, IN)
    expected, twin = model(x), copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin[0].weight.zero_()
    torch.testing.assert_close(twin(x), twin[0].bias + delta(twin[0], x))
    assert torch.equal(model(x), expected)
    hlk.remove_heterolora(twin)
    assert twin[0].__dict__["forward"].__self__ is twin[0] and torch.equal(twin(x), twin[0].bias.expand(3, OUT))


def test_pickle_of_a_wrapped_linear_loses_the_wrapper_as_before_and_keeps_the_paths():
    # A function that was made in a call is pickled by its name, which is the class's forward.
    torch.manual_seed(0)
    base, x = nn.Sequential(fake_quantise(nn.Linear(IN, OUT))), torch.randn(3, IN)
    plain = pickle.loads(pickle.dumps(base))(x)
    model = patch_silently(base)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(twin(x), plain + delta(twin[0], x))
    assert torch.equal(hlk.remove_heterolora(twin)(x), plain) and type(twin[0]) is nn.Linear


@pytest.mark.parametrize("hooked", ["before", "after"])
def test_hooks_of_accelerate_around_a_wrapped_linear(hooked):
    torch.manual_seed(0)
    model, x = nn.Sequential(fake_quantise(nn.Linear(IN, OUT))), torch.randn(3, IN)
    own, base = model[0].__dict__["forward"], model(x)
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu")
    if hooked == "before":
        accelerate.hooks.add_hook_to_module(model[0], hook)
    patch_silently(model)
    if hooked == "after":
        accelerate.hooks.add_hook_to_module(model[0], hook)
    torch.testing.assert_close(model(x), base + delta(model[0], x))
    unhooked = copy.deepcopy(model)
    accelerate.hooks.remove_hook_from_module(unhooked[0])
    torch.testing.assert_close(unhooked(x), model(x))
    hlk.remove_heterolora(model)
    assert torch.equal(model(x), base)
    accelerate.hooks.remove_hook_from_module(model[0])
    assert model[0].__dict__["forward"] == own and torch.equal(model(x), base)


def test_failure_after_the_wrapper_was_moved_puts_it_back(monkeypatch):
    model = nn.Sequential(fake_quantise(nn.Linear(IN, OUT)))
    before = snapshot(model)
    monkeypatch.setattr("heterolora_kernels.patching._ledger_rows", lambda state: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patch(model)
    assert_restored(model, before)


def test_a_wrapper_that_came_later_outlives_the_patch():
    model, x = nn.Sequential(fake_quantise(nn.Linear(IN, OUT))), torch.randn(3, IN)
    base = model(x)
    patch_silently(model)
    wrap(model[0])
    hlk.remove_heterolora(model)
    assert torch.equal(model(x), base + 1)
    # It calls what the first patch left; a second one would be called by itself.
    with pytest.raises(ValueError, match="earlier patch"):
        patch(model)


def test_quantised_linear_with_a_forward_in_the_instance():
    """As compressed-tensors leaves a model that stays compressed."""
    torch.manual_seed(0)
    linear, x = nn.Linear(IN, OUT), torch.randn(3, IN)
    linear.weight_packed = nn.Parameter((8 * linear.weight.detach()).round().to(torch.int8), requires_grad=False)
    del linear.weight
    linear.forward = types.MethodType(
        lambda self, input: F.linear(input, self.weight_packed.to(input.dtype) / 8, self.bias), linear)
    model = nn.Sequential(linear)
    base = model(x)
    patch_silently(model)
    torch.testing.assert_close(model(x), base + delta(model[0], x))
    assert torch.equal(hlk.remove_heterolora(model)(x), base)


def test_tensors_of_three_dimensions_that_are_no_matrices_are_not_told():
    model = Several()
    model.scale, model.positions = nn.Module(), nn.Module()
    model.scale.factor, model.positions.table = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.ones(7, 1, 4))
    model.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 2))
    patch_silently(model, exclude_modules=["router"])


def test_lazy_modules_are_left_or_passed_over_by_the_plan():
    model = nn.Sequential(nn.Linear(IN, IN), nn.LazyConv1d(2, 1), nn.LazyBatchNorm1d(), nn.LazyLinear(OUT))
    with pytest.warns(UserWarning, match=r"^1 module with 0 %.*3 \[LazyLinear\]: .*has not seen an input"):
        assert list(find_targets(model, hlk.HeteroLoraConfig(r=2), Heads(model, ()))) == ["0"]


def test_a_model_with_lazy_modules_is_patched_around_them():
    model = nn.Sequential(nn.Linear(IN, IN), nn.LazyLinear(OUT))
    with pytest.warns(UserWarning, match="LazyLinear that has not seen an input"):
        hlk.apply_heterolora(model, hlk.HeteroLoraConfig(r=2, search="off"))
    assert model(torch.randn(2, IN)).shape == (2, OUT)
    hlk.remove_heterolora(model)
    assert type(model[0]) is nn.Linear


def test_trial_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert judge(FalconLinear(IN, OUT)).way == PLAIN


def test_tensors_in_a_mapping_of_their_own_are_not_written_to(monkeypatch):
    """As compressed-tensors keeps them: an assignment writes into the tensor that is there."""
    class Mapping(MutableMapping):
        def __init__(self, own, copies):
            self.own, self.copies = dict(own), copies

        def __getitem__(self, name):
            return nn.Parameter(self.own[name].detach().clone()) if self.copies else self.own[name]

        def __setitem__(self, name, value):
            if self.own.get(name) is not None and value is not None and self.own[name].shape == value.shape:
                with torch.no_grad():
                    self.own[name].copy_(value)
            else:
                self.own[name] = value

        def __delitem__(self, name):
            del self.own[name]

        def __iter__(self):
            return iter(self.own)

        def __len__(self):
            return len(self.own)

    model, x = nn.Sequential(nn.Linear(IN, IN), fake_quantise(nn.Linear(IN, OUT))), torch.randn(3, IN)
    base, version = model(x), model[1].weight._version
    model[1]._parameters = Mapping(model[1]._parameters, copies=False)
    with monkeypatch.context() as patched:
        patched.setattr("heterolora_kernels.patching._ledger_rows", lambda state: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            patch(model)
    assert list(model[1]._parameters) == ["weight", "bias"]
    patch_silently(model, init_B="zeros")
    assert isinstance(model[1], PatchedQuantised) and torch.equal(model(x), base)
    hlk.remove_heterolora(model)
    assert torch.equal(model(x), base) and model[1].weight._version == version
    assert list(model[1]._parameters) == ["weight", "bias"]
    # Adapters would be copies as well, and never learn.
    model[1]._parameters.copies = True
    with pytest.warns(UserWarning, match=r"1 \[Linear\]: is offloaded"):
        patch(model)
