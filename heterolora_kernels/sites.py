"""Where a layer's shortcuts begin and end, and how their sources travel.

``SITES`` is one table with a row per layer class; names are never guessed. h is the layer's input, f the tensor that
enters the feed-forward block. Both are captured on modules *inside* the layer, whose hooks also run when activation
checkpointing recomputes it. f of the layer before crosses the layer's boundary as an argument and a result of its
``forward``, so that both kinds of checkpointing see it as such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heterolora_kernels.config import Site
from heterolora_kernels.grouping import Between, LinearGroup, surroundings_now
from heterolora_kernels.running import Running

#: Marks, among a layer's positional arguments, that f of the layer before follows. A string: it crosses checkpointing,
#: FSDP's and accelerate's argument handling as it is.
_F_PREV = "heterolora_f_prev"


_LLAMA = Site("input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj")
# Here post_attention_layernorm is the norm on the attention's output, not the one before the feed-forward block.
_GEMMA_2 = Site("input_layernorm", "pre_feedforward_layernorm", "self_attn.o_proj", "mlp.down_proj",
                "post_attention_layernorm", "post_feedforward_layernorm")
_OPT_NORM_FIRST = Site("self_attn_layer_norm", "final_layer_norm", "self_attn.out_proj", "fc2")
_OPT_NORM_LAST = Site("self_attn.q_proj", "fc1", "self_attn.out_proj", "fc2")
_GPT2 = Site("ln_1", "ln_2", "attn.c_proj", "mlp.c_proj")
_BERT = Site("attention.self.query", "intermediate.dense", "attention.output.dense", "output.dense")

#: ``{layer class: Site, or a function of the layer that returns it}``.
SITES: dict[str, Site | Callable[[nn.Module], Site]] = {
    **dict.fromkeys(("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer",
                     "GemmaDecoderLayer"), _LLAMA),
    "Gemma2DecoderLayer": _GEMMA_2,
    "Gemma3DecoderLayer": _GEMMA_2,
    "OPTDecoderLayer": lambda layer: _OPT_NORM_FIRST if layer.do_layer_norm_before else _OPT_NORM_LAST,
    "GPT2Block": _GPT2,
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
}

#: ``{shortcut: (source, part of the layer whose output it joins)}``.
SHORTCUTS: dict[str, tuple[str, str]] = {
    "residual_1": ("h", "attention"),
    "residual_2": ("f", "feed_forward"),
    "shortcut_sa": ("h", "feed_forward"),
    "shortcut_ffn": ("f_prev", "attention"),
}


def site_of(layer: nn.Module, sites: Mapping[str, Site] | None) -> Site | None:
    """The layer's row: the user's table first, then :data:`SITES`; None if neither has its class."""
    name = type(layer).__name__
    row = (sites or {}).get(name, SITES.get(name))
    return row(layer) if callable(row) else row


def why_refused(layer: nn.Module) -> str | None:
    """Why a layer of a known class cannot have shortcuts, or None."""
    if getattr(layer, "chunk_size_feed_forward", 0):
        return ("chunk_size_feed_forward > 0 runs the feed-forward block on parts of the sequence, whose rows do not match "
                "the shortcuts' sources; set it to 0")
    if hasattr(layer, "crossattention") or hasattr(layer, "encoder_attn"):
        return "it has cross-attention: shortcuts are defined for layers of one attention and one feed-forward block"
    return None


def _outside(layer: str) -> RuntimeError:
    return RuntimeError(
        f"{layer} was called outside the forward of its model, where the layers around it are unknown. If activation "
        "checkpointing is wrapped around the layer, use the model's gradient_checkpointing_enable()")


@dataclass(eq=False)
class _Carried:
    """f on its way, in one thread."""

    index: int | None = None
    f: Tensor | None = None
    depth: int = 0


class Carrier:
    """f of the last layer, on its way to the next one of the same stack. Empty outside the stack's forward."""

    def __init__(self) -> None:
        self._running: Running[_Carried] = Running(_Carried)

    def enter(self) -> None:
        """The stack's forward begins."""
        carried = self._running.begin()
        carried.index, carried.f = None, None
        carried.depth += 1

    def leave(self) -> None:
        """The stack's forward ends, in whatever way."""
        carried = self._running.now()
        carried.index, carried.f = None, None
        carried.depth -= 1
        if not carried.depth:
            self._running.end()

    def put(self, index: int, f: Tensor) -> None:
        carried = self._running.now()
        if not carried.depth:
            raise _outside(f"layer {index}")
        carried.index, carried.f = index, f

    def take(self, index: int, path: str) -> Tensor | None:
        """f of layer ``index - 1``; None if that layer was skipped (layerdrop).

        Raises:
            RuntimeError: outside the stack's forward, where the layer before is unknown.
        """
        carried = self._running.now()
        if not carried.depth:
            raise _outside(f"the layer of {path!r}")
        f = carried.f if carried.index == index - 1 else None
        carried.index, carried.f = None, None
        return f


@dataclass(eq=False)
class _Captured(Between):
    """What one layer captured in one thread, and what is between the calls of its linears."""

    running: bool = False
    h: Tensor | None = None
    f: Tensor | None = None
    f_prev: Tensor | None = None


