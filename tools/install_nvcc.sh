# Source this with $PY set. It puts nvcc 13.0 on PATH; if the machine has another release or none, it
# installs 13.0 from PyPI into build/nvcc (Debian's is older and supports neither C++20 nor sm_120; the
# resource table is for 13.0).
if [[ $(nvcc --version 2> /dev/null) != *"release 13.0"* ]]; then
  nvcc_home=$PWD/build/nvcc/nvidia/cu13
  if [ ! -x "$nvcc_home"/bin/nvcc ]; then
    "$PY" -m pip install -q --no-deps --upgrade --target build/nvcc 'nvidia-cuda-nvcc==13.0.*' \
      'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' \
      'nvidia-cuda-cccl==13.0.*' \
      || { echo "no nvcc 13.0 on PATH, and PyPI's could not be installed" >&2; exit 1; }
    ln -sfn lib "$nvcc_home"/lib64 # where nvcc looks for the runtime
  fi
  export PATH="$nvcc_home/bin:$PATH"
  unset CUDACXX
fi
nvcc --version | grep release
