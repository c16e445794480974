"""Tiles and pieces depend on the cache sizes: results are right for small, large, unknown sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Replaces the C library's sysconf to report other cache sizes.
_SYSCONF = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
long sysconf(int name) {
  if (name == _SC_LEVEL1_DCACHE_SIZE) return L1;
  if (name == _SC_LEVEL2_CACHE_SIZE) return L2;
  return ((long (*)(int))dlsym(RTLD_NEXT, "sysconf"))(name);
}
"""

_CHECK = """
import torch
from compact_ops import testing
from compact_ops.testing import SAMPLES, check, head_inputs, run
for op, size in (("linear_token_stats", 600), ("pairwise_symmetric_kl", 300), ("row_stats_", 9)):
    check(op, SAMPLES[op].make(0, size), **({"head_grad": "recompute"} if op[0] == "l" else {}))
wide = head_inputs(1, tokens=300, width=16, vocabulary=5000)
check("linear_token_stats", wide, head_grad="recompute")
upstream = torch.linspace(-1, 2, 300)
upstream[1::7] = 0
check("linear_token_stats", wide, head_grad="fused-weights", token_weight=upstream)
check("row_stats_", {"logits": wide["hidden"] @ wide["weight"].T, "target": wide["target"]})
print("ok")
"""


@pytest.mark.parametrize("level1,level2", [(0, 0), (-1, 1 << 18), (1 << 17, 1 << 23)])
def test_other_caches(level1: int, level2: int, tmp_path: Path) -> None:
    """A system that reports no sizes, an old CPU, and a CPU with larger caches than this one."""
    source, library = tmp_path / "sysconf.c", tmp_path / "sysconf.so"
    source.write_text(_SYSCONF)
    sizes = [f"-DL1={level1}L", f"-DL2={level2}L"]
    subprocess.run(
        ["gcc", "-shared", "-fPIC", *sizes, str(source), "-o", str(library), "-ldl"], check=True
    )
    env = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _CHECK]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "ok", done.stderr
