"""The methods, one file each. Called, as `highrank.methods()`, it names them."""

import sys
from types import ModuleType

from highrank.base import registry


class Methods(ModuleType):
    """This package, which can be called."""

    def __call__(self) -> dict[str, str]:
        """Returns every method's name and the first line of what its file says; none is imported."""
        return registry.first_lines("methods")


sys.modules[__name__].__class__ = Methods
