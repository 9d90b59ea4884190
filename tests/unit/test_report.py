"""The summary against numbers worked out by hand, and files a reader can open."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cospadi.errors import ArtifactError
from cospadi.files import ModelFolder, write_tensors
from cospadi.progress import learned
from cospadi.provenance import fingerprint
from cospadi.report import PLOTS, closing_message, collect, summarize
from cospadi.report.explore import specification
from cospadi.report.frontier import bytes_of, front, sizes, write_frontier
from cospadi.report.frontier import rows as frontier_rows
from cospadi.report.plots import _bits_by_place, plot_allocation, plot_pareto

RUN = {
    "variants": {
        "cospadi-20": {"method": "cospadi", "ratio": 0.2, "solver": "htp"},
        "svd_llm-20": {"method": "svd_llm", "ratio": 0.2},
    },
    "evaluation": {"tasks": ["piqa", "mmlu"]},
}
# bytes, dense bytes, relative error of q_proj and down_proj in each of two layers
MATRICES = {
    "cospadi-20": {
        "self_attn.q_proj": [(80, 100, 0.1), (80, 100, 0.2)],
        "mlp.down_proj": [(230 + 1 / 3, 300, 0.3), (250 - 1 / 3, 300, 0.4)],  # a shared dictionary is split
    },
    "svd_llm-20": {
        "self_attn.q_proj": [(79, 100, 0.2), (79, 100, 0.3)],
        "mlp.down_proj": [(240, 300, 0.4), (240, 300, 0.5)],
    },
}
WORD_PERPLEXITY = {"dense": 30.0, "cospadi-20": 40.0, "svd_llm-20": 120.0}


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def results(tmp_path) -> Path:
    return make_run(tmp_path)


@pytest.fixture
def dense_model(results) -> Path:
    return results / "dense-model"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with its summary; only to be read."""
    results = make_run(tmp_path_factory.mktemp("finished"))
    for name in ("fetch_model", "learn_dictionary/cospadi-20/layer_00"):
        (results / "benchmarks" / name).parent.mkdir(parents=True, exist_ok=True)
        (results / "benchmarks" / f"{name}.tsv").write_text("s\th:m:s\n2.5\t0:00:02\n")
    summarize(RUN, results, dense_model=results / "dense-model", rules=["fetch_model", "learn_dictionary"])
    return results


def make_run(folder: Path) -> Path:
    """A run of two layers, two matrices each, with two variants."""
    results = folder / "results" / "tiny"
    for variant, matrices in MATRICES.items():
        for layer in range(2):
            factors, codes = {}, {}
            for name, numbers in matrices.items():
                nbytes, dense_nbytes, error = numbers[layer]
                history = [
                    {"iteration": i, "relative_error": error * factor, "round_error": 1, "seconds": 0.1, "n_redrawn": 0}
                    for i, factor in enumerate((1.5, 1.1, 0.99)[: 3 - layer])
                ]
                matrix = f"model.layers.{layer}.{name}"
                factors[matrix] = {
                    "shape": [10, 5],
                    "n_atoms": 4,
                    "n_nonzero_coefs": 2,
                    "relative_error": error * 0.99,
                    "shift": 0.0,
                    "history": history if variant == "cospadi-20" else [],
                    "seconds": 1.0,
                    "solver": "htp" if variant == "cospadi-20" else "svd",
                }
                codes[matrix] = {"nbytes": nbytes, "dense_nbytes": dense_nbytes, "relative_error": error}
            unit = f"layer_{layer:02d}"
            about = {"format_version": 1, "unit": unit}
            learned = {**about, "method": RUN["variants"][variant]["method"], "seconds": 2.5, "matrices": factors}
            write(results / variant / "factors" / f"{unit}.json", learned)
            every = sum(matrix["dense_nbytes"] for matrix in codes.values())
            stored = {**about, "dense_nbytes_all": every, "matrices": codes}
            write(results / variant / "codes" / f"{unit}.json", stored)
        make_model(results / variant / "model", shards=2)
        (results / variant / "model" / "tokenizer.json").write_bytes(b"x" * 1000)
    make_model(results / "dense-model", shards=1)
    for number, (variant, perplexity) in enumerate(WORD_PERPLEXITY.items()):
        tasks = {
            "piqa": {"metrics": {"acc": 0.5, "acc_norm": 0.7 - number / 10}, "primary": "acc_norm"},
            "mmlu": {"metrics": {"acc": 0.3}, "primary": "acc"},
            "mmlu_anatomy": {"metrics": {"acc": 0.9}, "primary": "acc"},
        }
        evaluation = {
            "perplexity": {"word": perplexity, "token": perplexity / 2, "bits_per_byte": 1.0, "tokens": 500}
            | ({} if variant == "dense" else {"kl": number / 4}),
            "tasks": tasks,
            "samples": [{"prompt": "A <b> & c", "text": f"{variant}\n| <script>", "n_tokens": 3, "chat": False}],
            "seconds": {"total": 12.5},
        }
        write_scores(results, variant, **evaluation)
    return results


