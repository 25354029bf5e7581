# make demo   phantom data, then the three stages, small, on it; both commands set up .venv first
# make test   the tests
# make faults broken scans, tables, settings, caches and weights, one table of what came of them
# make lint   ruff
# make lock   .ci/requirements.lock anew: the hashes of all packages, also those that others need
# Another interpreter: make demo PYTHON=python3.12
# Every package compared with its hash: make demo REQUIREMENTS=.ci/requirements.lock

PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements.txt
BIN = $(VENV)/bin

# Large arrays are reused instead of being returned to the system after every step: on a CPU,
# training is otherwise spent in page faults (glibc only; ignored elsewhere).
export GLIBC_TUNABLES = glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456

.PHONY: demo test faults lint lock

# What all three stages of the demo share: small networks, coarse volumes.
SMALL = precision=fp32 n_workers=1 resunet.features=[8,16,32,64] \
  resunet.blocks=[1,1,1,1] data.spacing=[6,6,6] data.hu_window=[-200,1200]

demo: $(VENV)/.installed
	$(BIN)/python -m data.demo demo_data
	rm -rf results/demo_dino results/demo_classification results/demo_segmentation
	$(BIN)/python dino.py experiment=demo_dino $(SMALL) n_epochs=6 batch_size=8 learning_rate=0.0113 \
	  warmup_epochs=2 probe.every=3 probe.dense_cases=4 crops.regions_per_case=5 crops.num_local=2 \
	  crops.region_size=[40,32,32] crops.global_size=[24,24,24] crops.local_size=[24,24,24] \
	  dino.out_dim=1024 dino.patch_out_dim=256 dino.head_hidden=256 dino.head_bottleneck=128 \
	  dino.patch_level=2 dino.momentum=0.98
	$(BIN)/python classification.py experiment=demo_classification $(SMALL) n_epochs=15 \
	  warmup_epochs=1 batch_size=4 accumulate=1 learning_rate=2e-3 image.size=[48,40,40] \
	  dino_weights=results/demo_dino/checkpoints/backbone.pt
	$(BIN)/python classification.py experiment=demo_classification n_workers=0 precision=fp32 \
	  test_ckpt=results/demo_classification/checkpoints/best.pt
	$(BIN)/python segmentation.py experiment=demo_segmentation $(SMALL) n_epochs=10 val_every=10 \
	  warmup_epochs=1 batch_size=2 learning_rate=3e-3 patches.size=[32,32,32] patches.per_case=4 \
	  dino_weights=results/demo_dino/checkpoints/backbone.pt
	$(BIN)/python segmentation.py experiment=demo_segmentation n_workers=0 precision=fp32 \
	  test_ckpt=results/demo_segmentation/checkpoints/best.pt
	@echo "Reports: results/demo_*/report.html, results/demo_*/test/report.html"

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

faults: $(VENV)/.installed
	$(BIN)/python -m tests.faults --long

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lock: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip compile requirements.txt --output-file .ci/requirements.lock --universal \
	  --generate-hashes --python-version 3.11 --custom-compile-command "make lock" --quiet

# --no-compile: what is never imported, most of it, need not be compiled (half of pip's time); the
# rest is at its first import, whose result Python must then be allowed to keep.
unexport PYTHONDONTWRITEBYTECODE

# The second way serves Pythons without ensurepip (Debian's without python3-venv).
$(VENV)/.installed: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip install -q --target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip; }
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -r $(REQUIREMENTS)
	@touch $@
