"""Which code of the user results depend on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from compact.evaluation.imported import imports_of
from compact.metrics import METRICS
from compact.registry import IMPORT_VARIABLE, import_modules
from compact.weighting import POLICIES

DOMAIN = """
from dataclasses import dataclass
from compact.answers import Domain, register_domain

@register_domain("of_test_imported")
@dataclass(frozen=True)
class Mine(Domain):
    @classmethod
    def recognise(cls, gold, prompt):
        return None
    def normalise(self, answer):
        return answer
    def extract(self, completion):
        return None
"""
METRIC = """
from compact import register_metric

@register_metric("of_test_imported", axis="control")
def mine(pass_):
    return pass_.batch.token_offsets.diff().float()
"""


@pytest.fixture
def place(tmp_path: Path, own_registries: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that modules can be imported from."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv(IMPORT_VARIABLE, "")
    return tmp_path


def test_parts_of_a_package_count_if_a_name_of_it_is_used(place: Path) -> None:
    package = place / "package_of_test_imported"
    package.mkdir()
    (package / "__init__.py").write_text("from package_of_test_imported import metric\n")
    (package / "metric.py").write_text(METRIC)
    assert imports_of(["of_test_imported"], (METRICS, POLICIES)) == {}  # it is not there yet
    import_modules([package.name])
    assert imports_of(["nll", "uniform"], (METRICS, POLICIES)) == {}
    before = imports_of(["of_test_imported"], (METRICS, POLICIES))
    assert list(before["imports"]) == [package.name]
    assert imports_of(["of_test_imported"], (METRICS, POLICIES)) == before
    (package / "metric.py").write_text(METRIC + "# edited\n")
    assert imports_of(["of_test_imported"], (METRICS, POLICIES)) != before


def test_an_answer_domain_is_always_used(place: Path) -> None:
    """It may be that of any question."""
    assert imports_of() == {}
    (place / "domain_of_test_imported.py").write_text(DOMAIN)
    import_modules(["domain_of_test_imported"])
    assert list(imports_of()["imports"]) == ["domain_of_test_imported"]
