"""Libraries that are the answer to an exercise, as they are where answers are judged: every import of them works, and every use raises.

A notebook that imports one, unused, loses nothing by it, and no cell finds the real one in memory. No exercise needs them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys

LIBRARIES = ("bitsandbytes", "peft", "sklearn")


class _Unusable(type):
    """The class of whatever is imported from an absent library."""

    def __call__(cls, *arguments, **options):
        raise ImportError(_said(f"{cls.__module__}.{cls.__name__}"), name=cls.__module__)

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(_said(f"{cls.__module__}.{cls.__name__}.{name}"), name=cls.__module__)


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty module for each name in the libraries; whatever is asked of it is a class that cannot be used."""

    def find_spec(self, name, path=None, target=None):
        """A spec of the absent libraries' modules; None, so that the next finder is asked, for all others."""
        if name.partition(".")[0] in LIBRARIES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        """None: an ordinary module."""

    def exec_module(self, module):
        """Let every name that does not belong to the import system be found in the module."""

        def offered(name):
            if name.startswith("__"):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            found = _Unusable(name, (), {"__module__": module.__name__})
            setattr(module, name, found)
            return found

        module.__getattr__ = offered


def make_absent() -> None:
    """From here on this process imports absent libraries.   Raises RuntimeError where it has a real one already."""
    there = sorted(set(LIBRARIES) & set(sys.modules))
    if there:
        raise RuntimeError(f"{there[0]} is imported already")
    sys.meta_path.insert(0, Absent())


def _said(what):
    return f"{what} is not there when answers are judged: it is the answer to an exercise"
