"""How much hypothesis tries: a little and always the same in `make test`, much more and anew in `make fuzz`."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

EFFORT = int(os.environ.get("FUZZ_EFFORT", "1"))


def fuzz(examples: int):
    """Decorator of a hypothesis test: ``examples`` in `make test`, EFFORT times as many in `make fuzz`."""
    def decorate(test):
        chosen = settings(max_examples=examples * EFFORT, deadline=None, derandomize=EFFORT == 1, database=None)
        return pytest.mark.fuzz(chosen(test))
    return decorate
