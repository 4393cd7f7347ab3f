# make demo   train and evaluate a small DAT on real handwritten digits, from nothing
# make test   the whole test suite
# make lint   style
# make scorecard   what a run survives, in about five minutes
PYTHON ?= python3
VENV ?= .venv
OPTS ?=                 # further configuration of the demo, as TRAIN.EPOCHS=3
RUN = output/dat_micro/digits

.PHONY: demo test lint scorecard

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

demo: $(VENV)/installed
	rm -rf $(RUN)
	$(VENV)/bin/python tools/prepare.py digits output/digits
	$(VENV)/bin/torchrun --standalone --nproc-per-node 2 main.py --cfg configs/digits.yaml --opts $(OPTS)
	$(VENV)/bin/python main.py --cfg configs/digits.yaml --eval --resume $(RUN) --opts $(OPTS)
	@echo "The run lies in $(RUN); look at it with: $(VENV)/bin/tensorboard --logdir output"

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

scorecard: $(VENV)/installed
	$(VENV)/bin/python tests/reliability/scorecard.py --short
