# From a clone to a table: `make reproduce`. All commands run inside .venv, which is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# parts of the study at a time; each trains on one core
JOBS ?= 2
# glibc's setting that kernels get, for trainings that run in none
TRAIN = GLIBC_TUNABLES=$$($(BIN)/python -c "from diffseg.lab.forked import MALLOC; print(MALLOC)") $(BIN)/python -m diffseg.experiments

.PHONY: install reproduce study study-scaling study-label_efficiency study-robust study-ladder test test-slow lint strip clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15) and 'the pinned packages need Python 3.11 to 3.14; run make PYTHON=python3.11 install')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade-strategy only-if-needed -c constraints.txt -e ".[test]"
	touch $@

reproduce: install  ## notebooks 01 to 06 on the embedded mini world; ends with the table
	$(BIN)/diffseg run mini-voc

study: install  ## the mini benchmarks, then most trainings behind results/claims.csv: about four hours on two cores; a second call resumes
	for name in mini-voc mini-imagenet-s mini-cityscapes; do $(BIN)/diffseg run $$name || exit 1; done
	$(BIN)/diffseg run mini-voc --only 1-3 --set run=mini-voc-without plain_share=1.0
	$(BIN)/diffseg run mini-voc --only 1-3 --set run=mini-voc-unrefined refiner=none beta=0.2
	$(BIN)/diffseg run mini-cityscapes --only 1-3 --set run=mini-cityscapes-unrefined refiner=none beta=0.2
	$(BIN)/diffseg run mini-cityscapes --only 1-3 --set run=mini-cityscapes-untuned lora_scale=0
	$(BIN)/diffseg run mini-cityscapes --only 1-3 --set run=mini-cityscapes-without lora_scale=0 plain_share=1.0
	$(MAKE) -j$(JOBS) study-scaling study-label_efficiency study-robust study-ladder
	$(BIN)/python -m diffseg.experiments.published_figures

study-scaling: install
	OMP_NUM_THREADS=1 $(BIN)/diffseg study scaling

study-label_efficiency: install
	$(TRAIN).label_efficiency mini-voc --finer mini-imagenet-s --seeds 3 --counts 20 90 720

study-robust: install
	$(TRAIN).robust mini-voc --runs mini-voc-unrefined \
		--arms edge-aware "edge-aware, one network" "edges without a network"
	$(TRAIN).robust mini-cityscapes --runs mini-cityscapes-unrefined --arms edge-aware

study-ladder: install
	$(TRAIN).ladder mini-voc --rungs real oracle robust ours without --without mini-voc-without
	$(TRAIN).ladder mini-imagenet-s --rungs real robust ours
	$(TRAIN).ladder mini-cityscapes --rungs real robust ours untuned without \
		--untuned mini-cityscapes-untuned --without mini-cityscapes-without

test: install  ## the tests that CI runs: a worker a core, one thread each, a file on one worker
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --durations=10

test-slow: install  ## the tests that take longer
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

strip: install  ## remove outputs from the notebooks before a commit
	$(BIN)/python notebooks/strip.py notebooks/*.ipynb notebooks/solutions/*.ipynb

clean: install  ## list the results that no run refers to, and remove them when you agree
	$(BIN)/diffseg clean
