"""Headings, tables and text of PDF, Word, HTML and Markdown reach the Markdown; what cannot be read is named."""

import io
import json
import zipfile

import pytest

from r1ray.data.config import DataConfig
from r1ray.data.parse.document import parse
from r1ray.data.parse.markdown import count_tables, headings, sections
from r1ray.data.prepare.config import PrepareConfig
from r1ray.data.prepare.pipeline import prepare
from r1ray.data.read import read_conversations
from r1ray.errors import NothingToTrain, UnknownFormat, WrongEncoding

HTML = """<!DOCTYPE html><html><head><title>Card fees</title><script>var x = 1;</script></head><body><nav>Home | Help</nav><main>
<h1>Card fees</h1><p>Fees are due <b>monthly</b>.</p><h2>Gold</h2>
<table><tr><th>Card</th><th>Fee</th></tr><tr><td>Gold</td><td>12</td></tr></table>
<ul><li>free for students</li></ul></main><footer>imprint</footer></body></html>"""


def pdf(pages, encrypt=False):
    """A PDF of text lines (x, y, size, text), written by hand."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for lines in pages:
        stream = "".join(f"BT /F1 {size} Tf {x} {y} Td ({text}) Tj ET\n" for x, y, size, text in lines)
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}endstream")
        number = len(objects)
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents {number} 0 R /Resources << /Font << /F1 3 0 R >> >> >>"
        )
        kids.append(f"{number + 1} 0 R")
    objects[1] = f"<< /Type /Pages /Count {len(kids)} /Kids [{' '.join(kids)}] >>"
    out = io.BytesIO(b"%PDF-1.4\n")
    out.seek(0, 2)
    places = []
    for number, body in enumerate(objects, start=1):
        places.append(out.tell())
        out.write(f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1"))
    start = out.tell()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer << /Size {len(objects) + 1} /Root 1 0 R >>\n".encode())
    out.write(f"startxref\n{start}\n%%EOF\n".encode())
    return out.getvalue()


PAGE = [
    (50, 800, 24, "Card handbook"),
    (50, 760, 16, "Fees"),
    (50, 730, 11, "A new card costs 15 and reaches the customer within ten work-"),
    (50, 716, 11, "ing days, wherever that may be in the country or abroad."),
    (50, 690, 11, "Card"), (250, 690, 11, "Fee"), (400, 690, 11, "Limit"),
    (50, 674, 11, "Gold"), (250, 674, 11, "12"), (400, 674, 11, "5000"),
    (50, 658, 11, "Student"), (250, 658, 11, "0"), (400, 658, 11, "800"),
    (50, 620, 16, "Loss"),
    (50, 590, 11, "Block the card in the app right away."),
]  # fmt: skip


def word(path, title="Card fees"):
    """The smallest Word file with styles and a table."""
    ns = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'

    def paragraph(text, style=None):
        marked = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
        return f"<w:p>{marked}<w:r><w:t>{text}</w:t></w:r></w:p>"

    rows = "".join("<w:tr>" + "".join(f"<w:tc>{paragraph(c)}</w:tc>" for c in row) + "</w:tr>" for row in (("Card", "Fee"), ("Gold", "12")))
    body = paragraph(title, "Heading1") + paragraph("年费每月收取。") + paragraph("Gold", "Heading2") + f"<w:tbl>{rows}</w:tbl>"
    styles = "".join(f'<w:style w:type="paragraph" w:styleId="Heading{n}"><w:name w:val="heading {n}"/></w:style>' for n in (1, 2))
    rels = "http://schemas.openxmlformats.org"
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", f"<w:document {ns}><w:body>{body}</w:body></w:document>")
        archive.writestr("word/styles.xml", f"<w:styles {ns}>{styles}</w:styles>")
        archive.writestr(
            "[Content_Types].xml",
            f'<Types xmlns="{rels}/package/2006/content-types"><Default Extension="rels" '
            f'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
            f'<Override PartName="/word/document.xml" ContentType="{kind}.document.main+xml"/>'
            f'<Override PartName="/word/styles.xml" ContentType="{kind}.styles+xml"/></Types>',
        )
        office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
        relations = f"{rels}/package/2006/relationships"
        archive.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{relations}"><Relationship Id="r1" Type="{office}/officeDocument" '
            f'Target="word/document.xml"/></Relationships>',
        )
        archive.writestr(
            "word/_rels/document.xml.rels",
            f'<Relationships xmlns="{relations}"><Relationship Id="r2" Type="{office}/styles" Target="styles.xml"/></Relationships>',
        )
    return path


def test_a_pdf_keeps_headings_tables_and_joined_paragraphs(tmp_path):
    (tmp_path / "x.pdf").write_bytes(pdf([PAGE]))
    document = parse(tmp_path / "x.pdf")
    assert headings(document.markdown) == [(1, "Card handbook"), (2, "Fees"), (2, "Loss")]
    assert "A new card costs 15 and reaches the customer within ten working days, wherever" in document.markdown
    assert "| Card | Fee | Limit |\n| --- | --- | --- |\n| Gold | 12 | 5000 |\n| Student | 0 | 800 |" in document.markdown
    assert (document.title, document.num_headings, document.num_tables) == ("Card handbook", 3, 1)


def test_running_heads_and_page_numbers_are_left_out(tmp_path):
    pages = [
        [(50, 820, 9, "Bank handbook 2026"), (50, 700, 11, f"Text of part {'abcdef'[n]}."), (290, 20, 9, str(n + 1))] for n in range(6)
    ]
    (tmp_path / "x.pdf").write_bytes(pdf(pages))
    assert "Bank handbook" not in parse(tmp_path / "x.pdf").markdown
    assert parse(tmp_path / "x.pdf").markdown.count("Text of part") == 6


def test_a_word_file_keeps_headings_and_tables(tmp_path):
    document = parse(word(tmp_path / "x.docx"))
    assert headings(document.markdown) == [(1, "Card fees"), (2, "Gold")]
    assert "年费每月收取。" in document.markdown
    assert "| Card | Fee |" in document.markdown and "| Gold | 12 |" in document.markdown
    assert document.num_tables == 1


def test_a_page_loses_its_navigation_and_keeps_its_content(tmp_path):
    (tmp_path / "x.html").write_text(HTML, encoding="utf-8")
    document = parse(tmp_path / "x.html")
    assert headings(document.markdown) == [(1, "Card fees"), (2, "Gold")]
    assert "| Gold | 12 |" in document.markdown and "- free for students" in document.markdown
    assert not any(word in document.markdown for word in ("Home", "imprint", "var x"))


def test_a_page_in_gbk_is_read_by_its_declaration(tmp_path):
    (tmp_path / "x.html").write_bytes('<html><head><meta charset="gbk"></head><body><h1>年费</h1></body></html>'.encode("gbk"))
    assert "# 年费" in parse(tmp_path / "x.html").markdown


def test_sections_know_their_headings_and_code_has_none():
    text = "intro\n\n# A\n\ntext\n\n## B\n\n```\n# no heading\n```\n\n# C\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert [names for names, _ in sections(text)] == [(), ("A",), ("A", "B"), ("C",)]
    assert count_tables(text) == 1


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("x.pdf", b"%PDF-1.4 broken", UnknownFormat, "no readable PDF"),
        ("x.pdf", pdf([[]]), NothingToTrain, "scan"),
        ("x.docx", b"PK\x03\x04 broken", UnknownFormat, "no readable Word file"),
        ("x.doc", b"\xd0\xcf\x11\xe0 old", UnknownFormat, "before 2007"),
        ("x.md", "年费".encode("gbk"), WrongEncoding, "is not UTF-8"),
        ("x.png", b"\x89PNG", UnknownFormat, "no PDF, Word"),
        ("x.txt", b"", NothingToTrain, "holds no text"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, data, error, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message):
        parse(tmp_path / name)


def test_documents_become_markdown_files_and_dialogues_and_mangled_ones_are_rejected(settings, tmp_path):
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.pdf").write_bytes(pdf([PAGE]))
    word(folder / "sub" / "b.docx")
    (folder / "c.md").write_text("# 年费\n\n(cid:12)(cid:7)(cid:9)(cid:3) \ufffd\ufffd\n", encoding="utf-8")
    (folder / "d.txt").write_bytes("费用".encode("gbk"))
    tree = {"documents": {"sources": [folder], "dialogues": True}, "out": tmp_path / "out/x.parquet", "progress_s": None}
    result = prepare(PrepareConfig.model_validate(tree), settings)
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out/documents").rglob("*.md")) == [
        "documents/a.pdf.md",
        "documents/sub/b.docx.md",
    ]
    assert {k: result.report["documents"][k] for k in ("parsed", "rejected", "tables")} == {"parsed": 2, "rejected": 2, "tables": 2}
    reasons = [json.loads(line)["reason"] for line in result.rejects.read_text(encoding="utf-8").splitlines()]
    assert any("mangled characters" in r for r in reasons) and any("iconv" in r for r in reasons)
    asked = {c.messages[0].content: c.messages[1].content for c in read_conversations(DataConfig(path=result.out)).conversations}
    assert asked["What does Card handbook say about Loss?"] == "Block the card in the app right away."


def test_documents_alone_need_no_data_set(settings, tmp_path):
    (tmp_path / "a.md").write_text("# A\n\ntext\n")
    tree = {"documents": {"sources": [tmp_path / "a.md"]}, "out": tmp_path / "out/x.parquet"}
    result = prepare(PrepareConfig.model_validate(tree), settings)
    assert result.out is None and (tmp_path / "out/documents/a.md").exists()


def test_documents_of_the_same_name_stay_apart_and_other_files_are_counted(settings, tmp_path, capsys):
    for name in ("cards", "loans"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fees.md").write_text(f"# Fees of {name}\n\nThey are due at the end of each month.\n", encoding="utf-8")
    (tmp_path / "loans" / "old.doc").write_bytes(b"\xd0\xcf\x11\xe0 old")
    (tmp_path / "loans" / "rates.xlsx").write_bytes(b"PK")
    (tmp_path / "loans" / "~$open.docx").write_bytes(b"lock")
    tree = {
        "documents": {"sources": [tmp_path / "cards", tmp_path / "loans"], "dialogues": True},
        "out": "own/x.parquet",
        "progress_s": None,
    }
    result = prepare(PrepareConfig.model_validate(tree), settings)
    assert result.out == settings.home / "own" / "x.parquet", "a relative path counts from the home"
    written = {p.relative_to(result.out.parent).as_posix(): p.read_text(encoding="utf-8") for p in result.out.parent.rglob("*.md")}
    assert written.keys() == {"documents/fees.md", "documents/loans/fees.md"}
    assert "# Fees of loans" in written["documents/loans/fees.md"]
    assert json.loads(result.rejects.read_text(encoding="utf-8").splitlines()[0])["reason"] == (
        f"{tmp_path}/loans/old.doc is a Word file of before 2007. Save it as .docx."
    )
    assert "left out 1 files that are no documents: 1 .xlsx" in capsys.readouterr().out
