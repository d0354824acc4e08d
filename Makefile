# weightregions. `make help` lists what can be made; every target installs what it needs into .venv by itself.

# As in `make study SCALE=tiny OUT=first-look`:
#   SCALE   tiny | laptop | full | paper | lora
#   DATA    builtin | hub | a folder of datasets; not given: hub at scale paper, else builtin
#   OUT     where a study leaves its models, rows and reports; INTO where `make record` keeps rows
#   TESTS   what `make test` runs; JOBS in how many processes
#   FLAGS   flagged notebook cells to run as well, such as "slow cuda"
#   PYTHON  the interpreter that makes .venv
# and of `make bench`:
#   SIZE    base | small checkpoints
#   DEVICE  cpu | cuda; BASE  minilm | random weights, for probe and zoo
#   ONLY    ceiling similarity average merges line growth probe zoo commands adapters, or some of them
#   BEFORE  another checkout, whose commands are measured beside ours
#   ROUNDS  measurements of each way; CLOCK wall | cpu
#   ROWS    the file of rows
#   PEERS   1 installs mergekit and loss-landscapes into OUT/peers
SCALE  ?= laptop
DATA   ?=
OUT    ?= out
INTO   ?= nbs/study/recorded
TESTS  ?= tests
JOBS   ?= 2
FLAGS  ?=
PYTHON ?= python3
SIZE   ?= base
DEVICE ?= cpu
BASE   ?= minilm
ONLY   ?=
ROUNDS ?= 3
CLOCK  ?= wall
ROWS   ?= $(OUT)/bench.csv
BEFORE ?=
PEERS  ?=

BIN   := .venv/bin
QUIET := OMP_NUM_THREADS=1 TQDM_DISABLE=1 HF_HUB_OFFLINE=1
say    = @printf '\n== %s\n' "$(1)"

.DEFAULT_GOAL := help
.PHONY: help study record test bench lab prepare book clean

help: ## list the targets
	@awk -F ':.*## ' '/^[.a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile
	@printf '\n  as they stand: SCALE=$(SCALE) DATA="$(DATA)" OUT=$(OUT) TESTS=$(TESTS) JOBS=$(JOBS) FLAGS="$(FLAGS)" PYTHON=$(PYTHON)\n'

study: .venv ## measure all claims of the paper: SCALE, DATA, OUT
	$(call say,studying at scale $(SCALE)$(if $(DATA), on $(DATA) data); everything goes to $(OUT))
	$(BIN)/weightregions study --scale "$(SCALE)" $(if $(DATA),--data "$(DATA)") --out "$(OUT)"

record: ## keep the rows of a study as the run that the study notebooks show: OUT, INTO
	test -f "$(OUT)/rows/starts.csv"
	rm -rf "$(INTO)/rows" "$(INTO)/claims"
	cp -r "$(OUT)/rows" "$(OUT)/about.json" "$(INTO)/"
	$(if $(filter-out nbs/study/recorded,$(INTO)),cp -r "$(OUT)/claims" "$(INTO)/")

test: .venv ## run every notebook and every test: TESTS, JOBS, FLAGS
	$(call say,testing $(TESTS) in $(JOBS) processes: each notebook is one test)
	$(QUIET) $(BIN)/python -m pytest $(TESTS) -v -n $(JOBS) --dist loadgroup -o tmp_path_retention_policy=failed --durations 10 $(if $(FLAGS),--flags "$(FLAGS)")

bench: .venv $(if $(PEERS),$(OUT)/peers/installed) ## time, memory and error beside floors and peers: SIZE, DEVICE, ONLY, PEERS=1
	$(call say,measuring $(or $(ONLY),everything) at size $(SIZE) on $(DEVICE); rows go to $(ROWS))
	$(BIN)/python tests/bench --size "$(SIZE)" --device "$(DEVICE)" --base "$(BASE)" --only $(ONLY) --rounds "$(ROUNDS)" --clock "$(CLOCK)" --rows "$(ROWS)" --peers "$(OUT)/peers/bin/python" --before "$(BEFORE)"

lab: .venv ## open the notebooks in JupyterLab; saved notebooks are clean
	cd nbs && ../$(BIN)/jupyter lab --config ../.ci/lab.py

prepare: .venv ## after an edit: clean, export, execute all notebooks, render README.md
	$(call say,cleaning and exporting the notebooks)
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(call say,executing the notebooks)
	$(QUIET) $(BIN)/python .ci/execute.py $(if $(FLAGS),--flags "$(FLAGS)")
	$(call say,rendering README.md)
	$(BIN)/python .ci/readme.py

book: .venv ## build the browsable book: _book/index.html
	$(call say,building the book)
	$(BIN)/python .ci/book.py _book

clean: ## remove what can be made again, except .venv and results in OUT
	rm -rf _book build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -print -o -name .ipynb_checkpoints -print | xargs rm -rf

$(OUT)/peers/installed: tests/bench/peers.txt
	$(call say,installing peers into $(OUT)/peers)
	test -x $(OUT)/peers/bin/pip || $(PYTHON) -m venv $(OUT)/peers
	$(OUT)/peers/bin/python -m pip install --progress-bar off -r $<
	@touch $@

.venv: .venv/installed ## the virtual environment with everything in it

.venv/installed: settings.ini setup.py constraints.txt
	$(call say,installing into .venv (some minutes the first time))
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --use-pep517 --progress-bar off -c constraints.txt -e '.[dev,study,offline,docs,explore,ray,lora]'
	@touch $@
