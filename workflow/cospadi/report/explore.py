"""A page to explore a run: plots by Vega-Lite with numbers under the pointer, generated texts side by side; one file
that needs no network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from cospadi.files import replacing
from cospadi.report.figures import COLOURS
from cospadi.report.frontier import Bytes, bytes_of
from cospadi.report.summary import place_of

# Snakemake carries these for its own reports
_SCRIPTS = ("vega/vega.js", "vega-lite/vega-lite.js", "vega-embed/vega-embed.js")

_PAGE = jinja2.Environment(autoescape=True).from_string("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>What came out of the run</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em; color: #222 }
table { border-collapse: collapse }
th, td { border: 1px solid #ddd; padding: .4em .7em; vertical-align: top; text-align: left; max-width: 24em }
</style>
{% for script in scripts %}<script>{{ script | safe }}</script>
{% endfor %}</head>
<body>
<h1>What came out of the run</h1>
<p>Point at a mark for its numbers. Click a method in the legend to see it alone. Below the plots you choose whose
matrices are shown.</p>
<div id="plots"></div>
{% if prompts %}<h2>Generated texts</h2>
<table>
<tr><th></th>{% for prompt in prompts %}<th>{{ prompt }}</th>{% endfor %}</tr>
{% for name, texts in rows %}<tr><th>{{ name }}</th>{% for text in texts %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endif %}<script>vegaEmbed("#plots", {{ spec | safe }}, {actions: false});</script>
</body>
</html>
""")


