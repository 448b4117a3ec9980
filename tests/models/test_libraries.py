"""peft, accelerate and the rest of transformers around a model."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from pararnn.lm.models import ParaRNNForCausalLM

from .test_arguments import EXACT, MIXERS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of the libraries

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
SETTINGS = GenerationConfig(**GREEDY)
VIRTUAL = {  # tokens of peft
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 3,
    "token_dim": 8,
    "num_layers": 3,
    "num_attention_heads": 2,
}
PROJECTIONS = ["in_proj", "gate_proj", "out_proj", "down_proj"]


@pytest.fixture(params=MIXERS)
def model(request, make_model):
    return make_model(num_hidden_layers=3, mixers=MIXERS[request.param], attention_heads=2)


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.mark.parametrize("targets", [PROJECTIONS, "all-linear"])
def test_lora(model, tokens, tmp_path, peft, targets):
    config = peft.LoraConfig(
        r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False
    )
    own = model(tokens).logits
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    logits = adapted(input_ids=tokens).logits
    assert (logits - own).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(adapted(input_ids=tokens).logits, own)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(loaded.eval()(input_ids=tokens).logits, logits, rtol=1e-5, atol=1e-5)
    adapted.train()(input_ids=tokens, labels=tokens).loss.backward()
    trained = {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {n for n, p in adapted.named_parameters() if "lora_" in n}
    merged = adapted.merge_and_unload().eval()
    torch.testing.assert_close(merged(tokens).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_prompt_tuning(model, tokens, peft):
    """The virtual tokens come before the prompt once, and the cache has seen them afterwards."""
    config = peft.PromptTuningConfig(**VIRTUAL)
    adapted = peft.get_peft_model(model, config).eval()
    found = [
        adapted.generate(input_ids=tokens, use_cache=use_cache, **GREEDY)
        for use_cache in (True, False)
    ]
    assert torch.equal(*found)
    virtual = adapted.get_prompt(batch_size=3).to(torch.float64)
    embeddings = torch.cat([virtual, model.get_input_embeddings()(tokens)], 1)
    expected = model.generate(inputs_embeds=embeddings, generation_config=SETTINGS)
    assert torch.equal(found[0][:, 11:], expected)


def test_prefix_tuning_is_refused(model, tokens, peft):
    config = peft.PrefixTuningConfig(**VIRTUAL)
    with pytest.raises(TypeError, match=r"a DynamicCache, but this model continues from a Para"):
        peft.get_peft_model(model, config)(input_ids=tokens)


def test_dispatched_by_accelerate(model, tokens, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    expected = model(tokens).logits
    dispatched = accelerate.dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True)
    assert torch.equal(dispatched(tokens).logits, expected)
    model.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        empty = ParaRNNForCausalLM(model.config).double()
    loaded = accelerate.load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"})
    assert torch.equal(loaded.eval()(tokens).logits, expected)
    with pytest.raises(ValueError, match=r"ParaGRUCell have no values \(device meta\) but x is on"):
        accelerate.cpu_offload(model, "cpu")(tokens)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ({"max_shard_size": "5KB"}, {}),
        ({}, {"device_map": "auto"}),
        ({}, {"low_cpu_mem_usage": True}),
        ({}, {"dtype": torch.float32}),
    ],
)
def test_save_and_load(model, tokens, tmp_path, saved, loaded):
    model.save_pretrained(tmp_path, **saved)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **loaded)
    assert again.dtype is loaded.get("dtype", torch.float64)
    expected = model.to(again.dtype)(tokens).logits
    torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_more_tokens(make_model, tokens, tied):
    model = make_model(tie_word_embeddings=tied)
    before = model(tokens).logits.detach()
    model.resize_token_embeddings(23, mean_resizing=False)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    after = model(tokens, labels=tokens + 6)
    torch.testing.assert_close(after.logits[..., :17], before, **EXACT)
    assert after.logits.shape[-1] == model.config.vocab_size == 23
    after.loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model, tokens, dtype):
    expected = model(tokens).logits.float()
    half = model.to(dtype)
    found = half(tokens).logits
    assert (found - expected).norm() < 10 * torch.finfo(dtype).eps * expected.norm()
    half(tokens, labels=tokens).loss.backward()
    assert half.generate(tokens, generation_config=SETTINGS).shape == (3, 16)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_after_generation(model, tokens, reentrant):
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(tokens, labels=tokens).loss, parameters)
    model.train().activation_checkpointing_enable({"use_reentrant": reentrant})
    model.eval().generate(tokens, generation_config=SETTINGS)
    model.train()(tokens, labels=tokens).loss.backward()
    torch.testing.assert_close([p.grad for p in parameters], list(expected), **EXACT)
