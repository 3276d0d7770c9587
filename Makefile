# Everything runs in $(VENV), which the first call makes: Python, torch, the packages, the C++ extension.
#
#   make demo       the main job on real clips, and short versions of `make video`, `tokens`, `fifo` and `ranks`: outputs/
#   make video      a tokenizer and a MeBT learn from real clips: outputs/mebt_*.gif, .mp4
#   make tokens     a VQ-VAE learns from real clips, VideoGPT and MeBT from its codes: outputs/tokens_*.gif, .mp4
#   make fifo       a denoiser learns from real clips, and FIFO-Diffusion makes long videos of it: outputs/fifo_*
#   make ranks      a MeBT learns from real clips with the tokens of a video over $(RANKS) processes: outputs/distributed_*
#   make retrieval  a SViTT learns to retrieve clips by their captions: outputs/svitt_*.png
#   make test       all tests and doctests, and which ten took longest
#   make fuzz       $(EXAMPLES) random inputs for every operator (or OPERATORS="leap_attention or axial_attention"), others each time
#   make test-gpu   the tests that need a GPU; `make test-gpu VENV= PYTHON=python3` for a Python with its own torch
#   make sanitize   the C++ with AddressSanitizer and UndefinedBehaviorSanitizer, and its tests, for each instruction
#                   set; a part of it: `make sanitize CAPABILITIES=avx2 SANITIZE_TESTS=tests/test_direct_calls.py`
#   make arm64      the C++ compiled for arm64 (Debian: g++-aarch64-linux-gnu), its vectors and an attention under QEMU
#                   (qemu-user)
#   make kernels    what the compiler makes of every Triton kernel, without a GPU; with another Triton than the installed
#                   one, in an environment of its own: `make kernels TRITON=3.6.0 ARCHITECTURES="sm90 gfx942"`
#   make wheel      the wheel and the source distribution: dist/ (two minutes of compiling, for any Python and torch)
#   make test-wheel the wheel of dist/ in an environment without a compiler, whose torch is $(TORCH): `TORCH=2.14.1`
#   make test-timm  the tests of timm's models, in an environment of torch $(TIMM_TORCH), torchvision and timm
#   make lint       ruff and mypy
#   make bench      timings, tables and plots of $(OPERATOR): benchmarks/results/
#   make docs       the site, with every page of docs/ and the API: docs/_build/index.html
#   make clean      remove what was built, but not the environments: $(VENV), .venv-*

PYTHON ?= python3
VENV ?= .venv
# Another index of PyTorch's builds, see https://pytorch.org/get-started/locally: that of its CPU builds is a tenth of
# the download where there is no GPU. The version is pinned in constraints.txt.
TORCH_INDEX ?=
OPERATOR ?= leap_attention
RANKS ?= 2
TRITON ?=
ARCHITECTURES ?= sm90
HEAD_DIMS ?=
# Those of this processor, or some of them.
CAPABILITIES ?= $(shell $(RUN) -c 'import vattn._C as c; print(*c.cpu_capabilities())' 2>/dev/null)
# Of the kernels those of the CPU, and all that draws its inputs at random. One test starts another Python: not that.
SANITIZE_TESTS ?= tests/kernels tests/test_direct_calls.py $(shell grep -l hypothesis tests/test_*.py) \
	-k "(cpp or direct_calls or hypothesis) and not instruction_set"
ARM64_CXX ?= aarch64-linux-gnu-g++
ARM64_EMULATOR ?= qemu-aarch64 -L /usr/aarch64-linux-gnu
# By default the version that constraints.txt pins.
TORCH ?= $(patsubst torch==%,%,$(shell cat constraints.txt))
# torchvision is built for one version of torch, and PyPI's for its CUDA builds. There, the CPU build that $(TORCH) may be
# does not import it.
TIMM_TORCH ?= 2.14.1
EXAMPLES ?= 10000
OPERATORS ?=

ifeq ($(VENV),)
RUN := $(PYTHON)
else
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
endif
ifeq ($(TRITON),)
COMPILE := $(RUN)
COMPILER := $(INSTALLED)
else
COMPILE := .venv-triton-$(TRITON)/bin/python
COMPILER := .venv-triton-$(TRITON)/.installed
endif
BUILT := vattn/_build.json
TORCHRUN = $(RUN) -m torch.distributed.run --standalone --nproc-per-node
SOURCES := $(shell find csrc -type f)