def write_explorer(summary: Mapping[str, Any], path: Path) -> None:
    """Write the page of a run's summary (``summary.json``)."""
    from snakemake.assets import Assets

    variants = summary["variants"]
    prompts = list(dict.fromkeys(sample["prompt"] for v in variants.values() for sample in v["samples"]))
    texts = {
        name: {sample["prompt"]: sample["text"] for sample in variant["samples"]} for name, variant in variants.items()
    }
    page = _PAGE.render(
        # a script of a page ends at the first </script, also inside a text
        scripts=[Assets.get_content(name).replace("</script", r"<\/script") for name in _SCRIPTS],
        spec=json.dumps(specification(summary)).replace("<", r"\u003c"),
        prompts=prompts,
        rows=[(name, [found.get(prompt, "") for prompt in prompts]) for name, found in texts.items()],
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def specification(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The plots in Vega-Lite 5: sizes against quality, what learning cost, error and bits of every matrix."""
    variants, counted = summary["variants"], bytes_of(summary)
    models = [
        {
            "variant": name,
            "method": variant["method"] if name != "dense" else "dense",
            "MB": variant[counted.key] / 1e6,
            "percent": 100 * (1 - (variant["ratio_true"] or 0)),
            **{key: variant[key] for key in ("word_perplexity", "token_perplexity", "kl", "mean_accuracy")},
            "error": variant["mean_relative_error"],
            "learning": variant["seconds_learning"],
            "evaluating": variant["seconds_evaluating"],
        }
        for name, variant in variants.items()
    ]
    matrices = [
        {
            "variant": name,
            "layer": layer,
            "projection": projection.rpartition(".")[2],
            "error": numbers["relative_error"],
            "bits": 16 * numbers["nbytes"] / numbers["dense_nbytes"],
            "kB": numbers["nbytes"] / 1e3,
        }
        for name, variant in variants.items()
        for matrix, numbers in variant["matrices"].items()
        for layer, projection in [place_of(matrix)]
    ]
    quality = {
        "word_perplexity": _sizes(counted, "word_perplexity", "word perplexity, lower is better", "log"),
        "mean_accuracy": _sizes(counted, "mean_accuracy", "mean accuracy of the tasks", "linear"),
    }
    apart = {"scale": {"color": "independent", "shape": "independent"}}
    parts = [{"hconcat": [plot for key, plot in quality.items() if _has(models, key)], "resolve": apart}, _cost()]
    whole: dict[str, Any] = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "datasets": {"models": models, "matrices": matrices},
        "config": {"range": {"category": list(COLOURS)}, "axis": {"grid": True, "gridColor": "#e4e4e4"}},
    }
    if matrices:
        names = list(dict.fromkeys(row["variant"] for row in matrices))
        choice = {"input": "select", "options": names, "name": "matrices of "}
        whole["params"] = [{"name": "chosen", "value": names[0], "bind": choice}]
        maps = [_map("error", "relative error", "inferno"), _map("bits", "bits a weight", "viridis")]
        parts.append({"hconcat": maps, "resolve": apart})
    parts = [part for part in parts if part.get("hconcat") != []]
    return {**whole, "vconcat": parts, "resolve": apart}


def _has(models: list[dict[str, Any]], key: str) -> bool:
    return any(model[key] is not None for model in models)


def _tooltips(**titles: str) -> list[dict[str, str]]:
    text = {"variant", "method", "projection"}
    return [
        {"field": field, "title": title, "type": "nominal"}
        if field in text
        else {"field": field, "title": title, "type": "quantitative", "format": ".4~g"}
        for field, title in titles.items()
    ]


def _sizes(counted: Bytes, key: str, title: str, scale: str) -> dict[str, Any]:
    return {
        "title": "Size against quality",
        "width": 420,
        "height": 320,
        "data": {"name": "models"},
        "transform": [{"filter": f"isValid(datum.{key})"}],
        "params": [{"name": f"named_{key}", "select": {"type": "point", "fields": ["method"]}, "bind": "legend"}],
        "mark": {"type": "point", "filled": True, "size": 130},
        "encoding": {
            "x": {
                "field": "MB",
                "type": "quantitative",
                "scale": {"zero": False, "padding": 20},
                "title": f"MB of {counted.what} in the file",
            },
            "y": {
                "field": key,
                "type": "quantitative",
                "scale": {"type": scale, "zero": False, "nice": False, "padding": 20},
                "title": title,
            },
            "color": {"field": "method", "type": "nominal"},
            "shape": {"field": "method", "type": "nominal"},
            "opacity": {"condition": {"param": f"named_{key}", "value": 1}, "value": 0.1},
            "tooltip": _tooltips(
                variant="variant",
                method="method",
                MB="MB",
                percent="percent of dense",
                word_perplexity="word perplexity",
                token_perplexity="token perplexity",
                kl="KL from dense, nats a token",
                mean_accuracy="mean accuracy",
                error="mean relative error",
            ),
        },
    }


def _cost() -> dict[str, Any]:
    return {
        "title": "What it cost",
        "width": 420,
        "data": {"name": "models"},
        "transform": [{"fold": ["learning", "evaluating"], "as": ["job", "seconds"]}],
        "mark": "bar",
        "encoding": {
            "y": {"field": "variant", "type": "nominal", "sort": None, "title": None},
            "x": {"field": "seconds", "type": "quantitative", "title": "seconds of all jobs, added up"},
            "color": {"field": "job", "type": "nominal"},
            "tooltip": [*_tooltips(variant="variant", seconds="seconds"), {"field": "job", "type": "nominal"}],
        },
    }


def _map(field: str, title: str, scheme: str) -> dict[str, Any]:
    return {
        "title": f"{title[0].upper()}{title[1:]}, matrix by matrix",
        "width": 420,
        "height": 180,
        "data": {"name": "matrices"},
        "transform": [{"filter": "datum.variant == chosen"}],
        "mark": "rect",
        "encoding": {
            "x": {"field": "layer", "type": "ordinal", "axis": {"labelOverlap": True, "grid": False}},
            "y": {"field": "projection", "type": "nominal", "sort": None, "title": None, "axis": {"grid": False}},
            "color": {
                "field": field,
                "type": "quantitative",
                "title": title,
                "scale": {"scheme": scheme, "zero": True},
            },
            "tooltip": _tooltips(
                layer="layer",
                projection="projection",
                error="relative error",
                bits="bits a weight",
                kB="kB in the file",
            ),
        },
    }
