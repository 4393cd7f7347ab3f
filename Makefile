# make demo        train and evaluate a small DAT on handwritten digits, from nothing
# make test-fast   the unit tests; a minute on 2 cores
# make test        also training runs, faults, and parity with the released code; four minutes
# make test-all    also the slow tests; quarter of an hour
# make scorecard   what a run survives, in its short form; ten minutes
# make lint        style
# make pictures    the pictures of the documentation, with a report of the run PICTURED; needs Chromium
PYTHON ?= python3
VENV ?= .venv
OPTS ?=                 # further settings of the demo, as TRAIN.EPOCHS=3
RUN = output/dat_micro/digits
PICTURED = output/dat_pp_nano/imagenette_80
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: demo test-fast test test-all scorecard lint pictures

$(VENV)/installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --requirement requirements-dev.txt
	touch $@

demo: $(VENV)/installed
	rm -rf $(RUN)
	$(VENV)/bin/python tools/prepare.py digits output/digits
	$(VENV)/bin/torchrun --standalone --nproc-per-node 2 main.py --cfg configs/digits.yaml --opts $(OPTS)
	$(VENV)/bin/python main.py --cfg configs/digits.yaml --eval --resume $(RUN) --opts $(OPTS)
	@echo "How it went: open $(RUN)/report.html in a browser, or run $(VENV)/bin/tensorboard --logdir output"

test-fast: $(VENV)/installed
	$(PYTEST) tests/unit

test: $(VENV)/installed
	$(PYTEST)

test-all: $(VENV)/installed
	$(PYTEST) -m "slow or not slow"

scorecard: $(VENV)/installed
	$(VENV)/bin/python tests/reliability/scorecard.py --short

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

pictures: $(VENV)/installed
	photos=$$($(VENV)/bin/python -c "from importlib.resources import files; print(files('sklearn.datasets.images'))"); \
	$(VENV)/bin/python tools/explore.py $$photos/china.jpg $$photos/flower.jpg --pretrained weights/dat_pp_nano_imagenette --size 224 \
	    --point 0.3,0.42 --out output/explore.html && \
	$(VENV)/bin/python tools/visualize.py $$photos/flower.jpg --pretrained weights/dat_pp_nano_imagenette --out docs/attention.png && \
	$(VENV)/bin/python tools/report.py $(PICTURED) --pictures $$photos/china.jpg $$photos/flower.jpg
	$(VENV)/bin/python tools/screenshot.py output/explore.html docs/explorer.png
	$(VENV)/bin/python tools/screenshot.py $(PICTURED)/report.html docs/report.png --size 1280x1150
