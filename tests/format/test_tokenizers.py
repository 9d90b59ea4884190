"""What lies beside the weights travels: tokenizers of every class style give the same ids, code and links stay."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cospadi.calibration.windows import _load_tokenizer
from cospadi.checkpoint import assemble, densify
from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder, data_files
from cospadi.tokenizer import load_tokenizer

TEXTS = ("The old river.", "  two  spaces", "<s>x</s> y", " a\n\tb", "1234 café", "", "東京", "a<|endoftext|>b </s>c")
_TRAINED = ["The old river crosses a small village in 1834, and every teacher describes the northern mountain."] * 9


def _byte_level(*, bos: bool):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINED, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def _sentence_pieces():
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(_TRAINED, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


_NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
STYLES = {
    "Llama-2": ("llama", _sentence_pieces, {**_NAMES, "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}),
    "Llama-3": ("llama", lambda: _byte_level(bos=True), {**_NAMES, "tokenizer_class": "PreTrainedTokenizerFast"}),
    "Llama-3 said to be Llama-2": (
        "llama",
        lambda: _byte_level(bos=True),
        {**_NAMES, "tokenizer_class": "LlamaTokenizer"},
    ),
    "Mistral": ("mistral", _sentence_pieces, {**_NAMES, "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}),
    "Mistral, legacy": (
        "mistral",
        _sentence_pieces,
        {
            **_NAMES,
            "unk_token": "<unk>",
            "tokenizer_class": "LlamaTokenizerFast",
            "legacy": False,
            "add_bos_token": True,
        },
    ),
    "Qwen2": (
        "qwen2",
        lambda: _byte_level(bos=False),
        {"eos_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"},
    ),
    "Qwen3": (
        "qwen3",
        lambda: _byte_level(bos=False),
        {"eos_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"},
    ),
    "Gemma without a class": ("gemma3_text", _sentence_pieces, {**_NAMES, "unk_token": "<unk>"}),
    "plain": ("llama", lambda: _byte_level(bos=False), {**_NAMES, "add_bos_token": True}),
    "no settings": ("qwen3", lambda: _byte_level(bos=False), None),
}


def a_base(packed_model, family: str, folder: Path) -> tuple[Path, Path]:
    """Copy of a model's folder, and the codes for it."""
    folders = packed_model(family)
    shutil.copytree(folders.base, folder)
    return folder, folders.codes


def ids(tokenizer) -> list[list[int]]:
    return [tokenizer(text, verbose=False).input_ids for text in TEXTS]


@pytest.mark.parametrize("style", STYLES)
def test_tokenizers_of_every_class_give_the_same_ids(packed_model, tmp_path, style):
    family, make, settings = STYLES[style]
    base, codes = a_base(packed_model, family, tmp_path / "base")
    make().save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").unlink()
    if settings is not None:
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
    assemble(base, [codes], tmp_path / "packed", variant={})
    densify(tmp_path / "packed", tmp_path / "dense")
    original = load_tokenizer(base)
    expected = ids(original)
    assert len({tuple(text) for text in expected}) == len(TEXTS)
    for folder in (tmp_path / "packed", tmp_path / "dense"):
        found = load_tokenizer(folder)
        assert type(found) is type(original)
        assert ids(found) == expected, folder.name
        assert found.all_special_tokens == original.all_special_tokens
    # calibration reads the folder as evaluation does
    windows = _load_tokenizer(base)
    assert windows.encode(TEXTS) == expected
    assert (windows.bos, windows.eos, windows.size) == (original.bos_token_id, original.eos_token_id, len(original))


