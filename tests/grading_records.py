"""Records made by hand for the tests of what is made from records."""

from html.parser import HTMLParser

from labkit.exercises.exercise import all_exercises
from labkit.exercises.judging import CORRECT, NOT_ATTEMPTED, WRONG, Verdict
from labkit.grading.results import Graded, Late, Override, Performance, Question

HOSTILE = [
    "<script>alert(1)</script>", "'\"><img src=x onerror=alert(1)>", '=HYPERLINK("http://evil")', "+1+1", "-2+3", "@SUM(A1)", "\t=1+1", "\r=1+1",
    "＝1+1", "\x1b[31mred\x1b[0m\x07", "a\u202etxt.exe", "a txt.exe", "\u2066x\u2069", "N" * 100_000, "N" * 100_001, "../../etc/passwd", "{{ 7*7 }}",
    "]]><!--", "Points Possible", "\ud800", "a,b;c\n\"d\"", "李小龙", "محمد", "'=1", "",
]  # fmt: skip
NOTEBOOKS = {"lora-count": "04_lora_parameter_counting", "lora-merge": "04_lora_parameter_counting", "qlora-bits": "05_qlora"}


def graded(student="ann", lora=CORRECT, answer="Because of the rank.", earned=None, late=Late(), overrides=(), **other):
    """A record of three exercises, one of which is right, one as `lora` says, one not attempted; one question; one adapter."""
    known = all_exercises()
    misconception = next(iter(known["lora-count"].misconceptions))
    said = {CORRECT: "All 5 cases agree.", WRONG: misconception.format(rank=8), NOT_ATTEMPTED: "`lora_count` still raises NotImplementedError."}
    verdicts = (
        Verdict("lora-count", lora, said[lora], 5 if lora == CORRECT else 2, 5, 3, misconception if lora == WRONG else None),
        Verdict("lora-merge", CORRECT, "All 4 cases agree.", 4, 4, 3), Verdict("qlora-bits", NOT_ATTEMPTED, "Not attempted.", 0, 4, 2),
    )  # fmt: skip
    adapter = Performance("beside", 5, 3.25, "It learned.", (0.62, 0.52, 0.71), (0.8, 0.73, 0.87), 100)
    values = {
        "assignment": "lora", "release": "r1", "isolation": "full", "submitted": "2026-05-01T17:00:00+02:00", "files": (f"{student}/04.ipynb",),
        "digest": "abc", "verdicts": verdicts, "notebooks": NOTEBOOKS, "performance": adapter, "late": late, "overrides": overrides,
        "questions": (Question("lora-question", "04_lora_parameter_counting", 4, answer, earned, ""),),
    }  # fmt: skip
    return Graded(student, **values | other)


def hostile_records():
    """One record for every hostile text: as the name, the answer, a comment, a problem, a sentence, a file, a reason and a message."""
    records = []
    for text in HOSTILE:
        record = graded(
            text, late=Late(90, 0.1), problems=(text,), files=(text,), set_aside=(text,), overrides=(Override("qlora-bits", 1, text or "x", text),),
            questions=(Question("lora-question", "04_lora_parameter_counting", 4, text, 2.5, text),),
            performance=Performance("beside", 5, 0, text),
            verdicts=(Verdict("lora-count", WRONG, text, 0, 5, 3, text), Verdict("qlora-bits", WRONG, text, 0, 4, 2)),
        )  # fmt: skip
        records.append(record)
    return sorted(records, key=lambda record: record.student)


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text outside <style>.   Raises AssertionError for a page with unbalanced tags."""

    VOID = {"meta", "img", "br"}

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, self.open
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.texts.append("" if tag in ("bdi", "strong", "em", "span") else " ")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def assert_harmless(html):
    """No script, no handler, no address of another place, no form, a policy that forbids them, and no character that acts on a terminal."""
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "strong", "em", "bdi", "br", "span", "div", "article",
        "table", "thead", "tbody", "tr", "th", "td", "ul", "ol", "li", "dl", "dt", "dd", "figure", "figcaption", "img", "a",
    }  # fmt: skip
    attributes = {name: value for _, found in page.tags for name, value in found.items()}
    assert set(attributes) <= {"lang", "charset", "http-equiv", "content", "name", "class", "scope", "dir", "src", "alt", "href"}
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in page.named("img"))
    assert all(link["href"] == "time.html" for link in page.named("a"))
    policies = [meta["content"] for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policies[0]
    assert page.named("html") == [{"lang": "en"}]
    assert all(c.isprintable() or c == "\n" for c in html)
    return page
