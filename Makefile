# Every target builds what it needs in .venv; nothing is done by hand.
#   make demo       pre-train a masked autoencoder on real photos, pictures and tables in out/demo
#   make test       the whole suite         make bench      the benchmarks, JSON in out/bench.json
#   make gpu-check  the proof of the GPU kernels without a GPU      make lint     ruff
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
# A CPU build of torch; any torch >= 2.10 serves (make TORCH=torch).
TORCH ?= torch==2.13.0

.PHONY: demo test bench gpu-check lint clean
# Ten minutes in all: a slow build leaves less of them for training, which plans its steps, but enough to judge the result.
demo: BEGAN := $(shell date +%s)
demo: $(VENV)/.demo
	left=$$(($(BEGAN) + 520 - $$(date +%s))); [ $$left -lt 130 ] && left=130; [ $$left -gt 210 ] && left=210; \
	$(BIN)/maskops demo --out out/demo --seconds $$left

# Two processes of one thread each: thread pools of several processes on the same cores wait for each other. A process that
# crashes ends the run: the others would wait for it.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py --json out/bench.json

gpu-check: $(VENV)/.dev
	$(BIN)/python scripts/gpu_check.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip "setuptools>=77" "pybind11>=2.13" "$(TORCH)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	@echo "building the package; C++ takes about five minutes on two free cores and prints nothing"
	$(BIN)/pip install -q --no-build-isolation -e ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build out maskops/*.so
