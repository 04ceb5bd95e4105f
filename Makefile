# make pretrain: from a fresh machine to a trained model.  make test: the whole suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
KERNELS := $(wildcard csrc/*.py csrc/cpu/* csrc/cuda/*)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: pretrain test lint setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py launcher/install.sh $(KERNELS)
	sh launcher/install.sh $(PYTHON) $(VENV)
	touch $@

pretrain: setup
	deepspeed launcher/pretrain.py --ds_config ds_configs/zero2.json $(ARGS)

test: setup
	python -m pytest -n 2 --dist loadfile $(ARGS)

lint: setup
	ruff check .
	ruff format --check .
	mypy
	lint-imports

clean:
	rm -rf $(VENV) build *.egg-info sltrain_dist/_kernels_*.so
