"""What is measured: shapes named after the models they come from, and the cases of every block.

A *block* is one table. A *case* is one row of it: the tensors, and which contenders run on them in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

#: ``{name: (M, K, N)}``; M tokens, K in_features, N out_features. The five of TARGET are those on which the means are taken.
SHAPES: dict[str, tuple[int, int, int]] = {
    "SmolLM-135M_gate_up": (1024, 576, 1536),
    "SmolLM-135M_down": (1024, 1536, 576),
    "BERT-base_attention": (768, 768, 768),
    "OPT-350m_attention": (1536, 1024, 1024),
    "TinyLlama-1.1B_attention": (1024, 2048, 2048),
    "OPT-350m_fc1": (2048, 1024, 4096),
    "OPT-350m_fc2": (1024, 4096, 1024),
    "MiniLM-L6_attention": (1024, 384, 384),
    "MiniLM-L6_ffn_in": (1024, 384, 1536),
    "MiniLM-L6_ffn_out": (1024, 1536, 384),
    "SmolLM-135M_kv": (1024, 576, 192),
}
TARGET = tuple(SHAPES)[:5]
#: Linears that read one x: ``{name: (M, K, (N_1, ...))}``.
GROUPS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "MiniLM-L6_qkv": (1024, 384, (384, 384, 384)),
    "SmolLM-135M_qkv": (1024, 576, (576, 192, 192)),
    "SmolLM-135M_gate_up": (1024, 576, (1536, 1536)),
    "TinyLlama-1.1B_qkv": (1024, 2048, (2048, 256, 256)),
}
TOKENS = (1, 16, 128, 1024, 8192)
RANKS = (0, 1, 5, 8, 13, 16, 24, 40, 64)
DTYPES = ("bfloat16", "float32")

#: Seconds of samples per case, by block; ``--quick`` takes a third.
SECONDS = {"shapes": 2.0, "tokens": 0.6, "ranks": 0.8, "options": 0.6, "groups": 0.6, "layers": 0.6, "overhead": 0.4,
           "backends": 0.6, "isas": 1.0}


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        block: the table.
        name: of the shape.
        m, k: tokens and in_features.
        outs: out_features of every linear.
        dtype: of x and the weights.
        rank: of every path; 0 is a path without rows.
        adapters: dtype of lora_A and lora_B.
        dropout_p: on the paths' sources.
        backend: whose op is measured.
        contenders: what is timed, the subject first.
        mode: ``"train"`` (forward under grad, and backward) or ``"infer"`` (forward without grad).
    """

    block: str
    name: str
    m: int
    k: int
    outs: tuple[int, ...]
    dtype: str
    backend: str
    contenders: tuple[str, ...]
    mode: str = "train"
    rank: int = 8
    adapters: str = ""
    dropout_p: float = 0.0

    @property
    def adapter_dtype(self) -> str:
        return self.adapters or self.dtype

    @property
    def id(self) -> str:
        """For ``pytest -k``: words joined by dots."""
        parts = [self.block, self.name, f"M{self.m}", self.dtype, self.backend, f"r{self.rank}", self.mode]
        if self.adapters:
            parts.append(f"adapters_{self.adapters}")
        if self.dropout_p:
            parts.append(f"dropout{self.dropout_p:g}")
        return ".".join(parts)


def linear_cases(backend: str, others: tuple[str, ...] = (), quick: bool = False) -> Iterator[Case]:
    """Every case of one backend, ``others`` being measured on a few shapes beside it."""
    yield from _shapes(backend, quick)
    yield from _tokens(backend, quick)
    for rank in (0, 13) if quick else RANKS:
        m, k, n = SHAPES["BERT-base_attention"]
        contenders = ("op", "no_path", "frozen") if rank == 0 else ("op", "frozen", "peft")
        for dtype in DTYPES:
            yield Case("ranks", "BERT-base_attention", m, k, (n,), dtype, backend, contenders, rank=rank)
    yield from _options(backend, quick)
    yield from _groups(backend, quick)
    yield from _layers(backend, quick)
    for dtype in DTYPES:
        for mode in ("infer", "train"):
            yield Case("overhead", "tiny", 1, 64, (64,), dtype, backend, ("op", "layer", "two_matmuls", "peft"), mode)
    for other in () if quick else others:
        for name in TARGET[:3]:
            m, k, n = SHAPES[name]
            for dtype in DTYPES:
                yield Case("backends", name, m, k, (n,), dtype, other, ("op", "frozen", "peft"))


def _shapes(backend: str, quick: bool) -> Iterator[Case]:
    for name in TARGET[:3] if quick else SHAPES:
        m, k, n = SHAPES[name]
        for dtype in DTYPES:
            yield Case("shapes", name, m, k, (n,), dtype, backend, ("op", "no_statistics", "frozen", "peft", "mm_addmm"))
            if not quick:
                yield Case("shapes", name, m, k, (n,), dtype, backend, ("op", "frozen", "peft", "mm_addmm"), "infer")


def _tokens(backend: str, quick: bool) -> Iterator[Case]:
    for m in (1, 16) if quick else TOKENS:
        for dtype in DTYPES:
            for mode in ("infer", "train"):
                yield Case("tokens", "OPT-350m_attention", m, 1024, (1024,), dtype, backend, ("op", "frozen", "peft"), mode)


def _options(backend: str, quick: bool) -> Iterator[Case]:
    settings = [("bfloat16", "float32", 0.0), ("bfloat16", "", 0.1), ("bfloat16", "float32", 0.1), ("float32", "", 0.1)]
    for name in TARGET[2:3] if quick else TARGET[:3]:
        m, k, n = SHAPES[name]
        for dtype, adapters, dropout_p in settings[:2] if quick else settings:
            yield Case("options", name, m, k, (n,), dtype, backend, ("op", "frozen", "peft"), adapters=adapters,
                       dropout_p=dropout_p)


def _groups(backend: str, quick: bool) -> Iterator[Case]:
    for name in list(GROUPS)[:1] if quick else GROUPS:
        m, k, outs = GROUPS[name]
        for dtype in DTYPES:
            for mode in ("train",) if quick else ("infer", "train"):
                yield Case("groups", name, m, k, outs, dtype, backend, ("op", "separate", "frozen", "peft"), mode)


def _layers(backend: str, quick: bool) -> Iterator[Case]:
    shapes = [(name, *SHAPES[name]) for name in TARGET[:1] if quick] or [(name, *SHAPES[name]) for name in TARGET[:3]]
    for name, m, k, n in [*shapes, ("OPT-350m_attention", 1, 1024, 1024), ("OPT-350m_attention", 16, 1024, 1024)]:
        for dtype in DTYPES:
            for mode in ("train",) if quick else ("infer", "train"):
                yield Case("layers", name, m, k, (n,), dtype, backend, ("layer", "op", "frozen", "peft"), mode)


def isa_cases(backend: str, quick: bool = False, isa: str = "") -> Iterator[Case]:
    """A few shapes, for a process that is held to one instruction set; one for "portable", where a pass takes seconds."""
    shapes = [(name, *SHAPES[name]) for name in (TARGET[2:3] if quick or isa == "portable" else TARGET[0:3:2])]
    for name, m, k, n in [*shapes, ("OPT-350m_attention", 1, 1024, 1024)]:
        for dtype in DTYPES:
            yield Case("isas", name, m, k, (n,), dtype, backend, ("op", "frozen", "peft"))
