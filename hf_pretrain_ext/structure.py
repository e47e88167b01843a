"""What a model is made of, to be put back where what was put into it did not fit after all. Knows no Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["Structure"]


class Structure:
    """
    Remembers modules, parameters, hooks, attributes and configurations by reference; no tensor is copied.

    What is written into a tensor itself stays: only what takes another tensor's place is undone.

    Args:
        model (`torch.nn.Module`): what may be wrapped, resized or given modules.
        others (`object`): whose attributes are put back too, such as those of plug-ins.

    Example:

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> before = Structure(model)
    >>> model.append(nn.Linear(2, 1)).requires_grad_(False)
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
      (1): Linear(in_features=2, out_features=1, bias=True)
    )
    >>> before.put_back()
    >>> len(model), model[0].weight.requires_grad
    (1, True)
    """

    def __init__(self, model: nn.Module, *others: Any):
        modules = list(model.modules())
        configs = {id(each): each for module in modules for each in _configs(vars(module))}
        self._kept = [(each, type(each), _copied(vars(each))) for each in (*modules, *configs.values(), *others)]
        self._parameters = [(each, each.data, each.requires_grad) for each in model.parameters()]

    def put_back(self) -> None:
        """Makes everything what it was when it was remembered."""
        for each, kind, attributes in self._kept:
            if type(each) is not kind:
                each.__class__ = kind
            vars(each).clear()
            for name, (value, content) in attributes.items():
                if isinstance(value, list):
                    value[:] = content
                elif isinstance(value, dict | set):
                    # In place: handles of hooks find their dict by its identity.
                    value.clear()
                    value.update(content)
                vars(each)[name] = value
        for parameter, data, trained in self._parameters:
            parameter.data = data
            parameter.requires_grad_(trained)


def _copied(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (value, value.copy() if isinstance(value, dict | set | list) else None)
        for name, value in attributes.items()
    }


def _configs(attributes: dict[str, Any]) -> Iterator[Any]:
    """Configurations among the attributes of a module, with those inside them."""
    for value in attributes.values():
        if hasattr(value, "to_dict") and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            yield value
            yield from _configs(vars(value))