def make_model(folder: Path, *, shards: int) -> None:
    files = [f"model-{number}-of-{shards}.safetensors" for number in range(1, shards + 1)]
    files = ["model.safetensors"] if shards == 1 else files
    for file in files:
        write_tensors(folder / file, {f"{folder.parent.name} {folder.name} {file}": np.zeros(3, np.float32)})
    write(folder / "config.json", {})
    if shards > 1:
        weight_map = {f"{folder.parent.name} {folder.name} {file}": file for file in files}
        write(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def model_bytes(folder: Path) -> str:
    return str(sum(file.stat().st_size for file in folder.glob("*.safetensors")))


def write_scores(results: Path, variant: str, **scores) -> None:
    """``eval.json`` of a variant's model."""
    model = results / ("dense-model" if variant == "dense" else f"{variant}/model")
    of = {"format_version": 1, "fingerprint": fingerprint(ModelFolder(model)), "dtype": "float32"}
    write(results / variant / "eval.json", {**of, "seconds": {"total": 1.0}, **scores})


def texts_in(drawing: Path) -> set[str]:
    found = ElementTree.parse(drawing).iter("{http://www.w3.org/2000/svg}text")
    return {"".join(text.itertext()).strip() for text in found}


def rows(path: Path) -> dict[str, dict[str, str]]:
    with open(path) as file:
        return {row["variant"]: row for row in csv.DictReader(file, delimiter="\t")}


def test_table(finished):
    table = rows(finished / "summary.tsv")
    assert list(table) == ["dense", "cospadi-20", "svd_llm-20"]
    assert table["cospadi-20"] == {
        "variant": "cospadi-20",
        "method": "cospadi",
        "ratio_asked": "0.2",
        "target_bytes": "640",  # 80 + 80 + 230 + 250
        "ratio_true": "0.2",  # 1 - 640 / 800
        "ratio_of_all": "",
        "removed_blocks": "",
        "parameters_removed": "",
        "target_parameters_removed": "",
        "model_bytes": model_bytes(finished / "cospadi-20/model"),
        "word_perplexity": "40",
        "token_perplexity": "20",
        "kl": "0.25",
        "recovery": "0.75",  # 30 / 40
        "mean_accuracy": "0.45",  # of 0.6 and 0.3; mmlu_anatomy is a part of mmlu
        "mean_relative_error": "0.25",
        "worst_matrices": "1.down 0.4, 0.down 0.3, 1.q 0.2",
        "predicted_rise": "",
        "compensation_gain": "",
        "seconds_compensating": "",
        "refinement_gain": "",
        "seconds_refining": "",
        "distillation_gain": "",
        "seconds_distilling": "",
        "seconds_learning": "5",
        "seconds_evaluating": "12.5",
        "piqa": "0.6",
        "mmlu": "0.3",
    }
    assert table["svd_llm-20"]["target_bytes"] == "638"
    assert table["svd_llm-20"]["worst_matrices"] == "1.down 0.5, 0.down 0.4, 1.q 0.3"
    assert table["svd_llm-20"]["ratio_true"] == "0.2025"
    assert table["svd_llm-20"]["recovery"] == "0.25"
    dense = table["dense"]
    assert (dense["target_bytes"], dense["model_bytes"], dense["ratio_true"], dense["recovery"]) == (
        "800",
        model_bytes(finished / "dense-model"),
        "0",
        "1",
    )


def test_details(finished):
    summary = collect(RUN, finished, dense_model=finished / "dense-model")
    stored = json.loads((finished / "summary.json").read_text())
    assert {job["name"]: job["seconds"] for job in stored.pop("jobs")} == {
        "fetch_model": 2.5,
        "learn_dictionary/cospadi-20/layer_00": 2.5,
    }
    assert stored == summary
    matrix = summary["variants"]["cospadi-20"]["matrices"]["model.layers.0.mlp.down_proj"]
    assert matrix["relative_error"] == 0.3
    assert matrix["relative_error_learned"] == pytest.approx(0.297)
    assert (matrix["dense_nbytes"], matrix["n_atoms"]) == (300, 4)
    assert matrix["history"]["iteration"] == [0, 1, 2]
    assert matrix["history"]["relative_error"] == pytest.approx([0.45, 0.33, 0.297])
    assert summary["variants"]["dense"]["model"] == str(finished / "dense-model")


def test_closing_message(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("cospadi.report.choose_dtype", lambda dtype, device: ("bfloat16", f"{dtype} on {device}"))
    monkeypatch.setattr("cospadi.report.choose_device", lambda device: "a device")
    assert closing_message(SimpleNamespace(results=str(tmp_path))) == ""
    text = closing_message(SimpleNamespace(results=str(finished)))
    cospadi = next(line for line in text.splitlines() if line.startswith("cospadi-20  cospadi"))
    assert {"0.20", "0.2000", "40.00", "20.00", "0.750", "0.2500"} <= set(cospadi.split())
    assert f"svd_llm-20  {finished}/svd_llm-20/model" in text
    assert "in the dtype that this machine computes fastest in (auto on a device)" in text
    line = (
        f'AutoModelForCausalLM.from_pretrained("{finished}/cospadi-20/model", trust_remote_code=True, dtype="bfloat16")'
    )
    assert line in text and "Not evaluated in one dtype" not in text


def test_closing_message_tells_of_several_dtypes(results, dense_model):
    write_scores(
        results, "cospadi-20", **json.loads((results / "cospadi-20/eval.json").read_text()) | {"dtype": "bfloat16"}
    )
    summarize(RUN, results, dense_model=dense_model)
    text = closing_message(SimpleNamespace(results=results))
    assert "Not evaluated in one dtype: dense in float32, cospadi-20 in bfloat16, svd_llm-20 in float32" in text


def test_pages_are_self_contained_and_escaped(finished):
    page = (finished / "summary.html").read_text()
    assert page.count("<tr>") == 4 + 2  # and the best of the two that are as large, under its headings
    assert "<td>16-bit</td><td>cospadi-20</td>" in page
    assert "<td>cospadi-20</td><td>cospadi</td><td>0.20</td>" in page
    samples = (finished / "samples.html").read_text()
    assert "A &lt;b&gt; &amp; c" in samples and "<script>" not in samples
    assert samples.index("dense") < samples.index("cospadi-20") < samples.index("svd_llm-20")
    for text in (page, samples):
        assert "http" not in text and len(text) < 20_000
    markdown = (finished / "samples.md").read_text()
    assert "**cospadi-20**\n\n    cospadi-20\n    | <script>\n" in markdown


def test_the_page_to_explore_has_every_matrix_and_asks_no_network(finished):
    page = (finished / "explore.html").read_text()
    found = re.search(r'vegaEmbed\("#plots", (\{.*\}), \{actions: false\}\);</script>', page)
    spec = json.loads(found[1])
    summary = json.loads((finished / "summary.json").read_text())["variants"]
    assert [row["variant"] for row in spec["datasets"]["models"]] == list(summary)
    cospadi = next(row for row in spec["datasets"]["models"] if row["variant"] == "cospadi-20")
    assert cospadi["MB"] == summary["cospadi-20"]["target_bytes"] / 1e6
    assert cospadi["kl"] == summary["cospadi-20"]["kl"] > 0
    named = {tooltip["field"] for tooltip in spec["vconcat"][0]["hconcat"][0]["encoding"]["tooltip"]}
    assert "kl" in named <= cospadi.keys()
    errors = {
        (row["variant"], row["layer"], row["projection"]): (row["error"], row["bits"])
        for row in spec["datasets"]["matrices"]
    }
    assert errors == {
        (name, int(matrix.split(".")[2]), matrix.rpartition(".")[2]): (
            numbers["relative_error"],
            16 * numbers["nbytes"] / numbers["dense_nbytes"],
        )
        for name, variant in summary.items()
        for matrix, numbers in variant["matrices"].items()
    }
    assert not re.search(r"(src|href)=|https?:", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))
    assert "A &lt;b&gt; &amp; c" in page and "| <script>" not in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a chromium")
def test_a_browser_draws_the_page_to_explore(finished):
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    result = subprocess.run([*command, f"file://{finished}/explore.html"], capture_output=True, text=True, timeout=120)
    plots = result.stdout.split('<div id="plots"')[1].split("<script>vegaEmbed")[0]
    assert "<canvas" in plots and "matrices of" in plots  # the drawing, and the choice below it


def test_plots_show_every_variant(finished):
    texts = {}
    for name in PLOTS:
        assert (finished / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        texts[name] = texts_in(finished / "plots" / f"{name}.svg")
    assert {"self_attn.q_proj", "mlp.down_proj", "layer", "cospadi-20", "svd_llm-20"} <= texts["errors"]
    assert {"cospadi-20  40", "svd_llm-20  120", "dense  30"} <= texts["pareto"]
    assert {"fetch_model", "learn_dictionary", "minutes since the first job started"} <= texts["trace"]
    assert {"cospadi-20 (htp)", "learned without iterations: svd_llm-20"} <= texts["convergence"]


def test_with_embeddings_in_few_bits_bytes_are_those_of_the_whole_file(finished, tmp_path):
    summary = collect(RUN, finished, dense_model=finished / "dense-model")
    sizes = {name: variant["model_bytes"] / 1e6 for name, variant in summary["variants"].items()}
    assert bytes_of(summary) == ("target_bytes", "the compressed matrices")
    summary["variants"]["cospadi-20"]["config"]["embedding_bits"] = 8
    assert {row["variant"]: row["MB"] for row in specification(summary)["datasets"]["models"]} == sizes
    plot_pareto(summary, [tmp_path / "pareto.svg"])
    assert "bytes of the whole model in the file, masks counted  [MB]" in texts_in(tmp_path / "pareto.svg")


def test_allocation_is_drawn_for_variants_that_part_bytes_and_for_no_others(tmp_path):
    def variant(*nbytes):
        names = [f"model.layers.{n}.{p}" for n in (0, 1) for p in ("self_attn.q_proj", "mlp.up_proj")]
        matrices = {name: {"nbytes": n, "dense_nbytes": 1600} for name, n in zip(names, nbytes, strict=True)}
        return {"method": "sparse", "config": {"method": "sparse"}, "matrices": matrices}

    equal, parted = variant(800, 801, 800, 799), variant(400, 1200, 800, 800)
    del parted["matrices"]["model.layers.1.mlp.up_proj"]
    texts = {}
    for name, variants in (("none", {"same": equal}), ("one", {"same": equal, "parted": parted})):
        plot_allocation({"variants": variants}, [tmp_path / f"{name}.svg"])
        texts[name] = texts_in(tmp_path / f"{name}.svg")
    assert texts["none"] == {"Every variant of this run left all its matrices the same share of their bytes"}
    assert {"parted", "self_attn.q_proj", "mlp.up_proj", "bits a weight in the file"} <= texts["one"]
    assert "same" not in texts["one"]
    projections, layers, bits = _bits_by_place(parted["matrices"])
    assert (projections, layers) == (["self_attn.q_proj", "mlp.up_proj"], [0, 1])
    np.testing.assert_allclose(bits, [[4, 8], [12, np.nan]])


def test_equal_numbers_give_equal_files(finished, tmp_path):
    rules = ["fetch_model", "learn_dictionary"]
    summarize(RUN, finished, dense_model=finished / "dense-model", rules=rules, output=tmp_path / "again")
    for path in finished.glob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    for path in (finished / "plots").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "plots" / path.name).read_bytes()


def test_run_without_iterations_perplexity_and_samples(results, dense_model):
    for variant in WORD_PERPLEXITY:
        write_scores(results, variant)
    run = {"variants": {"svd_llm-20": RUN["variants"]["svd_llm-20"]}}
    summary = summarize(run, results, dense_model=dense_model)
    assert summary["variants"]["svd_llm-20"]["recovery"] is None
    assert rows(results / "summary.tsv")["svd_llm-20"]["word_perplexity"] == ""
    assert "word ppl" not in closing_message(SimpleNamespace(results=results))
    assert "None were asked for" in (results / "samples.html").read_text()
    assert (results / "plots" / "pareto.png").exists()


@pytest.mark.parametrize("missing", ["factors/layer_01.json", "codes/layer_00.json", "eval.json"])
def test_missing_file_is_named(missing, results, dense_model):
    (results / "svd_llm-20" / missing).unlink()
    with pytest.raises(
        ArtifactError, match=f"svd_llm-20/{missing}: the file does not exist.*run again: what is missing"
    ):
        summarize(RUN, results, dense_model=dense_model)
    assert not (results / "summary.tsv").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "not valid JSON.*Delete it"),
        ("[1]", "holds a list"),
        ('{"matrices": {}}', "says nothing of its format_version"),
        ('{"format_version": 1}', "has no object matrices.*Delete it"),
        ('{"format_version": 1, "matrices": {"a": 2}}', "has no object matrices"),
    ],
)
@pytest.mark.parametrize("file", ["factors/layer_01.json", "codes/layer_00.json"])
def test_what_is_no_report_of_a_unit_is_named(file, content, problem, results, dense_model):
    before = learned(results / "svd_llm-20" / file.partition("/")[0])
    (results / "svd_llm-20" / file).write_text(content)
    with pytest.raises(ArtifactError, match=f"svd_llm-20/{file}: {problem}"):
        collect(RUN, results, dense_model=dense_model)
    after = learned(results / "svd_llm-20" / file.partition("/")[0])
    assert after.layers == before.layers - 1  # status goes on without it


