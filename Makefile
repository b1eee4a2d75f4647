# The contract for people and CI. Every target sets up what it needs by itself.
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
READY := .venv/ready

.PHONY: setup demo test test-long test-attack lint format type docs notebooks bench bundles package sbom clean

setup: $(READY)

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "moe-envs needs Python >= 3.11: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update && apt-get install -y python3-venv; } || { echo "Python lacks venv: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt $(PIP_FLAGS) --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/moe-benchmark run demo --out runs/demo --jobs 2

# Tests start processes side by side: one thread for each.
test test-long test-attack: export OMP_NUM_THREADS = 1

test: lint type
	$(BIN)/pytest -n logical --dist worksteal --cov --durations=30 --cov-report=term-missing:skip-covered
	$(BIN)/python tests/coverage_floors.py

# Slow tests: the runner through twenty kills of its processes, and of Ray's workers; all experiments, twice; replicas;
# whole notebooks.
test-long: $(READY)
	MOE_ENVS_KILLS=20 MOE_ENVS_LONG=1 $(BIN)/pytest --durations=10 tests/benchmarks/test_runner.py \
		tests/benchmarks/test_ray.py tests/benchmarks/test_experiments.py tests/benchmarks/test_serve.py \
		tests/test_notebooks.py

# The attack on arguments, files and processes with all its cases.
test-attack: $(READY)
	MOE_ENVS_ATTACK=$${MOE_ENVS_ATTACK:-4} $(BIN)/pytest --durations=10 tests/attack

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(READY)
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt $(PIP_FLAGS) --editable '.[docs]'
	$(BIN)/mkdocs build --strict

# Rendered copies, of the published leaderboard's rows.
notebooks: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt $(PIP_FLAGS) --editable '.[docs]'
	$(BIN)/jupyter nbconvert --execute --to markdown --output-dir docs/notebooks notebooks/*.ipynb \
		--NbConvertBase.display_data_priority="['image/png', 'text/plain']"

bench: $(READY)
	$(BIN)/moe-benchmark run speed --out runs/speed --overwrite

bundles: $(READY)
	$(BIN)/moe-bundle rebuild digits fashion-mnist fashion-mnist-graph

# The wheel and the source distribution.
package: $(READY)
	$(BIN)/python -m build --outdir dist .

# The software bill of materials of what `.[serve,export,lm]` installs, in CycloneDX.
sbom:
	$(PYTHON) -m venv .venv-sbom
	.venv-sbom/bin/pip install --quiet --constraint constraints.txt $(PIP_FLAGS) '.[serve,export,lm]'
	.venv-sbom/bin/pip install --quiet --target .venv-sbom/tool cyclonedx-bom
	mkdir -p dist
	PYTHONPATH=.venv-sbom/tool .venv-sbom/bin/python -m cyclonedx_py environment .venv-sbom --of JSON -o dist/sbom.json

clean:
	rm -rf .venv .venv-sbom build dist *.egg-info