# Python, with no program beside it that a test might start: no compiler above all.
WITHOUT_COMPILER = PATH="$(CURDIR)/$(WHEEL_VENV)/bin" $(CURDIR)/$(WHEEL_VENV)/bin/python
WHEEL_VENV := .venv-wheel-$(TORCH)

.PHONY: demo video tokens fifo ranks retrieval test fuzz test-gpu sanitize arm64 kernels wheel test-wheel test-timm lint \
	bench docs clean

# FIFO's tensors are so small here that a second thread gains little, and loses much where another program wants its core.
demo: $(BUILT)
	$(RUN) -m examples.demo
	$(RUN) -m examples.mebt_video --steps 150 --outputs outputs/demo
	$(RUN) -m examples.video_tokens --short --steps 400 --outputs outputs/demo
	OMP_NUM_THREADS=1 $(RUN) -m examples.fifo_long_video --short --size 16 --steps 400 --frames 96 --outputs outputs/demo
	OMP_NUM_THREADS=1 $(TORCHRUN) 2 -m examples.train_distributed --short --outputs outputs/demo

video: $(BUILT)
	$(RUN) -m examples.mebt_video

tokens: $(BUILT)
	$(RUN) -m examples.video_tokens

# Threads that wait for each other sleep: by default they spin, and are ten times slower where another program runs.
fifo: $(BUILT)
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m examples.fifo_long_video

ranks: $(BUILT)
	OMP_NUM_THREADS=1 $(TORCHRUN) $(RANKS) -m examples.train_distributed

retrieval: $(BUILT)
	$(RUN) -m examples.svitt_retrieval

# One process per core. Threads of kernels that wait let those of other processes run.
test: $(BUILT)
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal --durations=10

fuzz: $(BUILT)
	EXAMPLES=$(EXAMPLES) $(RUN) -m pytest tests/test_any_input.py --hypothesis-profile=fuzz --durations=0 -v \
		$(if $(OPERATORS),-k "$(OPERATORS)")

test-gpu: $(BUILT)
	$(RUN) -m pytest -m gpu

# In a tree of its own, with the tests, so that these import this build. Python is not linked with the sanitizer, which
# must come before all that allocates, nor with the C++ library, whose exceptions it watches: both are preloaded.
sanitize: $(INSTALLED)
	rm -rf build/sanitize/lib
	VATTN_SANITIZE=1 VATTN_BUILD_CPP=1 VATTN_BUILD_CUDA=0 $(RUN) setup.py --quiet \
		build --build-base build/sanitize --build-lib build/sanitize/lib
	cp -r tests benchmarks conftest.py pyproject.toml build/sanitize/lib
	for capability in $(CAPABILITIES); do \
		(cd build/sanitize/lib && VATTN_CPU_CAPABILITY=$$capability ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		$(if $(VENV),$(CURDIR)/)$(RUN) -m pytest -q $(SANITIZE_TESTS)) || exit 1; \
	done

