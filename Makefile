# From a clone to a table: `make reproduce`. All commands run inside .venv, which is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# runs of a study at a time; two on a core each do 1.4 times the work of one on both
JOBS ?= 2

.PHONY: install reproduce study test test-slow lint strip clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'diffseg needs Python 3.11 or newer; run make PYTHON=python3.11 install')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade-strategy only-if-needed -c constraints.txt -e ".[test]"
	touch $@

reproduce: install  ## notebooks 01 to 06 on the embedded mini world; ends with the table
	$(BIN)/diffseg run mini-voc

study: install  ## the mini benchmarks, then every study of notebooks/studies: about seven hours on two cores; an interrupted study resumes
	for name in mini-voc mini-imagenet-s mini-cityscapes; do $(BIN)/diffseg run $$name || exit 1; done
	$(BIN)/diffseg run mini-cityscapes --only 1-4 --set run=mini-cityscapes-untuned 'target_images=""' train_real=false
	$(BIN)/python -m diffseg.experiments.pseudo_captions results/runs/mini-cityscapes-untuned/04_robust_training/synthetic \
		--out results/data/street-captions --words rider=cyclist motorcycle=motorbike
	for name in $(basename $(notdir $(wildcard notebooks/studies/*.yaml))); do $(BIN)/diffseg study $$name --jobs $(JOBS) || exit 1; done
	$(BIN)/python -m diffseg.experiments.noise

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
