# The image of all nodes, head and workers: docker build -t ovis2-ray:2.60.0 .
#
# The versions come from constraints.txt, with which the tests run. torch includes its CUDA 13 and NCCL libraries, so the
# host needs only NVIDIA's driver, 580 or later, and the container toolkit. flash-attn is not installed: it would need
# CUDA's compiler, and torch's own kernels do the same. The image contains code and dependencies: a runtime environment
# that installs packages on each node is slow, and without a package index it waits forever.
FROM python:3.11-slim-bookworm

# wget: used by KubeRay's probes. gcc: compiles the resampler below, and Triton's launcher when torch needs one.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./

# Installed separately and first, so that its 5 GB are in a layer that changes only with the pinned versions.
RUN pip install --no-cache-dir --constraint constraints.txt torch

COPY jobs jobs
COPY demo demo
COPY benchmarks benchmarks
COPY pipelines pipelines
COPY ovis_model ovis_model
RUN pip install --no-cache-dir --constraint constraints.txt '.[s3,video]' 'ray[default]'

USER ray
ENV RAY_USAGE_STATS_ENABLED=0
