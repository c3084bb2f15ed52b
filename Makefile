# perturbret's commands; `make help` lists them. Nothing but Python 3.11, make and git is needed.

DATASET ?= auto
GRID ?= params/ablation.yaml
CORES ?= $(shell getconf _NPROCESSORS_ONLN)
OUTPUTS ?= outputs
# PYTHON: the interpreter that .venv is made from.   TORCH=cpu: torch's CPU build.   ENV=active: no .venv.
PYTHON ?=
TORCH ?=
# Shells use a variable ENV of their own: this one is heard on make's command line only.
ENV :=

# The stamp is written last and named after what was installed, where: no stamp, or another name, and `make` installs.
KEY := $(shell (cat requirements.lock pyproject.toml; pwd) | cksum | tr ' ' '-')
STAMP := .venv/.installed-$(KEY)
PARTIAL := .venv.partial

ifeq ($(ENV),active)
PY := python
READY := active
else ifeq ($(ENV),)
PY := .venv/bin/python
READY := $(STAMP)
else
$(error ENV: expected 'active' or nothing, got '$(ENV)')
endif

ifeq ($(TORCH),cpu)
TORCH_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu
else ifneq ($(TORCH),)
$(error TORCH: expected 'cpu' or nothing, got '$(TORCH)')
endif

# torch first, with the dependencies of its build (a CUDA build brings its libraries), held to the lock's versions;
# then the lock as it stands; then this checkout. What is there already is not installed again.
PIP_INSTALL := $(PY) -m pip --disable-pip-version-check install
define install
$(PIP_INSTALL) $(TORCH_INDEX) --constraint requirements.lock torch
$(PIP_INSTALL) --no-deps --requirement requirements.lock
$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
endef

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help report test lab lint format bench env clean active activated

help: ## this list
	@echo "make TARGET [DATASET=name or file.yaml] [GRID=grid.yaml] [CORES=n] [OUTPUTS=directory] [TORCH=cpu] [ENV=active]"
	@echo
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  \1	\2/p' Makefile

report: $(READY) ## run the benchmark and write OUTPUTS/index.html (DATASET=auto, GRID=params/ablation.yaml)
	@$(PY) -m perturbret report --dataset "$(DATASET)" --grid "$(GRID)" --cores "$(CORES)" --outputs "$(OUTPUTS)"

test: $(READY) ## run every test, the notebooks among them
	@$(PY) -m pytest

lab: $(READY) ## open the notebooks in JupyterLab, the kernel registered
	@$(PY) -m ipykernel install --sys-prefix --name perturbret --display-name perturbret
	@$(PY) -m jupyterlab --ServerApp.root_dir=notebooks

lint: $(READY) ## check style, formatting and that notebooks are stored without outputs
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m nbstripout --verify notebooks/*.ipynb

format: $(READY) ## repair what lint finds, as far as it can be repaired
	@$(PY) -m nbstripout notebooks/*.ipynb
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: $(READY) ## run benchmarks/*.py with their defaults (docs/benchmarks.md)
	@for script in benchmarks/*.py; do echo "$$script"; $(PY) "$$script" || exit 1; done

clean: ## remove .venv and caches; results in OUTPUTS stay
	rm -rf .venv $(PARTIAL) .pytest_cache .ruff_cache .hypothesis .snakemake build dist
	find perturbret tests benchmarks notebooks -name __pycache__ -prune -exec rm -rf {} +

ifeq ($(ENV),active)
env: activated ## install everything and run nothing (into .venv, or with ENV=active into the activated environment)
	$(install)

active: activated
	@$(PY) workflow/check_environment.py
else
env: $(STAMP)
endif

activated:
	@[ -n "$$VIRTUAL_ENV$$CONDA_PREFIX" ] || { \
	  echo "ENV=active: expected an activated conda or venv environment, found none" >&2; exit 1; }

# PARTIAL lies there while an installation runs, with the number of its make. Found without that make: it was
# interrupted, pip may have left half a package, and only a fresh .venv is sure.
$(STAMP):
	@if [ -e $(PARTIAL) ]; then \
	  if kill -0 "$$(cat $(PARTIAL))" 2>/dev/null; then \
	    echo "process $$(cat $(PARTIAL)) is installing .venv: wait for it (or remove $(PARTIAL) if that is not so)" >&2; \
    exit 1; fi; \
	  echo "the last installation was interrupted: making .venv afresh"; rm -rf .venv; fi
	@echo $$PPID > $(PARTIAL)
	@if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then \
	  for python in $(or $(PYTHON),python3.11 python3); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then rm $(PARTIAL); \
	    echo "no Python 3.11 or newer among: $(or $(PYTHON),python3.11 python3); name one with PYTHON=/path/to/python3.11" >&2; \
	    exit 1; fi; \
	  echo "making .venv with $$($$found --version)"; \
	  $$found -m venv --clear .venv; fi
	$(install)
	@rm -f .venv/.installed-*
	@mv $(PARTIAL) $@
