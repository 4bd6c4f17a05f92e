"""The registry, the choice of a backend, and what an import may not do."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers_op import CASES, make_inputs

import heterolora_kernels as hlk
from heterolora_kernels import backends
from heterolora_kernels.backends import Backend, register_backend, resolve, unavailable_backends

CPU = torch.device("cpu")
REFERENCE_MODULE = "heterolora_kernels.backends.reference"


@pytest.fixture
def registry(monkeypatch):
    """The registry, its choice and what is loaded, all put back after the test."""
    monkeypatch.setattr(backends, "_backends", dict(backends._backends))
    monkeypatch.setattr(backends, "_loaded", set(backends._loaded))
    monkeypatch.setattr(backends, "_chosen", [None])
    monkeypatch.setattr(backends, "_resolved", {})
    return backends


def _x(value=1.0):
    return torch.full((2, 3), value), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)


def test_reference_is_always_available():
    assert "reference" in hlk.available_backends()
    assert "reference" not in unavailable_backends()
    assert not set(hlk.available_backends()) & set(unavailable_backends())


def test_reference_takes_any_device():
    for device in ("cpu", "cuda", "meta"):
        assert resolve(torch.device(device), "reference") == "reference"


@pytest.mark.parametrize("call", [lambda: hlk.use_backend("abacus"), lambda: resolve(CPU, "abacus"),
                                  lambda: hlk.lora_linear(*_x(), backend="abacus")],
                         ids=["use_backend", "resolve", "lora_linear"])
def test_unknown_name_is_named_with_the_known_ones(call, registry):
    with pytest.raises(ValueError, match=r"backend must be one of \[.*'reference'.*\], got 'abacus'"):
        call()
    assert registry._chosen == [None]


def test_unavailable_backend_reports_its_reason(registry):
    register_backend(Backend("abacus", "no.such.module", why_unavailable=lambda: "no beads on this machine"))
    assert "abacus" not in hlk.available_backends()
    assert unavailable_backends()["abacus"] == "no beads on this machine"
    for call in (lambda: hlk.use_backend("abacus"), lambda: resolve(CPU, "abacus")):
        with pytest.raises(RuntimeError, match="backend 'abacus' is unavailable: no beads on this machine"):
            call()
    assert registry._chosen == [None]
    assert resolve(CPU) != "abacus"


def test_later_backend_is_preferred_where_it_takes_the_device(registry):
    register_backend(Backend("abacus", REFERENCE_MODULE, device_types=("cpu",)))
    assert hlk.available_backends()[0] == "abacus"
    assert resolve(CPU) == "abacus"
    assert resolve(torch.device("meta")) != "abacus"
    assert resolve(CPU, "reference") == "reference"


def test_backend_of_another_device_says_what_it_takes(registry):
    register_backend(Backend("abacus", REFERENCE_MODULE, device_types=("cuda",)))
    with pytest.raises(RuntimeError, match=r"backend 'abacus' takes tensors on \['cuda'\], got cpu"):
        resolve(CPU, "abacus")
    with hlk.use_backend("abacus"):
        with pytest.raises(RuntimeError, match="backend 'abacus' takes tensors on"):
            hlk.lora_linear(*_x())


def test_backend_is_imported_at_its_first_use(registry, tmp_path, monkeypatch):
    (tmp_path / "beads_backend.py").write_text("import os\nos.environ['BEADS_IMPORTED'] = '1'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("BEADS_IMPORTED", "0")
    register_backend(Backend("abacus", "beads_backend"))
    hlk.available_backends()
    with hlk.use_backend("abacus"):
        assert os.environ["BEADS_IMPORTED"] == "0"
        resolve(CPU)
        assert os.environ["BEADS_IMPORTED"] == "1"
    sys.modules.pop("beads_backend")


def test_use_backend_as_a_call_holds_for_the_process(registry):
    register_backend(Backend("abacus", REFERENCE_MODULE))
    hlk.use_backend("reference")
    assert resolve(CPU) == "reference"
    hlk.use_backend("abacus")
    assert resolve(CPU) == "abacus"
    hlk.use_backend(None)
    assert resolve(CPU) == "abacus"


def test_use_backend_as_a_block_is_put_back(registry):
    register_backend(Backend("abacus", REFERENCE_MODULE))
    hlk.use_backend("abacus")
    with hlk.use_backend("reference"):
        assert resolve(CPU) == "reference"
        with hlk.use_backend("abacus"):
            assert resolve(CPU) == "abacus"
        with hlk.use_backend(None):
            assert resolve(CPU) == "abacus"
        assert resolve(CPU) == "reference"
    assert resolve(CPU) == "abacus"


def test_use_backend_is_put_back_after_an_exception(registry):
    register_backend(Backend("abacus", REFERENCE_MODULE))
    with pytest.raises(KeyError, match="wanted"):
        with hlk.use_backend("reference"):
            raise KeyError("wanted")
    assert resolve(CPU) == "abacus"


def test_argument_overrides_the_choice(registry):
    register_backend(Backend("abacus", REFERENCE_MODULE, device_types=("cuda",)))
    hlk.use_backend("abacus")
    assert torch.equal(hlk.lora_linear(*_x(), backend="reference"), torch.full((2, 4), 6.0))


def test_backward_uses_the_backend_of_its_forward(registry, monkeypatch):
    called = []

    def op(name, backend):
        called.append((name, backend))
        return getattr(torch.ops.heterolora_kernels, f"{name}_reference").default

    monkeypatch.setattr("heterolora_kernels.ops.autograd._op", op)
    register_backend(Backend("abacus", REFERENCE_MODULE))
    inputs = make_inputs(CASES["one_path"]).requires_grad_()
    with hlk.use_backend("abacus"):
        out = hlk.lora_linear(inputs.x, inputs.weights[0], inputs.lora_A[0], inputs.lora_B[0])
    with hlk.use_backend("reference"):
        out.sum().backward()
    assert called == [("lora_linear", "abacus"), ("lora_linear_backward", "abacus")]


def _python(code):
    root = Path(hlk.__file__).parents[1]
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tests}"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_import_touches_no_device_environment_or_file():
    out = _python("""
        import os, sys, threading, warnings
        import torch
        warnings.simplefilter("error")
        seen = []

        def ours():
            frame = sys._getframe(2)
            while frame is not None:
                if frame.f_globals.get("__name__", "").split(".")[0] == "heterolora_kernels":
                    return True
                if frame.f_code.co_filename.startswith("<frozen importlib"):
                    return False
                frame = frame.f_back
            return False

        def audit(event, args):
            if event in ("open", "os.mkdir", "os.listdir", "subprocess.Popen", "socket.connect") and ours():
                seen.append((event, str(args[0])))

        for method in ("__getitem__", "__setitem__", "__delitem__", "__contains__"):
            def spy(self, *args, _base=getattr(os._Environ, method), _method=method):
                if ours():
                    seen.append((_method, str(args[0])))
                return _base(self, *args)
            setattr(os._Environ, method, spy)

        def refuse(*args, **kwargs):
            raise RuntimeError("a device was touched")

        torch.cuda._lazy_init = refuse
        for name in ("_cuda_getDeviceCount", "_cuda_init"):
            if hasattr(torch._C, name):
                setattr(torch._C, name, refuse)
        torch.cuda.device_count = torch.cuda.is_available = refuse
        environment, generator, threads = dict(os.environ), torch.get_rng_state(), torch.get_num_threads()
        alive, mode = threading.active_count(), (torch.is_grad_enabled(), torch.get_default_dtype())
        sys.addaudithook(audit)
        import heterolora_kernels
        assert dict(os.environ) == environment
        assert torch.equal(torch.get_rng_state(), generator) and torch.get_num_threads() == threads
        assert threading.active_count() == alive
        assert mode == (torch.is_grad_enabled(), torch.get_default_dtype())
        assert not torch.cuda.is_initialized()
        print(seen)
    """)
    assert out == "[]"


def test_import_says_nothing_and_leaves_optional_packages_out():
    out = _python("""
        import warnings
        warnings.simplefilter("error")
        import sys
        import torch
        import heterolora_kernels
        print([name for name in ("transformers", "accelerate", "peft", "matplotlib", "datasets") if name in sys.modules])
        print("heterolora_kernels.backends.reference" in sys.modules)
    """)
    assert out.splitlines() == ["[]", "False"]


def test_first_call_may_be_compiled():
    out = _python("""
        import torch
        import heterolora_kernels as hlk
        x, weight, a, b = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3, requires_grad=True), torch.ones(4, 1)
        run = torch.compile(lambda: hlk.lora_linear(x, weight, a, b), fullgraph=True, backend="aot_eager")
        print(run().sum().item())
    """)
    assert out == "48.0"