def test_missing_variant_and_missing_unit(results, dense_model):
    run = {"variants": {**RUN["variants"], "late": {"method": "cospadi"}}}
    with pytest.raises(ArtifactError, match="late/codes: holds no unit of variant late"):
        collect(run, results, dense_model=dense_model)
    units = {"cospadi-20": ["layer_00", "layer_01", "layer_02"]}
    with pytest.raises(ArtifactError, match=r"cospadi-20/factors/layer_02\.json: the file does not exist"):
        collect(RUN, results, dense_model=dense_model, units=units)


def test_missing_weights(results, dense_model):
    for path in (results / "cospadi-20" / "model").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ArtifactError, match="cospadi-20/model: holds no safetensors file"):
        collect(RUN, results, dense_model=dense_model)


def test_scores_of_another_model_are_refused_by_name(results, dense_model):
    shutil.copy(results / "cospadi-20/eval.json", results / "svd_llm-20/eval.json")
    with pytest.raises(ArtifactError, match=r"svd_llm-20/eval\.json: is of fingerprint .*; expected is fingerprint"):
        collect(RUN, results, dense_model=dense_model)
    write(results / "svd_llm-20/eval.json", {"seconds": {"total": 1.0}})
    with pytest.raises(ArtifactError, match=r"svd_llm-20/eval\.json: says nothing of its format_version; .* evaluate"):
        collect(RUN, results, dense_model=dense_model)


