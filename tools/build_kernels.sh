#!/usr/bin/env bash
# An environment with torch and what compiles against it: tools/build_kernels.sh FOLDER TORCH_VERSION. For the
# Dockerfile, whose build arguments name the other versions (constraints/gpu.env).
set -euo pipefail

folder=$1 torch=$2
: "${TRANSFORMER_ENGINE:?}" "${FLASH_ATTN:?}" "${APEX_COMMIT:?}"

python3 -m venv "$folder"
# setuptools below 81 is what vLLM wants. The builds see this environment's torch: --no-build-isolation.
"$folder/bin/pip" install "torch==$torch" 'setuptools>=78.1.1,<81' wheel packaging ninja pybind11 cmake psutil numpy
"$folder/bin/pip" install --no-build-isolation "transformer-engine[pytorch,core_cu13]==$TRANSFORMER_ENGINE"
"$folder/bin/pip" install --no-build-isolation "flash-attn==$FLASH_ATTN"
# NVIDIA's Apex is not on the index; the package of that name there is another project.
APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "$folder/bin/pip" install --no-build-isolation \
  "apex @ git+https://github.com/NVIDIA/apex@$APEX_COMMIT"
