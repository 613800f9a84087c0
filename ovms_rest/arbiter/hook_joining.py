"""A user's hooks besides those of the service: in gunicorn, one that a settings file defines replaces the other."""

from collections import Counter
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ParamSpec

# Without these a worker would not end, or leave its row of the worker table behind.
_ENDING = frozenset(("child_exit", "worker_abort", "worker_exit"))

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
    """Have gunicorn call the service's hooks after the user's in a settings file that define the same ones.

    A hook of the user may call the service's itself, before or after what it does.
    """
    for name, ours in _hooks.items():
        users = getattr(cfg, name)
        if users is not ours and getattr(users, "__wrapped__", None) is not ours:
            cfg.set(name, wraps(ours)(partial(_call_both, name, users)))


def _call_both(name: str, users: Callable[..., None], *arguments: Any) -> None:
    """Call a user's hook, and then the service's unless it has done so; after an exception only if that is needed."""
    before, has_returned = _calls[name], False
    try:
        users(*arguments)
        has_returned = True
    finally:
        if _calls[name] == before and (has_returned or name in _ENDING):
            _hooks[name](*arguments)
