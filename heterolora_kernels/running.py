"""What belongs to one running call of a module: every thread that is in one has its own.

One record is always there; whoever begins first has it, and the others get one for their call. A compiled graph uses the
first record, which it leaves as it found it.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Generic, TypeVar

import torch

Record = TypeVar("Record")

_is_compiling = torch.compiler.is_compiling


class Running(Generic[Record]):
    """The records of the calls that are running.

    Args:
        make: makes an empty record; importable, for copies.
    """

    def __init__(self, make: Callable[[], Record]):
        self._make = make
        self._first = make()
        self._owner: int | None = None
        self._others: dict[int, Record] = {}
        # Taking the one entry out is a single step of the interpreter: two threads cannot both succeed.
        self._free = [True]

    def __getstate__(self) -> dict:
        return {"_make": self._make}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["_make"])

    def now(self) -> Record:
        """The record of this thread's call; an empty one where it is in none and others are."""
        if _is_compiling():
            return self._first
        thread, owner = get_ident(), self._owner
        if owner == thread:
            return self._first
        record = self._others.get(thread)
        # Without an owner a compiled graph may have begun.
        return record if record is not None else self._first if owner is None else self._make()

    def begin(self) -> Record:
        """The record for a call that begins; one that begins inside another of its thread shares that one's."""
        if _is_compiling():
            return self._first
        thread = get_ident()
        if self._owner == thread:
            return self._first
        try:
            self._free.pop()
        except IndexError:
            return self._others.setdefault(thread, self._make())
        self._owner = thread
        return self._first

    def end(self) -> None:
        """The call has ended; its record is empty."""
        if _is_compiling():
            return
        thread = get_ident()
        if self._owner == thread:
            self._owner = None
            self._free = [True]
        else:
            self._others.pop(thread, None)
