# Everything runs in a virtual environment of its own; `make test` and `make demo` do all set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: test lint types demo clean slow validator-table article gpu coverage

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# The table of faults rejected and false alarms that the README shows; about half an hour.
validator-table: $(READY)
	$(BIN)/python benchmarks/validator.py

slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .

# mypy reads the package under its import name, from a link that stands in for an install.
types: $(READY)
	mkdir -p $(VENV)/types
	ln -sfn "$(CURDIR)" $(VENV)/types/modelport
	cd $(VENV)/types && ../bin/mypy --config-file "$(CURDIR)/pyproject.toml" -p modelport

demo: $(READY)
	rm -rf out/demo
	$(BIN)/modelport export onnx --model demo --opset 11 --output out/demo
	$(BIN)/modelport run out/demo --text "Proof before deployment."

# Hours on a CPU; goes on where it was stopped. Less: make article SENTENCES=100 RUNS=3 MINUTES=10
article: $(READY)
	$(BIN)/python benchmarks/article.py --sentences $(or $(SENTENCES),1000) --runs $(or $(RUNS),5) $(if $(MINUTES),--minutes $(MINUTES))

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[cpu,openvino,audio,demo,report,publish,dev]"
	# Apart, see tests/checkpoints/test_timm.py; without it those tests are skipped.
	-$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt --target $(VENV)/timm timm torchvision pillow
	touch $(READY)

# Installs nothing: the Python that is there is the one that sees the GPU. What it lacks is named.
GPU_LINK := .bench/gpu/link
gpu:
	mkdir -p $(GPU_LINK)
	ln -sfn "$(CURDIR)" $(GPU_LINK)/modelport
	PYTHONPATH="$(CURDIR)/$(GPU_LINK)" $(PYTHON) benchmarks/gpu

# Resumes where it was interrupted; hours for all pairs on two cores.
coverage: $(READY)
	$(BIN)/python benchmarks/breadth

clean:
	rm -rf $(VENV) build *.egg-info out
