# syntax=docker/dockerfile:1
# The GPU image: `make image`. Two environments, for SGLang's and vLLM's pins conflict; each has this package, Megatron
# and the kernels of training. /opt/sglang is on the PATH; for vLLM: PATH=/opt/vllm/bin:$PATH. Every version is a build
# argument of constraints/gpu.env; the table is in docs/installation.md.
ARG CUDA_IMAGE
FROM ${CUDA_IMAGE} AS base

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    TORCH_CUDA_ARCH_LIST="8.0;9.0" \
    FLASH_ATTN_CUDA_ARCHS="80;90" \
    NVTE_CUDA_ARCHS="80;90" \
    NVTE_FRAMEWORK=pytorch

# Ubuntu's packages have the release's versions; the image's tag pins the release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
       build-essential ca-certificates git libibverbs-dev libnuma1 ninja-build rdma-core \
       python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# What compiles against torch takes an hour, so it comes first, once for each torch. MAX_JOBS: a job of flash-attention
# takes some GB of memory.
FROM base AS kernels
ARG APEX_COMMIT
ARG FLASH_ATTN
ARG MEGATRON_CORE
ARG TRANSFORMER_ENGINE
ARG MAX_JOBS=8
COPY tools/build_kernels.sh /opt/build_kernels.sh

FROM kernels AS sglang
ARG TORCH
ARG SGLANG
ARG TRANSFORMERS
ARG RAY
RUN /opt/build_kernels.sh /opt/sglang "${TORCH:?build with make image}"
# hadolint ignore=DL3059
RUN /opt/sglang/bin/pip install "sglang==${SGLANG}" "transformers==${TRANSFORMERS}" "ray[default]==${RAY}" \
       "torch==${TORCH}" "megatron-core==${MEGATRON_CORE}" "flash-attn==${FLASH_ATTN}"

FROM kernels AS vllm
ARG VLLM_TORCH
ARG VLLM
ARG TRANSFORMERS
ARG RAY
RUN /opt/build_kernels.sh /opt/vllm "${VLLM_TORCH:?build with make image}"
# hadolint ignore=DL3059
RUN /opt/vllm/bin/pip install "vllm==${VLLM}" "transformers==${TRANSFORMERS}" "ray[default]==${RAY}" \
       "torch==${VLLM_TORCH}" "megatron-core==${MEGATRON_CORE}" "flash-attn==${FLASH_ATTN}"

FROM base
COPY --from=sglang /opt/sglang /opt/sglang
COPY --from=vllm /opt/vllm /opt/vllm
COPY . /opt/megatron_dapo
RUN for environment in /opt/sglang /opt/vllm; do \
       "$environment/bin/pip" install --editable /opt/megatron_dapo && "$environment/bin/pip" check || exit 1; \
    done
ENV PATH=/opt/sglang/bin:$PATH
WORKDIR /opt/megatron_dapo
CMD ["megatron-dapo", "doctor"]
