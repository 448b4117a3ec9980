import pytest
import torch

from pararnn.lm.models import ParaRNNConfig, ParaRNNForCausalLM


@pytest.fixture(params=["paragru", "paralstm"])
def cell(request):
    return request.param


def tiny_config(**changes):
    return ParaRNNConfig(
        **{
            "vocab_size": 17,
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_heads": 2,
            "intermediate_size": 12,
            "initializer_range": 0.3,
            **changes,
        }
    )


@pytest.fixture
def make_model():
    """Builds a tiny float64 model in evaluation mode with no parameter left at a trivial value."""

    def make(**changes):
        model = ParaRNNForCausalLM(tiny_config(**changes)).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return make


@pytest.fixture
def tokens():
    return torch.randint(1, 17, (3, 11))