def test_unit_of_another_grouping_is_not_counted_twice(results, dense_model):
    for stage in ("factors", "codes"):
        folder = results / "cospadi-20" / stage
        (folder / "layers_00-01.json").write_bytes((folder / "layer_00.json").read_bytes())
    with pytest.raises(ArtifactError, match=r"layers_00-01\.json: holds .*q_proj, which layer_00\.json holds too"):
        collect(RUN, results, dense_model=dense_model)
    units = {variant: ["layer_00", "layer_01"] for variant in RUN["variants"]}
    summary = collect(RUN, results, dense_model=dense_model, units=units)
    assert summary["variants"]["cospadi-20"]["target_bytes"] == 640


def test_factors_and_codes_that_do_not_fit(results, dense_model):
    path = results / "cospadi-20" / "codes" / "layer_01.json"
    codes = json.loads(path.read_text())
    del codes["matrices"]["model.layers.1.mlp.down_proj"]
    write(path, codes)
    with pytest.raises(ArtifactError, match=r"codes/layer_01\.json: does not describe .*mlp\.down_proj"):
        collect(RUN, results, dense_model=dense_model)


def test_names_beside_points_that_nearly_coincide_do_not_overlap(monkeypatch):
    from cospadi.report import plots

    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, paths: drawn.append(figure))
    measured = {"a_first_variant-20": (80, 100), "another_variant-20": (80, 101), "a_third-20": (81, 100)}
    variants = {
        name: {"target_bytes": nbytes * 1e6, "word_perplexity": ppl, "config": {"method": name, "ratio": 0.2}}
        for name, (nbytes, ppl) in measured.items()
    }
    dense = {"target_bytes": 100e6, "word_perplexity": 30.0}
    plots.plot_pareto({"variants": {"dense": dense, **variants}}, [])
    (figure,) = drawn
    figure.draw_without_rendering()
    named = [text for text in figure.axes[0].texts if text.get_text().startswith(tuple(measured))]
    boxes = [text.get_window_extent() for text in named]
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def measured(name, nbytes, perplexity, *, bits=16, accuracy=None):
    method = name.split("-")[0]
    codes = {"value_bits": bits, "dictionary_bits": 16}
    scores = {"token_perplexity": perplexity, "word_perplexity": perplexity and 2 * perplexity}
    return {
        **scores,
        "recovery": None,
        "kl": perplexity and perplexity / 8,
        "method": method,
        "target_bytes": nbytes,
        "model_bytes": nbytes + 400,
        "ratio_true": 1 - nbytes / 1000,
        "mean_accuracy": accuracy,
        "mean_relative_error": 0.1,
        "seconds_learning": 1.0,
        "config": {"method": method, "ratio": 1 - nbytes / 1000, "codes": codes},
    }


