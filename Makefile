# `make help` lists what there is. Everything runs in .venv, which is set up from envs/lock.txt when it is missing or old.

CONFIG :=
CORES := all
RUN := demo
VARIANT := cospadi-20
FORMAT := gguf
TYPE := BF16
EXPORTED = $(if $(filter gguf,$(FORMAT)),gguf/$(TYPE).gguf,$(filter compressed-tensors,$(FORMAT)))
MINUTES := 10
FIRST := 1000000
PYTHON := python3

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# every pin is listed, with what it needs: nothing else is fetched
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-deps
# remembered, so that TORCH=system is said once
TORCH := $(or $(shell cat $(VENV)/.torch 2>/dev/null),lock)

IS_RUN = test -f results/$(RUN)/config.yaml || { echo "results/$(RUN)/config.yaml is not there: RUN= is what the config of a run calls \`run\`"; exit 1; }
SNAKEMAKE := $(BIN)/snakemake --cores $(CORES)
RULES := Snakefile workflow/*.smk workflow/rules

.DEFAULT_GOAL := help
.PHONY: help env new plan calibrate run status frontier densify export verify test fuzz slurm-test lint format audit bench bench-runtime clean clean-activations

help: ## List the targets e.g. make help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | sed 's/ e\.g\. /\n\t  /' | expand -t 26
	@echo
	@echo "  CONFIG=my.yaml   another run; it says what differs from config.yaml (default: the demo)"
	@echo "  CORES=8          CPU cores to use (default: all)"
	@echo "  RUN= VARIANT=    of densify, export and verify (default: $(RUN), $(VARIANT))"
	@echo "  MINUTES= FIRST=  of fuzz: how long, and the number of the first case (default: $(MINUTES), $(FIRST))"
	@echo "  PYTHON=python3.11, TORCH=system   for the set-up: another Python; the torch that this Python already has"

new: env ## Write a config that fits MODEL, a folder or a name on the hub e.g. make new MODEL=Qwen/Qwen2.5-0.5B TEXT=my.jsonl
	$(BIN)/python -m cospadi.new $(if $(TEXT),--text "$(TEXT)") $(if $(OUTPUT),--output "$(OUTPUT)") $(if $(MODEL),"$(MODEL)")

plan: env ## Say what a run will take: jobs, core-hours, memory, disk, size of every model e.g. make plan CONFIG=config/paper.yaml
	$(BIN)/python -m cospadi.needs $(if $(CONFIG),--configfile "$(CONFIG)") $(if $(filter-out all,$(CORES)),--cores $(CORES)) $(if $(RESULTS),--results "$(RESULTS)")

calibrate: env ## Measure this machine in half a minute, for plan, time limits and status e.g. make calibrate
	$(BIN)/python -m cospadi.machine

run: env ## Run the workflow: compress, evaluate, report e.g. make run CONFIG=config/paper.yaml CORES=8
	$(SNAKEMAKE) $(if $(CONFIG),--configfile "$(CONFIG)")

status: env ## Say what of a run is done and what is left, also while it runs e.g. make status CONFIG=config/paper.yaml
	$(BIN)/python -m cospadi.status $(if $(CONFIG),--configfile "$(CONFIG)")

frontier: ## Every method at every size (hours); its rows of docs/frontier.tsv, and its plots e.g. make frontier CORES=8
	$(MAKE) run CONFIG=config/frontier.yaml
	awk -F'\t' 'NR == FNR { print; mine[$$3]; next } !($$3 in mine)' results/frontier/frontier.tsv docs/frontier.tsv > results/frontier/with-others.tsv
	cp results/frontier/with-others.tsv docs/frontier.tsv
	cp results/frontier/plots/pareto.png docs/frontier-perplexity.png
	cp results/frontier/plots/accuracy.png docs/frontier-accuracy.png

densify: env ## Write results/RUN/VARIANT/dense, an ordinary model folder e.g. make densify RUN=demo VARIANT=ours-40
	@$(IS_RUN)
	$(SNAKEMAKE) --configfile results/$(RUN)/config.yaml -- results/$(RUN)/$(VARIANT)/dense

export: env ## Write results/RUN/VARIANT as FORMAT=gguf (TYPE=BF16, Q8_0, Q4_0 ...) or FORMAT=compressed-tensors
	@$(IS_RUN)
	@test -n "$(EXPORTED)" || { echo "FORMAT=$(FORMAT) is not known; say FORMAT=gguf or FORMAT=compressed-tensors"; exit 1; }
	$(SNAKEMAKE) --configfile results/$(RUN)/config.yaml -- results/$(RUN)/$(VARIANT)/$(EXPORTED)

verify: env ## Compare results/RUN/VARIANT/model, every byte of it, with its checksums e.g. make verify RUN=demo VARIANT=ours-40
	$(BIN)/python -m cospadi.checkpoint verify results/$(RUN)/$(VARIANT)/model

# threads of one worker that wait would take the other's core
test: lint ## Lint, then all tests but the slow ones e.g. make test
	OMP_WAIT_POLICY=passive $(BIN)/pytest -q -n 2 --dist loadfile -m "not slow and not slurm"

fuzz: env ## Damage checkpoints and configs at random for MINUTES, the kernel under AddressSanitizer e.g. make fuzz MINUTES=60
	PYTHONPATH=workflow $(BIN)/python tests/format/fuzz.py --minutes $(MINUTES) --first $(FIRST) --asan

slurm-test: env ## Run the workflow on a SLURM of one node, installed from Debian's packages where it is missing e.g. make slurm-test
	$(BIN)/pytest -q -m slurm tests/workflow/test_slurm.py

bench: env ## Run the benchmarks of the solvers, on the demo's matrices if it has run e.g. make bench
	$(BIN)/python benchmarks/run.py

bench-runtime: env ## Time packed checkpoints beside dense ones e.g. make bench-runtime
	$(BIN)/python benchmarks/runtime.py

lint: env ## Check style: ruff, snakefmt, snakemake --lint e.g. make lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check $(RULES)
	$(BIN)/snakemake --lint

format: env ## Format Python and Snakemake files e.g. make format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt $(RULES)

# --strict: a pin that the advisories do not know, or that cannot be asked for, is no pin without a vulnerability
audit: env ## Compare the pins in envs/ with the known vulnerabilities; needs pypi.org e.g. make audit
	test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install --quiet pip-audit; }
	@for pins in lock torch; do \
	  $(VENV)/audit/bin/pip-audit --strict --disable-pip --require-hashes --progress-spinner off -r envs/$$pins.txt || \
	  { echo "envs/$$pins.txt is not audited to its end: a vulnerability is listed above, or the advisories of pypi.org could not be reached"; exit 1; }; \
	done

clean-activations: ## Remove the activations that killed runs left, the largest files; while none is running e.g. make clean-activations
	find results -type d -name activations -prune -exec rm -rf {} +

clean: ## Remove results and caches; keeps .venv and resources/ e.g. make clean
	rm -rf results .snakemake .pytest_cache .ruff_cache .hypothesis

env: $(READY) ## Set up .venv e.g. make env PYTHON=python3.12

$(READY): envs/lock.txt envs/torch.txt envs/torch-cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; say which: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(if $(filter system,$(TORCH)),--system-site-packages) $(VENV)
	$(if $(filter system,$(TORCH)),,$(PIP) --require-hashes -r envs/torch-cpu.txt || { echo "No CPU build of torch is at hand: taking PyPI's, gigabytes larger"; $(PIP) --require-hashes -r envs/torch.txt; })
	$(PIP) --require-hashes -r envs/lock.txt
	$(PIP) --no-build-isolation --editable .
	$(BIN)/python -c 'import torch'
	echo $(TORCH) > $(VENV)/.torch
	touch $@
