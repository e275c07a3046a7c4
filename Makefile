# Thin names for commands. `make demo` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: install demo serve test test-cluster test-load bench lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: install  ## the main job on digital phantoms, with a local Ray; two fresh seeds in place of five, for time
	$(BIN)/python jobs/tune_asl.py --data.preprocess.size 48 --supcon.steps 700 --seeds 2023 --sweep.num-trials 64 \
	    --finals.seeds 3001 3002 --finals.finalists 2 $(ARGS)

serve: install  ## whatever is registered, at http://127.0.0.1:8000, for this machine alone
	$(BIN)/python jobs/serve_models.py --access.open $(ARGS)

test: install  ## what continuous integration runs
	$(BIN)/ruff check raymed jobs tests
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-cluster: install  ## longer: several workers and kills; mostly waiting, so three files at a time
	$(BIN)/python -m pytest -m slow -n 3 --dist loadfile $(ARGS)

test-load: install  ## a server at four fifths of its capacity for ten minutes; prints how its memory grows
	RAYMED_LOAD_SECONDS=600 $(BIN)/python -m pytest -m slow -s tests/serve/test_load.py $(ARGS)

bench: install  ## on a machine with nothing else to do
	$(BIN)/python jobs/bench_tune.py
	$(BIN)/python jobs/bench_train.py
	$(BIN)/python jobs/bench_workers.py
	$(BIN)/python jobs/bench_storage.py
	$(BIN)/python jobs/bench_clip.py
	$(BIN)/python jobs/bench_serve.py

lint: install
	$(BIN)/ruff check --fix raymed jobs tests
	$(BIN)/ruff format raymed jobs tests
	$(BIN)/pyright

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
