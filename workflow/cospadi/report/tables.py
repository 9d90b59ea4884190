"""The summary as text: TSV, a web page, the console; and the generated texts side by side."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from tabulate import tabulate

from cospadi.files import replacing
from cospadi.report.frontier import sizes


class Column(NamedTuple):
    """Column of the summary: key in the summary and TSV, heading for people, how a number is printed, what it is, and
    whether the console has room for it."""

    key: str
    heading: str
    print: Callable[[Any], str]
    meaning: str
    on_console: bool = True


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f}"


COLUMNS = (
    Column("method", "method", str, "how the weights were compressed"),
    Column("ratio_asked", "ratio asked", "{:.2f}".format, "share of the target matrices' bytes to remove"),
    Column("target_bytes", "target MB", _megabytes, "bytes in the file of the compressed matrices, masks counted"),
    Column("ratio_true", "ratio true", "{:.4f}".format, "share of those bytes that is gone, counted in the file"),
    Column(
        "ratio_of_all",
        "of all matrices",
        "{:.4f}".format,
        "the same bytes as a share of all matrices, where a variant leaves some as they are",
    ),
    Column("removed_blocks", "blocks removed", str, "blocks that went, numbered from 0"),
    Column("parameters_removed", "params removed", "{:.4f}".format, "share of the model's parameters in those blocks"),
    Column(
        "target_parameters_removed",
        "of targets",
        "{:.4f}".format,
        "share of the target matrices' parameters in those blocks",
    ),
    Column("model_bytes", "model MB", _megabytes, "all safetensors files of the model"),
    Column("word_perplexity", "word ppl", "{:.2f}".format, "perplexity a word on held-out text; lower is better"),
    Column("token_perplexity", "token ppl", "{:.2f}".format, "perplexity a token of the model's tokenizer"),
    Column(
        "kl",
        "KL",
        "{:.4f}".format,
        "nats a token between the dense model's predictions and this one's, on the same text; lower is better",
    ),
    Column("recovery", "recovery", "{:.3f}".format, "word perplexity of the dense model over that of this one"),
    Column("mean_accuracy", "mean acc", "{:.4f}".format, "mean over the tasks, normalized accuracy where there is one"),
    Column(
        "mean_relative_error",
        "rel. error",
        "{:.4f}".format,
        "mean over the matrices of ||X(W - DS)|| / ||XW||, in the variant's metric",
    ),
    Column("worst_matrices", "worst matrices", str, "layer and projection of the largest of these errors", False),
    Column(
        "predicted_rise",
        "predicted rise",
        "{:.3f}".format,
        "nats a token that the loss rises by the errors of all matrices, with metric gradients",
    ),
    Column(
        "compensation_gain",
        "made up for",
        "{:.3f}".format,
        "share of the divergence from the dense model, on windows kept out, that training the layers behind took away; "
        "mean over trainings",
    ),
    Column("seconds_compensating", "training s", "{:.0f}".format, "seconds of that, part of those of learning"),
    Column(
        "refinement_gain",
        "refined by",
        "{:.3f}".format,
        "share of a block's squared error, on windows kept out, that training took away; mean over blocks",
    ),
    Column("seconds_refining", "refining s", "{:.0f}".format, "seconds of that, which are part of those of learning"),
    Column(
        "distillation_gain",
        "distilled by",
        "{:.3f}".format,
        "share of the divergence from the dense model, on windows kept out, that training end to end took away",
    ),
    Column("seconds_distilling", "distilling s", "{:.0f}".format, "seconds of that, part of those of learning too"),
    Column("seconds_learning", "learning s", "{:.0f}".format, "seconds of all learning jobs, added up"),
    Column("seconds_evaluating", "eval s", "{:.0f}".format, "seconds of the evaluation job"),
)


def write_table(summary: Mapping[str, Any], path: Path) -> None:
    """``summary.tsv``: one row a variant, numbers with six digits, empty where nothing was measured."""
    variants = summary["variants"]
    tasks = _task_names(summary)
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["variant", *(column.key for column in COLUMNS), *tasks])
        for name, variant in variants.items():
            values = [variant[column.key] for column in COLUMNS] + [variant["tasks"].get(task) for task in tasks]
            writer.writerow([name, *(f"{value:.6g}" if isinstance(value, float) else value for value in values)])


def console_text(summary: Mapping[str, Any], dtype: str, reason: str) -> str:
    """The table, the folder of every model, and the line that loads one in `dtype`, the best here for a `reason`."""
    headings, rows = _cells(summary, [column for column in _columns(summary) if column.on_console])
    folders = [[name, variant["model"]] for name, variant in summary["variants"].items()]
    example = folders[min(1, len(folders) - 1)][1]
    dtypes = {name: variant["evaluation"]["dtype"] for name, variant in summary["variants"].items()}
    mixed = ", ".join(f"{name} in {found}" for name, found in dtypes.items()) if len(set(dtypes.values())) > 1 else ""
    return "\n".join(
        [
            "",
            tabulate(
                rows, headings, disable_numparse=True, colalign=["left", "left"] + ["right"] * (len(headings) - 2)
            ),
            "",
            tabulate(folders, tablefmt="plain"),
            "",
            *([f"Not evaluated in one dtype: {mixed}. Set evaluation.dtype to compare closely", ""] if mixed else []),
            f"Load a model, in the dtype that this machine computes fastest in ({reason}), with",
            f'  AutoModelForCausalLM.from_pretrained("{example}", trust_remote_code=True, dtype="{dtype}")',
        ]
    )


def write_page(summary: Mapping[str, Any], path: Path) -> None:
    """``summary.html``: the table on a page of its own, with the meaning of each column."""
    headings, rows = _cells(summary, _columns(summary))
    meanings = [(column.heading, column.meaning) for column in _columns(summary)]
    write_numbers(headings, rows, meanings, path, sizes=_size_cells(summary))


def write_numbers(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    meanings: Sequence[tuple[str, str]],
    path: Path,
    *,
    sizes: Sequence[Sequence[str]] = (),
) -> None:
    """A table on a web page of its own, with the meaning of its columns under it; `sizes` is a second one."""
    _render(_SUMMARY_PAGE, path, headings=headings, rows=rows, meanings=meanings, sizes=sizes)


def write_samples(summary: Mapping[str, Any], path: Path) -> None:
    """Generated texts by prompt, one row a variant; a web page or, if `path` ends in ``.md``, Markdown."""
    prompts: dict[str, list[tuple[str, str]]] = {}
    for name, variant in summary["variants"].items():
        for sample in variant["samples"]:
            prompts.setdefault(sample["prompt"], []).append((name, sample["text"]))
    _render(_SAMPLES_MARKDOWN if path.suffix == ".md" else _SAMPLES_PAGE, path, prompts=prompts)


def _columns(summary: Mapping[str, Any]) -> list[Column]:
    """The columns in which any variant has a value."""
    return [c for c in COLUMNS if any(variant[c.key] is not None for variant in summary["variants"].values())]


def _task_names(summary: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(task for variant in summary["variants"].values() for task in variant["tasks"]))


def _cells(summary: Mapping[str, Any], columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    tasks = _task_names(summary)
    rows = []
    for name, variant in summary["variants"].items():
        row = [name]
        row += ["" if variant[c.key] is None else c.print(variant[c.key]) for c in columns]
        row += [f"{variant['tasks'][task]:.4f}" if task in variant["tasks"] else "" for task in tasks]
        rows.append(row)
    return ["variant", *(column.heading for column in columns), *tasks], rows


def _size_cells(summary: Mapping[str, Any]) -> list[list[str]]:
    found = sizes(summary)
    headings = ["class", "best", "ratio true", "token ppl", "over dense", "next", "its ppl"]
    rows = [
        [
            *(row["class"], row["best"], f"{row['ratio']:.3f}", f"{row['perplexity']:.2f}"),
            "" if row["over_dense"] is None else f"{row['over_dense']:.3f}",
            *(row["next"], f"{row['next_perplexity']:.2f}"),
        ]
        for row in found
    ]
    return [headings, *rows] if rows else []


def _render(template: str, path: Path, **values: Any) -> None:
    environment = jinja2.Environment(autoescape=path.suffix == ".html", trim_blocks=True, lstrip_blocks=True)
    with replacing(path) as temporary:
        temporary.write_text(environment.from_string(template).render(**values), encoding="utf-8")


_STYLE = """
<style>
 body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 80em; margin: 2em auto; padding: 0 1em; }
 table { border-collapse: collapse; }
 th, td { padding: .35em .8em; border-bottom: 1px solid #ddd; vertical-align: top; text-align: left; }
 th { border-bottom: 2px solid #888; }
 table.numbers td:nth-child(n+3), table.numbers th:nth-child(n+3) { text-align: right; }
 table.numbers td { font-variant-numeric: tabular-nums; white-space: nowrap; }
 td.text { white-space: pre-wrap; }
 td:first-child { white-space: nowrap; }
 dt { font-weight: 600; float: left; clear: left; width: 8em; } dd { margin-left: 9em; }
</style>
"""

_SUMMARY_PAGE = (
    """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Summary</title>"""
    + _STYLE
    + """<h1>Summary</h1>
<div style="overflow-x: auto">
<table class="numbers">
<thead><tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if sizes %}
<h2>Best for each size</h2>
<table class="numbers">
<thead><tr>{% for heading in sizes[0] %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in sizes[1:] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
{% endif %}
<h2>Columns</h2>
<dl>
{% for heading, meaning in meanings %}
<dt>{{ heading }}</dt><dd>{{ meaning }}</dd>
{% endfor %}
</dl>
</html>
"""
)

_SAMPLES_PAGE = (
    """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Generated texts</title>"""
    + _STYLE
    + """<h1>Generated texts</h1>
<p>Greedy decoding: the most probable token at every step.</p>
{% for prompt, texts in prompts.items() %}
<h2>{{ prompt }}</h2>
<table>
<thead><tr><th>variant</th><th>text</th></tr></thead>
<tbody>
{% for variant, text in texts %}
<tr><td>{{ variant }}</td><td class="text">{{ text }}</td></tr>
{% endfor %}
</tbody>
</table>
{% else %}
<p>None were asked for.</p>
{% endfor %}
</html>
"""
)

_SAMPLES_MARKDOWN = """# Generated texts

Greedy decoding: the most probable token at every step.
{% for prompt, texts in prompts.items() %}

## {{ prompt | replace("\n", " ") }}
{% for variant, text in texts %}

**{{ variant }}**

{{ text | indent(4, first=True) }}
{% endfor %}
{% else %}

None were asked for.
{% endfor %}
"""
