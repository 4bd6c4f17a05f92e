"""Options, the cases of this run, and what every measurement is labelled with."""

from __future__ import annotations

import os
from dataclasses import asdict

import pytest
import torch

from bench.cases import isa_cases, linear_cases
from bench.machine import describe
from bench.search_cost import search_cases
from bench.training import step_cases
from heterolora_kernels.backends import available_backends, resolve


def pytest_addoption(parser):
    group = parser.getgroup("heterolora")
    group.addoption("--quick", action="store_true", help="fewer cases and rounds")
    group.addoption("--lora-backend", default=None, help="whose op is measured (default: the one that would be chosen)")
    group.addoption("--lora-threads", type=int, default=None, help="threads of PyTorch and of the kernels")
    group.addoption("--lora-tolerance", type=float, default=1.0, help="multiply what the check allows")
    group.addoption("--lora-bar", action="store_true", help="draw a progress bar on stderr")


def pytest_configure(config):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if config.option.lora_threads is not None:
        torch.set_num_threads(config.option.lora_threads)


def _backends(config) -> tuple[str, tuple[str, ...]]:
    """The backend under test, and those measured beside it."""
    asked = config.option.lora_backend
    backend = resolve(torch.device("cpu"), asked, torch.float32)
    here = []
    for name in () if asked is not None else available_backends():
        try:
            here.append(resolve(torch.device("cpu"), name, torch.bfloat16))
        except (RuntimeError, TypeError):
            continue
    return backend, tuple(name for name in here if name != backend)


def pytest_generate_tests(metafunc):
    backend, others = _backends(metafunc.config)
    quick, held = metafunc.config.option.quick, os.environ.get("HETEROLORA_CPU_ISA")
    if "case" in metafunc.fixturenames:
        cases = list(isa_cases(backend, quick, held) if held else linear_cases(backend, others, quick))
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])
    for fixture, make in (("step_case", step_cases), ("search_case", search_cases)):
        if fixture in metafunc.fixturenames:
            cases = [] if held else list(make(backend, quick))
            metafunc.parametrize(fixture, cases, ids=[case.id for case in cases])


def pytest_collection_modifyitems(config, items):
    # A process that is held to an instruction set has no training steps: no case, not a skip without a reason.
    items[:] = [item for item in items if "NOTSET" not in item.name]


@pytest.fixture(scope="session")
def options(pytestconfig):
    return pytestconfig.option


@pytest.fixture(scope="session")
def about(options):
    """``about(case) -> extra_info``: the case, the machine, and what the check allowed."""
    machine = describe()
    return lambda case: {"case": asdict(case), "machine": machine, "tolerance": options.lora_tolerance}


class _Bar:
    def __init__(self):
        self.bar = None

    def pytest_collection_finish(self, session):
        from tqdm import tqdm

        self.bar = tqdm(total=len(session.items), unit="case", dynamic_ncols=True)

    def pytest_runtest_logstart(self, nodeid, location):
        self.bar.set_description(nodeid.partition("[")[2].rstrip("]"))

    def pytest_runtest_logfinish(self, nodeid, location):
        self.bar.update()

    def pytest_unconfigure(self):
        if self.bar is not None:
            self.bar.close()


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    if session.config.option.lora_bar:
        session.config.pluginmanager.register(_Bar(), "heterolora-bar")
