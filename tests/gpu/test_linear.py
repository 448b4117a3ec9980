"""Linear memories by flash-linear-attention's kernels against the library's own, on a GPU."""

import copy

import pytest
import torch

from pararnn.lm import linear
from pararnn.lm.catalogue import LINEAR
from pararnn.lm.models import ParaRNNConfig, ParaRNNForCausalLM
from pararnn.testing import assert_close

pytestmark = pytest.mark.gpu


@pytest.mark.filterwarnings("default")  # the package's own would keep it from being imported
@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_the_same_model_by_both(name, shared_keys):
    """Logits, states and gradients in bfloat16, with documents that begin inside a row."""
    if reason := linear.missing(LINEAR[name], 64, 64):
        pytest.skip(reason)
    torch.manual_seed(0)
    config = ParaRNNConfig(
        vocab_size=17,
        hidden_size=128,
        num_hidden_layers=2,
        cell=name,
        memory_options={"shared_keys": shared_keys, "value_size": 64},
    )
    theirs = ParaRNNForCausalLM(config).cuda()
    ours = copy.deepcopy(theirs)
    for layer in ours.model.layers:
        assert layer.mixer.all_at_once is not None
        layer.mixer.all_at_once = None
    tokens = torch.randint(17, (3, 200), device="cuda")
    resets = torch.rand(3, 200, device="cuda") < 0.05
    results = []
    for model in (theirs, ours):
        with torch.autocast("cuda", torch.bfloat16):
            cache = model(tokens[:, :90], use_cache=True).cache_params
            output = model(
                tokens[:, 90:],
                labels=tokens[:, 90:],
                resets=resets[:, 90:],
                cache_params=cache,
                use_cache=True,
            )
        output.loss.backward()
        state = output.cache_params.layers[-1].recurrent
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append({"logits": output.logits, "state": state.float(), **gradients})
    for key, expected in results[1].items():
        assert_close(key, results[0][key], expected, rtol=0.06)
