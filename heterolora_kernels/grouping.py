"""Which linears read the same x: they share a dropout mask, and run as one op where that can be done.

A mask belongs to a group call, whether or not the members run as one op; so grouping never changes a result. The first member
that is called with x computes the outputs of all; each of the others takes its own if everything is then as it was. A member for
which it is not runs alone, and so does one that is called outside the layer's forward, or in a checkpoint of its own inside it:
a recompute knows neither the key nor the outputs that another call left.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import is_

import torch
from torch import Tensor, nn

from heterolora_kernels.ops.rng import draw_rng
from heterolora_kernels.running import Running

#: ``{layer class: groups of linears, relative to the layer}`` for the families of the site table.
_QKV_GATE_UP = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
_QKV = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),)
_BERT_QKV = (("attention.self.query", "attention.self.key", "attention.self.value"),)
GROUPS: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer",
                     "GemmaDecoderLayer", "Gemma2DecoderLayer", "Gemma3DecoderLayer"), _QKV_GATE_UP),
    "OPTDecoderLayer": _QKV,
    # GPT-2 computes q, k and v in one linear.
    "GPT2Block": (),
    "BertLayer": _BERT_QKV,
    "RobertaLayer": _BERT_QKV,
}


@dataclass(eq=False)
class _Plain:
    """A member's tensors as they were when they were found plain; whoever exchanges one frees it.

    Attributes:
        tensors: as :func:`_tensors_of` gives them, by references that keep nothing alive.
        addresses: of those that are parameters.
        counted: places of those that count their versions.
    """

    tensors: list[Callable[[], Tensor | None]]
    addresses: list[int]
    counted: list[int]

    @classmethod
    def of(cls, found: tuple[Tensor | None, ...]) -> _Plain:
        return cls([_nothing if t is None else weakref.ref(t) for t in found], _addresses(found),
                   [i for i, t in enumerate(found) if t is not None and not t.is_inference()])

    def are(self, found: tuple[Tensor | None, ...]) -> bool:
        """Whether they are the same objects, where they were."""
        for tensor, t in zip(self.tensors, found):
            if tensor() is not t:
                return False
        return self.addresses == _addresses(found)

    def versions(self, found: tuple[Tensor | None, ...]) -> list[int]:
        return [found[i]._version for i in self.counted]


@dataclass(eq=False)
class Turn:
    """One tensor's way through the members of a group.

    Attributes:
        x: the tensor.
        called: the members that had their turn, as indices.
        rng: int64 [1], the key of the mask; None before somebody asked.
        tensors, plain: those of every member, once they were found plain.
        outs: every member's output until it is taken, if the first member computed them; else None.
        circumstances, versions: what they were computed from, beside x and the tensors.
    """

    x: Tensor
    called: set[int] = field(default_factory=set)
    rng: Tensor | None = None
    tensors: Sequence[tuple[Tensor | None, ...]] = ()
    plain: Sequence[_Plain] = ()
    outs: list[Tensor | None] | None = None
    circumstances: tuple = ()
    versions: Sequence[list[int]] = ()

    def key(self, x: Tensor) -> Tensor:
        """The key of the mask of x: that of the turn, or one of its own for another tensor."""
        if self.x is not x:
            return draw_rng(x.device)
        if self.rng is None:
            self.rng = draw_rng(x.device)
        return self.rng


@dataclass(eq=False)
class Between:
    """What is between the calls of groups' members in one thread.

    Attributes:
        turns: of each group that is in the midst of one.
        surroundings: of the layer's forward, while it runs.
    """

    turns: dict[LinearGroup, Turn] = field(default_factory=dict)
    surroundings: tuple | None = None


class LinearGroup:
    """The linears of one layer that read one x, and what is between the calls of the first and of the last.

    Holds x, the key and outputs within the layer's forward alone: until the last member was called or :meth:`clear`.

    Args:
        members: names of the linears, in the order of their rows in the ledger.

    Attributes:
        linears: their modules, where they may run as one op; empty: they share masks alone.
        derived: scaling, gate, active and probe over the paths of all members; theirs are views of it.
    """

    def __init__(self, members: Iterable[str]):
        self.members = tuple(members)
        self.linears: list[nn.Module] = []
        self._own_hooks: list[int] = []
        self._is_wide = False
        self._plain: list[_Plain] = []
        self.derived = None
        #: The layer's, whose groups share it.
        self.layer: Running[Between] = Running(Between)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "derived": None, "_plain": []}

    def fuse(self, linears: Iterable[nn.Module], own_hooks: Iterable[int]) -> None:
        """Let the members run as one op.

        Args:
            own_hooks: how many of each linear's forward pre-hooks are those that capture sources.
        """
        self.linears, self._own_hooks = list(linears), list(own_hooks)
        self._is_wide = any(linear.out_features > linear.in_features for linear in self.linears)

    def running(self) -> Between | None:
        """What is between the calls, where the layer's forward runs and a member that is called now is in no checkpoint of its
        own."""
        between = self.layer.now()
        surroundings = between.surroundings
        return between if surroundings is not None and surroundings == surroundings_now() else None

    def enter(self, between: Between, index: int, x: Tensor) -> Turn:
        """The turn in which a member is called with x. A member that is called again begins a new one."""
        turn = between.turns.get(self)
        if turn is None or index in turn.called:
            turn = between.turns[self] = Turn(x)
        turn.called.add(index)
        if len(turn.called) == len(self.members):
            between.turns.pop(self, None)
        return turn

    def may_run(self, turn: Turn, linear: nn.Module, x: Tensor) -> bool:
        """Whether the members can run as one op now, ``linear`` being the first that is called with x."""
        if not self.linears or len(turn.called) > 1:
            return False
        # What one op saves is mostly in the gradient of x. Without a backward the weights of wide linears, which take turns in
        # the caches then, cost more: 1 to 20 % on the CPU (gate and up of 576 x 1536, float32).
        if self._is_wide and not torch.is_grad_enabled():
            return False
        # Writes to x between the calls would not be seen: an inference tensor counts none, nor does a traced one.
        unseen = torch.compiler.is_compiling() or x.is_inference()
        for member, own_hooks in zip(self.linears, self._own_hooks):
            if member.training != linear.training or "forward" in member.__dict__ or member._backward_hooks:
                return False
            if unseen and len(member._forward_hooks) + len(member._forward_pre_hooks) > own_hooks:
                return False
        if not self._are_plain(turn):
            return False
        # One op has outputs that ask for a gradient or has none.
        return x.requires_grad or not torch.is_grad_enabled() or len(set(map(_asks, self.linears))) == 1

    def _are_plain(self, turn: Turn) -> bool:
        """Whether the members' tensors lie here, whole, beside each other; looked at again where some were exchanged or moved."""
        found = [_tensors_of(linear) for linear in self.linears]
        if torch.compiler.is_compiling():
            return all([_is_plain(tensors, found[0][0]) for tensors in found])
        plain = self._plain
        if not plain or not all([known.are(tensors) for known, tensors in zip(plain, found)]):
            are_plain = all([_is_plain(tensors, found[0][0]) for tensors in found])
            plain = self._plain = [_Plain.of(tensors) for tensors in found] if are_plain else []
        turn.tensors, turn.plain = found, plain
        return bool(plain)

    def hold(self, turn: Turn, index: int, outs: list[Tensor], collecting: bool) -> Tensor:
        """Keep every member's output but one, which is returned, and what they were computed from."""
        turn.outs, turn.circumstances = list(outs), self._circumstances(index, turn.x, collecting)
        if not torch.compiler.is_compiling():
            turn.versions = [known.versions(tensors) for known, tensors in zip(turn.plain, turn.tensors)]
        turn.outs[index] = None
        return outs[index]

    def take(self, turn: Turn, index: int, x: Tensor, collecting: bool) -> Tensor | None:
        """The output of one member, if x, the circumstances and the member's tensors are those it was computed from."""
        out, turn.outs[index] = turn.outs[index], None
        if out is None or turn.x is not x or self._circumstances(index, x, collecting) != turn.circumstances:
            return None
        if torch.compiler.is_compiling():
            return out
        found = _tensors_of(self.linears[index])
        is_same = all(map(is_, turn.tensors[index], found)) and turn.plain[index].versions(found) == turn.versions[index]
        return out if is_same else None

    def _circumstances(self, index: int, x: Tensor, collecting: bool) -> tuple:
        """What must be the same for an output to be taken later."""
        device_type = x.device.type
        autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
        found = (torch.get_autocast_dtype(device_type) if autocast else None, self.linears[index].training, collecting)
        if torch.compiler.is_compiling():
            return found
        return (*found, torch.is_inference_mode_enabled(), None if x.is_inference() else x._version, id(self.derived))


