"""How paths are called: a module's name for its LoRA, ``<layer>.<site>`` for a shortcut."""

from __future__ import annotations

import re

_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<module>.+)$")


def split_path(name: str) -> tuple[str, str, str]:
    """``("model.layers", "3", "self_attn.q_proj")`` of ``model.layers.3.self_attn.q_proj``; layer "" for what lies in none."""
    match = _LAYER.match(name)
    return (match["stack"], match["layer"], match["module"]) if match else ("", "", name)
