# syntax=docker/dockerfile:1
# Two images, each for linux/amd64 and linux/arm64: `cuda` (the default) for NVIDIA GPUs, `cpu` without CUDA's libraries.
#   docker build -t backpropagate .
#   docker build --target cpu -t backpropagate:cpu .
# tests/install/test_docker.py runs these steps in a fresh root.

FROM python:3.13-slim-bookworm AS build
# Compiles the kernels of bp-merge and bp-export; nothing of this stage but the wheels is kept.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir "uv==0.13.9"
WORKDIR /src
COPY pyproject.toml uv.lock ./
COPY packages packages
RUN uv build --all-packages --wheel --out-dir /wheels \
    && uv export --frozen --no-dev --package backpropagate --extra ui --no-emit-workspace --no-hashes -o /wheels/locked.txt

FROM python:3.13-slim-bookworm AS base
RUN pip install --no-cache-dir "uv==0.13.9" \
    && useradd --create-home --home-dir /data --uid 1000 backprop \
    && mkdir -p /data/.backpropagate /data/.cache/huggingface /work \
    && chown -R backprop:backprop /data /work
ENV PATH=/opt/backpropagate/bin:$PATH \
    UV_LINK_MODE=copy \
    UV_CACHE_DIR=/var/cache/uv \
    HF_HOME=/data/.cache/huggingface
# The page listens on every address of the container, so it needs a password: BACKPROPAGATE_UI__AUTH=name:password, or
# the secret of compose.yaml.
COPY --chmod=755 .ci/docker-entrypoint /usr/local/bin/docker-entrypoint
VOLUME /data/.backpropagate
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s \
    CMD ["python", "/usr/local/bin/docker-entrypoint", "--health"]
ENTRYPOINT ["python", "/usr/local/bin/docker-entrypoint"]
CMD ["backprop", "ui", "--host", "0.0.0.0"]

FROM base AS cpu
# Where torch comes from: uv's name of a PyTorch index; empty for PyPI.
ARG TORCH_BACKEND=cpu
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels --mount=type=cache,target=/var/cache/uv \
    uv venv /opt/backpropagate \
    && uv pip install --python /opt/backpropagate ${TORCH_BACKEND:+--torch-backend=${TORCH_BACKEND}} \
        --constraint /wheels/locked.txt --find-links /wheels "backpropagate[ui]>=2.0"
USER 1000
WORKDIR /work

FROM base AS cuda
ARG TORCH_BACKEND=cu130
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels --mount=type=cache,target=/var/cache/uv \
    uv venv /opt/backpropagate \
    && uv pip install --python /opt/backpropagate ${TORCH_BACKEND:+--torch-backend=${TORCH_BACKEND}} \
        --constraint /wheels/locked.txt --find-links /wheels "backpropagate[standard]>=2.0"
USER 1000
WORKDIR /work
