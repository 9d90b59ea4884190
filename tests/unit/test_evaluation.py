"""Scores against direct computations on tiny random models."""

from __future__ import annotations

import json
import math
import shutil
import socket
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cospadi import factorize
from cospadi.checkpoint import assemble, densify
from cospadi.errors import ArtifactError, ConfigError, CospadiError, NumericalError
from cospadi.evaluation import HELDOUT_TASKS
from cospadi.evaluation.evaluate import evaluate
from cospadi.evaluation.generation import generate
from cospadi.evaluation.heldout import (
    TASK_FILES,
    heldout_pieces,
    last_word_passages,
    next_sentence_questions,
    sentence_order_questions,
)
from cospadi.evaluation.scoring import ScoringLM
from cospadi.files import ModelFolder, write_tensors
from cospadi.provenance import fingerprint

# bounds are those of float32, whatever the processor is best at
EXACT = {"dtype": "float32"}
PERPLEXITY = EXACT | {"perplexity": {"max_tokens": 300, "window": 64}}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    attempts = []

    def refuse(_, address):
        attempts.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert attempts == []  # also where a library swallowed the error


@pytest.fixture(scope="module")
def llama(tiny_model) -> Path:
    return tiny_model("llama", dtype="float32")


def changed(folder: Path, destination: Path, change) -> Path:
    """A copy of a model folder whose tensors went through `change`."""
    shutil.copytree(folder, destination)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, destination / "model.safetensors", {"format": "pt"})
    return destination


def pack_two(base: Path, folder: Path) -> Path:
    """``folder/packed``: `base` with two of its matrices packed."""
    weights, tensors, specs = ModelFolder(base), {}, {}
    for name in ("model.layers.0.mlp.up_proj", "model.layers.2.self_attn.q_proj"):
        packed, specs[name] = factorize(weights.read_weight(name), method="svd_llm", ratio=0.5).pack(name)
        tensors |= packed
    write_tensors(folder / "codes.safetensors", tensors, {"format_version": 1, "matrices": specs})
    assemble(base, [folder / "codes.safetensors"], folder / "packed", variant={"method": "svd_llm"})
    return folder / "packed"


def read_articles(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "heldout.jsonl").read_text().splitlines()]


