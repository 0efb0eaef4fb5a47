# make run      sets everything up, then runs the main job    (CONFIG=, DATA=, OUT=, ARGS=)
# make test     sets everything up, then runs the tests       (ARGS=)
# make check    format, lint, import layers, types
# make docs     builds the documents as a site in build/site
# make compare  compares methods under one budget             (COMPARE=configs/compare/..., DATA=, OUT=, ARGS=)

PYTHON ?= python3
CONFIG ?= configs/wrong_labels.yaml
DATA ?=
OUT ?=
ARGS ?=
COMPARE ?= configs/compare/quick.yaml
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes of `make test`. One of them runs all tests that start Ray.
WORKERS ?= 2
# Of Ray, for `make test-ray`.
VERSIONS ?= 2.50.1 2.55.1 2.60.0
# For `make test-pythons`.
PYTHONS ?= 3.11 3.12 3.13
# Servers of object stores. The dependencies of moto and of Ray exclude each other.
STORES := $(VENV)/stores
# What Ray needs to take jobs. It is not in $(VENV), where every local Ray would start more processes with it.
HOSTS := $(VENV)/hosts
PEERS := $(VENV)/peers

export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0
# Ray's own is 15: beside a busy process, such as the other half of the tests, its workers would wait.
export RAY_worker_niceness ?= 0

