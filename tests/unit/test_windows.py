"""Calibration windows: cut from text, or sampled from the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from cospadi.calibration.windows import prepare_windows
from cospadi.errors import ArtifactError, ConfigError, NumericalError
from cospadi.files import ModelFolder, write_tensors
from cospadi.provenance import tokens_digest
from cospadi.stage import choose_dtype

EOS = 2


def quiet(line: str) -> None:
    pass


def settings(**changes) -> dict:
    return {"source": "text", "samples": 12, "length": 64, "seed": 42, "packing": "packed"} | changes


def windows(path: Path) -> tuple[np.ndarray, np.ndarray, dict]:
    with h5py.File(path) as file:
        assert file["input_ids"].dtype == np.int32 and file["attention_mask"].dtype == np.uint8
        assert file["input_ids"].fletcher32 and file["attention_mask"].fletcher32
        return file["input_ids"][:], file["attention_mask"][:], dict(file.attrs)


def documents_in_tokens(model: Path, text: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = (text / "calibration.jsonl").read_text().splitlines()
    return [tokenizer(json.loads(line)["text"]).input_ids for line in lines]


@pytest.fixture
def copy_of(tiny_model, tmp_path):
    def make(family: str) -> Path:
        return Path(shutil.copytree(tiny_model(family), tmp_path / family))

    return make


def mixture(folder: Path, *texts: str) -> Path:
    """``calibration.jsonl`` of a mixture, each source one text over and over."""
    path = folder / "mixture.jsonl"
    lines = [{"title": "t", "text": text * 700, "source": number} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("shares", "counts"), [([1, 1, 1], [4, 4, 4]), ([8, 3, 1], [8, 3, 1]), ([100, 1, 1], [10, 1, 1])]
)
@pytest.mark.parametrize("packing", ["packed", "single"])
def test_sources_of_a_mixture_have_their_share_of_the_windows(tiny_model, tmp_path, shares, counts, packing):
    path, output = mixture(tmp_path, " river", " village", " engine"), tmp_path / "calibration.h5"
    if packing == "single":
        path.write_text("".join(f"{line}\n" * 12 for line in path.read_text().splitlines()))
    prepare_windows(tiny_model("llama"), settings(shares=shares, packing=packing), path, output, log=quiet)
    input_ids, _, _ = windows(output)
    tokens = [ids[5] for ids in documents_of(tiny_model("llama"), " river", " village", " engine")]
    found = [sum(token in row for row in input_ids) for token in tokens]
    assert found == counts
    # not one source after the other: the last windows may be held out
    first = [next(index for index, token in enumerate(tokens) if token in row) for row in input_ids]
    assert first != sorted(first)


def documents_of(model: Path, *texts: str) -> list[list[int]]:
    return [encoded(model, text * 10) for text in texts]


def test_more_samples_of_a_mixture_are_cut_at_the_same_places(tiny_model, tmp_path):
    # what is trained on more windows than the calibration's leaves out those that are kept out: they are equal or apart
    path = tmp_path / "mixture.jsonl"
    texts = [" ".join(str(number) for number in range(first, first + 900)) for first in (1000, 5000)]
    lines = [{"title": "t", "text": text, "source": number} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    places = []
    for samples in (6, 14):
        output = tmp_path / f"{samples}.h5"
        prepare_windows(tiny_model("llama"), settings(shares=[1, 1], samples=samples), path, output, log=quiet)
        places.append(set())
        for text, number in zip(texts, (0, 1), strict=True):
            stream = encoded(tiny_model("llama"), text)
            windows_of = [row.tolist() for row in windows(output)[0]]
            starts = [at for at in range(len(stream) - 63) if stream[at : at + 64] in windows_of]
            assert len(starts) == samples // 2
            places[-1] |= {(number, at % 64) for at in starts}
    assert places[0] == places[1] and len(places[0]) == 2


def encoded(model: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)(text).input_ids


def test_fewer_windows_than_sources_are_refused(tiny_model, tmp_path):
    path = mixture(tmp_path, " river", " village", " engine")
    with pytest.raises(ConfigError, match=r"calibration.samples: 2; the text has 3 sources"):
        prepare_windows(tiny_model("llama"), settings(shares=[1, 1, 1], samples=2), path, tmp_path / "c.h5", log=quiet)


@pytest.mark.parametrize(("text", "warned"), [(" the old river crosses a village", False), (" ЖЩЪ", True)])
def test_text_that_the_tokenizer_was_not_made_for_is_told(tiny_model, tmp_path, text, warned):
    lines: list[str] = []
    prepare_windows(tiny_model("llama"), settings(), mixture(tmp_path, text), tmp_path / "c.h5", log=lines.append)
    assert [line for line in lines if line.startswith("warning: only 1.")] == [
        line for line in lines if line.startswith("warning: ")
    ]
    assert any(line.startswith("warning: ") for line in lines) == warned


def test_a_conversation_that_ends_itself_is_ended_once(tiny_model, tmp_path):
    output = tmp_path / "c.h5"
    prepare_windows(tiny_model("llama"), settings(), mixture(tmp_path, "[user]river</s>\n"), output, log=quiet)
    input_ids, _, _ = windows(output)
    doubled = (input_ids[:, 1:] == EOS) & (input_ids[:, :-1] == EOS)
    assert (input_ids == EOS).any() and not doubled.any()


# --- cut from text ------------------------------------------------------------------------------------------------


def test_packed_windows_are_pieces_of_the_joined_documents(tiny_model, tiny_text, tmp_path):
    model, output = tiny_model("llama"), tmp_path / "calibration.h5"
    prepare_windows(model, settings(samples=150), tiny_text / "calibration.jsonl", output, log=quiet)
    input_ids, attention_mask, attributes = windows(output)
    assert input_ids.shape == attention_mask.shape == (150, 64)
    assert (attention_mask == 1).all()
    assert attributes == {
        "format_version": 1,
        "tokens": tokens_digest(input_ids, attention_mask),
        "model": model.name,
        "seed": 42,
        "source": "text",
        "packing": "packed",
        "vocabulary_size": 390,
        "n_documents": 24,
    }
    # cut at the EOS tokens, a window is the end of one document, whole ones, the beginning of another
    documents = [tuple(ids) for ids in documents_in_tokens(model, tiny_text)]
    crossings = 0
    for window in input_ids.tolist():
        pieces = [[]]
        for token in window:
            if token == EOS:
                pieces.append([])
            else:
                pieces[-1].append(token)
        crossings += len(pieces) - 1
        for number, piece in enumerate(pieces):
            text = tuple(piece)
            if len(pieces) == 1:
                fits = any(text == ids[i : i + 64] for ids in documents for i in range(len(ids) - 63))
            elif number == 0:
                fits = not text or any(ids[-len(text) :] == text for ids in documents)
            elif number == len(pieces) - 1:
                fits = any(ids[: len(text)] == text for ids in documents)
            else:
                fits = text in documents
            assert fits, piece
    assert crossings >= 4


def test_packed_windows_come_from_the_whole_text_and_never_overlap(tiny_model, tiny_text, tmp_path):
    model = tiny_model("llama")
    documents = documents_in_tokens(model, tiny_text)
    total = sum(map(len, documents)) + len(documents)
    samples = total // 64
    prepare_windows(model, settings(samples=samples), tiny_text / "calibration.jsonl", tmp_path / "all.h5", log=quiet)
    everything, _, _ = windows(tmp_path / "all.h5")
    # all windows together are the text but for less than a window: every token is counted once
    counts = np.bincount(np.concatenate([*documents, [EOS] * len(documents)]), minlength=400)
    difference = counts - np.bincount(everything.ravel(), minlength=400)
    assert (difference >= 0).all() and difference.sum() == total - samples * 64 < 64
    # a few windows are not the beginning of the same text
    prepare_windows(model, settings(samples=6), tiny_text / "calibration.jsonl", tmp_path / "few.h5", log=quiet)
    few, _, _ = windows(tmp_path / "few.h5")
    assert (tmp_path / "few.h5").exists() and len(np.unique(few, axis=0)) == 6
    titles = {
        number for number, ids in enumerate(documents) for window in few if set_of_runs(window) & set_of_runs(ids)
    }
    assert len(titles) >= 4


def set_of_runs(ids) -> set[tuple[int, ...]]:
    return {tuple(ids[i : i + 24]) for i in range(len(ids) - 23)}


@pytest.mark.parametrize("packing", ["packed", "single"])
def test_equal_seed_gives_equal_bytes(tiny_model, tiny_text, tmp_path, packing):
    model, text = tiny_model("llama"), tiny_text / "calibration.jsonl"
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare_windows(model, settings(seed=seed, packing=packing), text, tmp_path / f"{name}.h5", log=quiet)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert not np.array_equal(windows(tmp_path / "a.h5")[0], windows(tmp_path / "c.h5")[0])


def test_single_document_windows_are_padded_on_the_right(tiny_model, tmp_path):
    model, text = tiny_model("llama"), tmp_path / "calibration.jsonl"
    short, long = "The old river.", "The old river crosses the village. " * 30
    text.write_text("".join(json.dumps({"title": "t", "text": body}) + "\n" for body in (short, long)))
    chosen = settings(samples=2, packing="single")
    prepare_windows(model, chosen, text, tmp_path / "calibration.h5", log=quiet)
    input_ids, attention_mask, attributes = windows(tmp_path / "calibration.h5")
    ids = sorted(documents_in_tokens(model, tmp_path), key=len)
    order = np.argsort(attention_mask.sum(axis=1))
    expected = [*ids[0], EOS]
    assert attention_mask[order[0]].tolist() == [1] * len(expected) + [0] * (64 - len(expected))
    assert input_ids[order[0], : len(expected)].tolist() == expected
    assert input_ids[order[1]].tolist() == ids[1][:64] and attention_mask[order[1]].all()
    assert attributes["n_documents"] == 2 and attributes["packing"] == "single"


def test_too_little_text_says_how_much_is_missing(tiny_model, tiny_text, tmp_path):
    model, text = tiny_model("llama"), tiny_text / "calibration.jsonl"
    documents = documents_in_tokens(model, tiny_text)
    total = sum(map(len, documents)) + len(documents)
    with pytest.raises(ArtifactError, match=f"{64 * 5000 - total} tokens are missing.*lower calibration.samples"):
        prepare_windows(model, settings(samples=5000), text, tmp_path / "c.h5", log=quiet)
    with pytest.raises(
        ArtifactError, match=r"24 documents, but 30 windows.*: 6 documents, up to 384 tokens, are missing"
    ):
        prepare_windows(model, settings(samples=30, packing="single"), text, tmp_path / "c.h5", log=quiet)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ArtifactError, match="768 tokens are missing"):
        prepare_windows(model, settings(), tmp_path / "empty.jsonl", tmp_path / "c.h5", log=quiet)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty.jsonl"]


def test_bad_arguments(tiny_model, tiny_text, tmp_path):
    model, text = tiny_model("llama"), tiny_text / "calibration.jsonl"
    with pytest.raises(ConfigError, match=r"calibration.length: 513; the model has 512 positions"):
        prepare_windows(model, settings(length=513), text, tmp_path / "c.h5", log=quiet)
    with pytest.raises(ConfigError, match="needs a text file"):
        prepare_windows(model, settings(), None, tmp_path / "c.h5", log=quiet)
    with pytest.raises(ArtifactError, match="does not exist"):
        prepare_windows(model, settings(), tmp_path / "none.jsonl", tmp_path / "c.h5", log=quiet)


# --- tokenizers ---------------------------------------------------------------------------------------------------


def add_bos_by_template(folder: Path) -> None:
    """As Llama's tokenizer.json: every text begins with <s>."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_bos_parts_documents_where_the_tokenizer_adds_it(copy_of, tiny_text, tmp_path):
    folder = copy_of("llama")
    add_bos_by_template(folder)
    prepare_windows(folder, settings(samples=290), tiny_text / "calibration.jsonl", tmp_path / "c.h5", log=quiet)
    input_ids, _, _ = windows(tmp_path / "c.h5")
    assert (input_ids == 1).sum() >= 20 and (input_ids == EOS).sum() == 0


