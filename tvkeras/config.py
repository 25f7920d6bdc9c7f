"""gin: the configurable names, and errors that say what is legal. Only here gin is imported."""

import dataclasses
import inspect
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import gin
from absl import flags

from tvkeras import attacks, data, defenses
from tvkeras.evaluation import trials
from tvkeras.training import schedules
from tvkeras.training.averaging import Lookahead
from tvkeras.training.settings import Execution, Network, Recipe, Task

SETTINGS = {
    "task": Task,
    "network": Network,
    "recipe": Recipe,
    "execution": Execution,
}
CONFIGURABLES: tuple[Callable[..., Any], ...] = (
    *SETTINGS.values(),
    attacks.AutoAttack,
    attacks.AutoPGD,
    attacks.CarliniWagner,
    attacks.DecoupledDirectionNorm,
    attacks.FastAdaptiveBoundary,
    attacks.FastMinimumNorm,
    attacks.ProjectedGradient,
    attacks.Square,
    data.Augmentation,
    defenses.AdversarialTraining,
    defenses.TRADES,
    defenses.TVLipschitz,
    defenses.Undefended,
    Lookahead,
    schedules.one_cycle,
    schedules.sgd,
    schedules.step_decay,
    schedules.triangle,
    trials.Trial,
)


class ConfigError(ValueError):
    """A gin file or binding that names something unknown."""


def define_flags() -> None:
    """Defines --gin_file, --gin_param and --settings, for the program that calls it."""
    flags.disclaim_key_flags()  # they are the caller's, whose --help lists them
    flags.DEFINE_multi_string("gin_file", [], "A gin file; later ones win.")
    flags.DEFINE_multi_string("gin_param", [], "A binding, such as Recipe.epochs=30.")
    flags.DEFINE_bool("settings", False, "Print what is set, and all that can be, and stop.")


def configurable(
    root: Callable[..., Any], more: Sequence[Callable[..., Any]] = ()
) -> Callable[..., Any]:
    """Makes a command's root function, and `more` configurables, known to gin.

    Returns:
        The root, which takes the arguments it is not given from the configuration.
    """
    for function in more:
        _register(function)
    return _register(root)


def settings() -> dict[str, Any]:
    """Arguments of `tvkeras.training.loop.train`, as the configuration has them."""
    return {name: _register(kind)() for name, kind in SETTINGS.items()}


def bind(files: Sequence[str], bindings: Sequence[str] = ()) -> None:
    """Reads gin files, then single bindings such as "Recipe.epochs=30", which win.

    Raises:
        ConfigError: For a missing file, an unknown name or argument, a macro that
            nothing reads, or text that is no gin; the message lists what is legal.
    """
    for file in files:
        if not pathlib.Path(file).is_file():
            folder = pathlib.Path(file).parent
            near = sorted(str(path) for path in folder.glob("*.gin")) or "no gin files"
            raise ConfigError(f"gin file {file!r} does not exist; {folder} has {near}.")
    for function in CONFIGURABLES:
        _register(function)
    gin.clear_config()
    try:
        gin.parse_config_files_and_bindings(list(files), list(bindings))
    except (ValueError, SyntaxError, OSError) as error:
        raise ConfigError(f"{error}\nLegal settings:\n{_legal()}") from error


def listing() -> str:
    """What is bound, and as comments the defaults of all else that can be, as a gin file."""
    defaults = [
        f"# {function.__name__}.{name} = {_default(function, parameter)}"
        for function in sorted(_REGISTERED, key=lambda function: function.__name__)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty and not _is_bound(function, name)
    ]
    return "\n".join([gin.config_str(), "# Not set; by default:", *defaults])


def operative() -> str:
    """Every setting that was used, defaults included, as a gin file."""
    return str(gin.operative_config_str())


_REGISTERED: dict[Callable[..., Any], Callable[..., Any]] = {}


def _register(function: Callable[..., Any]) -> Callable[..., Any]:
    if function not in _REGISTERED:
        _REGISTERED[function] = gin.external_configurable(function, module="tvkeras")
    return _REGISTERED[function]


@gin.config.register_finalize_hook
def _refuse_unread_macros(config: dict[tuple[str, str], Any]) -> None:
    """Gin accepts any macro; one that no setting reads is a mistyped name."""
    macros = {scope for scope, selector in config if selector == "gin.macro"}
    selectors = (reference.scoped_selector for reference in gin.config.iterate_references(config))
    read = {selector.split("/")[0] for selector in selectors if selector.endswith("gin.macro")}
    if unread := macros - read:
        raise ValueError(
            f"nothing reads the macros {sorted(unread)}; those that are read: {sorted(read)}. "
            "A setting is written configurable.argument=value."
        )


def _is_bound(function: Callable[..., Any], name: str) -> bool:
    try:
        gin.query_parameter(f"{function.__name__}.{name}")
    except ValueError:
        return False
    return True


def _default(function: Callable[..., Any], parameter: inspect.Parameter) -> str:
    """A default in gin's words; that of a dataclass may be made by a function."""
    fields = getattr(function, "__dataclass_fields__", {})
    make = getattr(fields.get(parameter.name), "default_factory", dataclasses.MISSING)
    default = parameter.default if make is dataclasses.MISSING else make()
    if type(default) in _REGISTERED:
        return f"@{type(default).__name__}()"
    return f"@{default.__name__}" if inspect.isfunction(default) else repr(default)


def _legal() -> str:
    return "\n".join(
        f"  {function.__name__}: {', '.join(inspect.signature(function).parameters)}"
        for function in sorted(_REGISTERED, key=lambda function: function.__name__)
    )
