# make demo    accelerate the embedded model within 1% of its perplexity, then let the result write a few lines
# make bench   hasten beside llama.cpp, OpenVINO and transformers on the embedded model: table, JSON, plot in build/bench
#              (MODEL=folder FORMAT=int4-g128 AGAINST=openvino BENCH='--random-weights --workloads decode-1 --rounds 5')
# make test    all tests (EXTRAS=train also installs torch and transformers, for the comparisons that need them)
# make check   formatting, lint, types, floors, file sizes
# make fuzz    20,000 requests made of the server's OpenAPI description (CASES=100000 for more): every answer as it says
# make sanitize  the native tests under the address, undefined and thread sanitizers
# make clean   remove everything that these made
#
# Needs python3 >= 3.11 with venv, and a C++20 compiler; cmake, ninja and the rest come through pip.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?=
PROMPT ?= def read_config(path
MODEL ?= demo
FORMAT ?= int4-g32,int8-g32
AGAINST ?= llama.cpp,openvino,transformers
BENCH ?=
CASES ?= 20000
SANITIZERS ?= address,undefined thread

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check
sources := pyproject.toml CMakeLists.txt LICENSE README.md $(shell find src native -type f -not -path '*/__pycache__/*' -not -name '*.so')
comma := ,
empty :=
extras := $(subst $(empty) $(empty),$(comma),$(strip $(EXTRAS)))

.PHONY: demo bench test fuzz check sanitize install clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	@if [ -e build/demo-fast ]; then \
	  rm -rf build/demo-fast.previous && mv build/demo-fast build/demo-fast.previous && \
	  echo "the last demo's output is now build/demo-fast.previous"; \
	fi
	$(bin)/hasten accelerate demo --budget ppl=1% -o build/demo-fast
	@echo
	@echo "The accelerated model writes:"
	$(bin)/hasten generate build/demo-fast -p '$(PROMPT)' -n 96 --temperature 0.6 --repetition-penalty 1.15

# Peers are installed on first use, which takes a while (llama.cpp is compiled for this machine), and kept.
bench: $(VENV)/installed
	$(bin)/hasten bench $(MODEL) --against $(AGAINST) --format $(FORMAT) --output build/bench $(BENCH)

test: $(VENV)/tested-$(extras)
	$(bin)/python -m pytest -rs -n auto --dist loadfile --no-loadscope-reorder

fuzz: $(VENV)/tested-$(extras)
	HASTEN_FUZZ_CASES=$(CASES) $(bin)/python -m pytest -rs -s tests/server/test_schema.py

check:
	$(PYTHON) scripts/check

# Each sanitizer is a build of its own; whatever it finds ends the program with an error.
sanitize: $(VENV)/cmake
	@for kind in $(SANITIZERS); do \
	  build=build/sanitize-$${kind%%,*}; \
	  echo "== $$kind" && $(bin)/cmake -S . -B $$build -DHASTEN_PYTHON=OFF -DHASTEN_SANITIZE=$$kind >/dev/null && \
	  $(bin)/cmake --build $$build --target test_kernels -j 2 >$$build/log 2>&1 || { tail -50 $$build/log; exit 1; }; \
	  $$build/test_kernels || exit 1; \
	done

$(VENV)/cmake: $(VENV)/made
	$(pip) install -q 'cmake>=3.20'
	@touch $@

install: $(VENV)/installed

# The environment is made once, the package installed again when a source changes.
$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is older than 3.11 or missing"; echo "hint: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sysconfig, os; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no C headers"; echo "hint: apt install python3-dev, or dnf install python3-devel"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { \
	  echo "error: no C++ compiler"; echo "hint: apt install g++, or set CXX"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/made $(sources)
	@mkdir -p build
	@echo "building hasten: its kernels, one set for each kind of processor, take some minutes to compile"
	$(pip) install -q .
	@touch $@

$(VENV)/tested-$(extras): $(VENV)/installed
	$(pip) install -q 'hasten[test$(if $(extras),$(comma)$(extras))]'
	@touch $@

clean:
	rm -rf build $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