@pytest.fixture
def rivals(monkeypatch):
    """Two methods at two sizes, one of few bits, one that nobody compares with."""
    names = dict.fromkeys(("a", "b", "c", "dense"), SimpleNamespace(own_codec=False))
    monkeypatch.setattr("cospadi.report.frontier.METHODS", names)
    variants = [
        ("dense", 1000, 10.0),
        ("a-20", 800, 12.0),
        ("b-20", 795, 11.0),
        ("a-40", 600, 15.0),
        ("b-40", 601, 16.0),
    ]
    found = {name: measured(name, nbytes, perplexity) for name, nbytes, perplexity in variants}
    found["dense"] |= {"method": "none", "config": {}}
    few = {"c-20": measured("c-20", 800, 10.5, bits=8), "c-70": measured("c-70", 300, 14.0, bits=4)}
    return {"variants": {**found, **few}}


def test_frontier_has_bits_a_weight_and_a_class_for_every_variant(rivals, tmp_path):
    write_frontier(rivals, tmp_path / "frontier.tsv")
    with open(tmp_path / "frontier.tsv") as file:
        table = list(csv.DictReader(file, delimiter="\t"))
    assert [row["variant"] for row in table] == ["dense", "a-20", "b-20", "b-40", "a-40", "c-20", "c-70"]
    assert [row["class"] for row in table] == ["16-bit"] * 5 + ["any-bits"] * 2
    assert [float(row["bits"]) for row in table[:2]] == [16.0, 12.8]  # 500 weights of 16 bits
    assert table[0]["method"] == "dense" and table[0]["accuracy"] == ""
    assert (table[2]["ratio"], table[2]["bytes"]) == ("0.205", "795")
    assert (table[2]["perplexity"], table[2]["kl"]) == ("11", "1.375")


