# make demo: profile -> compile -> run -> eval on the shipped model.   make test: the tests.   make check: what CI runs.
# TORCH=torch==2.13.0 chooses what is installed where the base Python has no torch of its own.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
DEMO := build/demo

.PHONY: demo test test-zoo fuzz chaos check lines format docs schedules schedules-pixart schedules-opensora table proxies released bench bench-gpu bench-peers train train-pixart train-opensora clean

# The environment sees the base Python's packages only if that has torch (your own CUDA build, say).
.venv/bin/python:
	@if $(PYTHON) -c "import torch" 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages .venv; \
	else $(PYTHON) -m venv .venv && $(BIN)/pip install -q "$(TORCH)"; fi

.venv/ready: pyproject.toml | .venv/bin/python
	$(BIN)/pip install -q -e ".[dev]"
	@touch $@

demo: .venv/ready
	rm -rf $(DEMO)
	$(BIN)/sodaprof profile tiny-dit -o $(DEMO)/profile --samples 16
	$(BIN)/sodaprof compile $(DEMO)/profile --budget 2.0x -o $(DEMO)/solver-2.0x.json
	$(BIN)/sodaprof compile $(DEMO)/profile --budget 2.0x --policy soda -o $(DEMO)/soda-2.0x.json
	$(BIN)/sodaprof show $(DEMO)/solver-2.0x.json
	$(BIN)/sodaprof show $(DEMO)/soda-2.0x.json
	$(BIN)/sodaprof run tiny-dit $(DEMO)/solver-2.0x.json --label 5 --label 7 -o $(DEMO)/star-and-heart.png
	$(BIN)/sodaprof eval tiny-dit $(DEMO)/solver-2.0x.json $(DEMO)/soda-2.0x.json --samples 16 -o $(DEMO)/eval.json --picture $(DEMO)/side-by-side.png
	@echo "Look at $(DEMO)/side-by-side.png"

# Files side by side, one thread each: the tests' networks are tiny, and threads that wait for each other only slow them down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
test: .venv/ready
	$(PYTEST)

# Lines of the package, and of its tests without zoo, parity, studies and reference models. A ceiling rises for net new features
# only, with the reason in the commit. The last rises: overlapping runs, safe files with typed state, the boundary of the command
# line, labels, a scheduler that saves (1400 lines), with the reported cases, fuzzing and faults injected (3500 lines of tests);
# better fitted samplers: data basis, network times, placements that compete, joint fits (1100 lines, 1000 of tests);
# rows that change places, quantised weights, interrupts that libraries drop (250 lines, 500 of tests).
CEILING_PACKAGE := 20300
CEILING_TESTS := 20600
lines:
	@n=$$(git ls-files 'sodaprof/*.py' | xargs cat | wc -l); echo "sodaprof: $$n lines of at most $(CEILING_PACKAGE)"; \
	  test $$n -le $(CEILING_PACKAGE)
	@n=$$(git ls-files 'tests/*.py' | grep -vE '^tests/(zoo|parity|studies|reference)/' | xargs cat | wc -l); \
	  echo "tests: $$n lines of at most $(CEILING_TESTS)"; test $$n -le $(CEILING_TESTS)

check: .venv/ready lines
	@git ls-files -z | xargs -0 cat | wc -c | awk '$$1 > 48e6 { print "Tracked files: " $$1 " bytes, more than 48 MB."; exit 1 }'
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -p no:cacheprovider
	$(MAKE) bench-gpu DEVICE=cpu REHEARSAL=1 WHEELS= OUT=build/gpu-rehearsal

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Makes docs/cli.md from the commands. `python -m tests.studies.tutorial_page` runs the commands of docs/tutorial.md again.
docs: .venv/ready
	$(BIN)/python -m tests.studies.cli_page docs/cli.md

