"""The eval mode of a model for a while."""

from __future__ import annotations

import pytest
from torch import nn

from compact.student import evaluating


def test_each_module_is_in_its_mode_of_before() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with pytest.raises(ValueError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ValueError
    assert model.training and model[0].training and not model[1].training
