"""Asking a student's function or class one case: build it, load its state, call it, collect outputs and gradients.

Runs in the student's own kernel and in the worker alike, and knows no right answer.
"""

from __future__ import annotations

import traceback

import torch

from labkit.exercises.exercise import Case, Raised

_LONGEST_MESSAGE = 300


class Unusable(Exception):
    """The student's object cannot be asked as the case wants; the message says why, in the student's words."""


def answer(entry, case: Case):
    """What `entry` answers to `case`: its output, or a dict as `Case.asks` says; a `Raised` where it raised.

    The arguments are fresh copies, and torch's generator starts from the same seed in every call.
    """
    arguments = {name: copied(value, "gradients" in case.asks and name in case.gradients) for name, value in case.arguments.items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would set the generators of GPUs, too, which are not kept
        try:
            return _answer(entry, case, arguments)
        except (Exception, SystemExit) as error:
            return Raised(type(error).__name__, message_of(error), student_line(error))


def message_of(error) -> str:
    """The exception's words, at most 300 characters."""
    try:
        return str(error)[:_LONGEST_MESSAGE]
    except Exception:  # the exception may be the student's own
        return "its message cannot be read"


def _answer(entry, case, arguments):
    built = entry if case.build is None else entry(**copied(case.build))
    if case.state is not None:
        _load(built, case.state)
    output = built(*arguments.values())
    found = {"output": plain(output)}
    if "gradients" in case.asks:
        found["gradients"] = _gradients(output, built, arguments, case)
    if "state" in case.asks:
        found["state"] = plain(dict(built.state_dict()))
    if "trainable" in case.asks:
        found["trainable"] = {name: p.numel() for name, p in built.named_parameters() if p.requires_grad}
    return found["output"] if case.asks == ("output",) else {name: found[name] for name in case.asks}


def _load(module, state):
    names = set(module.state_dict())
    if names != set(state):
        raise Unusable(f"the parameters are {', '.join(sorted(names)) or 'none'}; the exercise asks for {', '.join(sorted(state))}")
    module.load_state_dict(copied(state))


def _gradients(output, built, arguments, case):
    if not isinstance(output, torch.Tensor) or not output.requires_grad:
        raise Unusable("no gradient flows back from the output: stay with torch's operations, without item(), detach() or no_grad()")
    if case.cotangent is not None and output.shape != case.cotangent.shape:
        raise Unusable(f"the output has shape {tuple(output.shape)}, not {tuple(case.cotangent.shape)}")
    parameters = dict(built.named_parameters()) if isinstance(built, torch.nn.Module) else {}
    sources = {name: arguments.get(name, parameters.get(name)) for name in case.gradients}
    wanted = {name: tensor for name, tensor in sources.items() if tensor is not None and tensor.requires_grad}
    total = output.sum() if case.cotangent is None else (output * case.cotangent).sum()
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True) if wanted else []
    by_name = dict(zip(wanted, found))
    # A frozen parameter and one that nothing depends on look alike from outside: neither receives a gradient.
    return {name: plain(by_name.get(name)) for name in case.gradients}


def copied(value, requires_grad: bool = False):
    """A deep copy of tensors, lists and dicts; nothing that the student's code changes reaches the case."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(requires_grad)
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(item) for item in value] if isinstance(value, list) else tuple(copied(item) for item in value)
    return value


def plain(value):
    """Tensors detached, everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value] if isinstance(value, list) else tuple(plain(item) for item in value)
    return value


def student_line(error: BaseException) -> int:
    """The line of the student's cell where `error` came from: of the innermost frame that lies in no file of a library; 0 without one."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if _is_a_cell(frame.filename)]
    return lines[-1] if lines else 0


def _is_a_cell(filename):
    # <frozen ...> and <string> are Python's own: exit(), a dataclass's __init__.
    return "ipykernel_" in filename or filename.startswith("<") and not filename.startswith(("<frozen", "<string"))
