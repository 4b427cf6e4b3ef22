# syntax=docker/dockerfile:1
# inl on an NVIDIA GPU or on a CPU:
#   docker build -t inl .
#   docker run --init --gpus all --shm-size 8g -v "$PWD:/work" inl train --config tiny
# docs/installation.md says more. There is no CUDA base image: JAX's wheels bring CUDA's libraries,
# the host brings the driver.
FROM python:3.12-slim

ARG EXTRAS=cuda,data,gpu,hf,plot,report
ENV PYTHONUNBUFFERED=1

# The dependencies come first, with a package without code: a change of the code keeps this layer.
# pyproject.toml has the bounds of their versions.
WORKDIR /src
COPY pyproject.toml LICENSE ./
COPY inl_jax/__init__.py inl_jax/
# hadolint ignore=DL3013
RUN mkdir configs \
    && touch README.md train_inl_llm_large.py \
    && pip install --no-cache-dir ".[${EXTRAS}]"

COPY README.md train_inl_llm_large.py ./
COPY configs configs
COPY inl_jax inl_jax
RUN pip install --no-cache-dir --no-deps --force-reinstall .

# Runs, tokens and compiled programs lie in /work, which any user of the host may mount and own.
ENV HOME=/work
RUN useradd --uid 1000 --home-dir /work --create-home inl && chmod 1777 /work
USER 1000
WORKDIR /work
ENTRYPOINT ["inl"]
