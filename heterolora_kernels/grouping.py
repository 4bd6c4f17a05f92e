"""Which linears read the same x, and the dropout mask they share.

A mask belongs to a group call, whether or not the members run as one fused op; so grouping never changes a result.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from heterolora_kernels.ops.rng import draw_rng

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


class MaskGroup:
    """The linears of one group: the first called draws the mask's key, the others reuse it for the same x.

    Holds x, to compare objects, until the last member has taken the key or :meth:`clear` is called.
    """

    def __init__(self, members: Iterable[str]):
        self.members = tuple(members)
        self._called: set[str] = set()
        self._x: Tensor | None = None
        self._rng: Tensor | None = None

    def __getstate__(self) -> dict:
        return {"members": self.members, "_called": set(), "_x": None, "_rng": None}

    def take(self, member: str, x: Tensor) -> Tensor:
        """The key for ``member``'s mask of ``x``: int64 [1]."""
        if self._rng is None or member in self._called:
            self._called, self._x, self._rng = set(), x, draw_rng(x.device)
        rng = self._rng if self._x is x else draw_rng(x.device)
        self._called.add(member)
        if len(self._called) == len(self.members):
            self.clear()
        return rng

    def clear(self) -> None:
        """Let go of x and the key."""
        self._called, self._x, self._rng = set(), None, None
