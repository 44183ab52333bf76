# Everything a fresh machine needs is Python 3.11 and make. The kit itself also runs on newer ones; LAVIS does not, so
# where python3 is newer, name one for it: make test OLD_PYTHON=python3.11
PYTHON ?= $(shell command -v python3.11 || command -v python3)
OLD_PYTHON ?= $(PYTHON)
BIN := .venv/bin
LAVIS_BIN := .venv-lavis/bin
MODEL ?= tiny-blip2-opt-2.7b
BOOK := docs/_build

# How a notebook goes into git: without outputs, and without what Jupyter, papermill and widgets note down while it runs.
STRIP := -m nbstripout --keep-id --drop-tagged-cells injected-parameters \
	--extra-keys "metadata.papermill cell.metadata.papermill \
	metadata.language_info.codemirror_mode metadata.language_info.file_extension metadata.language_info.mimetype \
	metadata.language_info.nbconvert_exporter metadata.language_info.pygments_lexer metadata.language_info.version"

.PHONY: help demo test extended lint lab setup both browser lavis twins tapes picture docs filter strip bench sweeps rates \
	newest processors clean
unexport PYTHONDONTWRITEBYTECODE  # hundreds of processes import the same modules
.NOTPARALLEL:  # two notebooks at once would write to one run

help:  ## what can be made
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 12

demo: setup  ## convert a twin, prove it, show the verdict (needs no LAVIS)
	@mkdir -p outputs
	@$(BIN)/python -m blip2nb.lavis_env.papermill notebooks/convert.ipynb outputs/$(MODEL).ipynb -p model_name $(MODEL) --log-level WARNING
	@echo
	@$(BIN)/blip2nb show $(MODEL)
	@echo "  notebook  outputs/$(MODEL).ipynb"

test: both lavis browser lint  ## everything, LAVIS itself included
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

extended: .venv/dev.done .transformers4/installed.done  ## the converted directories in transformers 4.57 too (another 135 MB)
	$(BIN)/python -m pytest -m extended

newest:  ## the newest releases of all dependencies, in an environment that is made for it and removed (.newest)
	rm -rf .newest
	$(PYTHON) -m venv .newest
	.newest/bin/python -m pip install -q -e '.[dev]'
	.newest/bin/python -m pip freeze --exclude-editable
	.newest/bin/python -m pytest tests/test_convert.py tests/test_hygiene.py -k "not book"
	for twin in tiny-blip2-opt-2.7b tiny-blip2-flan-t5-xl; do \
		.newest/bin/python -m blip2nb.lavis_env.papermill notebooks/convert.ipynb .newest/$$twin.ipynb -p model_name $$twin \
			-p output_dir $(CURDIR)/.newest/outputs --log-level WARNING || exit 1; done
	rm -rf .newest

lint: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

lab: setup  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/convert.ipynb

setup: .venv/main.done  ## the main environment (.venv)

both:  # both environments at once: each is one process that unpacks
	@$(MAKE) --silent .venv/dev.done & first=$$!; \
		$(MAKE) --silent .venv-lavis/packages.done; second=$$?; wait $$first && exit $$second

browser: .venv/dev.done  # a browser for the tests; where none can be had it says so, and those tests are skipped
	@$(BIN)/python tests/browser.py

lavis: .venv-lavis/lavis.done  ## the LAVIS environment (.venv-lavis) and its Jupyter kernel

twins: setup  ## convert and prove all seven twins; the README's numbers
	@for twin in $$($(BIN)/python -c "from blip2nb.variants import TWINS; print(*TWINS)"); do \
		$(BIN)/blip2nb convert $$twin && $(BIN)/blip2nb verify $$twin --no-figures >/dev/null && \
		$(BIN)/blip2nb show $$twin | grep -E "^tiny|layers|logits|captions" || exit 1; done

tapes: setup lavis  ## record the twins' reference recordings again, with LAVIS itself
	for twin in $$($(BIN)/python -c "from blip2nb.variants import TWINS; print(*TWINS)"); do \
		$(BIN)/blip2nb capture $$twin --output blip2nb/tapes/$$twin.safetensors || exit; done

picture: demo  ## the picture in the README
	cp outputs/$(MODEL)/figures/depth_trace.png docs/depth_trace.png

