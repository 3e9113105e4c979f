import pytest
from torch import nn

from trainer.eval_mode import eval_mode


def test_every_submodule_gets_its_own_mode_back_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3), nn.Sequential(nn.Dropout()))
    model.train()
    model[1].eval()  # a frozen normalisation layer
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == before == [True, True, False, True, True]
