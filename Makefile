# The verbs of the project. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3# interpreter that makes the environment, 3.11 or newer
VENV ?= .venv# the environment
EXPERIMENT ?= table2_embedded# file in conf/experiment, for sweep, status and tables
LAUNCHER ?=# file in conf/hydra/launcher: local or slurm; empty runs the cells one after another here
SUITE ?= paper# of reproduce-tableN: paper, or embedded where there is no ImageNet or no hub
ARGS ?=# further overrides, e.g. ARGS="seed=0,1,2 engine.device=cuda:1"

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
LAUNCH = $(if $(LAUNCHER),hydra/launcher=$(LAUNCHER))

.PHONY: help setup data demo test lint audit format sweep status tables figures bench report notebooks wandb-sync clean
.PHONY: reproduce-table1 reproduce-table2 reproduce-table3 reproduce-table4

help: ## list the verbs
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'variables: EXPERIMENT=$(EXPERIMENT) LAUNCHER=$(LAUNCHER) ARGS=$(ARGS) PYTHON=$(PYTHON) VENV=$(VENV)'

setup: $(STAMP) ## make the environment in .venv, once

$(STAMP): pyproject.toml requirements.lock
	@free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1000000)}'); [ "$$free" -ge 8 ] \
		|| echo "note: $$free GB are free here; the environment takes up to 7 GB, most of it PyTorch's libraries for GPUs"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'error: PYTHON=$(PYTHON) is not Python 3.11 or newer; set PYTHON=python3.11'; exit 2; }
	@$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev,cluster,export]'
	@touch $@

data: setup ## fetch the embedded models and texts, checked by hash
	$(RUN) -m bc.data

demo: setup data ## a sweep on real models, text and images, its table and figure (about 8 minutes on 2 cores)
	@for half in demo demo_vision; do \
		$(RUN) -m experiments.run +experiment=$$half $(LAUNCH) $(ARGS) \
		&& $(RUN) -m experiments.tables $$half $(ARGS) > /dev/null \
		&& $(RUN) -m experiments.figures $$half $(ARGS) > /dev/null || exit; \
	done
	@cat results/tables/demo.md results/tables/demo_vision.md
	@echo 'tables:  results/tables/demo.md and demo_vision.md (.csv, .tex, .html); all results: results/cells.csv'
	@echo 'figures: results/figures/demo.png and demo_vision.png (.svg)'

test: setup ## run the tests
	$(RUN) -m pytest

lint: setup ## check style and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

audit: setup ## compare requirements.lock with the known vulnerabilities (needs the internet)
	$(RUN) -m venv --clear .audit && .audit/bin/pip install --quiet pip-audit
	.audit/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip --strict; status=$$?; rm -rf .audit; exit $$status

format: setup ## put the code into the project's style
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

sweep: setup ## run EXPERIMENT's cells, on LAUNCHER, with ARGS; finished cells are skipped
	$(RUN) -m experiments.run +experiment=$(EXPERIMENT) $(LAUNCH) $(ARGS)

status: setup ## one line a cell of EXPERIMENT, and totals
	@$(RUN) -m experiments.status $(EXPERIMENT) $(ARGS)

tables: setup ## rebuild results/cells.csv and EXPERIMENT's table
	@$(RUN) -m experiments.tables $(EXPERIMENT) $(ARGS)

wandb-sync: setup ## upload to Weights & Biases what cells wrote offline (after `wandb login`)
	$(RUN) -m experiments.wandb_sync

figures: setup ## draw every experiment that cells.csv has rows of, as PNG and SVG
	@$(RUN) -m experiments.figures

bench: setup ## measure what calibration costs beside the published protocols, into results/benchmarks (about 30 minutes)
	$(RUN) -m experiments.benchmarks $(ARGS)

report: figures ## write results/report/index.html, one file that needs no network, and results/costs.md
	@$(RUN) -m experiments.costs
	@$(RUN) -m experiments.report

notebooks: setup ## execute the notebooks on the committed results and keep their outputs
	$(RUN) -m pytest --nbmake --overwrite notebooks
	@$(RUN) -m experiments.notebooks

reproduce-table1: ## run Table 1 (vision) and rebuild it; SUITE=embedded needs no ImageNet
reproduce-table2: ## run Table 2 (language models) and rebuild it; SUITE=embedded needs no hub
reproduce-table3: ## run Table 3 (group sizes, AWQ) and rebuild it; SUITE=embedded needs no hub
reproduce-table4: ## run Table 4 (binary weights, BiLLM) and rebuild it; SUITE=embedded needs no hub
TABLES := reproduce-table1 reproduce-table2 reproduce-table3 reproduce-table4
IMAGENET = --imagenet '$(patsubst data.paths.imagenet=%,%,$(filter data.paths.imagenet=%,$(ARGS)))'
IMAGENET += $(if $(findstring data.evaluation.limit=,$(ARGS)),--part) $(if $(findstring model.path=,$(ARGS)),,--hub)
ifeq ($(SUITE),embedded)
$(TABLES): reproduce-%: data
	$(RUN) -m experiments.run +experiment=$*_embedded $(LAUNCH) $(ARGS)
	$(RUN) -m experiments.tables $*_embedded $(filter-out seed=%,$(ARGS))
else ifneq ($(SUITE),paper)
$(TABLES):
	@echo 'error: SUITE=$(SUITE) is not known; allowed: paper, embedded' >&2; exit 2
else
$(TABLES): reproduce-%: setup
	@$(RUN) -m bc.data $(if $(filter table1,$*),$(IMAGENET),--hub) \
		|| { echo 'without $(if $(filter table1,$*),all of ImageNet or the models,the hub): make $@ SUITE=embedded' >&2; exit 2; }
	$(RUN) -m experiments.run +experiment=$* $(LAUNCH) $(ARGS)
	$(RUN) -m experiments.tables $* $(filter-out seed=%,$(ARGS))
endif

clean: ## remove caches, logs and shared artefacts; results and the environment stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist results/artefacts results/logs
	find bc conf experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
