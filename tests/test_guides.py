"""Every block of docs/guides.md runs, and prints what the page shows below it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

PAGE = Path(__file__).resolve().parent.parent / "docs" / "guides.md"


def _sections() -> dict[str, list[tuple[str, str | None]]]:
    """``{heading: [(block, what is shown below it or None)]}``."""
    found: dict[str, list[tuple[str, str | None]]] = {}
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE):
        blocks = re.findall(r"```python\n(.*?)```\n(?:```\n(.*?)```\n)?", part, flags=re.DOTALL)
        found[part.partition("\n")[0]] = [(block, shown or None) for block, shown in blocks]
    return found


SECTIONS = _sections()
[(COMMON, _)] = SECTIONS.pop("# Guides")


def _reset_accelerate() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps its settings for the process: none of an earlier test, none for a later one."""
    _reset_accelerate()
    yield
    _reset_accelerate()


@pytest.mark.parametrize("heading", [heading for heading, blocks in SECTIONS.items() if blocks])
def test_blocks_of_a_section_print_what_is_shown(heading, fresh_accelerate, tmp_path, monkeypatch, capsys):
    if heading.startswith("TRL"):
        pytest.importorskip("trl", reason="the guide to TRL needs trl (extra test)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict = {}
    exec(COMMON, namespace)
    for block, shown in SECTIONS[heading]:
        capsys.readouterr()
        exec(block, namespace)
        # What a Trainer logs is a dictionary a line.
        said = re.sub(r"^\{'.*\}\n", "", capsys.readouterr().out, flags=re.MULTILINE)
        if shown is not None:
            assert said == shown
