# The image of every node, head and workers alike: docker build -t ovis2-ray:2.60.0 .
#
# The versions are those of constraints.txt, which the tests run with. torch brings its own CUDA and NCCL libraries: the
# host needs NVIDIA's driver and container toolkit, nothing else. Code and dependencies are baked in: a runtime
# environment that installs packages on each node is slow, and without an index it waits for ever.
FROM python:3.11-slim-bookworm

# wget: KubeRay's probes call it. gcc: Triton compiles a launcher with it when torch asks for one.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./

# Alone and first: its 5 GB stay in a layer that changes with the pins only.
RUN pip install --no-cache-dir --constraint constraints.txt torch

COPY jobs jobs
COPY demo demo
COPY benchmarks benchmarks
COPY pipelines pipelines
COPY ovis_model ovis_model
RUN pip install --no-cache-dir --constraint constraints.txt '.[s3,video]' 'ray[default]'

USER ray
ENV RAY_USAGE_STATS_ENABLED=0