.PHONY: setup run test test-all test-cluster test-ray test-pythons compare check format docs clean bench-algorithm bench-scale bench-recycling bench-scripts \
	bench-graph bench-architecture bench-treatment bench-equilibrium bench-few-shot bench-peers bench-memory bench-generalisation bench-hypergradient \
	bench-physics bench-paper bench-example-weights bench-networks

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
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) $(ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

# Clusters of several nodes and of separate hosts, killed drivers, damaged disks, object stores, Slurm if it is
# installed. It takes 40 minutes and needs root on Linux.
test-cluster: $(STAMP)
	test -x $(STORES)/bin/python || $(PYTHON) -m venv $(STORES)
	$(STORES)/bin/python -m pip install --quiet "moto[server]>=5" "gcp-storage-emulator>=2026.7"
	test -x $(HOSTS)/bin/python || $(PYTHON) -m venv $(HOSTS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(HOSTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
	$(HOSTS)/bin/python -m pip install --quiet --constraint constraints.txt "ray[default]"
	RAYBILEVEL_TEST_STORES=$(CURDIR)/$(STORES)/bin RAYBILEVEL_TEST_HOSTS=$(CURDIR)/$(HOSTS)/bin/python \
		$(BIN)/python -m pytest tests/cluster --override-ini timeout=7200 $(ARGS)

# What depends on Ray's inner code, with each of VERSIONS, in environments that see the project's other packages. Ends
# with a table of the results.
test-ray: $(STAMP) $(VERSIONS:%=$(VENV)/ray-%/.installed)
	$(BIN)/python -m tests.ray_versions $(VERSIONS:%=$(VENV)/ray-%/bin/python)

# Without dependencies, and before the project's packages are seen: pip would find the other Ray there.
$(VENV)/ray-%/.installed: $(STAMP)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps "ray==$*"
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
	touch $@

# The unit tests and a search on Ray with each of PYTHONS, in environments of their own, of a few GB each. Ends with a
# table that names versions which the machine lacks, or for which a package does. ARGS go to pytest.
test-pythons: $(STAMP)
	$(BIN)/python -m tests.python_versions $(PYTHONS) --folder $(VENV) $(ARGS)

# raybilevel against black-box searchers and implicit gradients: records, table and figures in OUT. It can be resumed.
bench-algorithm: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat \
		--editable ".[bench]"
	$(BIN)/python -m benchmarks configs/bench/algorithm.yaml --data "$(DATA)" --out "$(OUT)" $(ARGS)

# What many hyperparameters are worth on new data: records, tables and figures in OUT. It takes an hour of two cores, ten
# splits of short problems and three of others, and can be resumed. A part: ARGS="--only digits-8,digits-16 --splits 3".
bench-generalisation: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat \
		--editable ".[bench]"
	$(BIN)/python -m benchmarks.generalisation --data "$(DATA)" --out "$(OUT)" $(ARGS)

# Searches on networks trained by SGD and AdamW, their results trained again under other seeds: records and a table in
# OUT, in an hour of two cores. A part: ARGS="--only mnist-1k-2 --seeds 3".
bench-networks: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat \
		--editable ".[bench]"
	$(BIN)/python -m benchmarks.networks --data "$(DATA)" --out "$(OUT)" $(ARGS)

# What a search costs its driver, and how many slots it keeps busy. A part: ARGS=steps|latency|memory|slots|overhead|sharing.
bench-scale: $(STAMP)
	$(BIN)/python -m benchmarks.scale $(or $(ARGS),all)

compare: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat \
		--editable ".[compare]"
	$(BIN)/raybilevel compare "$(COMPARE)" $(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)") $(ARGS)

# Iterations and time that recycling saves for filters of an image regulariser: table and recycling.json in OUT.
bench-recycling: $(STAMP)
	$(BIN)/python -m benchmarks.recycling --data "$(DATA)" --out "$(OUT)" $(ARGS)

# Effects of a treatment by learned weights against inverse propensities: table, treatment.json and figure in OUT.
bench-treatment: $(STAMP)
	$(BIN)/python -m benchmarks.treatment --out "$(OUT)" $(ARGS)

# Weights of physics-informed losses by searches and by heuristics: table and physics.json in OUT (an hour on one core).
# It can be resumed. A part: ARGS="--equations burgers --seeds 2".
bench-physics: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat \
		--editable ".[bench]"
	$(BIN)/python -m benchmarks.physics --out "$(OUT)" $(ARGS)

# The published experiment of the augmented Lagrangian scheme, by its protocol and by ours. With 5,000 and 10,000 examples
# it takes hours: ARGS="--sizes 1K".
bench-paper: $(STAMP)
	$(BIN)/python -m benchmarks.paper --data "$(DATA)" --out "$(OUT)" $(ARGS)

# Hyper-cleaning of MNIST with a weight for each example, beside V-PBGD by its authors' settings, which takes most of an
# hour a seed: ARGS="--iterations 0" leaves it out.
bench-example-weights: $(STAMP)
	$(BIN)/python -m benchmarks.example_weights --data "$(DATA)" --out "$(OUT)" $(ARGS)

# A deep-equilibrium classifier: accuracy, and memory of a gradient.
# With DATA: ARGS="--config configs/equilibrium_mnist.yaml".
bench-equilibrium: $(STAMP)
	$(BIN)/python -m benchmarks.equilibrium $(if $(DATA),--data "$(DATA)") --out "$(OUT)" $(ARGS)

# A learned initialisation against a random one and joint training: table, few_shot.json and figure in OUT.
bench-few-shot: $(STAMP)
	$(BIN)/python -m benchmarks.few_shot --data "$(DATA)" --out "$(OUT)" $(ARGS)

# Hypergradients of the default method against differences of trained F: table and hypergradient.json in OUT (ten
# minutes on one core). A part: ARGS="--kinds LSTM Adam --dtypes float32 --points 1".
bench-hypergradient: $(STAMP)
	$(BIN)/python -m benchmarks.hypergradient --out "$(OUT)" $(ARGS)

# One hypergradient by torchopt, betty, boat-torch, higher and raybilevel: table and hypergradient_peers.json in OUT. The
# peers have their own virtual environment, which sees the project's. boat-torch asks for an older numpy, and betty-ml
# for an older Python, in metadata that only an older pip reads.
bench-peers: $(STAMP)
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -c 'import site, sys; open(site.getsitepackages()[0] + "/project.pth", "w").write(sys.argv[1])' \
		"$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"
	$(PEERS)/bin/python -m pip install --quiet --no-deps boat-torch==1.1.1 graphviz==0.21 higher==0.2.1 optree==0.20.0 torchopt==0.7.3
	$(PEERS)/bin/python -m pip install --quiet "pip==24.0"
	$(PEERS)/bin/python -m pip install --quiet --no-deps --ignore-requires-python betty-ml==0.2.1
	$(PEERS)/bin/python -W ignore -m benchmarks.hypergradient_peers --data "$(DATA)" --out "$(OUT)" $(ARGS)

# Memory and time of one hypergradient of a transformer with 1.2 and 9.7 million weights: table and memory.json in OUT.
bench-memory: $(STAMP)
	$(BIN)/python -m benchmarks.memory --out "$(OUT)" $(ARGS)

# Learned edges of Cora and Citeseer against the remaining ones and a nearest-neighbour graph: table, graph.json, figures.
bench-graph: $(STAMP)
	$(BIN)/python -m benchmarks.graph --data "$(DATA)" --out "$(OUT)" $(ARGS)

# Architectures of a cell by a descent against random ones at equal cost.
# With DATA: ARGS="--config configs/architecture_cifar.yaml".
bench-architecture: $(STAMP)
	$(BIN)/python -m benchmarks.architecture $(if $(DATA),--data "$(DATA)") --out "$(OUT)" $(ARGS)

# The scripts of examples/scripts with several searchers, at an equal number of trials: records and a table; resumable.
bench-scripts: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat \
		--editable ".[bench,lightning,transformers]"
	$(BIN)/python -m benchmarks.scripts --out "$(OUT)" $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Warnings are errors. It needs no network. The variable silences a notice of the theme.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
