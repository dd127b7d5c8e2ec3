"""The files of a folder or a zip that strangers filled: listing them, and reading them within limits. Whose they are is in lms.py.

Nothing is unpacked to the disk and nothing outside the folder is opened. Limits hold for the bytes that come out, whatever a header says.
"""

from __future__ import annotations

import io
import os
import re
import stat
import zipfile
from calendar import timegm
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from labkit.errors import UserError
from labkit.exercises.judging import printable
from labkit.submission.cells import MAX_NOTEBOOK

MIB = 2**20
# Of a student's own zip; an export of a whole class may have ten times as many.
MAX_ENTRIES = 20_000
MAX_ZIP = 128 * MIB
# Text compresses 3 to 30 times, deflate's limit is 1032. Small files may be of one letter only.
MAX_RATIO, _ANY_RATIO_BELOW = 200, MIB
_BLOCK = 64 * 1024
_LONGEST_SHOWN, _LONGEST_PART = 120, 255  # characters; the second is what file systems allow
_DIRECTORY_ENTRY = b"PK\x01\x02"
_NOT_HANDED_IN = {"__MACOSX", "__pycache__", "node_modules", "site-packages"}
_AGAIN = "make the zip anew with your system's own program, or hand in the files as they are"


@dataclass(frozen=True)
class File:
    """One file.   name: its whole path as people see it.   parts: the path, in what was given, of the file or of the zip that holds it.

    modified: minutes since 1970 as the disk or the zip says, 0 where unknown.   fault: why it is not read, "" where nothing is known against it.
    source, entry: the path on the disk, or the zip and its entry.
    """

    name: str
    parts: tuple[str, ...]
    modified: int = 0
    source: Path | Zip | None = None
    entry: str = ""
    fault: str = ""

    @property
    def basename(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]

    def read(self, limit: int = MAX_NOTEBOOK) -> bytes:
        """The content, `limit` bytes at most.   Raises UserError, one sentence."""
        if self.fault:
            raise UserError(self.fault)
        try:
            if isinstance(self.source, Path):
                return _from_disk(self.source, limit, shown(self.name))
            with self.source.opened() as archive:
                return _from_zip(archive, self.entry, limit, shown(self.name))
        except UserError:
            raise
        except Exception as error:  # what a stranger's bytes make zipfile and zlib raise is no closed list
            if isinstance(error, OSError) and isinstance(self.source, Path):
                raise UserError(f"{shown(self.name)} cannot be read ({error.strerror or type(error).__name__}): hand it in again.") from None
            raise UserError(f"{shown(self.name)} is damaged ({_words(error)}): {_AGAIN}.") from None


class Zip:
    """A zip on the disk, which is opened once, or one inside another, which is read into memory whenever it is needed."""

    def __init__(self, source: Path | File):
        self.source, self._open = source, None

    def __getstate__(self):
        return {"source": self.source, "_open": None}  # an open file does not travel to another process

    @contextmanager
    def opened(self):
        """The zipfile.ZipFile.   Raises UserError for too many entries or overlapping ones, zipfile.BadZipFile and others for what is no zip."""
        if isinstance(self.source, Path):
            if self._open is None:
                self._open = _zipfile(self.source, 10 * MAX_ENTRIES, shown(self.source.name))
            yield self._open
        else:
            with _zipfile(io.BytesIO(self.source.read(MAX_ZIP)), MAX_ENTRIES, shown(self.source.name)) as archive:
                yield archive


@dataclass
class Listing:
    """What a folder or a zip holds.   folders: the parts of every folder, so that one without a file is seen, too."""

    files: list[File]
    folders: list[tuple[str, ...]]


