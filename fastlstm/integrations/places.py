"""How modules of a library come to run fastlstm: their class changes, and that of torch's layers inside them.

Nothing else of a module changes. So its copies, pickles and replicas compute with parameters of their own.
"""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

from fastlstm import convert
from fastlstm.integrations import import_library

Model = TypeVar("Model")


class Place(NamedTuple):
    """A class of a library that fastlstm runs."""

    module: str  # by which users import the class
    name: str
    package: str  # as pip knows it
    oldest: str  # the first release that will do
    # Does what the class's `method` does, or returns None for a call that the library's own code is to run. That code
    # also runs a call with arguments that `run` does not have.
    run: Callable[..., Any]
    unlike: Callable[[Any], str] = lambda module: ""  # returns what keeps a module as it is, in words, or nothing
    method: str = "forward"  # the one that `run` stands for
    derived: bool = False  # whether modules of derived classes run fastlstm, too

    def is_of(self, cls: type) -> bool:
        """Return whether a class is the library's. Its name is common only within the library's own modules."""
        return cls.__qualname__ == self.name and f"{cls.__module__}.".startswith(f"{self.module}.")


class Places:
    """The places of an integration, whose name is that of its module. There they are `_places`, which pickles ask for.
    `within` returns the modules of what users pass, where that is no module itself.
    """

    def __init__(self, integration: str, *places: Place, within: Callable[[Any], Any] = lambda model: model) -> None:
        self._integration, self._places, self._within = integration, places, within

    def accelerate(self, model: Model) -> Model:
        """Make the library's modules in a model run fastlstm on the CPU.

        Parameters, `state_dict` and results stay as they are, up to rounding. Layers of torch inside the modules become
        fastlstm's, and remain instances of torch's classes. Calls on other devices, under autocast, and with tensors of
        more than one dtype run the library's own code. A module of a derived class stays as it is, except in
        sb3-contrib, and so does one with options that fastlstm does not take. A UserWarning names each kind that stays.

        Args:
            model: one of the library's modules, or a module that has some. For BenchMARL also an `Experiment`.

        Returns:
            `model`, changed.

        Raises:
            ImportError: for a release of the library that is too old.
            TypeError: for a model without such modules.
        """
        for module, place in self._modules_of(model):
            cls: Any = type(module)
            if cls.__module__ == self._integration:
                continue
            import_library(place.module, place.package, place.oldest)
            difference = place.unlike(module) if place.derived or place.is_of(cls) else "it is of a derived class"
            if difference:
                warnings.warn(f"{cls.__name__} stays as it is: {difference}", stacklevel=2)
            else:
                module.__class__ = _class_for(place, self._integration, cls)
                if any(isinstance(each, pair) for each in module.modules() for pair in convert.PAIRS):
                    convert.replace(module, keep_type=True)
        return model

    def restore(self, model: Model) -> Model:
        """Undo `accelerate`: the modules run the library's code again, and their layers are torch's. Return `model`.

        That holds also for a layer that was fastlstm's before `accelerate`, by `fastlstm.replace`. Raises TypeError
        where `accelerate` does.
        """
        for module, _ in self._modules_of(model):
            if type(module).__module__ == self._integration:
                module.__class__ = type(module).__bases__[0]
                convert.restore(module)
        return model

    def place_of(self, cls: type) -> Any:
        """Return the place of a class of the library or of one derived from it, or None for another class."""
        return next((place for parent in cls.__mro__ for place in self._places if place.is_of(parent)), None)

    def _modules_of(self, model: Any) -> list[tuple[Any, Place]]:
        """Return the library's modules in a model, each with its place. Raise TypeError for a model without any."""
        modules: Any = getattr(self._within(model), "modules", tuple)()
        found = [(module, place) for module in modules if (place := self.place_of(type(module)))]
        if not found:
            names = ", ".join(dict.fromkeys(place.name for place in self._places))
            raise TypeError(f"model must have modules of {names}, got {type(model).__name__} without any")
        return found


@cache
def _class_for(place: Place, integration: str, theirs: type) -> type:
    """Return the class that takes a place, for modules of one class of the library."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = place.run(self, *args, **kwargs)
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise  # from within `run`, which does have these arguments
            result = None
        return getattr(super(cls, self), place.method)(*args, **kwargs) if result is None else result

    def reduce(self: Any, protocol: Any) -> Any:
        make, args, *state = super(cls, self).__reduce_ex__(protocol)
        plain = [theirs if each is cls else each for each in (make, *args)]
        return _rebuilt, (integration, *plain), *state

    members = {place.method: method, "__reduce_ex__": reduce, "__module__": integration, "__doc__": theirs.__doc__}
    cls: Any = type(theirs.__name__, (theirs,), members)
    return cls


def _rebuilt(integration: str, make: Callable[..., Any], *args: Any) -> Any:
    """Return the module that `make` returns with the class that `accelerate` gives it. Copies and pickles call this."""
    module = make(*args)
    theirs: Any = type(module)
    module.__class__ = _class_for(import_module(integration)._places.place_of(theirs), integration, theirs)
    return module
