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

# The heavy campaigns that the default run leaves out.
slow:
    uv run pytest -m slow -n 0

# Generated reference pages.
docs:
    uv run python docs/reference/generate.py

# Start-up times as ratios, in one run.
bench-start:
    uv run python benchmarks/start.py