docs: $(patsubst %,$(BOOK)/source/%,$(wildcard notebooks/*.ipynb))  ## run every notebook and bind them as a book to read offline
	@rm -rf $(BOOK)/html $(filter-out $^,$(wildcard $(BOOK)/source/notebooks/*))
	@$(BIN)/python -m sphinx -q -W --keep-going -c docs $(BOOK)/source $(BOOK)/html
	@echo "  book      $(BOOK)/html/index.html"

filter:  # the filter that .gitattributes names. Not required: without .venv, git says so and takes notebooks as they are
	@git config filter.nbstripout.clean '$(BIN)/python $(STRIP)'
	@git config filter.nbstripout.smudge cat
	@git config filter.nbstripout.required false

strip: .venv/dev.done  ## take the outputs off the notebooks, as git does on `git add`
	@for notebook in notebooks/*.ipynb; do \
		$(BIN)/python $(STRIP) -t $$notebook > $$notebook.stripped && mv $$notebook.stripped $$notebook || exit 1; done

bench: setup  ## what conversions cost at full size: an hour, 51 GB of disk, and a machine with nothing else to do
	$(BIN)/python -m benchmarks.convert --size all --in-memory --cast bfloat16 --costs
	$(BIN)/python -m benchmarks.notebooks

sweeps: setup .venv/dev.done browser  ## what a sweep gains, costs and survives: an hour, and a machine with nothing else to do
	$(BIN)/python -m benchmarks.sweep

rates: setup lavis  ## how often faults are found, how often one is imagined, what a verification costs: an hour
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.false_alarms
	$(BIN)/python -m benchmarks.verification

processors: setup lavis  ## the same verdicts and causes with other processors' instructions, and 1 to 4 threads: half an hour
	$(BIN)/python -m benchmarks.processors

clean:  ## remove the environments, the book and everything in outputs/
	rm -rf .venv .venv-lavis .transformers4 .newest .browser $(BOOK) $(filter-out outputs/README.md,$(wildcard outputs/*))

.venv/main.done: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or newer is needed, found ' + sys.version.split()[0] + '. Say which with: make PYTHON=python3.11')"
	@echo "Making .venv: PyTorch, transformers and JupyterLab. About 3 GB to download, 6 GB on disk, 2 to 10 minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

.venv/dev.done: .venv/main.done
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,docs]'
	@test ! -e .git || $(MAKE) --silent filter || echo "git took no filter: 'make strip' before you commit notebooks."
	@touch $@

# lavis.ipynb is run once its kernel is there, and again when the kernel is made; until then it is shown as it is.
$(BOOK)/source/notebooks/lavis.ipynb: $(wildcard .venv/share/jupyter/kernels/lavis/kernel.json)
$(BOOK)/source/notebooks/%.ipynb: notebooks/%.ipynb $(wildcard blip2nb/*.py blip2nb/*/*.py blip2nb/*/*/*.py) | .venv/dev.done
	@mkdir -p $(@D)
	@if [ $* = lavis ] && ! $(BIN)/jupyter kernelspec list 2>/dev/null | grep -q '^ *lavis '; then cp $< $@; else \
		echo "  running   $<"; \
		$(BIN)/python -m blip2nb.lavis_env.papermill $< $(BOOK)/$*.ipynb -p output_dir $(abspath $(BOOK))/outputs --no-progress-bar --log-level ERROR \
			|| { echo "$< failed; as far as it came it is in $(BOOK)/$*.ipynb" >&2; exit 1; }; \
		$(BIN)/python -m nbstripout --keep-id --keep-count --keep-output --drop-tagged-cells injected-parameters \
			$(BOOK)/$*.ipynb && mv $(BOOK)/$*.ipynb $@; fi

.venv-lavis/packages.done: requirements-lavis.txt constraints-lavis.txt
	@$(OLD_PYTHON) -c "import sys; (3, 8) <= sys.version_info < (3, 12) or sys.exit('LAVIS needs Python 3.8 to 3.11, found ' + sys.version.split()[0] + '. Say which with: make lavis OLD_PYTHON=python3.11')"
	@echo "Making .venv-lavis: LAVIS with the old transformers it needs. About 3 GB to download, 7 GB on disk, 2 to 10 minutes."
	@test -x $(LAVIS_BIN)/python || $(OLD_PYTHON) -m venv .venv-lavis
	@$(LAVIS_BIN)/python -m pip install -q -c constraints-lavis.txt -r requirements-lavis.txt
	@touch $@

.venv-lavis/lavis.done: .venv-lavis/packages.done .venv/main.done
	@$(LAVIS_BIN)/python -m pip install -q --no-deps -e .
	@$(LAVIS_BIN)/python -m ipykernel install --prefix .venv --name lavis --display-name "LAVIS (blip2nb)" 2>/dev/null >/dev/null
	@touch $@

.transformers4/installed.done: requirements-transformers4.txt | .venv/main.done
	@rm -rf .transformers4
	@$(BIN)/python -m pip install -q --no-deps --target .transformers4 -r requirements-transformers4.txt
	@touch $@
