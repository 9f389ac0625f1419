# Every target sets up .venv from requirements.txt when it is missing or older than the pins.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALL = -m pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE  # every command starts Python anew, which would compile MONAI again each time
SERVE = apps/monailabel/serve.py --studies "$(STUDIES)" --bundles "$(BUNDLE)" --port $(or $(PORT),8000)

.PHONY: demo serve dicom test test-fast bench study lint

demo: .venv/ready  ## the whole chain in minutes; DATASET=<nnU-Net folder> for real images
	$(BIN)/python -m tools demo $(if $(DATASET),--dataset_dir "$(DATASET)") $(ARGS)

serve:  ## MONAI Label on this computer: STUDIES=<folder of images, or DICOMweb URL> BUNDLE=<bundle, or folder of bundles> PORT=8000
	@$(PYTHON) $(SERVE) --check
	@$(MAKE) --no-print-directory .venv-monailabel/ready
	@.venv-monailabel/bin/python $(SERVE) $(ARGS)

dicom: .venv-deploy/ready  ## MONAI Deploy: IMAGES=<folder of a DICOM CT study> BUNDLE=<merged bundle> OUTPUT=<folder for the DICOM SEG>
	@ulimit -s 32768; .venv-deploy/bin/python apps/deploy/app.py --images "$(IMAGES)" --bundle "$(BUNDLE)" --output "$(OUTPUT)"

test: .venv/ready  ## everything, as continuous integration runs it; tests whose environment cannot be made are skipped and say so
	-$(MAKE) --keep-going --jobs=2 $(foreach name,mergekit monailabel deploy nnunet nnunet1 timm,.venv-$(name)/ready)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: .venv/ready
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

bench: .venv/ready .venv-mergekit/ready .venv-nnunet/ready  ## speed, as ratios within one run; ARGS=merging for a part
	$(BIN)/python -m tests.benchmarks $(ARGS)

study: .venv/ready  ## what a merge costs by starting point, method and seed: DATASETS=<nnU-Net datasets, separated by commas>
	@$(if $(DATASETS),,echo "error: DATASETS is missing: make study DATASETS=<nnU-Net datasets, separated by commas>"; exit 1)
	$(BIN)/python -m tests.benchmarks.study --dataset_dir "$(DATASETS)" $(ARGS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tools vendor --check

.venv/ready: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) -r requirements.txt
	touch $@

.venv-monailabel/ready: apps/monailabel/requirements.txt  ## the server, in an environment of its own
	test -x .venv-monailabel/bin/python || $(PYTHON) -m venv .venv-monailabel
	.venv-monailabel/bin/python $(INSTALL) -r apps/monailabel/requirements.txt
	touch $@

.venv-deploy/ready: apps/deploy/requirements.txt  ## MONAI Deploy, which needs other versions than MONAI Label does
	test -x .venv-deploy/bin/python || $(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/python $(INSTALL) -r apps/deploy/requirements.txt
	touch $@

.venv-mergekit/ready: .venv/ready  ## the peer that merging is compared with: it sees .venv's packages and holds what is missing there
	$(PYTHON) -m venv .venv-mergekit
	echo "$(CURDIR)"/.venv/lib/python*/site-packages > $$(echo .venv-mergekit/lib/python*/site-packages)/ours.pth
	.venv-mergekit/bin/python $(INSTALL) mergekit==0.1.5
	touch $@

.venv-nnunet/ready:  ## the peer that inference and converted models are compared with
	test -x .venv-nnunet/bin/python || $(PYTHON) -m venv .venv-nnunet
	.venv-nnunet/bin/python $(INSTALL) torch==2.13.0 monai==1.6.1 nnunetv2==2.8.1
	touch $@

.venv-nnunet1/ready: .venv/ready  ## nnU-Net 1, the peer that STU-Net's inference is compared with: its code beside our environment
	$(BIN)/python $(INSTALL) --no-deps --target .venv-nnunet1 nnunet==1.7.1 \
		batchgenerators==0.23 SimpleITK==2.5.7 scikit-image==0.26.0 lazy_loader==0.6
	touch $@

.venv-timm/ready: .venv/ready  ## timm, the peer of 2D networks, and what it imports: their code beside our environment
	$(BIN)/python $(INSTALL) --no-deps --target .venv-timm timm==1.0.31 torchvision==0.29.1 huggingface_hub==2.4.0
	touch $@
