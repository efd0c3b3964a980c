# Each target sets up what it needs in .venv, from the versions pinned in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A folder on the path of .venv that shows this one under the package's name, to Python, mypy and editors alike.
SOURCE := $(VENV)/src

.PHONY: demo test test-slow lint bench clean

demo: build/pico.bundle/bundle.json
	$(BIN)/diffoundry run build/pico.bundle "a large red star at the left on a navy background" --seed 7 --steps 20 -o build/star.png
	$(BIN)/python -m diffoundry.examples.pico.demo build/pico.bundle demo.png

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p diffoundry
	$(BIN)/lint-imports --no-logo

bench: build/pico.bundle/bundle.json
	$(BIN)/diffoundry bench build/pico.bundle

build/pico.bundle/bundle.json: $(READY) $(wildcard examples/pico/*/*)
	mkdir -p build
	$(BIN)/diffoundry compile examples/pico -o build/pico.bundle --engine onnxruntime
	touch $@

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	mkdir -p $(SOURCE) && ln -sfn ../.. $(SOURCE)/diffoundry
	echo "$(CURDIR)/$(SOURCE)" > "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/diffoundry.pth"
	touch $@

clean:
	rm -rf build .venv
