# make study   install, render the embedded videos, run the TAM ablation at 16 frames, print its result
# make test    every notebook (nbdev_test) and pytest
# make lab     JupyterLab on the notebooks
# make refresh run the study notebooks again and keep their outputs
# make evidence run all study notebooks from finished runs, the ledger after them, and keep their tables and figures
# make figures draw the committed figures again from the committed tables alone
# make docs    README.md and static pages (in _docs/) from the notebooks
# make clean   remove pages, executed notebooks and rendered videos; .venv and finished runs stay
PYTHON ?= python3
BIN := .venv/bin
STUDY := $(filter-out nbs/index.ipynb nbs/core.ipynb nbs/claims.ipynb,$(wildcard nbs/*.ipynb)) nbs/claims.ipynb
.PHONY: study test lab refresh evidence figures docs clean install dev check

study: install
	@$(BIN)/study run ablation_tam -p frames 16

install:
	@$(PYTHON) install.py study

dev:
	@$(PYTHON) install.py dev

# two workers with one thread each: with more, they wait for each other on a machine of two cores, and everything takes three times as long
test: dev
	VIDEO_STUDY_DATA="$(CURDIR)/outputs/data" OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

# what is committed is what the notebooks export, and they are clean
check: dev
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	@test -z "$$(git status --porcelain -- nbs video_study settings.ini pyproject.toml)" || \
		{ git status --short -- nbs video_study; git diff --stat; echo "nbdev_clean or nbdev_export changed the files above: run 'make check' and commit"; exit 1; }

# the study notebooks are committed with the outputs of their default run, and with the evidence and the figures that it leaves; finished runs are read, not repeated
refresh evidence: dev
	@for nb in $(STUDY) nbs/index.ipynb; do echo "running $$nb"; \
		VIDEO_STUDY_EVIDENCE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level=ERROR --ExecutePreprocessor.timeout=-1 $$nb || exit 1; \
		$(BIN)/nbdev_clean --fname $$nb; done
	@$(BIN)/study readme

figures: dev
	@$(BIN)/study figures

lab: install
	$(BIN)/jupyter lab nbs/index.ipynb

docs: install
	@$(BIN)/study readme
	@$(BIN)/study docs

clean:
	rm -rf _docs build dist *.egg-info .pytest_cache outputs/notebooks outputs/data
	@echo "finished runs are kept in outputs/runs; remove them by hand to train again"
