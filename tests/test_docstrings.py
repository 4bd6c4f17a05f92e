"""The API reference: every public name says what its parameters are, and pdoc builds it without a warning."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import pytest

import heterolora_kernels as hlk
from heterolora_kernels.backends import Backend, extra, register_backend
from heterolora_kernels.callback import HeteroLoraCallback
from heterolora_kernels.functional import lora_delta, lora_linear_group
from heterolora_kernels.scoring import Measures, ScoringPass

ROOT = Path(__file__).resolve().parent.parent

#: What users call, and what those who write proxies and backends do.
PUBLIC = [*(getattr(hlk, name) for name in hlk.__all__ if callable(getattr(hlk, name))), HeteroLoraCallback, Backend,
          register_backend, extra, lora_linear_group, lora_delta, Measures, ScoringPass]
METHODS = [getattr(cls, name) for cls in (hlk.RankSearch, hlk.HeteroLoraConfig) for name in vars(cls)
           if callable(getattr(cls, name)) and not name.startswith("_")]


def _sections(function) -> dict[str, str]:
    """``{"": summary, "Args": ..., ...}`` of a docstring in Google's style."""
    parts = re.split(r"^(Args|Attributes|Returns|Yields|Raises|Source):", inspect.getdoc(function) or "", flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2]))}


def _entries(text: str) -> set[str]:
    """``a, b: words`` at the first indentation names a and b."""
    lines = re.findall(r"^    ((?:\w+(?:, )?)+):", text, flags=re.MULTILINE)
    return {name for line in lines for name in line.split(", ")}


def _parameters(function) -> list[str]:
    found = inspect.signature(function).parameters.values()
    return [p.name for p in found if p.name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def _name(function) -> str:
    return function.__qualname__


@pytest.mark.parametrize("function", [*PUBLIC, *METHODS], ids=_name)
def test_every_parameter_is_in_the_docstring(function):
    sections = _sections(function)
    named = _entries(sections.get("Args", "")) | _entries(sections.get("Attributes", "") if inspect.isclass(function) else "")
    assert sections[""].strip(), "no summary"
    assert [name for name in _parameters(function) if name not in named] == []


@pytest.mark.parametrize("function", [function for function in [*PUBLIC, *METHODS] if not inspect.isclass(function)], ids=_name)
def test_a_result_is_in_the_docstring(function):
    if inspect.signature(function).return_annotation not in ("None", "Iterator[None]"):
        assert _sections(function).keys() & {"Returns", "Yields"}


def test_pdoc_builds_the_reference_without_a_warning(tmp_path, capfd):
    pdoc = pytest.importorskip("pdoc", reason="the API reference needs pdoc (extra docs)")
    modules = re.search(r"^DOCUMENTED = (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*modules, output_directory=tmp_path)
    assert capfd.readouterr().err == ""
    page = (tmp_path / "heterolora_kernels.html").read_text()
    assert all(f'id="{name}"' in page for name in hlk.__all__)
    assert all((tmp_path / f"{module.replace('.', '/')}.html").exists() for module in modules)