def test_tokenizer_without_tokenizer_json(copy_of, tiny_text, tmp_path):
    """A tokenizer that only transformers can read gives the same windows."""
    folder, text = copy_of("llama"), tiny_text / "calibration.jsonl"
    prepare_windows(folder, settings(), text, tmp_path / "light.h5", log=quiet)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "tokenizer.json").unlink()
    prepare_windows(folder, settings(), text, tmp_path / "full.h5", log=quiet)
    assert np.array_equal(windows(tmp_path / "full.h5")[0], windows(tmp_path / "light.h5")[0])


def test_settings_of_the_tokenizer_file_do_not_cut_documents(copy_of, tiny_model, tiny_text, tmp_path):
    from tokenizers import Tokenizer

    folder, text = copy_of("llama"), tiny_text / "calibration.jsonl"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(folder / "tokenizer.json"))
    prepare_windows(folder, settings(), text, tmp_path / "a.h5", log=quiet)
    prepare_windows(tiny_model("llama"), settings(), text, tmp_path / "b.h5", log=quiet)
    assert np.array_equal(windows(tmp_path / "a.h5")[0], windows(tmp_path / "b.h5")[0])


def test_vocabulary_mismatch_is_refused(copy_of, tiny_text, tmp_path):
    folder = copy_of("llama")
    weights = ModelFolder(folder)
    tensors = {name: weights.read(name).copy() for name in weights.weight_map}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:300]
    write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(ArtifactError, match=r"gives id 3\d\d, but the model has 300 embedding rows"):
        prepare_windows(folder, settings(), tiny_text / "calibration.jsonl", tmp_path / "c.h5", log=quiet)
    assert not (tmp_path / "c.h5").exists()