def direct_predictions(folder: Path, text: str, window: int) -> tuple[torch.Tensor, list[int]]:
    """log p(. | its window) of every token in float64, and the tokens; windows overlap by nothing."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    found, predicted = [], 0
    while predicted < len(ids) - 1:
        stop = min(len(ids) - 1, predicted + window)
        start = max(0, stop - window)  # as lm-eval: the last window is full too, its known part is context only
        logits = model(torch.tensor([ids[start:stop]])).logits[0].log_softmax(-1).detach()
        found.append(logits[predicted - start :])
        predicted = stop
    return torch.cat(found), ids[1:]


def direct_loglikelihood(folder: Path, text: str, window: int) -> tuple[float, int]:
    """Sum of log p(token | its window), and the number of tokens."""
    predictions, ids = direct_predictions(folder, text, window)
    return predictions[range(len(ids)), ids].sum().item(), len(ids)


def test_perplexity_equals_direct_computation(llama, tiny_text, tmp_path):
    result = evaluate(llama, PERPLEXITY, heldout=tiny_text / "heldout.jsonl", output=tmp_path / "eval.json")
    assert result["fingerprint"] == fingerprint(ModelFolder(llama))
    articles = read_articles(tiny_text)
    pieces = heldout_pieces(articles, max_tokens=300, window=64)
    total, tokens = np.sum([direct_loglikelihood(llama, piece, 64) for piece in pieces], axis=0)
    words = sum(len(piece.split()) for piece in pieces)
    scores = result["perplexity"]
    assert (scores["tokens"], scores["words"], scores["pieces"]) == (tokens, words, len(pieces))
    assert scores["token"] == pytest.approx(math.exp(-total / tokens), rel=1e-4)
    assert scores["word"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    n_bytes = sum(len(piece.encode()) for piece in pieces)
    assert scores["bits_per_byte"] == pytest.approx(-total / n_bytes / math.log(2), rel=1e-5)
    assert json.loads((tmp_path / "eval.json").read_text()) == result


def test_plain_lm_eval_gives_the_same_given_the_path(llama, tiny_text, tmp_path):
    heldout = tiny_text / "heldout.jsonl"
    expected = evaluate(llama, PERPLEXITY, heldout=heldout, output=tmp_path / "eval.json")["perplexity"]
    metadata = {"heldout": str(heldout), "max_tokens": 300, "window": 64}
    scores = lm_eval.simple_evaluate(
        "hf",
        {"pretrained": str(llama), "max_length": 64, "add_bos_token": False, "device": "cpu"},
        tasks=["heldout"],
        task_manager=TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=metadata),
        bootstrap_iters=0,
    )["results"]["heldout"]
    assert scores["word_perplexity,none"] == pytest.approx(expected["word"], rel=1e-6)
    assert scores["bits_per_byte,none"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)


def test_packed_checkpoint_scores_like_its_dense_copy(llama, tiny_text, tmp_path):
    pack_two(llama, tmp_path)
    densify(tmp_path / "packed", tmp_path / "dense")
    dense, packed, original = (
        evaluate(folder, PERPLEXITY, heldout=tiny_text / "heldout.jsonl", output=tmp_path / "eval.json")
        for folder in (tmp_path / "dense", tmp_path / "packed", llama)
    )
    assert packed["perplexity"]["token"] == pytest.approx(dense["perplexity"]["token"], rel=1e-4)
    assert packed["perplexity"]["token"] != pytest.approx(original["perplexity"]["token"], rel=1e-3)


def test_pieces_longer_than_the_window_roll(llama, tmp_path):
    # digits are a token each here, so 3.5 bytes a token of the window is far too many
    text = " ".join("7391" * 3 for _ in range(60))
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"title": "digits", "text": text}) + "\n")
    evaluation = {"perplexity": {"max_tokens": 100, "window": 40}, "dtype": "float32"}
    result = evaluate(llama, evaluation, heldout=heldout, output=tmp_path / "eval.json")
    pieces = heldout_pieces([text], max_tokens=100, window=40)
    total, tokens = np.sum([direct_loglikelihood(llama, piece, 40) for piece in pieces], axis=0)
    assert tokens > 40 * len(pieces)
    assert result["perplexity"]["tokens"] == tokens
    assert result["perplexity"]["token"] == pytest.approx(math.exp(-total / tokens), rel=1e-4)


@pytest.fixture(scope="module")
def compared(llama, tiny_text, tmp_path_factory) -> Path:
    """Folder with a held-out text of which some rolls, and the states of the dense model on it."""
    folder = tmp_path_factory.mktemp("compared")
    articles = [" ".join("7391" * 3 for _ in range(40)), *read_articles(tiny_text)[:4]]
    lines = (json.dumps({"title": "", "text": text}) for text in articles)
    (folder / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    result = compare(llama, folder, states=folder / "states.h5")
    assert "kl" not in result["perplexity"]
    return folder


def compare(model: Path, folder: Path, *, states: Path, dense: Path | None = None, **options) -> dict:
    evaluation = EXACT | {"perplexity": {"max_tokens": 300, "window": 40}} | options
    return evaluate(
        model, evaluation, heldout=folder / "heldout.jsonl", output=folder / "eval.json", states=states, dense=dense
    )


@pytest.mark.parametrize("own_head", [False, True])
def test_divergence_from_the_dense_model_equals_direct_computation(own_head, llama, compared, tmp_path):
    folder = pack_two(llama, tmp_path)
    if own_head:
        folder = changed(
            folder, tmp_path / "other", lambda tensors: tensors["model.embed_tokens.weight"].__imul__(1.25)
        )
    result = compare(folder, compared, states=compared / "states.h5", dense=llama, batch_size=3)
    pieces = heldout_pieces(read_articles(compared), max_tokens=300, window=40)
    divergences = []
    for piece in pieces:
        (p, _), (q, _) = (direct_predictions(model, piece, 40) for model in (llama, folder))
        divergences.append((p.exp() * (p - q)).sum(-1))
    divergences = torch.cat(divergences)
    assert len(divergences) == result["perplexity"]["tokens"] > 40 * len(pieces)
    # float32 against float64, and the packed model's own way of computing
    assert result["perplexity"]["kl"] == pytest.approx(divergences.mean().item(), rel=1e-3)
    assert result["perplexity"]["kl"] > 1e-3


def test_a_model_is_not_compared_with_what_is_of_another(llama, compared, tiny_text, tmp_path):
    states = compared / "states.h5"
    assert compare(llama, compared, states=states, dense=llama)["perplexity"]["kl"] == pytest.approx(0, abs=1e-6)
    other = changed(llama, tmp_path / "other", lambda tensors: tensors["model.norm.weight"].__imul__(2))
    with pytest.raises(ArtifactError, match=r"states\.h5: is of fingerprint .* evaluate the dense model anew"):
        compare(llama, compared, states=states, dense=other)
    with pytest.raises(ArtifactError, match=r"states\.h5: has no states of a window of \d+ tokens: of another text"):
        compare(llama, tiny_text, states=states, dense=llama)


def test_batches_of_windows_change_nothing(llama, tiny_text, tmp_path):
    scores = [
        evaluate(
            llama, PERPLEXITY | {"batch_size": size}, heldout=tiny_text / "heldout.jsonl", output=tmp_path / "eval.json"
        )["perplexity"]["token"]
        for size in (1, 4)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_models_compute_in_the_dtype_asked_for(packed, tiny_model, tiny_text, tmp_path):
    folder = direct = tiny_model("llama")  # stored in bfloat16
    if packed:
        # the base in float32, so that densify does not round what was packed
        folder, direct = pack_two(tiny_model("llama", dtype="float32"), tmp_path), tmp_path / "dense"
        densify(folder, direct)
    pieces = heldout_pieces(read_articles(tiny_text), max_tokens=300, window=64)
    total, tokens = np.sum([direct_loglikelihood(direct, piece, 64) for piece in pieces], axis=0)
    error = {}
    for dtype in ("float32", "bfloat16"):
        evaluation = {**PERPLEXITY, "dtype": dtype}
        result = evaluate(folder, evaluation, heldout=tiny_text / "heldout.jsonl", output=tmp_path / "eval.json")
        assert (result["dtype"], result["dtype_reason"]) == (dtype, "the config asks for it")
        error[dtype] = abs(math.log(result["perplexity"]["token"]) + total / tokens)
    assert 20 * error["float32"] < error["bfloat16"] < 0.05


def test_uniform_model_has_the_perplexity_of_its_vocabulary(llama, tiny_text, tmp_path):
    def zero(tensors):
        tensors["model.norm.weight"][:] = 0

    folder = changed(llama, tmp_path / "uniform", zero)
    result = evaluate(folder, PERPLEXITY, heldout=tiny_text / "heldout.jsonl", output=tmp_path / "eval.json")
    assert result["perplexity"]["token"] == pytest.approx(400, rel=1e-5)


def test_what_is_recorded(tiny_model, tiny_text, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(
        "cospadi.evaluation.evaluate.choose_dtype", lambda dtype, device: ("bfloat16", f"{dtype} on {device}")
    )
    result = evaluate(
        tiny_model("qwen3"),
        {**PERPLEXITY, "dtype": "auto", "generate": {"prompts": ["The old river", "A"], "max_new_tokens": 5}},
        heldout=tiny_text / "heldout.jsonl",
        output=tmp_path / "eval.json",
        threads=1,
        log=lines.append,
    )
    assert (result["dtype"], result["device"], result["threads"]) == ("bfloat16", "cpu", 1)
    assert result["dtype_reason"] == "auto on cpu" and any(line.endswith("as bfloat16: auto on cpu") for line in lines)
    assert result["seconds"]["total"] >= result["seconds"]["perplexity"] >= result["seconds"]["perplexity_model"] > 0
    assert result["peak_rss_bytes"] > 50e6
    assert set(result["versions"]) == {"lm_eval", "python", "torch", "transformers"}
    assert [sample["n_tokens"] <= 5 for sample in result["samples"]] == [True, True]
    assert any("token perplexity" in line for line in lines)


@pytest.mark.parametrize(
    ("family", "options"), [("mistral", {}), ("qwen2", {}), ("gemma3_text", {"final_logit_softcapping": 2.0})]
)
def test_families(family, options, tiny_model, tiny_text, tmp_path):
    folder = tiny_model(family, **options)
    evaluation = EXACT | {"perplexity": {"max_tokens": 100, "window": 32}}
    files = {"heldout": tiny_text / "heldout.jsonl", "output": tmp_path / "eval.json", "states": tmp_path / "states.h5"}
    result = evaluate(folder, evaluation, **files)
    again = evaluate(folder, evaluation, **files, dense=folder)  # logits are made of the states as the model makes them
    assert again["perplexity"]["kl"] == pytest.approx(0, abs=1e-6)
    articles = read_articles(tiny_text)
    pieces = heldout_pieces(articles, max_tokens=100, window=32)
    total, tokens = np.sum([direct_loglikelihood(folder, piece, 32) for piece in pieces], axis=0)
    assert math.log(result["perplexity"]["token"]) == pytest.approx(-total / tokens, rel=0.01)  # bfloat16


def test_generation_is_greedy_and_unchanged_by_its_batch(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    prompts = ["The old river crosses the village and", "A"]
    expected = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        for _ in range(6):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        expected.append(tokenizer.decode(ids[-6:], skip_special_tokens=True))
    samples = generate(model, tokenizer, prompts=prompts, max_new_tokens=6, chat=True)
    assert [sample["text"] for sample in samples] == expected
    assert not any(sample["chat"] for sample in samples)  # this tokenizer has no template


def test_chat_template_is_used(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    prompt = "The old river"
    plain = generate(model, tokenizer, prompts=[f"<s>Ask: {prompt} Answer:"], max_new_tokens=6)
    tokenizer.chat_template = "<s>Ask: {{ messages[0]['content'] }} Answer:"
    (sample,) = generate(model, tokenizer, prompts=[prompt], max_new_tokens=6, chat=True)
    assert (sample["chat"], sample["text"]) == (True, plain[0]["text"])


def direct_accuracies(folder: Path, questions: list[dict]) -> dict[str, float]:
    """Share of questions whose right choice is likeliest, as it is and over its number of characters."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    correct = {"acc": 0, "acc_norm": 0}
    for question in questions:
        sums = []
        for choice in question["choices"]:
            context = tokenizer.encode(question["query"])
            ids = tokenizer.encode(f"{question['query']} {choice}")
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(logits[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
        lengths = [len(choice) for choice in question["choices"]]
        correct["acc"] += int(np.argmax(sums)) == question["gold"]
        correct["acc_norm"] += int(np.argmax(np.divide(sums, lengths))) == question["gold"]
    return {name: count / len(questions) for name, count in correct.items()}


def write_task(folder, name, questions, *, more=""):
    """A local task of lm-eval: questions with choices, of which some may be shown; `more` lines of metrics."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / f"{name}.yaml").write_text(f"""
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
{more}
""")


def test_local_multiple_choice_task(llama, tmp_path):
    questions = [
        {"query": "The old river", "choices": ["crosses the village", "7 7 7 7"], "gold": 0},
        {"query": "A famous poem", "choices": ["the", "describes the long winter"], "gold": 1},
        {"query": "Every ship", "choices": ["carries a library", "became green"], "gold": 1},
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, "tiny_questions", questions)
    result = evaluate(
        llama, EXACT | {"tasks": ["tiny_questions"], "task_path": str(folder)}, output=tmp_path / "eval.json"
    )
    scores = result["tasks"]["tiny_questions"]
    assert scores["metrics"] == pytest.approx(direct_accuracies(llama, questions))
    assert (scores["primary"], scores["documents"], scores["num_fewshot"]) == ("acc_norm", 3, 0)
    limited = evaluate(
        llama, {"tasks": ["tiny_questions"], "task_path": str(folder), "limit": 2}, output=tmp_path / "eval.json"
    )
    assert limited["tasks"]["tiny_questions"]["documents"] == 2


def test_documents_that_are_shown_are_those_of_lm_eval(llama, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = [
        "the",
        "old",
        "river",
        "crosses",
        "village",
        "and",
        "every",
        "ship",
        "carries",
        "a",
        "library",
        "of",
        "green",
        "famous",
        "poems",
        "in",
        "winter",
    ]
    lines = [
        {
            "query": " ".join(rng.choice(words, 5)),
            "choices": [" ".join(rng.choice(words, 3)) for _ in range(3)],
            "gold": 1,
        }
        for _ in range(12)
    ]
    more = "  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}"
    write_task(folder, "shown", lines, more=more)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32),
        AutoTokenizer.from_pretrained(llama),
    )
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype="float32")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    expected = lm_eval.simple_evaluate(lm, tasks=["shown"], task_manager=manager, num_fewshot=2, bootstrap_iters=0)
    asked = EXACT | {"tasks": ["shown"], "task_path": str(folder), "num_fewshot": 2}
    found = evaluate(llama, asked, output=tmp_path / "eval.json")["tasks"]["shown"]
    assert found["num_fewshot"] == 2 and found["documents"] == 12
    for metric in ("acc", "acc_norm", "brier_score"):  # the last is of the likelihoods themselves
        assert found["metrics"][metric] == pytest.approx(expected["results"]["shown"][f"{metric},none"], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_answers_read_behind_one_context_score_as_each_alone(family, tiny_model):
    folder = tiny_model(family, dtype="float32")  # mistral and gemma3_text see 24 tokens back
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary, positions = model.config.vocab_size, model.config.max_position_embeddings
    rng = np.random.default_rng(0)

    def ids(count):
        return rng.integers(3, vocabulary, count).tolist()

    shared = [(ids(length), [ids(count) for count in counts]) for length, counts in ((40, (3, 9, 1, 30)), (5, (1, 1)))]
    asked = [(context, answer) for context, answers in shared for answer in answers]
    asked += [(ids(30), ids(4)), (ids(positions), ids(2)), (ids(1), ids(positions))]  # alone; cut; as long as may be
    with torch.no_grad():
        written = model(torch.tensor([shared[1][0]])).logits[0, -1].argmax().item()
    asked.append((shared[1][0], [written]))
    order = rng.permutation(len(asked))
    requests = [(None, *asked[place]) for place in order]
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype="float32")
    expected = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    read = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    for batch_size in (1, 4):
        read.clear()
        lm = ScoringLM(model, tokenizer, folder=folder, log=print, batch_size=batch_size)
        found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-4, abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert sum(greedy for _, greedy in found) >= 1
        if batch_size == 1:
            sizes = sorted(tuple(one.shape) for one in read)
            long = [(1, positions), (1, positions)]
            assert sizes == sorted([(1, 40), (4, 29), (1, 5), (1, 33), *long])
    hook.remove()


def test_last_words_equal_a_direct_computation(llama, tiny_text, tmp_path):
    heldout = tiny_text / "heldout.jsonl"
    result = evaluate(
        llama, EXACT | {"tasks": ["last_word"], "limit": 20}, heldout=heldout, output=tmp_path / "eval.json"
    )
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    total, right = 0.0, 0
    passages = last_word_passages(read_articles(tiny_text))[:20]
    for passage in passages:
        context, _, word = passage.rpartition(" ")
        ids = tokenizer.encode(context, add_special_tokens=False)
        answer = tokenizer.encode(f"{context} {word}", add_special_tokens=False)[len(ids) :]
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        total += logits[range(len(answer)), answer].sum().item()
        right += logits.argmax(-1).tolist() == answer
    scores = result["tasks"]["last_word"]
    assert scores["primary"] == "acc" and scores["documents"] == len(passages) == 20
    assert scores["metrics"]["acc"] == right / 20
    assert scores["metrics"]["perplexity"] == pytest.approx(math.exp(-total / 20), rel=1e-4)


def test_last_words_stand_in_the_passage_before_them():
    filler = " ".join(["word"] * 16)
    first = f"A ship of that kind {filler}."
    article = f"{first} Then {filler} and so on to the ship! Then {filler} it was a boat. In all {filler} it is gone."
    assert last_word_passages([f"Heading\n{article}"]) == [
        f"{first} Then {filler} and so on to the ship"  # boat and gone stand nowhere before
    ]
    many = " ".join(f"Sentence {i} {filler}." for i in range(9))
    passages = last_word_passages([many, many])
    assert passages[0] == passages[1] == f"Sentence 0 {filler}. Sentence 1 {filler}"  # of all articles in turn
    assert passages[-1].startswith("Sentence 4 ") and len(passages) == 16


def test_tasks_that_an_interrupted_job_had_finished_are_not_run_again(llama, tiny_text, tmp_path, monkeypatch):
    monkeypatch.setattr("cospadi.finished.SAVE_SECONDS", 0)
    evaluation = EXACT | {"tasks": [*HELDOUT_TASKS], "limit": 6}
    files = {"heldout": tiny_text / "heldout.jsonl", "output": tmp_path / "eval.json"}
    whole = evaluate(llama, evaluation, **files)
    assert list(tmp_path.glob(".*")) == []

    def interrupted():
        lines = []

        def log(line):
            lines.append(line)
            if sum(line.startswith(HELDOUT_TASKS) for line in lines) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate(llama, evaluation, **files, log=log)

    scored = []
    of_model = ScoringLM._loglikelihood_tokens

    def counted(self, requests, *more, **how):
        scored.append(len(requests))
        return of_model(self, requests, *more, **how)

    interrupted()
    monkeypatch.setattr(ScoringLM, "_loglikelihood_tokens", counted)
    again = evaluate(llama, evaluation, **files)
    assert again["tasks"] == whole["tasks"] and len(again["tasks"]) == 3
    assert len(scored) == 1  # of the third alone
    assert list(tmp_path.glob(".*")) == []
    monkeypatch.setattr(ScoringLM, "_loglikelihood_tokens", of_model)
    interrupted()
    monkeypatch.setattr(ScoringLM, "_loglikelihood_tokens", counted)
    scored.clear()
    other = evaluate(llama, evaluation | {"limit": 7}, **files)
    assert len(scored) == 3 and all(task["documents"] == 7 for task in other["tasks"].values())


def test_questions_of_the_heldout_text_equal_a_direct_computation(llama, tiny_text, tmp_path):
    made = {"next_sentence": next_sentence_questions, "sentence_order": sentence_order_questions}
    result = evaluate(
        llama,
        EXACT | {"tasks": list(made), "limit": 12},
        heldout=tiny_text / "heldout.jsonl",
        output=tmp_path / "eval.json",
    )
    for name, questions in made.items():
        scores = result["tasks"][name]
        assert (scores["primary"], scores["documents"]) == ("acc_norm", 12)
        assert scores["metrics"] == pytest.approx(direct_accuracies(llama, questions(read_articles(tiny_text))[:12]))


@pytest.mark.parametrize(
    ("make", "length", "n_choices"), [(next_sentence_questions, 2, 4), (sentence_order_questions, 3, 2)]
)
def test_questions_of_the_heldout_text(make, length, n_choices, tiny_text):
    articles = read_articles(tiny_text)
    questions = make(articles)
    assert questions == make(articles)
    # 40 sentences an article, none of which is asked for twice
    assert len(questions) == 6 * (40 // length)
    # an answer by place is right as often as chance, at any limit
    for limit in (12, len(questions)):
        counts = np.bincount([question["gold"] for question in questions[:limit]], minlength=n_choices)
        assert counts.max() - counts.min() <= 1
    seen = set()
    calibration = (tiny_text / "calibration.jsonl").read_text()
    for number, question in enumerate(questions):
        assert len(set(question["choices"])) == n_choices
        article = articles[number % 6]  # of all articles in turn
        right = question["choices"][question["gold"]]
        for choice in question["choices"]:
            assert (f"{question['query']} {choice}" in article) == (choice == right)
        if n_choices == 2:
            assert len({len(choice) for choice in question["choices"]}) == 1
        assert f"{question['query']} {right}" not in calibration
        seen.add(f"{question['query']} {right}")
    assert len(seen) == len(questions)


def test_wrong_sentences_are_far_away_and_of_like_length():
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "lambda", "sigma"]
    article = " ".join(f"Sentence {i} has {' '.join(words[: 3 + i % 5])}." for i in range(40))
    short = "He said so. " * 3
    questions = next_sentence_questions([short + article, f"Dr. {article[:200]}"])
    assert len(questions) == 20  # nothing of the second article has three sentences that are eight away
    for question in questions:
        right = question["choices"][question["gold"]]
        place = int(right.split()[1])
        assert question["query"].startswith(f"Sentence {place - 1} ")
        for choice in question["choices"]:
            assert choice == right or abs(int(choice.split()[1]) - place) >= 8
            assert abs(len(choice.split()) - len(right.split())) <= 1


def test_questions_have_whole_sentences_of_one_paragraph():
    whole = [f"The year {i} was of some importance." for i in range(4)]
    assert len(sentence_order_questions([" ".join(whole)])) == 1
    for broken in (
        [whole[0], "It was Mr.", whole[1], whole[2]],
        [whole[0], f"{whole[1]}\n{whole[2]}", whole[3]],
        [whole[0], "Too short here.", whole[2], whole[3]],
        [whole[0], whole[1], whole[1]],
    ):
        assert sentence_order_questions([" ".join(broken)]) == []


@pytest.mark.parametrize("task", HELDOUT_TASKS)
def test_tasks_of_the_heldout_text_need_it(task, llama, tmp_path):
    with pytest.raises(ConfigError, match=f"{task} needs a held-out text"):
        evaluate(llama, {"tasks": [task]}, output=tmp_path / "eval.json")
    (tmp_path / "short.jsonl").write_text(json.dumps({"title": "", "text": "Too short. For that."}) + "\n")
    with pytest.raises(ArtifactError, match=f"no passage for the task {task}"):
        evaluate(llama, {"tasks": [task]}, heldout=tmp_path / "short.jsonl", output=tmp_path / "eval.json")


def test_pieces_are_spread_over_all_articles():
    articles = [f"{name} " * 2000 for name in ("alpha", "beta", "gamma", "delta")]
    pieces = heldout_pieces(articles, max_tokens=1000, window=100)
    first_words = [piece.split()[0] for piece in pieces]
    counts = {word: first_words.count(word) for word in ("alpha", "beta", "gamma", "delta")}
    assert min(counts.values()) >= 3 and max(counts.values()) <= 4
    assert sum(len(piece) for piece in pieces) == pytest.approx(4500, rel=0.1)
    assert max(len(piece.encode()) for piece in pieces) <= 350


def test_pieces_of_more_articles_than_fit_are_evenly_spaced():
    articles = [f"article{i} " * 100 for i in range(100)]
    pieces = heldout_pieces(articles, max_tokens=400, window=100)
    chosen = [int(piece.split()[0].removeprefix("article")) for piece in pieces]
    assert chosen == [10, 30, 50, 70, 90]


def test_all_of_the_text():
    articles = ["one two three " * 40, "four five " * 90]
    pieces = heldout_pieces(articles, max_tokens=None, window=50)
    assert sum(len(piece.split()) for piece in pieces) == 300


def test_pieces_lose_no_word_and_split_no_character():
    article = "żółć 東京都 naïve\n\n" * 50 + "x" * 1000
    pieces = heldout_pieces([article], max_tokens=10**6, window=20)
    assert "".join("".join(pieces).split()) == "".join(article.split())
    assert all(len(piece.encode()) <= 70 for piece in pieces)


@pytest.mark.parametrize("content", ["", '{"title": "a", "text": "  "}\n'])
def test_empty_heldout_text(content, llama, tmp_path):
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(content)
    with pytest.raises(ArtifactError, match=r"heldout\.jsonl: holds no text"):
        evaluate(llama, PERPLEXITY, heldout=heldout, output=tmp_path / "eval.json")


def test_damaged_heldout_text(llama, tmp_path):
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text('{"title": "a", "text": "b"}\n{"title": "a", "te')
    with pytest.raises(ArtifactError, match=r"line 2 is not an article"):
        evaluate(llama, PERPLEXITY, heldout=heldout, output=tmp_path / "eval.json")


def test_window_longer_than_the_positions(llama, tiny_text, tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation\.perplexity\.window: 513, .* has 512 positions"):
        evaluate(
            llama,
            {"perplexity": {"max_tokens": 1000, "window": 513}},
            heldout=tiny_text / "heldout.jsonl",
            output=tmp_path / "eval.json",
        )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_weights_are_no_score(value, llama, tiny_text, tmp_path):
    def spoil(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    folder = changed(llama, tmp_path / "broken", spoil)
    with pytest.raises(NumericalError, match=r"broken: \d+ of \d+ log-likelihoods are not finite"):
        evaluate(folder, PERPLEXITY, heldout=tiny_text / "heldout.jsonl", output=tmp_path / "eval.json")
    assert not (tmp_path / "eval.json").exists()


def test_perplexity_beyond_float(llama, tiny_text, tmp_path):
    def blow_up(tensors):
        tensors["model.norm.weight"][:] *= 1e4

    folder = changed(llama, tmp_path / "huge", blow_up)
    with pytest.raises(NumericalError, match="larger than any float"):
        evaluate(folder, PERPLEXITY, heldout=tiny_text / "heldout.jsonl", output=tmp_path / "eval.json")


def test_missing_tensor_is_not_drawn_at_random(llama, tiny_text, tmp_path):
    folder = changed(llama, tmp_path / "lacking", lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(ArtifactError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight"):
        evaluate(folder, PERPLEXITY, heldout=tiny_text / "heldout.jsonl", output=tmp_path / "eval.json")


def test_truncated_weights(llama, tiny_text, tmp_path):
    folder = tmp_path / "truncated"
    shutil.copytree(llama, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        evaluate(folder, PERPLEXITY, heldout=tiny_text / "heldout.jsonl", output=tmp_path / "eval.json")


def test_tokenizer_of_another_model(llama, tiny_text, tiny_model, tmp_path):
    small = tiny_model("llama", dtype="float32", vocab_size=100)
    with pytest.raises(ArtifactError, match=r"gives token \d+, the model knows 100"):
        evaluate(small, PERPLEXITY, heldout=tiny_text / "heldout.jsonl", output=tmp_path / "eval.json")


def test_task_whose_data_is_missing(llama, tmp_path):
    (tmp_path / "lost.yaml").write_text(
        f"{{task: lost, dataset_path: json, dataset_kwargs: {{data_files: {tmp_path}/lost.jsonl}}, "
        "test_split: train, output_type: loglikelihood_rolling, doc_to_text: '', doc_to_target: '{{text}}'}"
    )
    with pytest.raises(CospadiError, match=r"evaluation\.tasks: the data of a task cannot be loaded \(.*lost\.jsonl"):
        evaluate(llama, {"tasks": ["lost"], "task_path": str(tmp_path)}, output=tmp_path / "eval.json")


def test_unknown_task(llama, tmp_path, monkeypatch):
    # the index of lm-eval's own tasks takes seconds to build
    monkeypatch.setattr("cospadi.evaluation.tasks.TaskManager", lambda: TaskManager(include_defaults=False))
    monkeypatch.setattr(TaskManager, "all_tasks", ["hellaswag", "piqa"])
    with pytest.raises(ConfigError, match=r"evaluation\.tasks: 'helaswag' is not a task .* did you mean hellaswag\?"):
        evaluate(llama, {"tasks": ["helaswag"]}, output=tmp_path / "eval.json")