def test_best_for_each_size_compares_what_is_as_large_and_of_one_class(rivals):
    found = {(row["class"], row["best"]): row for row in sizes(rivals)}
    assert found.keys() == {("16-bit", "b-20"), ("16-bit", "a-40")}  # few bits are not the rivals of 16
    assert found["16-bit", "b-20"]["next"] == "a-20" and found["16-bit", "b-20"]["over_dense"] == 1.1
    assert found["16-bit", "a-40"]["next_perplexity"] == 16.0


def test_with_embeddings_in_few_bits_sizes_are_of_the_whole_file_and_of_any_bits(rivals):
    for name, nbytes in (("b-20", 700), ("c-20", 701)):  # more for the matrices, less for the embedding
        rivals["variants"][name]["config"]["embedding_bits"] = 4
        rivals["variants"][name]["model_bytes"] = nbytes
    table = {row["variant"]: row for row in frontier_rows(rivals)}
    assert (table["b-20"]["class"], table["b-20"]["model_bytes"], table["b-20"]["bytes"]) == ("any-bits", 700, 795)
    found = {(row["class"], row["best"], row["next"]) for row in sizes(rivals)}
    assert found == {("any-bits", "c-20", "b-20"), ("16-bit", "a-40", "b-40")}


def test_front_is_what_nothing_smaller_is_as_good_as():
    points = {"large": (9, 5.0), "dominated": (8, 7.0), "middle": (7, 6.0), "small": (2, 8.0), "twin": (2, 9.0)}
    assert front(points) == ["small", "middle", "large"]
    assert front({name: (x, -y) for name, (x, y) in points.items()}, least=False) == ["small", "middle", "large"]
    assert front({}) == []
    assert front({"better": (100.5, 5.0), "a few bytes less": (100.0, 6.0)}) == ["better"]


