"""What is measured on a GPU: calls of real models' linears, in the order in which they are worth their time.

The first is the one that the promises are about. The squares with rank 16 are those for which LoRAFusion publishes numbers (Zhu
et al., "LoRAFusion: Efficient LoRA Fine-Tuning for LLMs", arXiv 2510.00206).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench.cases import Case

BACKEND = "triton"
#: Everything that is measured in turn; the subject first. no_path is our own matmul kernel without LoRA.
CONTENDERS = ("op", "no_statistics", "no_path", "frozen", "peft", "mm_addmm")
#: Tokens, K and N of the promise, in bfloat16 at rank 16.
MAIN = (8192, 4096, (4096,))
#: ``{name: (K, (N_1, ...))}``: linears of Llama-3-8B (hidden 4096, 8 of 32 heads for keys and values, 14336 in between),
#: Qwen2.5-7B (3584, 4 of 28, 18944) and OPT-350m (1024, 4096).
LINEARS: dict[str, tuple[int, tuple[int, ...]]] = {
    "Llama-3-8B_o": (4096, (4096,)), "Llama-3-8B_qkv": (4096, (4096, 1024, 1024)), "Llama-3-8B_gate_up": (4096, (14336, 14336)),
    "Llama-3-8B_down": (14336, (4096,)),
    "Qwen2.5-7B_o": (3584, (3584,)), "Qwen2.5-7B_qkv": (3584, (3584, 512, 512)), "Qwen2.5-7B_gate_up": (3584, (18944, 18944)),
    "Qwen2.5-7B_down": (18944, (3584,)),
    "OPT-350m_attention": (1024, (1024,)), "OPT-350m_fc1": (1024, (4096,)), "OPT-350m_fc2": (4096, (1024,)),
}
SQUARES = (4096, 5120, 8192)
TOKENS = (8192, 4096, 2048)


def gpu_cases(quick: bool = False) -> Iterator[Case]:
    """Every case, the most wanted first: what a time budget cuts off is the end."""
    for case in _wanted(quick):
        # PEFT compiled takes minutes for everything and says the same everywhere. mm_addmm has no dropout.
        dropped = {"mm_addmm"} if case.dropout_p or case.adapters else set()
        yield replace(case, contenders=tuple(name for name in case.contenders if name not in dropped))


def _wanted(quick: bool) -> Iterator[Case]:
    main = Case("squares", "4096", *MAIN, "bfloat16", BACKEND, (*CONTENDERS, "peft_compiled", "op_again"), rank=16)
    usual = replace(main, contenders=CONTENDERS)
    yield main
    yield replace(main, dropout_p=0.1)
    yield replace(usual, block="models", name="Llama-3-8B_qkv", k=4096, outs=LINEARS["Llama-3-8B_qkv"][1])
    yield replace(usual, block="options", name="float32 adapters", adapters="float32")
    yield replace(usual, block="decoding", name="Llama-3-8B_o", m=1, mode="infer")
    if quick:
        return
    for width in SQUARES:
        for tokens in TOKENS:
            for dropout_p in (0.0, 0.1):
                if (tokens, width) != (MAIN[0], MAIN[1]):
                    yield replace(usual, name=str(width), m=tokens, k=width, outs=(width,), dropout_p=dropout_p)
    for name, (k, outs) in LINEARS.items():
        if name != "Llama-3-8B_qkv":
            yield replace(usual, block="models", name=name, k=k, outs=outs)
    for rank in (8, 32, 64):
        yield replace(usual, block="ranks", rank=rank)
    for dtype in ("float16", "float32"):
        yield replace(usual, block="options", name=dtype, dtype=dtype)
    yield replace(usual, block="options", name="float32 adapters", adapters="float32", dropout_p=0.1)
    for tokens in (16, 128):
        yield replace(usual, block="decoding", name="Llama-3-8B_o", m=tokens, mode="infer")
    for name in ("OPT-350m_attention", "OPT-350m_fc1", "Qwen2.5-7B_o"):
        k, outs = LINEARS[name]
        yield replace(usual, block="models", name=name, m=2048, k=k, outs=outs)