def test_damaged_tokenizer_is_refused(copy_of, tiny_text, tmp_path):
    folder = copy_of("llama")
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ArtifactError, match=r"tokenizer.json: no usable tokenizer"):
        prepare_windows(folder, settings(), tiny_text / "calibration.jsonl", tmp_path / "c.h5", log=quiet)


# --- sampled from the model ---------------------------------------------------------------------------------------


def test_self_sampling_is_seeded_and_leaves_the_global_state_alone(tiny_model, tmp_path):
    import torch

    model, lines = tiny_model("llama"), []
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    chosen = settings(source="self", samples=18, length=20)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare_windows(model, chosen | {"seed": seed}, None, tmp_path / f"{name}.h5", log=lines.append)
    assert torch.equal(torch.rand(3), expected)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    input_ids, attention_mask, attributes = windows(tmp_path / "a.h5")
    assert input_ids.shape == (18, 20) and (attention_mask == 1).all()
    assert attributes["source"] == "self" and attributes["n_documents"] == 0
    assert (attributes["dtype"], attributes["dtype_reason"]) == choose_dtype("auto", "cpu")
    assert len(np.unique(input_ids, axis=0)) == 18 and len(np.unique(input_ids[:, 0])) > 8
    assert not np.isin(input_ids[:, 0], (0, 1, 2)).any()
    assert not np.array_equal(input_ids, windows(tmp_path / "c.h5")[0])
    assert any(line.startswith("windows 17-18 of 18: token 20/20") for line in lines)


