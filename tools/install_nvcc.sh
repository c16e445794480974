# Sourced where nvcc is missing: installs NVIDIA's compiler from PyPI into build/nvcc and puts it on PATH.
nvcc_home=$PWD/build/nvcc
if [ ! -x "$nvcc_home"/nvidia/cu13/bin/nvcc ]; then
  "$PY" -m pip install -q --target "$nvcc_home" 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-runtime==13.0.*' \
    'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-cccl==13.0.*' \
    || { echo "nvcc is missing and could not be installed from PyPI" >&2; exit 1; }
fi
export PATH="$nvcc_home/nvidia/cu13/bin:$PATH" CUDACXX="$nvcc_home/nvidia/cu13/bin/nvcc"
nvcc --version | tail -n 2
