"""The table of planted faults fits the kernels; tools/cuda_checks.sh plants them."""

import mutants
import pytest


@pytest.mark.parametrize("fault", mutants.FAULTS, ids=lambda fault: fault.what.replace(" ", "-"))
def test_the_text_of_a_fault_is_in_its_kernel_once(fault: mutants.Fault) -> None:
    text = (mutants.KERNELS / fault.file).read_text()
    assert text.count(fault.right) == 1, fault.right
    assert fault.wrong != fault.right