def test_self_sampling_computes_in_the_dtype_of_the_config(tiny_model, tmp_path):
    ids = {}
    for dtype in ("bfloat16", "float32"):
        chosen = settings(source="self", samples=8, length=40, dtype=dtype)
        prepare_windows(tiny_model("llama"), chosen, None, tmp_path / "c.h5", log=quiet)
        ids[dtype], _, attributes = windows(tmp_path / "c.h5")
        assert attributes["dtype"] == dtype
    # equal draws, probabilities a little apart: the windows begin alike, and one parts from the other somewhere
    assert 0 < np.mean(ids["bfloat16"] != ids["float32"]) < 0.9
    assert np.array_equal(ids["bfloat16"][:, 0], ids["float32"][:, 0])


def test_self_sampling_follows_the_model_at_temperature_one(copy_of, tmp_path):
    """A head that prefers two tokens, 3 to 1, whatever came before; generation settings of the model do not count."""
    folder = copy_of("qwen2")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.1, "top_k": 1, "eos_token_id": 9}))
    weights = ModelFolder(folder)
    tensors = {name: weights.read(name).copy() for name in weights.weight_map}
    dtype = tensors["lm_head.weight"].dtype
    # the final norm gives (1, 0, 0, ...) for every token, so the head's first column is the logits
    tensors["model.embed_tokens.weight"][:] = np.eye(1, 48, dtype=np.float32).astype(dtype)
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name][:] = dtype.type(0)
    tensors["model.norm.weight"][:] = dtype.type(1 / np.sqrt(48))
    head = np.zeros((400, 48), np.float32)
    head[:, 0], head[9, 0], head[11, 0] = -40, np.log(3), 0
    tensors["lm_head.weight"] = head.astype(dtype)
    write_tensors(folder / "model.safetensors", tensors)
    chosen = settings(source="self", samples=48, length=40)
    prepare_windows(folder, chosen, None, tmp_path / "c.h5", log=quiet)
    drawn = windows(tmp_path / "c.h5")[0][:, 1:]
    assert set(np.unique(drawn)) == {9, 11}  # and token 9, an end of text there, ends nothing
    # 1872 draws: a standard deviation of 0.010
    assert abs((drawn == 9).mean() - 0.75) < 0.04


def test_self_sampling_starts_with_bos_where_the_tokenizer_does(copy_of, tmp_path):
    folder = copy_of("llama")
    add_bos_by_template(folder)
    prepare_windows(folder, settings(source="self", samples=3, length=10), None, tmp_path / "c.h5", log=quiet)
    assert (windows(tmp_path / "c.h5")[0][:, 0] == 1).all()


def test_self_sampling_from_damaged_weights_is_refused(copy_of, tmp_path):
    folder = copy_of("llama")
    weights = ModelFolder(folder)
    tensors = {name: weights.read(name).copy() for name in weights.weight_map}
    tensors["model.norm.weight"][:] = np.nan
    write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(NumericalError, match="predicts NaN or infinity"):
        prepare_windows(folder, settings(source="self", samples=2, length=10), None, tmp_path / "c.h5", log=quiet)
    assert not (tmp_path / "c.h5").exists()
