# Every target sets up .venv from requirements.txt when it is missing or older than the pins.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test test-fast bench lint dicom

demo: .venv/ready  ## the whole chain in minutes; DATASET=<nnU-Net folder> for real images
	$(BIN)/python -m tools demo $(if $(DATASET),--dataset_dir $(DATASET)) $(ARGS)

test: .venv/ready  ## everything, as continuous integration runs it; what an environment below is missing for is skipped and says so
	-test -f .venv-mergekit/ready || $(MAKE) .venv-mergekit/ready
	-test -f .venv-deploy/ready || $(MAKE) .venv-deploy/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: .venv/ready
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

bench: .venv/ready .venv-mergekit/ready .venv-nnunet/ready  ## speed, as ratios within one run; ARGS=merging for a part
	$(BIN)/python -m tests.benchmarks $(ARGS)

dicom: .venv-deploy/ready  ## IMAGES=<folder of a DICOM CT study> BUNDLE=<merged bundle> OUTPUT=<folder>: a DICOM segmentation
	ulimit -s 32768; .venv-deploy/bin/python apps/deploy/app.py --images "$(IMAGES)" --bundle "$(BUNDLE)" --output "$(OUTPUT)"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tools vendor --check

.venv/ready: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv-mergekit/ready:  ## the peer that merging is compared with, in an environment of its own
	test -x .venv-mergekit/bin/python || $(PYTHON) -m venv .venv-mergekit
	.venv-mergekit/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 mergekit==0.1.5
	touch $@

.venv-deploy/ready: apps/deploy/requirements.txt  ## MONAI Deploy, which needs other versions than MONAI Label does
	test -x .venv-deploy/bin/python || $(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/python -m pip install --quiet --disable-pip-version-check -r apps/deploy/requirements.txt
	touch $@

.venv-nnunet/ready:  ## the peer that inference is compared with
	test -x .venv-nnunet/bin/python || $(PYTHON) -m venv .venv-nnunet
	.venv-nnunet/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 monai==1.6.1 nnunetv2==2.8.1
	touch $@