def test_accuracy_is_drawn_with_its_front(rivals, tmp_path):
    from cospadi.report import plots

    for name, accuracy in [("dense", 0.6), ("a-20", 0.5), ("b-20", 0.55), ("a-40", 0.4), ("b-40", 0.45)]:
        rivals["variants"][name]["mean_accuracy"] = accuracy
    plots.plot_accuracy(rivals, [tmp_path / "accuracy.svg"])
    texts = texts_in(tmp_path / "accuracy.svg")
    assert {"dense  0.6", "b-20  0.55", "a-40  0.4"} <= texts and not any("c-20" in text for text in texts)


def test_many_variants_are_named_in_a_legend_of_groups(tmp_path):
    from cospadi.report import plots

    names = [f"{method}-{ratio}" for method in ("a", "b_long") for ratio in range(10, 90, 10)]
    variants = {name: measured(name, 1000 - 10 * int(name.split("-")[1]), 12.0 + len(name)) for name in names}
    plots.plot_pareto({"variants": {"dense": measured("dense", 1000, 10.0), **variants}}, [tmp_path / "pareto.svg"])
    texts = texts_in(tmp_path / "pareto.svg")
    assert {"a", "b_long"} <= texts and not any(text.startswith("a-") for text in texts)


def test_many_variants_have_styles_of_their_own():
    from cospadi.report.plots import _styles

    variants = {
        f"{method}-{ratio}": {"config": {"method": method, "ratio": ratio}}
        for method in ("cospadi", "svd_llm", "wanda")
        for ratio in (0.2, 0.3, 0.4, 0.5)
    }
    styles = _styles(variants)
    assert list(styles) == list(variants)
    assert len(set(styles.values())) == 12
    assert len({styles[f"cospadi-{ratio}"].color for ratio in (0.2, 0.3, 0.4, 0.5)}) == 1
    alone = _styles({name: variant for name, variant in variants.items() if name.startswith("wanda")})
    assert len({style.color for style in alone.values()}) == 4


def test_groups_of_one_colour_have_other_markers_and_lines():
    from cospadi.report.plots import LABELLED, _styles

    groups = [{"config": {"method": "sparse", "max_iter": number}} for number in range(LABELLED + 1)]
    styles = _styles({str(number): variant for number, variant in enumerate(groups)}).values()
    for marked in ("marker", "linestyle"):
        assert len({(style.color, getattr(style, marked)) for style in styles}) == len(groups)


