# Every target does all the set-up it needs. `make demo` is the place to start.
PYTHON ?= python3
BIN := .venv/bin
# two cores and several processes: one thread each is faster than fighting over them
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1

.PHONY: demo test test-all check bench gpu torture clean

demo: .venv/.installed  ## the whole story on simulated cells, under Prefect, at most five minutes
	$(BIN)/python -m flows.story

test: .venv/.installed  ## no network, no GPU, no root
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 -m "not slow and not browser and not service and not gpu"

# by file: servers that a file's tests share are started once
test-all: .venv/.installed  ## and the slow, browser and service tests
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not gpu"

check: .venv/.installed  ## style, types, import contracts
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

bench: .venv/.installed  ## costs beside references, in minutes; DATA=FOLDER of the two public h5ad files
	$(ONE_THREAD) $(BIN)/python benchmarks/published.py --quick $(if $(DATA),--data "$(DATA)")
	$(ONE_THREAD) $(BIN)/python benchmarks/steps.py --steps 1 --cells 32
	$(ONE_THREAD) $(BIN)/python benchmarks/inference.py --repeats 1 --shapes "2 x 64"
	$(ONE_THREAD) $(BIN)/python benchmarks/tokenise.py --cells 5000 --repeats 1

gpu: .venv/.installed  ## what one GPU does, in ten minutes; without one it says so
	$(BIN)/python benchmarks/gpu.py

torture: .venv/.installed  ## kill -9 at random moments, fifty times, of services twenty times, and promoters at once
	cd tests && $(ONE_THREAD) ../$(BIN)/python torture.py --kills 50
	cd tests && $(ONE_THREAD) ../$(BIN)/python promoters.py
	cd tests && $(ONE_THREAD) ../$(BIN)/python torture_services.py

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[flows,dev,bench]"
	@touch $@

clean:  ## forget local state; data and environment stay
	rm -rf .endoprint scores
