"""The course's secret, from which hidden cases and hidden episodes are drawn: a small file outside the repository, made on first use."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from labkit.errors import UserError
from labkit.paths import ROOT

_LEAST = 16  # characters


def secret_path() -> Path:
    """Where the secret lies unless another file is named: in the user's configuration folder."""
    if os.name == "nt":
        return Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming") / "labkit" / "secret"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "labkit" / "secret"


def read_secret(path: Path | None = None) -> tuple[str, bool]:
    """The secret, and whether it was made just now.   path: default `secret_path()`; only that one is made where it is missing.

    Raises UserError for a file that is missing, too short, or in the repository.
    """
    wanted = path or secret_path()
    if wanted.resolve().is_relative_to(ROOT):
        raise UserError(f"{wanted} lies in the course's folder, where students may get to see it: keep the secret somewhere else.")
    made = path is None and not wanted.exists()
    try:
        if made:
            wanted.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(wanted, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with open(descriptor, "w", encoding="ascii") as file:
                    file.write(secrets.token_hex(32) + "\n")
            except OSError:
                wanted.unlink()  # half a secret would be taken for one
                raise
        secret = wanted.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{wanted} cannot be read ({getattr(error, 'strerror', None) or 'no text'}): name the file that holds the course's "
                        "secret, or leave --secret out and one is made.") from None
    if len(secret) < _LEAST:
        raise UserError(f"{wanted} holds {len(secret)} characters: a secret has at least {_LEAST}, or it can be guessed.")
    return secret, made