def test_import_is_light():
    code = "import sys, cospadi.report; print(*{'torch', 'transformers', 'matplotlib', 'lm_eval'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []


def test_variants_that_lose_blocks(results, dense_model):
    run = {
        "variants": {
            "svd_llm-20": RUN["variants"]["svd_llm-20"],
            "uidl-2": {"method": "uidl", "blocks": 2},
            "both": {"steps": [{"method": "uidl", "blocks": 2}, {"method": "cospadi", "ratio": 0.2}]},
        }
    }
    # four layers of 400 bytes, of which the first two went; 80 parameters are in no matrix of a block
    counts = {
        "dense": {"parameters": 880, "target_parameters": 800},
        "pruned": {"parameters": 480, "target_parameters": 400},
    }
    pruning = {**counts, "removed": [5, 0, 1, 3, 4], "seconds": 7.0, "fits": []}
    write(results / "uidl-2/pruning/pruned.json", pruning)
    (results / "cospadi-20").rename(results / "both")
    make_model(results / "uidl-2" / "model", shards=1)
    for name in ("uidl-2", "both"):
        write_scores(results, name, perplexity={"word": 120.0, "token": 60.0, "bits_per_byte": 1.0, "tokens": 500})
    path = results / "uidl-2/pruning/pruned.json"
    summary = summarize(run, results, dense_model=dense_model, pruned={"uidl-2": path, "both": str(path)})
    table = rows(results / "summary.tsv")
    assert table["dense"]["target_bytes"] == "1600"  # of all layers, not only of those that are left
    assert table["uidl-2"]["target_bytes"] == "800" and table["uidl-2"]["ratio_true"] == "0.5"
    assert table["uidl-2"]["ratio_asked"] == table["uidl-2"]["mean_relative_error"] == ""
    assert table["uidl-2"]["removed_blocks"] == "0-1 3-5"
    assert table["uidl-2"]["parameters_removed"] == "0.454545"  # 400 / 880
    assert table["both"]["method"] == "uidl + cospadi"
    assert table["both"]["target_bytes"] == "640" and table["both"]["ratio_true"] == "0.6"  # 1 - 640 / 1600
    assert table["both"]["ratio_asked"] == "0.6"  # 1 - 0.5 * 0.8
    assert table["both"]["seconds_learning"] == "12"
    assert (results / "plots/pareto.svg").read_text().count("uidl-2") >= 1
    # and nothing but those
    summary = summarize(
        {"variants": {"uidl-2": run["variants"]["uidl-2"]}}, results, dense_model=dense_model, pruned={"uidl-2": path}
    )
    assert "No variant of this run factorizes" in (results / "plots/errors.svg").read_text()
    assert summary["variants"]["dense"]["target_bytes"] == 1600


def test_a_variant_that_leaves_matrices_as_they_are_has_two_ratios(tmp_path):
    results = make_run(tmp_path)
    for path in (results / "cospadi-20" / "codes").glob("*.json"):
        stored = json.loads(path.read_text())
        path.write_text(json.dumps({**stored, "dense_nbytes_all": stored["dense_nbytes_all"] + 600}))
    variants = collect(RUN, results, dense_model=results / "dense-model")["variants"]
    assert variants["cospadi-20"]["ratio_true"] == pytest.approx(1 - 640 / 800)
    assert variants["cospadi-20"]["ratio_of_all"] == pytest.approx((800 - 640) / (800 + 1200))
    assert variants["svd_llm-20"]["ratio_of_all"] is variants["dense"]["ratio_of_all"] is None


def test_plot_of_distances(tmp_path):
    from cospadi.report.plots import plot_distances

    rows = [[0.1 * (start + length) for length in range(1, 6 - start)] for start in range(5)]
    metrics = ("angular", "angular_last", "cosine", "cosine_worst", "l2")
    distances = {"n_layers": 5, "metrics": dict.fromkeys(metrics, rows)}
    plot_distances(distances, [tmp_path / "a.svg", tmp_path / "a.png"])
    plot_distances(distances, [tmp_path / "b.svg"])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "blocks in the cut" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "a.png").stat().st_size > 10_000
