"""The GPU benchmark's results as Markdown: ratios, and what is promised of them. No device is needed to read them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.cases import Case
from bench.gpu_cases import MAIN

#: ``title: numerator, denominator``; more than 1 is slower than the denominator, or faster than the numerator.
RATIOS = {"op / frozen": ("op", "frozen"), "op / own matmul": ("op", "no_path"), "own matmul / frozen": ("no_path", "frozen"),
          "statistics on / off": ("op", "no_statistics"), "PEFT / op": ("peft", "op"),
          "compiled PEFT / op": ("peft_compiled", "op"),
          "mm + addmm / op": ("mm_addmm", "op")}
TITLES = {"squares": "Squares, rank 16", "models": "Linears of models", "ranks": "Ranks", "options": "Dtypes and dropout",
          "decoding": "Few tokens, without grad"}
MODES = {"forward": "forward", "both": "forward + backward", "infer": "forward without grad"}


class Limit(NamedTuple):
    """A promise about the main case, M = 8192, K = N = 4096, r = 16, bfloat16, no dropout.

    Attributes:
        ratio: a title of :data:`RATIOS`.
        mode: a key of :data:`MODES`.
        bound: at most this; at least, for speed-ups over others (``is_floor``).
        aim: what it is hoped to be.
    """

    ratio: str
    mode: str
    bound: float
    aim: float | None = None
    is_floor: bool = False


LIMITS = (Limit("op / frozen", "forward", 1.18, 1.08), Limit("op / frozen", "both", 1.22, 1.12),
          Limit("op / own matmul", "forward", 1.08), Limit("op / own matmul", "both", 1.12),
          Limit("statistics on / off", "both", 1.01), Limit("PEFT / op", "both", 1.35, is_floor=True))


def write_whole(path: Path, text: str) -> None:
    """Beside it and swapped in: who is stopped leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    beside.write_text(text)
    os.replace(beside, path)


def case_of(result: dict) -> Case:
    """The case of a result that was read from JSON, where tuples are lists."""
    return Case(**{name: tuple(value) if isinstance(value, list) else value for name, value in result["case"].items()})


def ratio(result: dict, title: str, mode: str, kind: str = "graph") -> float | None:
    """Of two medians of one case; None where one of them is missing."""
    times = result["ms"].get(mode, {}).get(kind, {})
    above, below = (times.get(name) for name in RATIOS[title])
    return None if above is None or below is None else above[1] / below[1]


def main_result(found: dict) -> dict | None:
    """The result that the promises are about."""
    for result in found.get("results", ()):
        case = case_of(result)
        if ((case.m, case.k, case.outs, case.rank, case.dtype) == (*MAIN, 16, "bfloat16") and not case.dropout_p
                and not case.adapters and case.mode == "train"):
            return result
    return None


def judged(found: dict) -> Iterator[tuple[Limit, float | None, str]]:
    """Every promise, what was measured (None: nothing), and a word: met, missed, not measured."""
    result = main_result(found)
    for limit in LIMITS:
        value = None if result is None else ratio(result, limit.ratio, limit.mode)
        if value is None:
            yield limit, None, "not measured"
        else:
            yield limit, value, "met" if (value >= limit.bound if limit.is_floor else value <= limit.bound) else "missed"


def markdown(found: dict) -> str:
    """All tables."""
    return "\n".join([*_head(found), *_parts(found), *_limits(found), *_tables(found), *_remarks(found), ""])


def _head(found: dict) -> Iterator[str]:
    about = found.get("machine")
    if not about:
        yield "# No GPU was measured"
        return
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    yield f"# {about['card']}, capability {about['capability']}"
    yield f"Commit {about['commit']}; {versions}."
    if found.get("ceilings"):
        yield (f"The card itself: copy {found['ceilings']['copy_gb_per_s']:g} GB/s, bf16 product "
               f"{found['ceilings']['bf16_tflop_per_s']:g} TFLOP/s.")
    yield ("Ratios are of medians, by CUDA events around replays of CUDA graphs; in brackets by events around plain calls. "
           "\"frozen\" is F.linear (cuBLAS), \"own matmul\" our kernel without LoRA. Everything was compared with float64 first.")


def _parts(found: dict) -> Iterator[str]:
    if found.get("parts"):
        yield from ("", "| part | outcome | seconds |", "|---|---|---|")
        yield from (f"| {name} | {part['outcome']} | {part['seconds']:g} |" for name, part in found["parts"].items())


def _limits(found: dict) -> Iterator[str]:
    yield from ("", "## What is promised", "M = 8192, K = N = 4096, r = 16, bfloat16, no dropout.", "",
                "| ratio | of | measured | limit | aim | |", "|---|---|---|---|---|---|")
    for limit, value, word in judged(found):
        yield (f"| {limit.ratio} | {MODES[limit.mode]} | {'' if value is None else f'{value:.3f}'} | "
               f"{'at least' if limit.is_floor else 'at most'} {limit.bound:g} | {limit.aim or ''} | {word} |")


def _tables(found: dict) -> Iterator[str]:
    results = [(case_of(result), result) for result in found.get("results", ())]
    for block, title in TITLES.items():
        mine = [(case, result) for case, result in results if case.block == block]
        if mine:
            head = ["shape", "M", "K", "N", "r", "dtype", "dropout", "of", "op ms", *RATIOS]
            yield from ("", f"## {title}", "| " + " | ".join(head) + " |", "|---" * len(head) + "|")
        for case, result in mine:
            for mode in result["ms"]:
                yield "| " + " | ".join(_row(case, result, mode)) + " |"


def _row(case: Case, result: dict, mode: str) -> Iterator[str]:
    yield from (case.name, str(case.m), str(case.k), " + ".join(map(str, case.outs)), str(case.rank), case.dtype,
                f"{case.dropout_p:g}", MODES[mode])
    own = result["ms"][mode].get("graph", {}).get("op")
    yield "" if own is None else f"{own[1]:.4g}"
    for title in RATIOS:
        graph, events = (ratio(result, title, mode, kind) for kind in ("graph", "events"))
        yield " ".join([*([] if graph is None else [f"{graph:.3f}"]), *([] if events is None else [f"({events:.2f})"])])


def _remarks(found: dict) -> Iterator[str]:
    lines = [f"wrong, and not timed: {line}" for line in found.get("wrong", ())]
    result = main_result(found)
    again = None if result is None else result["ms"].get("both", {}).get("graph", {})
    if again and "op_again" in again and "op" in again:
        lines.append(f"the op measured twice in one case: {again['op_again'][1] / again['op'][1]:.3f}; less is noise")
    for result in found.get("results", ()):
        lines += [f"{case_of(result).id}: {name}: {reason}" for name, reason in result["failed"].items()]
    lines += [f"no time was left for {name}" for name in found.get("left_out", ())]
    if lines:
        yield from ("", "## Remarks", *[f"- {line}" for line in lines])
