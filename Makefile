# make demo: profile -> compile -> run -> eval on the shipped model.   make test: the tests.   make check: what CI runs.
# TORCH=torch==2.13.0 chooses what is installed where the base Python has no torch of its own.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
DEMO := build/demo

.PHONY: demo test test-zoo check format schedules schedules-pixart schedules-opensora table proxies released bench bench-gpu bench-peers train train-pixart train-opensora clean

# The environment sees the base Python's packages only where that has torch (your own CUDA build, say).
.venv/ready: pyproject.toml
	@if $(PYTHON) -c "import torch" 2>/dev/null; \
	then $(PYTHON) -m venv --clear --system-site-packages .venv; \
	else $(PYTHON) -m venv --clear .venv && $(BIN)/pip install -q "$(TORCH)"; fi
	$(BIN)/pip install -q -e ".[dev]"
	@touch $@

demo: .venv/ready
	rm -rf $(DEMO)
	$(BIN)/sodaprof profile tiny-dit -o $(DEMO)/profile --samples 16
	$(BIN)/sodaprof compile $(DEMO)/profile --budget 2.0x -o $(DEMO)/update-2.0x.json
	$(BIN)/sodaprof compile $(DEMO)/profile --budget 2.0x --policy soda -o $(DEMO)/soda-2.0x.json
	$(BIN)/sodaprof show $(DEMO)/update-2.0x.json
	$(BIN)/sodaprof show $(DEMO)/soda-2.0x.json
	$(BIN)/sodaprof run tiny-dit $(DEMO)/update-2.0x.json --label 5 --label 7 -o $(DEMO)/star-and-heart.png
	$(BIN)/sodaprof eval tiny-dit $(DEMO)/update-2.0x.json $(DEMO)/soda-2.0x.json --samples 16 -o $(DEMO)/eval.json --picture $(DEMO)/side-by-side.png
	@echo "Look at $(DEMO)/side-by-side.png"

# Files side by side, one thread each: the tests' networks are tiny, and threads that wait for each other only slow them down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
test: .venv/ready
	$(PYTEST)

check: .venv/ready
	@git ls-files -z | xargs -0 cat | wc -c | awk '$$1 > 48e6 { print "Tracked files: " $$1 " bytes, more than 48 MB."; exit 1 }'
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -p no:cacheprovider

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Makes what schedules/tiny-dit holds, and its pictures, from the shipped model: the fitted update, SODA and FORA.
RESULTS := docs/results
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

# Asks which prediction orders schedules rightly, and how near each policy comes to the best of 3 060: docs/proxies.md.
# What build/proxies holds is not played again; an hour and a half on one core.
proxies: .venv/ready
	test -e build/tiny-dit-profile/manifest.json || $(BIN)/sodaprof profile tiny-dit -o build/tiny-dit-profile --samples 100
	test -e build/tiny-dit-20-profile/manifest.json || \
	  $(BIN)/sodaprof profile tiny-dit -o build/tiny-dit-20-profile --steps 20 --samples 32
	$(BIN)/python -m tests.proxies

# Makes ToCa's and DuCa's released schedules for the published models, from their shapes alone.
released: .venv/ready
	$(BIN)/python -m sodaprof.models.published build/published
	for m in $$(ls build/published); do for p in toca duca; do mkdir -p schedules/$$m && \
	  $(BIN)/sodaprof compile build/published/$$m --policy $$p -o schedules/$$m/$$p.json --force || exit 1; done; done

# Tries discovery, runtime, FLOPs and lowering on tiny instances of diffusers' transformer classes, and whole pipelines.
test-zoo: .venv/ready
	mkdir -p build
	$(BIN)/python -m tests.zoo_check --markdown > build/zoo.md; classes=$$?; \
	$(BIN)/python -m tests.zoo_pipelines --markdown > build/zoo-pipelines.md; pipelines=$$?; \
	{ sed -n '1,/^<!-- classes -->/p' docs/zoo.md; echo; cat build/zoo.md; echo; \
	  sed -n '/^## Pipelines/,/^<!-- pipelines -->/p' docs/zoo.md; echo; cat build/zoo-pipelines.md; } > build/zoo-page.md; \
	cp build/zoo-page.md docs/zoo.md; exit $$((classes + pipelines))

# Times the loop on this machine: DiT-S/2 with random weights, tiny-dit under budgets in milliseconds. Ten minutes on a CPU.
BENCH := build/bench
bench: .venv/ready
	mkdir -p $(BENCH)
	$(BIN)/python -m tests.random_models dit-s-2 $(BENCH)/dit-s-2
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
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.light_steps tiny-dit $(BENCH)/dit-s-2 -o $(RESULTS)/light-steps.json
	$(BIN)/python -m sodaprof.report.page $(RESULTS) docs/results.md

# Runs the GPU tests, times DiT-XL/2 and PixArt-XL with random weights in bf16, and profiles DiT-XL/2. Needs a GPU; minutes.
ON_GPU := --device cuda --dtype bfloat16 --force
bench-gpu: .venv/ready
	mkdir -p $(BENCH)
	$(BIN)/python -m pytest -m gpu
	set -e; for m in "dit-xl-2 50 18" "pixart-xl-2-512 20 8" "pixart-xl-2-1024 20 8"; do set -- $$m; \
	  $(BIN)/python -m tests.random_models $$1 $(BENCH)/$$1; \
	  $(BIN)/sodaprof inspect $(BENCH)/$$1 --steps $$2 -o $(BENCH)/$$1-inspected --force; \
	  $(BIN)/sodaprof compile $(BENCH)/$$1-inspected --policy fora --knob anchors=$$3 -o $(BENCH)/$$1-$$3-of-$$2.json --force; \
	  $(BIN)/sodaprof bench $(BENCH)/$$1 $(BENCH)/$$1-$$3-of-$$2.json $(ON_GPU) -o $(RESULTS)/bench-$$1-cuda.json; \
	  $(BIN)/python -m tests.compiled $(BENCH)/$$1 $(RESULTS)/compiled-$$1-cuda.json --device cuda --dtype bfloat16; done
	$(BIN)/sodaprof profile $(BENCH)/dit-xl-2 -o $(BENCH)/dit-xl-2-profile --samples 100 $(ON_GPU)
	cp $(BENCH)/dit-xl-2-profile/manifest.json $(RESULTS)/profile-dit-xl-2-cuda.json
	$(BIN)/python -m sodaprof.report.page $(RESULTS) docs/results.md

# Measures other caches beside this project's, and makes the tables in docs/peers.md. Most of an hour on two threads.
bench-peers: .venv/ready
	$(BIN)/pip install -q -e ".[peers]"
	$(BIN)/python -m tests.peers

# Makes the weights of tiny-dit again (hours on a CPU, minutes on a GPU).
train: .venv/ready
	$(BIN)/python -m sodaprof.models.train_tiny_dit build/train

# Makes the weights of tiny-pixart again (an hour and a half on a CPU).
train-pixart: .venv/ready
	$(BIN)/python -m sodaprof.models.train_tiny_pixart build/train-pixart

# Makes the weights of tiny-opensora again (an hour on a CPU).
train-opensora: .venv/ready
	$(BIN)/python -m sodaprof.models.train_tiny_opensora build/train-opensora

clean:
	rm -rf .venv build
