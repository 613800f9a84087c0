"""A user's hooks besides those of the service: in gunicorn, one that a settings file defines replaces the other."""

from collections import Counter
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ParamSpec

# Called even after the user's has failed: a worker would not end otherwise, or its row of the worker table stay taken.
_ALWAYS = frozenset(("child_exit", "worker_abort", "worker_exit"))

_hooks: dict[str, Callable[..., None]] = {}
_calls: Counter[str] = Counter()
_Arguments = ParamSpec("_Arguments")


def joined(hook: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Decorate a hook of the service that `join_hooks` joins with a user's."""

    @wraps(hook)
    def call(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> None:
        _calls[hook.__name__] += 1
        hook(*arguments, **options)

    _hooks[hook.__name__] = call
    return call


def join_hooks(cfg: Any) -> None:
    """Have gunicorn call the user's hook and then the service's where a settings file defines one of the same name.

    A user's hook may call the service's itself, at any point; that is then the only call.
    """
    for name, ours in _hooks.items():
        users = getattr(cfg, name)
        if users is not ours and getattr(users, "__wrapped__", None) is not ours:
            cfg.set(name, wraps(ours)(partial(_call_both, name, users)))


def _call_both(name: str, users: Callable[..., None], *arguments: Any) -> None:
    """Call a user's hook, and then the service's unless the user's has; after an exception only those of `_ALWAYS`."""
    before, has_returned = _calls[name], False
    try:
        users(*arguments)
        has_returned = True
    finally:
        if _calls[name] == before and (has_returned or name in _ALWAYS):
            _hooks[name](*arguments)