class LayerState:
    """What one layer captured in the running forward. Holds nothing after it; every thread has its own.

    Attributes:
        name: the layer's name in the model.
        index: its position in the stack.
        imports_f, exports_f: whether f comes from the layer before and goes to the next one.
        groups: the layer's groups of linears.
    """

    def __init__(self, name: str, index: int, carrier: Carrier | None):
        self.name = name
        self.index = index
        self.carrier = carrier
        self.imports_f = False
        self.exports_f = False
        self.returns_tuple = False
        self.groups: list[LinearGroup] = []
        self._running: Running[_Captured] = Running(_Captured)

    def capture_h(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook: the module's input is h. Outside the layer's forward nobody would let go of it."""
        captured = self._running.now()
        if captured.running:
            captured.h = _first_tensor(args, kwargs)

    def capture_f(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook: the module's input is f."""
        captured = self._running.now()
        if captured.running:
            captured.f = _first_tensor(args, kwargs)

    def source(self, name: str, path: str) -> Tensor:
        """h, f or f_prev for ``path``; zeros for the f of a layer that was skipped.

        Raises:
            RuntimeError: the source was not captured before the path's linear ran.
        """
        captured = self._running.now()
        value = getattr(captured, name)
        if value is None and name == "f_prev" and captured.h is not None:
            return torch.zeros_like(captured.h)
        if value is None:
            raise RuntimeError(f"path {path!r} needs {name} of layer {self.name!r}, which was not captured before its linear "
                               "ran: the layer's row in `sites` does not describe what its forward does")
        return value

    def open(self, f_prev: Tensor | None) -> None:
        """The layer's forward begins, with f of the layer before."""
        captured = self._running.begin()
        captured.running, captured.f_prev = True, f_prev
        if self.groups:
            captured.surroundings = surroundings_now()

    def clear(self) -> None:
        """The layer's forward ends, in whatever way."""
        captured = self._running.now()
        captured.running = False
        captured.h = captured.f = captured.f_prev = captured.surroundings = None
        if captured.turns:
            captured.turns.clear()
        self._running.end()

    def hold(self, groups: list[LinearGroup]) -> None:
        """Let these groups be open while the layer's forward runs."""
        self.groups = groups
        for group in groups:
            group.layer = self._running

    def wrap(self, args: tuple, kwargs: dict, f_prev: Tensor | None) -> tuple[tuple, dict]:
        """Put f_prev behind the layer's first positional argument (reentrant checkpointing follows those alone)."""
        if not args:
            return args, {**kwargs, _F_PREV: f_prev}
        return (args[0], _F_PREV, f_prev, *args[1:]), kwargs

    def unwrap(self, args: tuple, kwargs: dict) -> tuple[tuple, dict, Tensor | None]:
        """The inverse of :meth:`wrap`; f_prev is None in a call that was not wrapped."""
        if _F_PREV in kwargs:
            kwargs = dict(kwargs)
            return args, kwargs, kwargs.pop(_F_PREV)
        if len(args) > 2 and isinstance(args[1], str) and args[1] == _F_PREV:
            return (args[0], *args[3:]), kwargs, args[2]
        return args, kwargs, None


def _first_tensor(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))


@torch.compiler.assume_constant_result
def _inside_a_traced_block() -> bool:
    """Whether torch.compile is tracing the body of a checkpoint or of another block, in which nothing outside may be written.

    A layer that captures nothing but for its groups does without them there: else the model would not be compiled at all.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx().output.current_tracer.parent is not None


class PatchedLayer:
    """Mixin of a layer: clears what was captured, and passes f in and out. ``_heterolora`` is its LayerState."""

    def __call__(self, *args, **kwargs):
        state = self._heterolora
        if state.imports_f:
            f_prev = state.carrier.take(state.index, f"{state.name}.shortcut_ffn")
            args, kwargs = state.wrap(args, kwargs, f_prev)
        out = super().__call__(*args, **kwargs)
        if state.exports_f:
            *out, f = out
            state.carrier.put(state.index, f)
            out = tuple(out) if state.returns_tuple else out[0]
        return out

    def patched_forward(self, base_forward, *args, **kwargs):
        state = self._heterolora
        if state.carrier is None and torch.compiler.is_dynamo_compiling() and _inside_a_traced_block():
            return base_forward(self, *args, **kwargs)
        args, kwargs, f_prev = state.unwrap(args, kwargs)
        try:
            state.open(f_prev)
            out = base_forward(self, *args, **kwargs)
            if not state.exports_f:
                return out
            if not isinstance(out, (Tensor, tuple)):
                raise TypeError(f"layer {state.name!r} returns {type(out).__name__}; shortcut_ffn needs a layer that returns "
                                "a tensor or a tuple")
            state.returns_tuple = isinstance(out, tuple)
            return (*(out if state.returns_tuple else (out,)), state.source("f", state.name))
        finally:
            state.clear()


class PatchedStack:
    """Mixin of the module whose forward calls the layers: f of a layer never outlives it.

    ``_heterolora_carriers`` is the list of its carriers.
    """

    def patched_forward(self, base_forward, *args, **kwargs):
        # A slice of a Sequential is built with this class, without the carriers.
        carriers = self.__dict__.get("_heterolora_carriers", ())
        for carrier in carriers:
            carrier.enter()
        try:
            return base_forward(self, *args, **kwargs)
        finally:
            for carrier in carriers:
                carrier.leave()
