"""Exported models answer as PyTorch does, and are whole or refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from experts.language import LanguageModel
from experts.language.transformer import ModelSettings, Transformer
from experts.serving.export import FORMATS, ExportError, export, load_exported
from experts.serving.runners import Source
from experts.serving.sources import DenseLanguage, of_bundle, of_language, of_reference_model

pytest.importorskip("onnxruntime")
SIZE = ModelSettings(vocabulary=300, d_model=32, layers=2, heads=2, num_experts=6, d_ff=48, k=2, context=64)


@pytest.fixture(scope="module")
def digits() -> Source:
    return of_bundle("digits")


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "huggingface"])
def test_a_classifier_in_every_format(digits: Source, form: Any, tmp_path: Path) -> None:
    manifest = export(digits, tmp_path / "out", form, "1.2.3-rc.1")
    assert manifest["version"] == "1.2.3-rc.1"
    assert manifest["input"] == {"name": "input", "dtype": "float32", "shape": ["batch", 64]}
    assert manifest["output"]["shape"] == ["batch", 10]
    assert manifest["parity"]["predictions"] >= 2000
    assert manifest["parity"]["same_top_1"] >= (0.99 if form == "onnx-int8" else 1)
    assert (manifest["parity"]["largest_difference"] < 1e-4) == (form != "onnx-int8")
    assert {*manifest["files"], "manifest.json"} == {path.name for path in (tmp_path / "out").iterdir()}
    if form.startswith("onnx"):
        exported = load_exported(tmp_path / "out")
        found = exported.run(digits.examples)
        with torch.no_grad():
            wanted = digits.module(torch.from_numpy(digits.examples)).numpy()
        np.testing.assert_allclose(found[:5], wanted[:5], atol=1e-5 if form == "onnx" else 1.0)
        assert (found.argmax(1) == wanted.argmax(1)).all()  # between two examples int8 may choose another class
    else:
        with pytest.raises(ExportError, match="another runtime"):
            load_exported(tmp_path / "out")


def test_other_processes_run_it_without_this_package(digits: Source, tmp_path: Path) -> None:
    with torch.no_grad():
        wanted = digits.module(torch.from_numpy(digits.examples[:3])).argmax(1).tolist()
    np.save(tmp_path / "inputs.npy", digits.examples[:3])
    codes = {
        "onnx": "import onnxruntime; session = onnxruntime.InferenceSession('{0}/model.onnx')\n"
        "print(session.run(None, dict(input=x))[0].argmax(1).tolist())",
        "torchscript": "import torch; print(torch.jit.load('{0}/model.pt')(torch.from_numpy(x)).argmax(1).tolist())",
        "torch-export": "import torch\n"
        "print(torch.export.load('{0}/model.pt2').module()(torch.from_numpy(x)).argmax(1).tolist())",
    }
    for form, code in codes.items():
        folder: Any = tmp_path / form
        export(digits, folder, form)  # type: ignore[arg-type]
        start = f"import sys, numpy; sys.modules['experts'] = None; x = numpy.load({str(tmp_path / 'inputs.npy')!r})\n"
        run = [sys.executable, "-c", start + code.format(folder)]
        done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert json.loads(done.stdout.splitlines()[-1]) == wanted


@pytest.fixture
def language() -> Source:
    torch.manual_seed(0)
    network = Transformer(SIZE).eval().requires_grad_(False)
    with torch.no_grad():
        for each in network.parameters():
            each.mul_(3)  # router logits that are no ties
    model = LanguageModel.__new__(LanguageModel)
    model.network, model.metadata = network, {}
    ids = torch.randint(300, (8, 20), generator=torch.Generator().manual_seed(1)).numpy()
    return Source(DenseLanguage(model).eval(), ids, {"kind": "language"}, language=model)


def test_the_static_graph_of_a_language_model_is_the_model(language: Source) -> None:
    ids = torch.from_numpy(language.examples)
    assert language.language is not None
    with torch.inference_mode():
        found, wanted = language.module(ids), language.language.network(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert sum(each.numel() for each in language.module.parameters()) == sum(
        each.numel() for each in language.language.network.parameters()
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.load:DeprecationWarning")
@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_a_language_model_of_any_number_of_rows_and_tokens(language: Source, form: Any, tmp_path: Path) -> None:
    manifest = export(language, tmp_path / "out", form)
    assert manifest["input"] == {"name": "input", "dtype": "int64", "shape": ["batch", "tokens"]}
    assert manifest["output"]["shape"] == ["batch", "tokens", 300]
    run: Any = load_exported(tmp_path / "out").run if form == "onnx" else None
    for rows, tokens in ((1, 3), (5, 11)):
        ids = torch.from_numpy(language.examples[:rows, :tokens])
        with torch.inference_mode():
            wanted = language.module(ids)
            found = torch.jit.load(tmp_path / "out" / "model.pt")(ids) if run is None else run(ids.numpy())
        np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_the_shipped_language_model_in_the_format_of_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    manifest = export(of_language("language"), tmp_path / "out", "huggingface")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= manifest["files"].keys()
    assert manifest["parity"]["close"] > 0.99


def test_a_reference_model(tmp_path: Path) -> None:
    assert export(of_reference_model("digits-mlp"), tmp_path / "out", "onnx")["parity"]["close"] == 1


class _Fickle(nn.Module):
    """Answers otherwise when it is traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (3.0 if torch.jit.is_tracing() else 1.0)


def test_a_model_that_would_answer_otherwise_is_not_written(tmp_path: Path) -> None:
    source = Source(_Fickle(), np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32), {})
    with pytest.raises(ExportError, match=r"logits are PyTorch's in 0\.0% of predictions.*nothing was written"):
        export(source, tmp_path / "out", "torchscript")
    assert not (tmp_path / "out").exists()


def test_what_is_not_possible_is_told(digits: Source, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format='x' is not one of onnx"):
        export(digits, tmp_path / "out", "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="version='1' is not a semantic version"):
        export(digits, tmp_path / "out", "onnx", "1")
    with pytest.raises(ExportError, match="for language models"):
        export(digits, tmp_path / "out", "huggingface")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("mine")
    with pytest.raises(ExportError, match="holds something else"):
        export(digits, tmp_path / "mine", "torch-export")
    with pytest.raises(ExportError, match="holds something else"):
        export(digits, tmp_path / "mine" / "a.txt", "torch-export")
    export(digits, tmp_path / "out", "torch-export")
    (tmp_path / "out" / "b.txt").write_text("mine")
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    for folder in ("out", "mine"):
        with pytest.raises(ExportError, match="holds something else"):
            export(digits, tmp_path / folder, "torch-export")
    assert (tmp_path / "out" / "b.txt").read_text() == (tmp_path / "mine" / "a.txt").read_text() == "mine"


def test_damage_is_found(digits: Source, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(digits, folder, "onnx")
    raw = (folder / "model.onnx").read_bytes()
    for damaged in (raw[:-10], raw[:100] + bytes([raw[100] ^ 1]) + raw[101:]):
        (folder / "model.onnx").write_bytes(damaged)
        with pytest.raises(ExportError, match=r"model\.onnx"):
            load_exported(folder)
    (folder / "model.onnx").unlink()
    with pytest.raises(ExportError, match=r"model\.onnx"):
        load_exported(folder)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("0.1.0", "0.2.0"))
    with pytest.raises(ExportError, match=r"manifest\.json"):
        load_exported(folder)
    with pytest.raises(ExportError, match="holds something else"):
        export(digits, folder, "onnx")
