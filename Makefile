# Thin names for commands. `make demo` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
PROVIDER ?= local

.PHONY: install demo serve test test-cluster test-load bench lint clean
.PHONY: cluster-up cluster-status submit logs stop cluster-down doctor offline-pack backup restore

install: $(VENV)/.installed

ifdef OFFLINE
ifneq (,$(filter install,$(or $(MAKECMDGOALS),install)))
.PHONY: $(VENV)/.installed  # whatever was installed before, this pack is wanted now
endif
endif

$(VENV)/.installed: pyproject.toml
ifdef OFFLINE
	$(PYTHON) $(OFFLINE)/install.py $(VENV) --project .
else
# A venv without pip was half made.
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
endif
	touch $@

demo: install  ## the main job on digital phantoms, with a local Ray; two fresh seeds in place of five, for time
	$(BIN)/python jobs/tune_asl.py --data.preprocess.size 48 --supcon.steps 700 --seeds 2023 --sweep.num-trials 64 \
	    --finals.seeds 3001 3002 --finals.finalists 2 $(ARGS)

serve: install  ## whatever is registered, at http://127.0.0.1:8000, for this machine alone
	$(BIN)/python jobs/serve_models.py --access.open $(ARGS)

cluster-up: install  ## a cluster: PROVIDER=local, onprem, aws, gcp or kuberay
	$(BIN)/python -m raymed.cluster up $(PROVIDER) $(ARGS)

cluster-status: install
	$(BIN)/python -m raymed.cluster status

submit: install  ## JOB=jobs/train_classifier.py on that cluster; FLAGS=--no-wait does not wait for it
	$(BIN)/python -m raymed.cluster submit $(FLAGS) $(JOB) $(ARGS)

logs: install  ## of the last job; NAME=... of another one, or of a part; ARGS=--follow
	$(BIN)/python -m raymed.cluster logs $(if $(NAME),'$(NAME)') $(ARGS)

stop: install  ## the last job that runs, at its next checkpoint; NAME=... another one
	$(BIN)/python -m raymed.cluster stop $(NAME)

cluster-down: install
	$(BIN)/python -m raymed.cluster down

doctor: install  ## what is wrong with this machine or the cluster that is up, before a job finds it
	$(BIN)/python -m raymed.doctor $(ARGS)

offline-pack: install  ## everything for machines without internet, in the new folder TO=DIR
	$(BIN)/python -m raymed.cluster.offline pack $(TO) $(ARGS)

backup: install  ## MLflow, models, runs and the log of decisions, into the new folder TO=DIR; ARGS=--cluster
	$(BIN)/python -m raymed.cluster.backup save $(TO) $(ARGS)

restore: install  ## FROM=DIR into an empty storage; ARGS="--storage ..."
	$(BIN)/python -m raymed.cluster.backup restore $(FROM) $(ARGS)

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