def _nothing() -> None:
    return None


def surroundings_now() -> tuple:
    """What a checkpoint changes for what runs in it: the grad mode, or the hooks of saved tensors."""
    if torch.compiler.is_compiling():
        return (torch.is_grad_enabled(),)
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True)


def _tensors_of(linear: nn.Module) -> tuple[Tensor | None, ...]:
    parameters = linear._parameters
    return (parameters.get("weight"), parameters.get("bias"), parameters.get("lora_A"), parameters.get("lora_B"),
            linear._buffers.get("lora_mask"))


def _addresses(found: tuple[Tensor | None, ...]) -> list[int]:
    """Of a member's parameters; whoever moves or empties one through ``.data`` leaves it the same object of the same version."""
    return [t.data_ptr() for t in found[:4] if t is not None]


def _asks(linear: nn.Module) -> bool:
    return any([t is not None and t.requires_grad for t in linear._parameters.values()])


def _is_plain(found: tuple[Tensor | None, ...], like: Tensor | None) -> bool:
    """Whether a member's tensors lie here, whole, beside those of the others.

    A DTensor, a ZeRO-3 partition, a parameter that FSDP has flattened or an offloaded one is brought by the member's own call.
    """
    weight, bias, lora_A, lora_B, _ = found
    for tensor in (weight, lora_A, lora_B, *([] if bias is None else [bias])):
        if type(tensor) is not nn.Parameter or tensor.device != like.device or tensor.is_meta or tensor.numel() == 0:
            return False
        # ZeRO-3 gathers the parameters of one module at a time, in the backward too.
        if hasattr(tensor, "ds_id"):
            return False
        if not torch.compiler.is_compiling() and tensor.untyped_storage().nbytes() == 0:
            return False
    return weight.dtype == like.dtype and weight.shape[1:] == like.shape[1:]
