"""Whose a file is and when it came, as learning platforms write it into folders, file names and lists. What the files hold is in submissions.py.

The forms, with an example of each:
Canvas      doejane_LATE_12345_67890_04_lora-1.ipynb     (instructure/canvas-lms, lib/content_zipper.rb; -1: handed in again)
Moodle      Jane Doe_123456_assignsubmission_file_/04_lora.ipynb, or the same with the file's name behind it and no folder
Brightspace 271836-442356 - Jane Doe - Dec 5, 2024 1149 AM - 04_lora.ipynb, or a folder of that name
Blackboard  LoRA_jdoe_attempt_2024-12-05-11-49-00_04_lora.ipynb
Gradescope  submission_metadata.yml beside a folder for each submission
nbgrader    submitted/STUDENT/ASSIGNMENT/timestamp.txt
A time without an offset is read in the offset of the deadline, in UTC where there is none.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone, tzinfo
from zoneinfo import ZoneInfo

from labkit.errors import UserError
from labkit.grading.archives import MIB, File

METADATA, TIMESTAMP, TIMES = "submission_metadata.yml", "timestamp.txt", "submitted.csv"
PLAIN = "name"
_LONGEST = 255  # of a name in every file system
_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
# Numbers without a zero in front, so that nobody's alice_04_05_lora.ipynb is taken for an export.
_FORMS = (
    ("Canvas", r"(?:LATE_)?anon_(?P<id>[^\W_]+)_(?P<order>[1-9]\d*)_.+", re.IGNORECASE),
    ("Canvas", r"(?P<name>.+?)(?P<late>_LATE)?_(?P<id>[1-9]\d*)_(?P<order>[1-9]\d*)_.+", re.IGNORECASE),
    ("Moodle", r"(?P<name>.+?)_(?P<id>\d+)_assignsubmission_[a-z]+_.*", 0),
    ("Brightspace", r"(?P<id>\d+)-\d+ ?- ?(?P<name>.+?) ?- ?(?:(?P<month>[A-Z][a-z]+)\.? (?P<day>\d\d?), (?P<year>\d{4}) "
                    r"(?P<hour>\d\d?)[:.-]?(?P<minute>\d\d) ?(?P<half>[AP]M)?|[^-]*\d{4}[^-]*)(?: ?- .+)?", 0),
    ("Blackboard", r".+_(?P<id>[^_]+)_attempt_(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)-(?P<hour>\d\d)-(?P<minute>\d\d)-(?P<second>\d\d)"
                   r"(?:[._].*)?", 0),
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """What an export says of a file.   kind: the platform, or PLAIN for a folder or a file that is simply called after somebody.

    name, id, email: the student's, "" where it does not say.   submitted: when, with its offset.   late: marked so, without a time.
    order: larger for what was handed in later, among files of the same time.
    """

    kind: str
    name: str
    id: str = ""
    email: str = ""
    submitted: datetime | None = None
    late: bool = False
    order: int = 0

    @property
    def identity(self) -> str:
        """What tells this student from all others of the same export."""
        return self.id or self.email or self.name

    @property
    def unmatched(self) -> str:
        """What results go by where no roster knows the student: names alone may belong to two."""
        return self.name if self.kind == PLAIN else self.identity if self.kind in ("Gradescope", "Blackboard") else f"{self.name or 'anon'}_{self.id}"


def claim_of(first: str, zone: tzinfo) -> Claim | None:
    """What the name of a folder or a file says where a platform made it, else None.   zone: of times without an offset."""
    for kind, form, flags in _FORMS if len(first) <= _LONGEST else ():
        match = re.fullmatch(form, first, flags | re.DOTALL)
        if match:
            found = {"name": "", "late": "", "order": 0} | match.groupdict()
            name, order = found["name"].strip(), int(found["order"])
            return Claim(kind, name, found["id"], submitted=_moment(found, zone), late=bool(found["late"]), order=order)
    return None


def _moment(found, zone):
    if not found.get("year"):
        return None
    month, hour = found["month"], int(found["hour"])
    if found.get("half"):
        hour = hour % 12 + (12 if found["half"] == "PM" else 0)
    try:
        month = int(month) if month.isdigit() else _MONTHS.index(month[:3].lower()) + 1
        return datetime(int(found["year"]), month, int(found["day"]), hour, int(found["minute"]), int(found.get("second") or 0), tzinfo=zone)
    except ValueError:
        return None


def gradescope_claims(file: File, zone: tzinfo) -> dict[str, list[Claim]]:
    """Folder -> a claim for each of its submitters, as Gradescope's list says.   Raises UserError for a list that cannot be read."""
    import yaml

    data = file.read(64 * MIB)
    try:
        table = yaml.load(data, Loader=_loader())
        return {str(folder): _submitters(entry, zone) for folder, entry in table.items()}
    except Exception as error:  # what a stranger's bytes make yaml raise is no closed list
        raise UserError(f"{file.name} cannot be read ({type(error).__name__}): students are called as their folders are.") from None


