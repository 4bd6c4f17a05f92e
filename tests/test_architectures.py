"""A part of the table of architectures in every run: kinds of models, not all of them."""

from __future__ import annotations

import pytest
from check_architecture import check, types

pytest.importorskip("peft", reason="peft is not installed")

KINDS = ["llama", "gpt2", "bert", "t5", "vit", "wav2vec2", "clip", "mamba", "mixtral", "distilbert", "falcon", "whisper",
         "phimoe", "llava"]


@pytest.mark.parametrize("model_type", KINDS)
def test_kinds_of_models(model_type):
    record = check(model_type)
    assert record["outcome"] == "reached", record["reason"]
    assert record["paths"] > len(record["unreached"])
    assert record["peft"].partition(":")[0] in ("same", "not in PEFT"), record["peft"]


def test_every_type_is_in_the_list():
    assert len(types()) > 300 and set(KINDS) <= set(types())
