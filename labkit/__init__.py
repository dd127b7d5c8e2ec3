"""The face of labkit: which public name lives in which module. Importing it loads nothing else; a name is loaded when it is used."""

from importlib import import_module

__version__ = "0.1.0"

_MODULE_OF = {
    "DATA": "paths",
    "Samples": "demonstrations",
    "Tabletop": "tabletop",
    "UserError": "errors",
    "Variation": "tabletop",
    "action_token_loss": "sft",
    "action_to_bins": "actions",
    "bins_to_action": "actions",
    "check": "exercises.judging",
    "claims_table": "claims",
    "compare": "rollouts",
    "explain_unknown": "watch",
    "film": "watch",
    "fine_tune": "sft",
    "load_policy": "policy",
    "load_sweep": "sweeps",
    "lora": "sft",
    "receipt": "submission.receipt",
    "rollout": "rollouts",
    "set_up": "session",
    "talk_to_robot": "watch",
    "trusted": "exercises.judging",
    "wilson": "rollouts",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"labkit has no public name {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"labkit.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))