# Makes what schedules/tiny-dit holds, and its pictures, from the shipped model: the fitted update, SODA and FORA.
RESULTS := docs/studies/results
POLICIES = "solver --fit $(1)" soda fora
compiled = set -e; for b in $(3); do for p in $(call POLICIES,$(1)); do $(BIN)/sodaprof compile $(2) --policy $$p --budget $$b \
	  -o schedules/$(1)/$${p%% *}-$$b.json --force; done; done
drawn = $(BIN)/sodaprof eval $(1) schedules/$(1)/*-$(2).json --samples 8 --no-controls --force --picture $(RESULTS)/$(1).png
schedules: .venv/ready
	$(BIN)/sodaprof profile tiny-dit -o schedules/tiny-dit/profile --samples 100 --force
	$(call compiled,tiny-dit,schedules/tiny-dit/profile,2.0x 2.5x 3.5x 5.0x)
	$(call drawn,tiny-dit,3.5x)

# The same for tiny-pixart. Its profile stays in build/. What they come to is measured by `make table`.
schedules-pixart: .venv/ready
	$(BIN)/sodaprof profile tiny-pixart -o build/tiny-pixart-profile --samples 100 --force
	$(call compiled,tiny-pixart,build/tiny-pixart-profile,1.5x 1.9x 2.5x)
	$(call drawn,tiny-pixart,2.5x)

# The same for tiny-opensora, from 32 clips.
schedules-opensora: .venv/ready
	$(BIN)/sodaprof profile tiny-opensora -o build/tiny-opensora-profile --samples 32 --force
	$(call compiled,tiny-opensora,build/tiny-opensora-profile,1.9x 2.5x)
	$(call drawn,tiny-opensora,2.5x)

# Makes the comparison of docs/studies/results.md: profiles, schedules and evaluations of every policy. A day on one core; what
# build/table holds is not made again.
table: .venv/ready
	$(BIN)/python -m tests.studies.table

# Asks which prediction orders schedules rightly, and how near each policy comes to the best of 3 060: docs/studies/proxies.md.
# What build/proxies holds is not played again; an hour and a half on one core.
proxies: .venv/ready
	test -e build/tiny-dit-profile/manifest.json || $(BIN)/sodaprof profile tiny-dit -o build/tiny-dit-profile --samples 100
	test -e build/tiny-dit-20-profile/manifest.json || \
	  $(BIN)/sodaprof profile tiny-dit -o build/tiny-dit-20-profile --steps 20 --samples 32
	$(BIN)/python -m tests.studies.proxies

# Makes ToCa's and DuCa's released schedules for the published models, from their shapes alone.
released: .venv/ready
	$(BIN)/python -m tests.studies.published build/published
	for m in $$(ls build/published); do for p in toca duca; do mkdir -p schedules/$$m && \
	  $(BIN)/sodaprof compile build/published/$$m --policy $$p -o schedules/$$m/$$p.json --force || exit 1; done; done

# Tries discovery, runtime, FLOPs and lowering on tiny instances of diffusers' transformer classes, whole pipelines, and these
# together with what users put on them.
test-zoo: .venv/ready
	mkdir -p build
	$(BIN)/python -m tests.zoo.zoo_check --markdown > build/zoo.md; classes=$$?; \
	$(BIN)/python -m tests.zoo.zoo_pipelines --markdown > build/zoo-pipelines.md; pipelines=$$?; \
	$(BIN)/python -W ignore -m tests.zoo.zoo_guests --markdown > build/zoo-guests.md; guests=$$?; \
	{ sed -n '1,/^<!-- classes -->/p' docs/studies/zoo.md; echo; cat build/zoo.md; echo; \
	  sed -n '/^## Pipelines/,/^<!-- pipelines -->/p' docs/studies/zoo.md; echo; cat build/zoo-pipelines.md; echo; \
	  sed -n '/^## Guests/,/^<!-- guests -->/p' docs/studies/zoo.md; echo; cat build/zoo-guests.md; } > build/zoo-page.md; \
	cp build/zoo-page.md docs/studies/zoo.md; exit $$((classes + pipelines + guests))

# Reads legal and changed files of every kind: 10 000 schedules and 2 000 of each other. SEED=1 draws others.
SEED := 0
fuzz: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seed $(SEED)

# Kills, interrupts, fills the disk under and doubles `profile` and `refine`, half an hour at most. KILLS=3 makes few trials.
KILLS := 100
chaos: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --kills $(KILLS)

# Times the loop on this machine: DiT-S/2 with random weights, tiny-dit under budgets in milliseconds. Ten minutes on a CPU.
BENCH := build/bench
bench: .venv/ready
	mkdir -p $(BENCH)
	$(BIN)/python -m tests.studies.random_models dit-s-2 $(BENCH)/dit-s-2
	$(BIN)/sodaprof inspect $(BENCH)/dit-s-2 --steps 50 -o $(BENCH)/inspected --force
	for n in 18 10; do $(BIN)/sodaprof compile $(BENCH)/inspected --policy fora --knob anchors=$$n \
	  -o $(BENCH)/fora-$$n-of-50.json --force || exit 1; done
	$(BIN)/sodaprof bench $(BENCH)/dit-s-2 $(BENCH)/fora-18-of-50.json $(BENCH)/fora-10-of-50.json --force \
	  -o $(RESULTS)/bench-dit-s-2.json
	OMP_NUM_THREADS=1 $(BIN)/sodaprof bench tiny-dit --cost $(BENCH)/cost.json --force
	set -e; for b in 1.25x 1.5x 1.75x 2.0x; do $(BIN)/sodaprof compile schedules/tiny-dit/profile --cost $(BENCH)/cost.json \
	  --policy soda --budget $$b -o $(BENCH)/soda-ms-$$b.json --force; done
	set -e; for b in 2.0x 5.0x; do $(BIN)/sodaprof compile schedules/tiny-dit/profile --cost $(BENCH)/cost.json \
	  --policy solver --budget $$b -o $(BENCH)/solver-ms-$$b.json --force; done
	OMP_NUM_THREADS=1 $(BIN)/sodaprof bench tiny-dit $(foreach b,1.25x 1.5x 1.75x 2.0x,$(BENCH)/soda-ms-$(b).json) \
	  $(foreach b,2.0x 5.0x,$(BENCH)/solver-ms-$(b).json) --force -o $(RESULTS)/bench-tiny-dit.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.studies.light_steps tiny-dit $(BENCH)/dit-s-2 -o $(RESULTS)/light-steps.json
	$(BIN)/python -m tests.studies.page $(RESULTS) docs/studies/results.md

# One prepared run on a GPU box without network, 8 minutes at most: docs/gpu.md. Needs no environment of its own.
# DEVICE=cpu REHEARSAL=1 runs the same code on the CPU with tiny networks, with the environment's Python.
WHEELS ?=
OUT ?= build/gpu
DEVICE ?= cuda
REHEARSAL ?=
bench-gpu: $(if $(REHEARSAL),.venv/ready)
	$(if $(REHEARSAL),OMP_NUM_THREADS=1 $(BIN)/python,$(PYTHON)) -m tests.gpu --out $(OUT) --device $(DEVICE) \
	  $(if $(WHEELS),--wheels $(WHEELS)) $(if $(REHEARSAL),--rehearsal)

# Measures other caches beside this project's, and makes the tables in docs/studies/peers.md. Most of an hour on two threads.
bench-peers: .venv/ready
	$(BIN)/pip install -q -e ".[peers]"
	$(BIN)/python -m tests.studies.peers

# Makes the weights of tiny-dit again (hours on a CPU, minutes on a GPU).
train: .venv/ready
	$(BIN)/python -m tests.reference.train_tiny_dit build/train

# Makes the weights of tiny-pixart again (an hour and a half on a CPU).
train-pixart: .venv/ready
	$(BIN)/python -m tests.reference.train_tiny_pixart build/train-pixart

# Makes the weights of tiny-opensora again (an hour on a CPU).
train-opensora: .venv/ready
	$(BIN)/python -m tests.reference.train_tiny_opensora build/train-opensora

clean:
	rm -rf .venv build
