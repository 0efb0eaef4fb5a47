# make run    sets everything up, then the main job      (CONFIG=, DATA=, OUT=, ARGS=)
# make test   sets everything up, then the test suite
# make check  format, lint, types
# make compare  methods against each other        (COMPARE=configs/compare/..., DATA=, OUT=, ARGS=)

PYTHON ?= python3
CONFIG ?= configs/digits.yaml
DATA ?=
OUT ?=
ARGS ?=
COMPARE ?= configs/compare/quick.yaml
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# moto's dependencies and Ray's exclude each other.
S3 := $(VENV)/s3

export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: setup run test test-all test-cluster compare bench-algorithm bench-recycling bench-graph bench-architecture bench-scale check format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@echo "installing torch, ray and what they need (a few minutes the first time) ..."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat \
		--editable ".[images,report]" --group dev
	touch $(STAMP)

run: $(STAMP)
	$(BIN)/raybilevel run "$(CONFIG)" $(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)") $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

# Clusters of several nodes, killed drivers, spoilt disks, an S3 server: takes the better part of an hour.
test-cluster: $(STAMP)
	test -x $(S3)/bin/moto_server || $(PYTHON) -m venv $(S3)
	$(S3)/bin/python -m pip install --quiet "moto[server]>=5"
	RAYBILEVEL_TEST_S3=$(S3)/bin/moto_server $(BIN)/python -m pytest tests/cluster --override-ini timeout=7200 $(ARGS)

# Ours against black-box searchers and implicit gradients: records, table and figures in OUT; resumable.
bench-algorithm: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat \
		--editable ".[bench]"
	$(BIN)/python -m raybilevel.benchmark configs/bench/algorithm.yaml --data "$(DATA)" --out "$(OUT)" $(ARGS)

# What a search costs its driver, and how many slots it keeps busy; ARGS=latency|memory|slots|overhead|sharing for a part.
bench-scale: $(STAMP)
	$(BIN)/python -m raybilevel.benchmark.scale $(or $(ARGS),all)

compare: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat \
		--editable ".[compare]"
	$(BIN)/raybilevel compare "$(COMPARE)" $(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)") $(ARGS)

# Krylov iterations that recycling saves when filters of an image regulariser are learned: table and recycling.json in OUT.
bench-recycling: $(STAMP)
	$(BIN)/python -m raybilevel.benchmark.recycling --data "$(DATA)" --out "$(OUT)" $(ARGS)

# Learned edges of Cora and Citeseer against those that are left and a nearest-neighbour graph: table, graph.json and figures.
bench-graph: $(STAMP)
	$(BIN)/python -m raybilevel.benchmark.graph --data "$(DATA)" --out "$(OUT)" $(ARGS)

# Architectures of a cell by a descent against random ones at equal cost; ARGS="--config configs/architecture_cifar.yaml" with DATA.
bench-architecture: $(STAMP)
	$(BIN)/python -m raybilevel.benchmark.architecture $(if $(DATA),--data "$(DATA)") --out "$(OUT)" $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