def list_files(path: Path, prefix: str = "") -> Listing:
    """Everything in a folder, in a zip, or one file, in the order of the names. Zips in it are listed, too, zips in those are not.

    Hidden files, checkpoints and what systems put beside are left out. What cannot be read is there with its `fault`.
    prefix: put before the names that people see.   Raises UserError where `path` itself does not exist or cannot be listed.
    """
    path = Path(path)
    try:
        if path.is_dir():
            found = _in_folder(path, prefix)
        elif path.suffix.lower() == ".zip" and path.is_file():
            found = _in_zip(Zip(path), prefix, ())
        else:
            found = Listing([File(prefix + path.name, (path.name,), int(path.stat().st_mtime // 60), path.resolve())], [])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name the folder, the zip or the notebook that holds what was handed in.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check who may read it.") from None
    except UserError as error:
        return Listing([File(prefix + path.name, (path.name,), fault=str(error))], [])
    files = []
    for file in found.files:
        nested = file.basename.lower().endswith(".zip") and not file.fault
        files += _nested(file) if nested else [file]
    found.files = sorted(files, key=lambda file: (file.parts, file.name))
    return found


def shown(name: str) -> str:
    """A file's name for a sentence: one line, without control characters, not too long."""
    name = printable(name)
    return name if len(name) <= _LONGEST_SHOWN else "..." + name[-_LONGEST_SHOWN:]


def _refused(file, why):
    return File(file.name, file.parts, file.modified, fault=f"{shown(file.name)} {why}.")


def _nested(file):
    try:
        inside = _in_zip(Zip(file), f"{file.name}/", file.parts).files
    except UserError as error:
        return [File(file.name, file.parts, file.modified, fault=str(error))]
    return [
        _refused(found, "is a zip inside a zip, which is not opened: hand in the notebooks themselves, or one zip of them")
        if found.basename.lower().endswith(".zip") and not found.fault else found for found in inside
    ]  # fmt: skip


def _left_out(parts):
    return any(part.startswith(".") or part in _NOT_HANDED_IN for part in parts)


def _in_folder(root, prefix):
    found, waiting = Listing([], []), [()]
    while waiting:
        parts = waiting.pop()
        try:
            entries = sorted(os.scandir(root.joinpath(*parts)), key=lambda entry: entry.name)
        except OSError as error:
            if not parts:
                raise
            name = prefix + "/".join(parts)
            found.files.append(File(name, parts, fault=f"{shown(name)} cannot be read ({error.strerror}): check who may read the folder."))
            continue
        for entry in entries:
            here = (*parts, entry.name)
            if _left_out((entry.name,)):
                continue
            file = File(prefix + "/".join(here), here)
            if entry.is_symlink():
                found.files.append(_refused(file, "is a link, which is not followed: hand in the file itself"))
            elif entry.is_dir():
                found.folders.append(here)
                waiting.append(here)
            elif entry.is_file():
                found.files.append(File(file.name, here, int(entry.stat().st_mtime // 60), Path(entry.path)))
            else:
                found.files.append(_refused(file, "is no ordinary file: hand in the file itself"))
    return found


def _in_zip(archive, prefix, parts):
    """Listing of a zip.   parts: of the zip itself where it is a student's, else ().   Raises UserError for one that cannot be listed."""
    name = shown(archive.source.name)
    try:
        with archive.opened() as opened:
            infos = opened.infolist()
    except UserError:
        raise
    except Exception as error:  # see File.read
        raise UserError(f"{name} is no readable zip ({_words(error)}): {_AGAIN}.") from None
    if not infos:
        raise UserError(f"{name} is an empty zip: put the notebooks in and hand it in again.")
    found, last = Listing([], []), {info.filename: info for info in infos}
    for info in infos:
        path, way_out = _safe(_decoded(info))
        too_long = any(len(part) > _LONGEST_PART for part in path)
        path = tuple(part[:_LONGEST_PART] for part in path)
        if not path or _left_out(path):
            continue
        if info.is_dir() and not way_out and not too_long:
            found.folders.append(path)
            continue
        file = File(prefix + "/".join(path), parts or path, _modified(info), archive, info.filename)
        fault = "has a name that leads out of its zip" if way_out else "has a name that no system allows" if too_long else _unreadable(info)
        if last[info.filename] is not info:
            fault = "is in its zip twice: the last one of the name counts"
        found.files.append(_refused(file, fault) if fault else file)
    return found


def _safe(name):
    """The parts of an entry's name, without those that lead elsewhere, and whether there were any."""
    name = name.replace("\\", "/")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    drive = re.match(r"[A-Za-z]:", name)
    inside = tuple(part for part in parts if part != "..")
    if drive and inside:
        inside = tuple(part for part in (inside[0][2:], *inside[1:]) if part)
    return inside, bool(drive) or name.startswith("/") or ".." in parts


def _decoded(info):
    """The entry's name. Zips from macOS and Moodle hold UTF-8 without saying so; zipfile takes that for the letters of the first PC."""
    if not info.flag_bits & 0x800:
        try:
            return info.filename.encode("cp437").decode("utf-8")
        except UnicodeError:
            pass
    return info.filename


def _modified(info):
    try:
        return timegm((*info.date_time, 0, 0, 0)) // 60 if info.date_time[0] > 1980 else 0  # zips without a time say 1980
    except (ValueError, OverflowError):
        return 0


def _unreadable(info):
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a link, which is not followed: hand in the file itself"
    if info.flag_bits & 0x1:
        return "is encrypted: hand it in without a password"
    # zipfile bounds what comes out of one step of deflate, but of no other method.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by a method that is not read: {_AGAIN}"
    return ""


def _zipfile(source, most, name):
    with open(source, "rb") if isinstance(source, Path) else nullcontext(source) as stream:
        # Before zipfile makes an object for every entry: each begins with these bytes.
        if _count(stream, _DIRECTORY_ENTRY) > most:
            raise UserError(f"{name} holds more than {most:,} files: put only the notebooks in and hand it in again.")
    archive = zipfile.ZipFile(source)
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    if any(one.header_offset + 30 + one.compress_size > other.header_offset for one, other in zip(infos, infos[1:])):
        archive.close()
        raise UserError(f"{name} is a zip bomb or damaged (its files overlap): {_AGAIN}.")
    return archive


def _count(stream, wanted):
    count, tail = 0, b""
    while block := stream.read(MIB):
        count += (tail + block).count(wanted)
        tail = block[1 - len(wanted) :]
    return count


def _from_disk(path, limit, name):
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{name} is no ordinary file: hand in the file itself.")
    if status.st_size > limit:
        raise UserError(_too_large(name, f"has {status.st_size / MIB:,.0f} MiB", limit))
    with open(path, "rb") as stream:
        data = stream.read(status.st_size + 1)  # it may grow meanwhile; and as much is set apart as is asked for
    if len(data) > status.st_size:
        raise UserError(f"{name} grew while it was read: grade again when nobody writes to it.")
    return data


def _from_zip(archive, entry, limit, name):
    info = archive.getinfo(entry)
    parts, size = [], 0
    with archive.open(info) as stream:
        while part := stream.read(_BLOCK):
            size += len(part)
            if size > limit:
                raise UserError(_too_large(name, "unpacks to more", limit))
            if size > _ANY_RATIO_BELOW and size > MAX_RATIO * info.compress_size:
                raise UserError(f"{name} unpacks to more than {MAX_RATIO} times its size, as a zip bomb does: {_AGAIN}.")
            parts.append(part)
    return b"".join(parts)


def _too_large(name, says, limit):
    fix = "clear its outputs and hand it in again" if name.lower().endswith(".ipynb") else "hand in only what is asked for"
    return f"{name} {says}, at most {limit / MIB:,.0f} MiB are read: {fix}."


def _words(error):
    return printable(f"{type(error).__name__}: {str(error)[:80]}")