def test_the_tokenizer_of_a_packed_folder_needs_no_trust(packed_model, tmp_path):
    """With transformers alone, and with nobody there to ask."""
    code = (
        "import sys; sys.modules['cospadi'] = None; from transformers import AutoTokenizer; "
        f"print(AutoTokenizer.from_pretrained({str(packed_model('llama').packed)!r}, trust_remote_code=False)('a b'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and "input_ids" in done.stdout, done.stderr[-2000:]
    card = (packed_model("llama").packed / "README.md").read_text()
    lines = [line for line in card.splitlines() if "trust_remote_code=True" in line]
    assert len(lines) == 1 and lines[0].startswith("model = AutoModelForCausalLM")


DATA = (
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
    "licence.txt",
    "LICENSE-MODEL.pdf",
    "legal/Third_Party_Notices",
    "Gemma_Terms_of_Use.html",
    "Notice",
    "USE_POLICY.md",
    "added_tokens.json",
    "sentencepiece.bpe.model",
)
LEFT = (
    "tokenization_foreign.py",
    "legal/licence_check.py",
    "modeling_foreign.py",
    "training_args.bin",
    "consolidated.00.pth",
    "original/tokenizer.model",
    ".cache/huggingface/x.json",
    "model.old.safetensors.index.json",
)


def test_data_travels_and_code_stays(packed_model, tmp_path):
    base, codes = a_base(packed_model, "llama", tmp_path / "base")
    for name in (*DATA, *LEFT):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("{}" if name.endswith(".json") else name)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    foreign = {"AutoTokenizer": ["tokenization_foreign.T", None]}
    (base / "preprocessor_config.json").write_text(json.dumps({"a": 1, "auto_map": foreign}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "modeling_foreign.C"}}))
    assemble(base, [codes], tmp_path / "packed", variant={})
    densify(tmp_path / "packed", tmp_path / "dense")
    for folder in (tmp_path / "packed", tmp_path / "dense"):
        for name in DATA:
            assert (folder / name).read_text() == (base / name).read_text(), name
        assert not any((folder / name).exists() for name in LEFT)
        assert json.loads((folder / "preprocessor_config.json").read_text()) == {"a": 1}
        kept = json.loads((folder / "tokenizer_config.json").read_text())
        assert {key: kept[key] for key in settings} | {"tokenizer_class": None} == settings | {"tokenizer_class": None}
        assert "foreign" not in (folder / "config.json").read_text()
    assert not list((tmp_path / "dense").glob("*.py"))
    # a tokenizer that only its own code can read is refused, and that code is not run
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": foreign}))
    with pytest.raises(ArtifactError, match="no usable tokenizer"):
        assemble(base, [codes], tmp_path / "again", variant={})
    assert not (tmp_path / "again").exists()


def test_links_out_of_the_folder_are_refused(packed_model, tmp_path):
    base, codes = a_base(packed_model, "llama", tmp_path / "base")
    (tmp_path / "secret").write_text("secret")
    (base / "inside.txt").write_text("fine")
    (base / "NOTICE").symlink_to(base / "inside.txt")
    assemble(base, [codes], tmp_path / "packed", variant={})
    assert (tmp_path / "packed" / "NOTICE").read_text() == "fine" and not (tmp_path / "packed" / "NOTICE").is_symlink()
    (base / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match=r"LICENSE: a link out of the model's folder, to .*secret.*Put a copy"):
        assemble(base, [codes], tmp_path / "again", variant={})
    # the cache of the hub links to files of the same repository
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (snapshot.parent.parent / "blobs").mkdir(parents=True)
    snapshot.parent.mkdir()
    (base / "LICENSE").unlink()
    shutil.move(base, snapshot)
    (snapshot.parent.parent / "blobs" / "f00").write_text("the licence")
    (snapshot / "LICENSE").symlink_to("../../blobs/f00")
    (snapshot / "NOTICE").unlink()
    assert Path("LICENSE") in data_files(snapshot)


def test_a_folder_with_two_models_is_refused(packed_model, tmp_path):
    base, _ = a_base(packed_model, "qwen3", tmp_path / "base")
    assert (base / "model.safetensors.index.json").exists()
    shutil.copy(packed_model("llama").base / "model.safetensors", base)
    with pytest.raises(ArtifactError, match=r"holds two models: model.safetensors, .* Remove the one"):
        ModelFolder(base)
