# make reproduce         install into .venv and run the study reports/quickstart
# make reports/<study>   the same for any study, such as: make reports/docstrings
# make test              unit tests on TensorFlow and JAX, notebooks compared with their committed outputs
# make test-slow         the tests that take minutes each
# make test-colab        the tests with the packages of Colab's TPU runtime, which has no TensorFlow, and its GPU runtime
# make lint              ruff on code and notebooks
# make help              this list

.PHONY: help reproduce test test-slow test-colab lint FORCE
help:
	@sed -n '/^#/!q; s/^# /  /p' Makefile

PIP = .venv/bin/python -m pip --disable-pip-version-check
PYTEST = .venv/bin/python -m pytest

reproduce: reports/quickstart

reports/%: .venv/.installed FORCE
	@.venv/bin/python -m gpt2lib.study $@

# Compares with Hugging Face, which nothing else needs.
reports/benchmark: .venv/.installed-bench

# Two files of tests at a time: each process may take 3 GB.
test: .venv/.installed-test
	KERAS_BACKEND=tensorflow $(PYTEST) -n 2 --dist loadfile tests
	KERAS_BACKEND=jax $(PYTEST) -n 2 --dist loadfile tests -m "not backend_free and not slow"

# pytest exits with 5 where it finds nothing to run
test-slow: .venv/.installed-test
	KERAS_BACKEND=tensorflow $(PYTEST) tests -m slow || [ $$? -eq 5 ]
	KERAS_BACKEND=jax $(PYTEST) tests -m "slow and not backend_free" || [ $$? -eq 5 ]

# Old packages warn of what newer Pythons will not have, and the GPU runtime's TensorFlow of the GPU that is not here.
test-colab: .venv/.colab-tpu .venv/.colab-gpu
	KERAS_BACKEND=jax .venv/colab-tpu/bin/python -m pytest tests -W ignore::DeprecationWarning
	KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 .venv/colab-gpu/bin/python -m pytest tests -W ignore::DeprecationWarning

lint: .venv/.installed-test
	.venv/bin/ruff check
	.venv/bin/ruff format --check

# A stamp is made again when the list of packages has changed. One waits for the other, because under make -j two pips
# would get into each other's way.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv: about 2 GB, some minutes"
	@$(PIP) install -q -c constraints.txt -e '.[tensorflow,notebooks]'
	@touch $@

.venv/.installed-test: .venv/.installed
	@$(PIP) install -q -c constraints.txt -e '.[tensorflow,notebooks,test]'
	@touch $@

.venv/.installed-bench: .venv/.installed
	@$(PIP) install -q -c constraints.txt -e '.[tensorflow,notebooks,bench,corpus]'
	@touch $@

# What Colab has, then what a notebook's first cell adds, which must replace none of it, then what tests need.
.venv/.colab-%: tests/colab/%.txt notebooks/colab.py pyproject.toml | .venv/bin/python
	@echo "Installing what Colab's $* runtime has into .venv/colab-$*: some minutes"
	@rm -rf .venv/colab-$* && .venv/bin/python -m venv --without-pip .venv/colab-$*
	@$(PIP) --python .venv/colab-$*/bin/python install -q pip -r $<
	@.venv/colab-$*/bin/python notebooks/colab.py
	@$(PIP) --python .venv/colab-$*/bin/python install -q -c $< pytest nbval papermill psutil tensorboardX
	@grep -v '^#' $< | sort >$@.list && $(PIP) --python .venv/colab-$*/bin/python freeze --all | sort | comm -23 $@.list - >$@.lost
	@! grep . $@.lost
	@touch $@

.venv/bin/python:
	@sh -c "$$MAKE_VENV"

# A .venv with a fitting Python and pip, on machines as they come: Debian and Ubuntu split venv off their Python, macOS
# has an old one, distributions may have one that is too new.
define MAKE_VENV
fits='import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
scratch=$$(mktemp -d)
trap 'rm -rf "$$scratch"' EXIT

attempt() {
  rm -rf .venv
  "$$@" >>"$$scratch/log" 2>&1 && .venv/bin/python -m pip --version >>"$$scratch/log" 2>&1
}
without_ensurepip() {
  "$$1" -m venv --without-pip .venv && "$$1" -m pip --python .venv/bin/python install -q pip
}
uv_from_pip() {
  python3 -m venv "$$scratch/uv" && "$$scratch/uv/bin/pip" install -q uv &&
    "$$scratch/uv/bin/uv" venv -q --seed --python 3.12 .venv
}
every_way() {
  for python in python3.13 python3.12 python3.11 python3; do
    "$$python" -c "$$fits" 2>/dev/null || continue
    attempt "$$python" -m venv .venv && exit
    attempt "$$python" -m virtualenv .venv && exit
    attempt uv venv -q --seed --python "$$python" .venv && exit
    attempt without_ensurepip "$$python" && exit
  done
  attempt uv venv -q --seed --python 3.12 .venv && exit
  attempt uv_from_pip && exit
}

every_way
if command -v apt-get >/dev/null; then
  if [ "$$(id -u)" = 0 ]; then sudo=; else sudo=sudo; fi
  # sudo works without a password, or somebody is there to give it
  if [ -z "$$sudo" ] || sudo -n true 2>/dev/null || { [ -t 0 ] && sudo -v; }; then
    echo "Installing python3-venv with apt-get"
    { $$sudo apt-get -q update && $$sudo apt-get -qy install python3-venv; } >>"$$scratch/log" 2>&1 && every_way
  fi
fi
rm -rf .venv
tail -n 5 "$$scratch/log" >&2
if command -v apt-get >/dev/null; then hint='sudo apt-get install python3-venv'; else hint='pip install uv'; fi
echo "No Python 3.11 to 3.13 here can make .venv and none could be fetched; run \`$$hint\`, then make again." >&2
exit 1
endef
export MAKE_VENV