# With the headers of the PyTorch at hand, which are the same for all processors. Its library is not: nothing is linked.
arm64: $(BUILT)
	command -v $(ARM64_CXX) $(firstword $(ARM64_EMULATOR))
	mkdir -p build/arm64
	flags=$$($(RUN) -c 'import json; from torch.utils.cpp_extension import include_paths as paths; import sysconfig; \
		print(*json.load(open("$(BUILT)"))["flags"], *("-isystem " + path for path in paths()), \
		"-isystem", sysconfig.get_path("include"))'); \
	for source in csrc/*.cpp csrc/cpu/*.cpp; do \
		$(ARM64_CXX) $$flags -Werror -fopenmp -fPIC -Icsrc \
			-c $$source -o build/arm64/$$(basename $$source .cpp).o || exit 1; \
	done
	CXX="$(ARM64_CXX)" EMULATOR="$(ARM64_EMULATOR)" $(RUN) -m pytest tests/kernels/test_vectors.py -k generic

kernels: $(COMPILER)
	$(COMPILE) -m benchmarks.kernel_report --architectures $(ARCHITECTURES) $(if $(HEAD_DIMS),--head-dims $(HEAD_DIMS))

# By way of the source distribution. The CUDA part would tie the wheel to one Python and one torch.
wheel: $(INSTALLED)
	rm -rf build/wheel dist
	VATTN_BUILD_CPP=1 VATTN_BUILD_CUDA=0 $(RUN) -m build --no-isolation --outdir build/wheel
	PATH="$(dir $(abspath $(RUN))):$$PATH" $(RUN) -m auditwheel repair --plat manylinux_2_28_$$(uname -m) --only-plat \
		--exclude libtorch_cpu.so --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist
	$(RUN) -m abi3audit --strict dist/*.whl
	$(RUN) -m tests.wheels dist/*.whl

# The README's programs and the tests of the CPU kernels, away from the checkout.
test-wheel: $(WHEEL_VENV)/.installed
	$(WHEEL_VENV)/bin/python -m pip install --no-deps --force-reinstall dist/*.whl
	$(WHEEL_VENV)/bin/python -m pip install "$$(ls dist/*.whl)[test]"
	rm -rf build/test-wheel
	mkdir -p build/test-wheel
	cp -r tests benchmarks conftest.py pyproject.toml README.md build/test-wheel
	cd build/test-wheel && $(WITHOUT_COMPILER) -m vattn.info
	cd build/test-wheel && $(WITHOUT_COMPILER) -m pytest -q tests/test_documents.py -k "programs and README"
	cd build/test-wheel && $(WITHOUT_COMPILER) -m pytest -q tests/kernels -k "cpp and not slow and not instruction_sets"
	cd build/test-wheel && $(WITHOUT_COMPILER) -m pytest -q tests/test_direct_calls.py

# The extension of the checkout is built for all versions of torch.
test-timm: .venv-timm-$(TIMM_TORCH)/.installed $(BUILT)
	OMP_WAIT_POLICY=PASSIVE .venv-timm-$(TIMM_TORCH)/bin/python -m pytest tests/test_timm.py vattn/integrations/timm.py

lint: $(BUILT)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

bench: $(BUILT)
	$(RUN) -m benchmarks $(OPERATOR) --backward
	$(RUN) -m benchmarks plot $(OPERATOR)

# In an environment of its own, behind which are the packages of $(RUN). What a failed build leaves is not in docs/_build.
docs: $(BUILT) .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) .venv-docs/bin/python -m mkdocs build --strict
	rm -rf docs/_build
	mv build/docs docs/_build

clean:
	rm -rf build dist outputs docs/_build *.egg-info vattn/_C*.so $(BUILT)
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.venv-*' -prune -exec rm -rf {} +

# The extension is built in place, and not by pip, so that ninja recompiles only what has changed.
$(BUILT): $(SOURCES) setup.py $(INSTALLED)
	VATTN_BUILD_CPP=1 $(RUN) setup.py --quiet build_ext --inplace

$(VENV)/.installed: constraints.txt pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vattn needs Python 3.11 or later: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install $(addprefix --extra-index-url ,$(TORCH_INDEX)) --constraint constraints.txt \
		torch setuptools ninja
	VATTN_BUILD_CPP=0 $(RUN) -m pip install --constraint constraints.txt --no-build-isolation \
		--editable '.[demo,test,dev]'
	touch $@

# Environments with packages of their own, and behind them those of $(RUN).
BEHIND = $(RUN) -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
	> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"

.venv-docs/.installed: docs/requirements.txt $(INSTALLED)
	$(RUN) -m venv $(@D)
	$(@D)/bin/python -m pip install --requirement docs/requirements.txt
	$(BEHIND)
	touch $@

# One package: no second torch.
.venv-triton-$(TRITON)/.installed: $(INSTALLED)
	$(RUN) -m venv $(@D)
	$(@D)/bin/python -m pip install --no-deps triton==$(TRITON)
	$(BEHIND)
	touch $@

.venv-timm-$(TIMM_TORCH)/.installed: $(INSTALLED)
	$(RUN) -m venv $(@D)
	$(@D)/bin/python -m pip install $(addprefix --extra-index-url ,$(TORCH_INDEX)) torch==$(TIMM_TORCH) torchvision timm
	$(BEHIND)
	touch $@

$(WHEEL_VENV)/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install $(addprefix --extra-index-url ,$(TORCH_INDEX)) torch==$(TORCH)
	touch $@
