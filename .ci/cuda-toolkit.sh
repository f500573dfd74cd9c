#!/usr/bin/env bash
# A CUDA 13.0 toolkit from PyPI's wheels, for a machine without a GPU and without root: nvcc, headers, the
# libraries to link against, and a stand-in for the driver's libcuda that answers every call with "no device".
#
#   cuda-toolkit.sh DEST                   makes the toolkit in DEST (about 1.2 GB)
#   eval "$(cuda-toolkit.sh DEST --env)"   sets what cargo needs to build with it, and to run without a driver
set -euo pipefail
dest=${1:?usage: cuda-toolkit.sh DEST [--env]}
if [[ ${2:-} == --env ]]; then
  dest=$(cd "$dest" && pwd)
  printf 'export CUDA_HOME=%q CUDA_PATH=%q NVCC=%q PATH=%q:"$PATH"\n' \
    "$dest" "$dest" "$dest/bin/nvcc" "$dest/bin"
  printf 'export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}\n'
  printf 'export LD_LIBRARY_PATH=%q${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}\n' "$dest/lib64:$dest/lib64/stubs"
  exit 0
fi
mkdir -p "$dest"
dest=$(cd "$dest" && pwd)
[[ -x $dest/venv/bin/python ]] || python3 -m venv "$dest/venv"
"$dest/venv/bin/pip" --quiet install \
  'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-runtime==13.0.*' \
  'nvidia-cuda-cccl==13.0.*' 'nvidia-cuda-nvrtc==13.0.*' 'nvidia-cublas==13.0.*' 'nvidia-curand==10.4.*'
wheels=$(echo "$dest"/venv/lib/python3*/site-packages/nvidia/cu13)
for part in bin include nvvm; do ln -sfn "$wheels/$part" "$dest/$part"; done
mkdir -p "$dest/lib64/stubs"
for library in "$wheels"/lib/*.so.*; do
  name=$(basename "$library")
  ln -sfn "$library" "$dest/lib64/$name"
  ln -sfn "$library" "$dest/lib64/${name%%.so*}.so"
done
for library in "$wheels"/lib/*.a; do ln -sfn "$library" "$dest/lib64/"; done
ln -sfn lib64 "$dest/lib"
# 100 is CUDA_ERROR_NO_DEVICE.
grep -hoE '\bcu[A-Z][A-Za-z0-9]+(_v[0-9]+|_ptsz|_ptds)?\b' "$dest/include/cuda.h" | sort -u |
  awk '{ print "int " $1 "(void) { return 100; }" }' >"$dest/libcuda.c"
cc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$dest/lib64/stubs/libcuda.so" "$dest/libcuda.c"
ln -sfn libcuda.so "$dest/lib64/stubs/libcuda.so.1"
