"""Language models of transformers: ours as one of them, the adapter round theirs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from experts import language
from experts.data import DataError
from experts.huggingface import adapt
from experts.language import tokens
from experts.language.corpus import read
from experts.language.model import LanguageModel
from experts.language.transformer import ModelSettings, Transformer
from experts.layers import MoELayer
from tests.experts.test_corpus import folder_of

transformers = pytest.importorskip("transformers", reason="pip install moe-envs[hf]")
NAMES = ("Mixtral", "Qwen3Moe", "Olmoe")


def tiny(name: str) -> Any:
    sizes = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64, "pad_token_id": None,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    sizes["num_local_experts" if name == "Mixtral" else "num_experts"] = 6
    if name == "Qwen3Moe":
        sizes |= {"moe_intermediate_size": 24, "head_dim": 8, "norm_topk_prob": True}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(1))


def test_recording_and_the_models_own_k_change_nothing(model: Any, ids: torch.Tensor) -> None:
    wanted = model(ids).logits
    adapted = adapt(model)
    assert (adapted.layers, adapted.num_experts) == (2, 6)
    with adapted.recording() as found:
        torch.testing.assert_close(model(ids).logits, wanted)
    assert [routing.members.sum(-1).tolist() for routing in found] == [[2] * 18] * 2
    for k in (2, [2, 2], torch.full((2, 9, 2), 2), lambda layer, inputs, logits: torch.full((len(logits),), 2)):
        with adapted.choosing(k):
            torch.testing.assert_close(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)
    with adapted.choosing(1):
        assert not torch.allclose(model(ids).logits, wanted, atol=1e-3)
    adapted.close()
    torch.testing.assert_close(model(ids).logits, wanted)


def test_each_token_gets_the_experts_it_is_given(model: Any, ids: torch.Tensor) -> None:
    adapted = adapt(model)
    each = torch.randint(7, (2, 9, 2), generator=torch.Generator().manual_seed(2))
    allowed = torch.ones(2, 6, dtype=torch.bool)
    allowed[1, :3] = False
    with adapted.recording() as found, adapted.choosing(each):
        model(ids)
    assert torch.stack([routing.members.sum(-1) for routing in found], -1).equal(each.flatten(0, 1))
    with adapted.recording() as found, adapted.choosing(allowed=allowed):
        model(ids)
    assert found[1].members[:, :3].sum() == 0
    assert found[1].members.sum(-1).tolist() == [2] * 18
    with pytest.raises(ValueError, match="for 18 tokens"), adapted.choosing(torch.ones(2, 5, 2)):
        model(ids)
    for wrong in (-1, 99, [2], [2, 2, 2]):
        with pytest.raises(ValueError, match="a number from 0 to 6, or one for each of 2"), adapted.choosing(wrong):
            model(ids)


def test_with_the_models_cache_a_policy_decides_token_by_token(model: Any, ids: torch.Tensor) -> None:
    adapted = adapt(model)

    def by_logits(layer: int, inputs_ND: torch.Tensor, logits_NE: torch.Tensor) -> torch.Tensor:
        return 1 + (logits_NE.softmax(-1).amax(-1) < 0.6).long() * (1 + layer)

    with adapted.choosing(by_logits):
        wanted = model(ids).logits
        past, parts = None, []
        for token in ids.split(1, dim=1):
            found = model(token, past_key_values=past, use_cache=True)
            past = found.past_key_values
            parts.append(found.logits)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-4, rtol=1e-4)


def test_our_layer_takes_the_place_of_theirs(model: Any, ids: torch.Tensor) -> None:
    wanted = model(ids).logits
    block = model.model.layers[0].mlp
    model.model.layers[0].mlp = MoELayer.from_block(block)
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)
    model.model.layers[0].mlp = block
    adapted = adapt(model)
    layers = adapted.replace()
    assert [type(layer) for layer in layers] == [MoELayer] * 2
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="use the new layers"), adapted.choosing(1):
        model(ids)


def test_experts_are_compressed(model: Any, ids: torch.Tensor) -> None:
    wanted, adapted = model(ids).logits, adapt(model)
    weights = 2 * 6 * 3 * 24 * 32
    assert weights < adapted.compress(8) < 1.2 * weights
    error = (model(ids).logits - wanted).abs().max() / wanted.abs().max()
    assert 0 < error < 0.05
    assert adapted.compress(4) < 0.7 * weights


def test_what_has_no_experts_is_told() -> None:
    with pytest.raises(ValueError, match="no layers of experts"):
        adapt(torch.nn.Linear(3, 3))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    text = read(folder_of(tmp_path_factory.mktemp("corpus"), {"one": 100, "two": 100}))
    settings = ModelSettings(vocabulary=300, d_model=32, layers=3, heads=2, num_experts=4, d_ff=16, k=2, context=64)
    torch.manual_seed(0)
    network = Transformer(settings).eval().requires_grad_(False)
    for weight in network.parameters():
        if weight.ndim == 2:
            weight.mul_(8)
    return LanguageModel(network, tokens.train(text, 300), {})


def test_ours_is_read_by_transformers_and_back(ours: LanguageModel, tmp_path: Path) -> None:
    folder = language.save_huggingface(ours, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "one 1: some words, Grüße 😀"
    assert tokenizer.encode(text) == ours.encode(text)
    assert tokenizer.decode(ours.encode(text)) == text
    ids = torch.tensor([ours.encode(text)])
    wanted = ours.network(ids).logits
    assert float(wanted.abs().max()) > 1
    torch.testing.assert_close(theirs(ids).logits, wanted, atol=1e-4, rtol=1e-4)
    for k in (1, [3, 1, 2]):
        with adapt(theirs).choosing(k):
            torch.testing.assert_close(theirs(ids).logits, ours.network(ids, k).logits, atol=1e-4, rtol=1e-4)
    again = language.load_huggingface(folder)
    assert again.settings == ours.settings
    assert torch.equal(again.network(ids).logits, wanted)
    with pytest.raises(DataError, match="holds no Qwen3-MoE"):
        language.load_huggingface(tmp_path)


def test_another_qwen_is_refused(tmp_path: Path, ours: LanguageModel) -> None:
    language.save_huggingface(ours, tmp_path / "model")
    tiny("Qwen3Moe").save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match="is not of `save_huggingface`"):
        language.load_huggingface(tmp_path / "model")
