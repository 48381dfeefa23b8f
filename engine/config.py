"""The command line of every script: `[FILE.yaml ...] [RUN_DIR ...] [key=value ...]`, later wins.

A script declares one dataclass, made of the dataclasses of the packages; OmegaConf reads values into it and
checks their types. Here stand the order of the arguments, the errors in one line, `--help` and the exit codes.
"""

import ast
import dataclasses
import difflib
import errno
import functools
import inspect
import os
import re
import signal
import sys
import textwrap
import time
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from errors import ConfigurationError, MachineError, UserError

Config = TypeVar("Config")

HELP_WIDTH = 100
RANK_GRACE_SECONDS = 2.0


# ---------------------------------------------------------------------------------------------------- keys


@dataclass(frozen=True)
class Key:
    """One key of a configuration: its dotted name, type, default and meaning."""

    name: str
    type: Any
    default: Any  # dataclasses.MISSING where it must be given
    meaning: str
    group: type | None  # the dataclass of its sub-keys, if it has any

    @property
    def optional_group(self) -> bool:
        """Whether this is a part that is switched off by null."""
        return self.group is not None and type(None) in typing.get_args(self.type)


def list_keys(cls: type, prefix: str = "", instance: Any = None) -> Iterator[Key]:
    """All dotted keys of a dataclass, depth first; `instance` holds the defaults where it is not the class."""
    hints = typing.get_type_hints(cls)
    meanings = _field_docstrings(cls)
    for field in dataclasses.fields(cls):
        default = field.default
        if instance is not None:
            default = getattr(instance, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        hint = hints[field.name]
        group = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
        if typing.get_origin(hint) not in (None, Union, types.UnionType):
            group = None  # a list or mapping of dataclasses has no dotted keys of its own
        name = prefix + field.name
        yield Key(name, hint, default, meanings.get(field.name, ""), group)
        if group is not None:
            yield from list_keys(group, name + ".", default if dataclasses.is_dataclass(default) else None)  # type: ignore[arg-type]


@functools.cache
def _field_docstrings(cls: type) -> dict[str, str]:
    """Field name -> the string literal that follows it, in the class and those it inherits from."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(part):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
        except OSError:  # typed at a prompt: there is no source to read
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for statement, after in zip(body, body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                found[statement.target.id] = " ".join(inspect.cleandoc(after.value.value).split())
    return found


def _type_name(hint: Any) -> str:
    """A type as a user reads it: `int or float`, `list of str`, `one of bf16, fp32`, `... or null`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(_value_text(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _type_name(part) for part in arguments)
    if origin is list and arguments and dataclasses.is_dataclass(arguments[0]):
        return "list of mappings with the keys of " + getattr(arguments[0], "__name__", "")
    if origin is list:
        return "list of " + (_type_name(arguments[0]) if arguments else "anything")
    if origin is tuple:
        return "list [" + ", ".join("..." if part is Ellipsis else _type_name(part) for part in arguments) + "]"
    if origin is dict:
        return f"mapping of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return "its own keys"
    return "anything" if hint is Any else getattr(hint, "__name__", str(hint))


def _value_text(value: Any) -> str:
    """A value as YAML writes it on one line; of a dataclass, what differs from its defaults."""
    if isinstance(value, list | tuple):
        value = [_changed(item) if dataclasses.is_dataclass(item) else item for item in value]
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("...").rstrip()


def _changed(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults."""
    values = dataclasses.asdict(instance)
    usual = dataclasses.asdict(type(instance)())
    return {name: value for name, value in values.items() if value != usual[name]}


# ----------------------------------------------------------------------------------------------- arguments


def parse(
    cls: type[Config], argv: Sequence[str] | None = None, *, runs: str | None = None, files: tuple[str, ...] = ()
) -> Config:
    """Read the command line into an instance of the dataclass `cls`.

    Each argument is a YAML file, the directory of a run or `key=value`; a later one wins over an earlier one, but
    that no file takes the place of a run named before it. A run's directory is put into the key that `runs` names
    (appended, if that key is a list), and so is what exists and ends in one of `files`. `--help` prints every key
    and exits with 0. Raises ConfigurationError, with one line that names the key or the file.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if any(argument in ("-h", "--help") for argument in arguments):
        print(help_text(cls, runs=runs), end="")
        sys.exit(0)
    keys = {key.name: key for key in list_keys(cls)}
    config = OmegaConf.structured(cls)
    for argument in _runs_behind_files(arguments, files):
        config = _merge_argument(config, argument, keys, runs, files)
    try:
        return typing.cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        missing = [key.name for key in keys.values() if _is_missing(config, key.name)]
        if missing:
            raise ConfigurationError(f"{missing[0]}: has no default; give {missing[0]}=VALUE") from error
        raise ConfigurationError(f"{error.full_key or 'configuration'}: {_first_line(error)}") from error


def _runs_behind_files(arguments: list[str], files: tuple[str, ...]) -> list[str]:
    """The arguments in the order in which they are merged: runs that stand before the last file come behind it."""
    last = max((i for i, argument in enumerate(arguments) if os.path.isfile(argument)), default=-1)
    runs = [argument for argument in arguments[: last + 1] if _is_run(argument, files)]
    others = [argument for argument in arguments[: last + 1] if not _is_run(argument, files)]
    return [*others, *runs, *arguments[last + 1 :]]


def _is_run(argument: str, files: tuple[str, ...]) -> bool:
    """Whether an argument is a directory, or ends in one of `files` and exists."""
    return os.path.isdir(argument) or (argument.endswith(files) and os.path.isfile(argument))


def _merge_argument(
    config: Any, argument: str, keys: dict[str, Key], runs: str | None, files: tuple[str, ...] = ()
) -> Any:
    """One argument merged into the configuration."""
    if _is_run(argument, files):
        key = runs if runs and argument.rstrip("/").endswith(files) else _key_of_runs(argument, runs)
        value: Any = argument.rstrip("/") or "/"
        if typing.get_origin(keys[key].type) is list:
            value = [*(OmegaConf.select(config, key) or []), value]
        given = OmegaConf.create()
        OmegaConf.update(given, key, value)
        return _merge(config, given, keys, "")
    if os.path.isfile(argument):
        if not argument.endswith((".yaml", ".yml")):
            raise ConfigurationError(f"{argument}: neither a .yaml file nor the directory of a run")
        return _merge(config, _load(argument), keys, f"{argument}: ")
    name, equals, text = argument.partition("=")
    if argument.startswith("-"):
        plain = argument.lstrip("-")
        raise ConfigurationError(
            f"{argument}: not an option; keys are written key=value without dashes, as in "
            f"{plain if equals else 'seed=1'}; --help lists them"
        )
    if equals and re.fullmatch(r"\w+(\.\w+|\[\d+\])*", name):
        return _merge(config, _read_override(name, text, argument), keys, "", text)
    if argument in keys:
        raise ConfigurationError(f"{argument}: has no value; write {argument}=VALUE")
    if argument.endswith((".yaml", ".yml")):
        raise ConfigurationError(f"{argument}: no such file; check the path")
    if equals:
        raise ConfigurationError(f"{argument}: {name!r} cannot be a key; write key=value, as in seed=1")
    hint = _suggestion(argument, keys)
    raise ConfigurationError(
        f"{argument or repr(argument)}: no such file or run directory"
        + (f", and as a key it needs a value; {hint}" if hint else "; check the path, or write key=value")
    )


def _key_of_runs(directory: str, runs: str | None) -> str:
    """The key that takes a run's directory; an error where the script takes none or this is not a run."""
    if runs is None:
        raise ConfigurationError(f"{directory}: is a directory, and this script takes no run; give a .yaml file")
    if not any(Path(directory, name).exists() for name in ("config.yaml", "best", "config.json")):
        raise ConfigurationError(
            f"{directory}: neither the directory of a run (config.yaml, best/) nor a model's folder (config.json)"
        )
    return runs


def _load(path: str) -> Any:
    """A YAML file as an OmegaConf mapping."""
    try:
        given = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: {_yaml_problem(error)}") from error
    except (OmegaConfBaseException, OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigurationError(f"{path}: cannot be read as YAML: {_first_line(error)}") from error
    if not OmegaConf.is_dict(given):
        raise ConfigurationError(f"{path}: must be a mapping, key: value on each line")
    return given


def _read_override(name: str, text: str, argument: str) -> Any:
    """`key=value` as an OmegaConf mapping."""
    try:
        return OmegaConf.from_dotlist([argument])
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or _first_line(error)
        raise ConfigurationError(f"{name}: {text!r} is not valid YAML ({problem}); quote it") from error
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigurationError(f"{name}: {text!r} cannot be read: {_first_line(error)}") from error


def _merge(config: Any, given: Any, keys: dict[str, Key], source: str, text: str | None = None) -> Any:
    """`given` merged over `config`; errors begin with `source` (`FILE.yaml: ` or nothing) and the key."""
    plain = OmegaConf.to_container(given, resolve=False)
    assert isinstance(plain, dict)
    _check(plain, keys, source, "", text)
    try:
        return OmegaConf.merge(config, given)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        full_key = getattr(error, "full_key", None) or ""
        key = keys.get(full_key.partition("[")[0])
        if key is None:
            where = source + full_key if full_key else source.removesuffix(": ") or next(iter(_leaves(plain)))
            raise ConfigurationError(f"{where}: {_first_line(error)}") from error
        raise _wrong_type(key, _leaves(plain).get(key.name), source) from error


def _check(given: dict[Any, Any], keys: dict[str, Key], source: str, prefix: str, text: str | None) -> None:
    """What OmegaConf lets pass or says badly: unknown keys, booleans for strings, a mapping for a value."""
    for name, value in given.items():
        full = f"{prefix}{name}"
        key = keys.get(full)
        if key is None:
            inner = next(iter(_leaves({full: value})))
            hint = _suggestion(inner, keys) or "--help lists the keys"
            raise ConfigurationError(f"{source}{inner}: no such key; {hint}")
        if isinstance(value, str) and value == "???":
            raise ConfigurationError(f"{source}{full}: ??? stands for a missing value; give one")
        interpolated = isinstance(value, str) and "${" in value
        if key.group is not None and not interpolated:
            if isinstance(value, dict):
                _check(value, keys, source, full + ".", text)
            elif not (value is None and key.optional_group):
                raise _wrong_type(key, value, source)
        elif isinstance(value, list) and (inner_class := _class_of_items(key.type)):
            for number, item in enumerate(value):
                if not isinstance(item, dict):
                    raise _wrong_type(key, value, source)
                place = f"{full}[{number}]."
                _check(item, {inner.name: inner for inner in list_keys(inner_class, place)}, source, place, text)
        elif isinstance(value, dict) and typing.get_origin(key.type) is not dict and key.type is not Any:
            raise _wrong_type(key, value, source)
        elif _takes_text(key.type):
            items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            for item in items:
                if isinstance(item, bool):
                    raise ConfigurationError(
                        f"{source}{full}: expected {_type_name(key.type)}, got {_value_text(value)}: YAML reads "
                        "bare on, off, yes, no, true and false as booleans; quote the word"
                    )
            number = isinstance(value, int | float) and key.type in (str, str | None)
            if number and text is not None and text.strip() != str(value):
                raise ConfigurationError(f"{full}: YAML reads {text} as the number {value}; quote it to keep it")


def _class_of_items(hint: Any) -> type | None:
    """The dataclass whose instances a list holds, if it does."""
    item = next(iter(typing.get_args(hint)), None) if typing.get_origin(hint) is list else None
    return item if isinstance(item, type) and dataclasses.is_dataclass(item) else None


def _takes_text(hint: Any) -> bool:
    """Whether a type, or the items of a list or mapping, can be str but not bool."""
    if typing.get_origin(hint) in (list, dict):
        return _takes_text(typing.get_args(hint)[-1]) if typing.get_args(hint) else False
    if typing.get_origin(hint) in (Union, types.UnionType):
        parts = typing.get_args(hint)
        return bool not in parts and any(_takes_text(part) for part in parts)
    return hint is str


def _wrong_type(key: Key, value: Any, source: str) -> ConfigurationError:
    """The error for a value that its key cannot take."""
    start = f"{source}{key.name}: expected {_type_name(key.type)}"
    if key.group is not None:
        what = f"{key.name}={{}}, {key.name}=null or" if key.optional_group else ""
        names = [field.name for field in dataclasses.fields(key.group)]
        example = f"; give {what} {key.name}.{names[0]}=...".replace("  ", " ") if names else ""
        start = f"{source}{key.name}: has keys of its own ({', '.join(names)}){example}"
        return ConfigurationError(f"{start}; got {_value_text(value)}")
    if value is None:
        empty = "; write '' (quoted) for an empty text" if _takes_text(key.type) else ""
        return ConfigurationError(f"{start}, got nothing{empty}")
    is_list = any(typing.get_origin(part) in (list, tuple) for part in (key.type, *typing.get_args(key.type)))
    if is_list and not isinstance(value, list):
        return ConfigurationError(f"{start}, got {_value_text(value)}; write a list as [a,b]")
    hint = ""
    if typing.get_origin(key.type) is Literal:
        choices = [str(choice) for choice in typing.get_args(key.type)]
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
    return ConfigurationError(f"{start}, got {_value_text(value)}{hint}")


def _leaves(given: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted key to value, with the inner mappings as well, the deepest first."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, dict):
            found.update(_leaves(value, f"{prefix}{name}."))
        found[f"{prefix}{name}"] = value
    return found


def _suggestion(name: str, keys: dict[str, Key]) -> str:
    """`did you mean ...` for a key that does not exist, or an empty text."""
    same_end = [key for key in keys if key.rpartition(".")[2] == name.rpartition(".")[2] and key != name]
    close = difflib.get_close_matches(name, keys, n=3, cutoff=0.75)
    close = [key for key in close if key in same_end] or close
    if not close and len(same_end) <= 3:
        close = same_end
    close = close or difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else ""


def _is_missing(config: Any, name: str) -> bool:
    """Whether a key has no value yet; False where a part above it is switched off."""
    parent, _, last = name.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return node is not None and OmegaConf.is_missing(node, last)


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or _first_line(error)
    return f"line {mark.line + 1}: {problem}" if mark is not None else f"not valid YAML: {problem}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------- help


def help_text(cls: type, *, runs: str | None = None) -> str:
    """Usage and every key of a script's dataclass with type, default and meaning, at most 100 columns wide."""
    module = sys.modules.get(cls.__module__)
    script = os.path.basename(getattr(module, "__file__", None) or "script.py")
    run_usage = " [RUN_DIR ...]" if runs else ""
    lines = [f"usage: python {script} [FILE.yaml ...]{run_usage} [key=value ...]     (later wins)", ""]
    if module is not None and module.__doc__:
        lines += [inspect.cleandoc(module.__doc__), ""]
    if runs:
        lines += _wrap(f"RUN_DIR, the directory of a run, is put into the key {runs}.", "") + [""]
    lines.append("keys (type, default, meaning):")
    indent, part = "  ", ""
    for key in list_keys(cls):
        if key.group is not None:
            part = key.name
            lines += ["", *_wrap(_group_line(key), indent)]
        else:
            if key.name.rpartition(".")[0] != part:
                part = key.name.rpartition(".")[0]
                lines.append("")
            required = key.default is dataclasses.MISSING
            default = "must be given" if required else f"default {_value_text(key.default)}"
            lines += _wrap(f"{key.name}  ({_type_name(key.type)}; {default})", indent, hang=8)
        lines += _wrap(key.meaning, indent + "    ") if key.meaning else []
    return "\n".join(lines) + "\n"


def _group_line(key: Key) -> str:
    if not key.optional_group:
        return f"{key.name}.*"
    if key.default is None or key.default is dataclasses.MISSING:
        return f"{key.name}.*  (not used by default; {key.name}={{}} or any key below switches it on)"
    return f"{key.name}.*  (used by default; {key.name}=null switches it off)"


def _wrap(text: str, indent: str, hang: int = 0) -> list[str]:
    return textwrap.wrap(
        text, HELP_WIDTH, initial_indent=indent, subsequent_indent=indent + " " * hang, break_on_hyphens=False
    )


# --------------------------------------------------------------------------------------------------- saving


def to_yaml(config: Any) -> str:
    """The configuration as YAML that `parse` reads back to an equal one; without `resume`, which is no setting."""
    plain = _escaped(dataclasses.asdict(config))
    plain.pop("resume", None)
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def _escaped(value: Any) -> Any:
    """The same with every `${` of its texts escaped: values are resolved already, none is an interpolation."""
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    if isinstance(value, str):  # backslashes right before `${` are escapes themselves, elsewhere they are not
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def save(config: Any, path: str | os.PathLike[str]) -> None:
    """Write `to_yaml(config)` to a file, whole or not at all."""
    temporary = Path(f"{os.fspath(path)}.tmp")
    temporary.write_text(to_yaml(config), encoding="utf-8")
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------- a script


def run_script(
    main: Callable[[Config], Any], cls: type[Config], *, runs: str | None = None, files: tuple[str, ...] = ()
) -> None:
    """Parse the command line, call `main(config)` and end the process with the exit code of what went wrong.

    An error that a user can cause or meet becomes one line on standard error; anything else is a defect and
    keeps its traceback.
    """
    try:
        main(parse(cls, runs=runs, files=files))
    except UserError as error:
        _end(str(error), error.exit_code)
    except KeyboardInterrupt:
        _end("stopped by the keyboard", 130)
    except (OSError, MemoryError, RuntimeError) as error:
        message = machine_failure(error)
        if message is None:
            raise
        _end(message, MachineError.exit_code)


def machine_failure(error: BaseException) -> str | None:
    """One line for an error by which the machine failed (memory, disk, a dead worker), None for any other."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or 'disk'}: {error.strerror}; free some space, then go on with resume=true"
    text = _first_line(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            f"train.batch_size: the GPU is out of memory ({text.partition('. ')[2] or text}); "
            "raise train.accumulate or lower data.crop"
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        return "train.batch_size: out of memory; raise train.accumulate or lower data.crop"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return f"data.workers: {text}"
    return None


def _end(message: str, code: int) -> NoReturn:
    """Print one line and exit; of several processes, rank 0 prints.

    The others mostly meet the same error. They wait for the launcher to end them because of rank 0; one that
    is left alone had an error of its own, and says so.
    """
    rank = int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    if rank != 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(RANK_GRACE_SECONDS)
        line = f"{line} (rank {rank})"
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(code)