def _loader():
    """yaml's safe loader, for which Ruby's tags mean nothing and `<<` copies nothing."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        def flatten_mapping(self, node):
            pass

        def untagged(self, suffix, node):
            if isinstance(node, yaml.ScalarNode):
                return node.value
            return self.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else self.construct_mapping(node, deep=True)

    Loader.add_multi_constructor("!", Loader.untagged)
    return Loader


def _submitters(entry, zone):
    created = entry.get(":created_at")
    submitted = aware(created, zone) if isinstance(created, datetime) else None
    return [
        Claim("Gradescope", *(str(who.get(key) if who.get(key) is not None else "") for key in (":name", ":sid", ":email")), submitted)
        for who in entry[":submitters"]
    ]  # fmt: skip


def timestamp_of(file: File, zone: tzinfo) -> datetime | None:
    """The time in nbgrader's timestamp.txt, "2026-03-27 14:02:11.123456 Europe/Berlin"; None for anything else."""
    try:
        words = file.read(1024).decode().split()
        moment = datetime.fromisoformat(" ".join(words[:2]))
        return aware(moment, ZoneInfo(words[2]) if len(words) == 3 else zone)
    except (UserError, ValueError, OSError, KeyError):  # zoneinfo knows no closed list of zones, nor has every system all of them
        return None


def aware(moment: datetime, zone: tzinfo) -> datetime:
    """The same moment with an offset; `zone` where it has none."""
    return moment if moment.utcoffset() is not None else moment.replace(tzinfo=zone)


def read_times(file: File, zone: tzinfo) -> dict[str, datetime]:
    """Student -> when the work came, from an instructor's CSV with the columns student and submitted (ISO 8601): for exports without times.

    Raises UserError, with the line, for what cannot be meant.
    """
    try:
        text = file.read().decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=text.partition("\n")[0].count)))
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{file.name} is no CSV in UTF-8: save it again from your spreadsheet as 'CSV UTF-8'.") from None
    columns = [cell.strip().lower() for cell in rows[0]] if rows else []
    if not {"student", "submitted"} <= set(columns):
        raise UserError(f"{file.name}, line 1: the first line has to name the columns student and submitted.")
    found = {}
    for number, row in enumerate(rows[1:], start=2):
        cells = {column: cell.strip() for column, cell in zip(columns, row)}
        if not any(cells.values()):
            continue
        try:
            found[cells["student"]] = aware(datetime.fromisoformat(cells["submitted"]), zone)
        except (ValueError, KeyError):
            raise UserError(f"{file.name}, line {number}: no time; write one as in 2026-03-27T23:59:00+01:00, or take the line out.") from None
    return found


def zone_of(deadline: datetime | None) -> tzinfo:
    """The offset that times without one are read in."""
    return timezone(deadline.utcoffset()) if deadline else timezone.utc


class Roster:
    """Finds the student of the roster that a claim means. Without case, spaces and forms of accents, but only where one student fits."""

    def __init__(self, students: Iterable):
        self.ids, self.any_case, self.emails, self.local_parts, self.names, self.letters = {}, {}, {}, {}, {}, {}
        for student in students:
            email = folded(student.email)
            words = ((self.ids, student.id), (self.any_case, folded(student.id)), (self.emails, email), (self.local_parts, email.partition("@")[0]),
                     (self.names, folded(student.name)), *((self.letters, order) for order in _orders(student.name)))
            for index, word in words:
                if word:
                    index.setdefault(word, set()).add(student.id)

    def find(self, claim: Claim) -> tuple[str | None, bool]:
        """(the student's id or None, whether an id is spelled as in the roster).

        A platform's name only means a name and its number only an id: some platforms let students choose what they are called. Moodle's number
        is its own. Where name and number mean two students, neither is meant.
        """
        if claim.kind == PLAIN:
            return self._one(claim.name, self._by_id(claim.name) or self._by_name(claim.name))
        number = "" if claim.kind == "Moodle" else claim.id
        by_id = self._by_id(number) or _only(self.emails, folded(claim.email))
        by_name = self._by_name(claim.name)
        return self._one(number, None if by_id and by_name and by_id != by_name else by_id or by_name)

    def _one(self, word, id):
        return id, id is not None and word == id

    def _by_id(self, word):
        others = (self.any_case, self.emails, self.local_parts)
        return _only(self.ids, word) or next(filter(None, (_only(index, folded(word)) for index in others)), None)

    def _by_name(self, word):
        return _only(self.names, folded(word)) or _only(self.letters, _letters(word))


def _only(index, word):
    found = index.get(word, ())
    return next(iter(found)) if len(found) == 1 else None


def folded(text: str) -> str:
    """Without case, with single spaces, accents in one form."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split())


def _letters(text):
    return "".join(c for c in folded(text) if unicodedata.category(c)[0] in "LMN")


def _orders(name):
    """A name's letters in all the orders that its words are written in: Jane Mary Doe, Doe, Jane Mary and so on."""
    words = folded(name).replace(",", " ").split()
    return {_letters(" ".join(words[i:] + words[:i])) for i in range(len(words))}
