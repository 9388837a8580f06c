# `make demo`: a first picture. `make ablation`: everything from nothing to the table. `make test`: the whole test suite. `make docs`:
# the pages as a site. Each builds .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
SCALE ?= laptop

.PHONY: demo ablation test ui docs clean

demo: .venv/installed
	$(BIN)/python run.py demo

ablation: .venv/installed
	$(BIN)/python run.py reproduce table5 --scale $(SCALE)
	$(BIN)/python run.py report table6 --scale $(SCALE)

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

ui: .venv/installed
	$(BIN)/python run.py ui $(SWEEP) --scale $(SCALE)

docs: .venv/docs
	$(BIN)/python scripts/docs.py
	$(BIN)/zensical build --clean --strict
	@echo "open .docs/site/index.html in a browser"

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	touch $@

# pip first: that of Python 3.11 and 3.12 knows no dependency groups.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else "Python 3.11 or 3.12 is needed; call: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group test --editable '.[eval,slurm,sweep]'
	touch $@

clean:
	rm -rf .venv .cache .docs .pytest_cache .ruff_cache
