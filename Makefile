# Every target sets up what it needs by itself, as uv.lock has it; see tools/setup_env.sh.
#
# STACK=onedl      the OneDL forks of the OpenMMLab libraries, in .venv (default)
# STACK=openmmlab  the OpenMMLab originals, in .venv-openmmlab
# PYTHON=...       the Python of the environment (3.10 to 3.12; default: the first that is found)
# FORCE_CUDA=1     compile mmcv's CUDA operators too (needs nvcc)
# TASK=...         what `make demo` shows: maskrcnn (default), retinanet, sfpn, upernet or classification
# MODEL=...        with which backbone: biformer_t (default), debiformer_t, or bixt_ti (classification, sfpn)
# SEED=...         seed of the demo's scenes (default: 0)

STACK ?= onedl
TASK ?= maskrcnn
MODEL ?= biformer_t
SEED ?= 0

VENV_onedl := .venv
VENV_openmmlab := .venv-openmmlab
VENV := $(VENV_$(STACK))
ifeq ($(VENV),)
$(error STACK=$(STACK) is not known; use STACK=onedl or STACK=openmmlab)
endif
PY := $(VENV)/bin/python

# Programs that are started anew again and again should not compile themselves each time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow smoke lint format bench bench-long lock clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'
	@sed -n '2,/^$$/s/^#//p' $(MAKEFILE_LIST)

env:  ## set up the environment (the other targets do it by themselves)
	@tools/setup_env.sh $(STACK)

demo: env  ## train, evaluate and draw on a toy data set (TASK=maskrcnn)
	@$(PY) tools/demo.py $(TASK) --model $(MODEL) --seed $(SEED)

# Two at a time: most tests wait for processes or run on one core. Those of a file share what they
# have set up, so they stay together; files come in the order of tests/conftest.py.
test: env  ## run the fast tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n 2 --dist loadfile \
	  --no-loadscope-reorder --durations 10

test-slow: env  ## run the slow tests, which train small models
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m slow -n 2 --dist loadfile -v --timeout 3600 --durations 10

smoke:  ## run the tests that need no mmcv with another torch (TORCH=2.10.0)
	@tests/smoke.sh "$(TORCH)" $(PYTHON)

lint: env  ## check style and formatting
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@for script in .ci/run */*.sh; do bash -n "$$script" || exit; done

format: env  ## correct style and formatting where that is possible
	@$(PY) -m ruff check --fix
	@$(PY) -m ruff format

RESULTS := benchmarks/results
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=16000000000

bench: env  ## run the CPU benchmarks that take minutes, and write docs/speed.md
	@$(PY) -m benchmarks.cpu --out $(RESULTS)/cpu.json
	@$(PY) -m benchmarks.cpu rivals --out $(RESULTS)/cpu_rivals.json
	@$(PY) -m benchmarks.cpu deterministic --out $(RESULTS)/cpu_deterministic.json
	@$(PY) -m benchmarks.cpu half --out $(RESULTS)/cpu_half.json
	@$(PY) -m benchmarks.input_pipeline --out $(RESULTS)/input_pipeline.json
	@for case in s8 s4 rivals tokens; do \
	  $(PY) -m benchmarks.bixt $$case --out $(RESULTS)/cpu_bixt_$$case.json || exit; done
	@$(PY) -m benchmarks.plot

bench-long: env  ## run the others: DeBiFormer, COCO's size (20 GB of memory), large images, torch.compile, exported files
	@$(KEEP_MEMORY) $(PY) -m benchmarks.cpu grids --out $(RESULTS)/cpu_grids.json
	@$(KEEP_MEMORY) $(PY) -m benchmarks.cpu biformer --out $(RESULTS)/cpu_kept.json
	@$(PY) -m benchmarks.cpu compile --out $(RESULTS)/cpu_compile.json
	@$(PY) -m benchmarks.cpu export --out $(RESULTS)/cpu_export.json
	@$(PY) -m benchmarks.cpu debiformer --out $(RESULTS)/cpu_debiformer.json
	@$(PY) -m benchmarks.cpu coco --out $(RESULTS)/cpu_coco.json
	@$(PY) -m benchmarks.plot

lock:  ## renew uv.lock from pyproject.toml
	@tools/uv.sh lock

clean:  ## remove build output and the tools' caches (environments: rm -r .venv*)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
