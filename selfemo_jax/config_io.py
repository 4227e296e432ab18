"""Settings from YAML and the command line, and back to YAML: jsonargparse reads, the messages are ours."""

import argparse
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from selfemo_jax.config import Config
from selfemo_jax.config_check import validate

__all__ = ["Command", "Flag", "config_folder", "load_config", "parse_config", "read_config", "to_yaml"]

COMMAND_LINE = "command line"
SHORT = {"profile_steps": "log.profile_steps"}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A flag of one command that is not a setting of the run."""

    help: str
    type: type = str
    default: Any = None
    required: bool = False
    switch: bool = False
    """True: takes no value; present means True."""
    positional: bool = False
    """True: an argument without dashes; optional unless `required`."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the command line says beside the settings."""

    config_file: Path | None = None
    """The YAML file that was read."""
    resume: Literal["latest", "auto"] | None = None
    """latest: there must be a run to resume; auto: resume it if there is one; None: a new run."""
    dry_run: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The command's own flags by name."""


def load_config(
    argv: Sequence[str],
    *,
    prog: str,
    description: str = "",
    flags: Mapping[str, Flag] | None = None,
    base: Callable[[Command], Path | None] | None = None,
) -> tuple[Config, Command]:
    """Settings and flags of one command.

    The file is --config's; else what `base` returns, given the flags; else with --resume the run folder's own
    config.yaml; else the bundled tiny.yaml. The command line is laid over it, `run_dir` is filled in and the
    whole is validated. --help prints and exits. ValueError names the key, where it stands and what to write.
    """
    flags = flags or {}
    own_parser = _flag_parser(prog, description, flags)
    argv = list(argv)
    if "-h" in argv or "--help" in argv:
        settings = _settings_parser().format_help().partition("\n\n")[2]
        print(own_parser.format_help() + "\n" + re.sub(r"  --\S+ CONFIG +Path to a .*\n", "", settings))
        raise SystemExit(0)
    words, texts = _split_command_line(argv, flags)
    own = vars(own_parser.parse_args(words))
    overrides = _typed_overrides(texts)
    command = Command(resume=own["resume"], dry_run=own["dry_run"], extra={name: own[name] for name in flags})

    if own["config"] is not None:
        path = _find_config(own["config"])
    else:
        saved = Path(overrides.get("run_dir") or ".") / "config.yaml"
        resumed = saved if command.resume and "run_dir" in overrides and saved.is_file() else None
        chosen = base(command) if base else None
        path = chosen or resumed or config_folder() / "tiny.yaml"
        # What a run left lies beside its settings, wherever it lay when they were written.
        if chosen and "run_dir" not in overrides and chosen.parent != config_folder():
            overrides["run_dir"] = str(chosen.parent)
    config = _build(_laid_over(_read_yaml(path), overrides), where=str(path))
    if config.run_dir is None:
        config = replace(config, run_dir=str(Path("runs") / path.stem))
    sources = f"{path} and the {COMMAND_LINE}" if texts else str(path)
    validate(config, where=sources)
    return config, replace(command, config_file=path)


def read_config(path: Path) -> Config:
    """The settings in one YAML file, validated; what it leaves out has the default."""
    return parse_config(_read_yaml(path), where=str(path))


def parse_config(settings: Mapping[str, Any], *, where: str = "settings") -> Config:
    """A validated Config from nested mappings as YAML gives them; `where` opens each error message."""
    config = _build(_checked_keys(settings, where), where=where)
    validate(config, where=where)
    return config


def to_yaml(config: Config) -> str:
    """Every setting as YAML; `read_config` gives an equal Config back."""
    tree = asdict(config)
    # PyYAML writes these three as they are and reads them back as line breaks.
    plain = not re.search("[\x85\u2028\u2029]", json.dumps(tree, ensure_ascii=False))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=plain, width=110)


def config_folder() -> Path:
    """The bundled configs: inside an installed package, else beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _find_config(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if path.parent == Path("configs") or len(path.parts) == 1:
        bundled = config_folder() / path.name
        if bundled.is_file():
            return bundled
    known = sorted(f"configs/{p.relative_to(config_folder())}" for p in config_folder().rglob("*.yaml"))
    close = difflib.get_close_matches(f"configs/{path.name}", known, n=1)
    near = f"did you mean {close[0]}?" if close else f"bundled: {', '.join(known)}"
    raise ValueError(f"{COMMAND_LINE}: --config {name}: no such file; {near}")


# ---- the tree as keys ----


def _leaves(section: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> annotated type, of every setting that is not itself a section."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(section).items():
        if is_dataclass(hint):
            found |= _leaves(hint, f"{prefix}{name}.")
        else:
            found[prefix + name] = hint
    return found


LEAVES = _leaves(Config)
SECTIONS = {key.rsplit(".", n)[0] for key in LEAVES for n in range(1, key.count(".") + 1)}


def _nearest(name: str, known: Sequence[str]) -> str:
    """`did you mean X?`, or nothing when no known key resembles the name."""
    last = name.rsplit(".", 1)[-1]
    same = [key for key in known if key.rsplit(".", 1)[-1] == last]
    close = same or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        lasts = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
        close = [lasts[match] for match in difflib.get_close_matches(last, lasts, n=1, cutoff=0.6)]
    return f"did you mean {' or '.join(close[:3])}?" if close else ""


def _unknown(name: str, known: Sequence[str], where: str) -> ValueError:
    near = _nearest(name, known) or f"known here: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"
    return ValueError(f"{where}: unknown key {name}; {near}")


def _checked_keys(settings: Any, where: str, prefix: str = "") -> dict[str, Any]:
    """The same mapping with empty sections left out, once every key in it is known."""
    if not isinstance(settings, Mapping):
        name = f"section {prefix[:-1]}" if prefix else "the file"
        raise ValueError(f"{where}: {name} holds {settings!r}; expected key: value lines")
    checked: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key in SECTIONS:
            if value is not None:
                checked[name] = _checked_keys(value, where, key + ".")
        elif key in LEAVES:
            checked[name] = _as_text(value, LEAVES[key])
        elif key.removeprefix(prefix) in LEAVES and "." in key.removeprefix(prefix):
            raise ValueError(f"{where}: unknown key {key}; in a file write it nested, one level a line")
        else:
            raise _unknown(key, list(LEAVES), where)
    return checked


def _as_text(value: Any, hint: Any) -> Any:
    """A bare number where text is expected is its text, so that `mesh: 8` needs no quotes."""
    takes_text = hint is str or str in get_args(hint)
    return str(value) if takes_text and isinstance(value, int) and not isinstance(value, bool) else value


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key in SECTIONS:
            yield from _flat(value, key + ".")
        else:
            yield key, value


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _laid_over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the dotted keys of `above` set in it."""
    result = below
    for key, value in above.items():
        node = result
        *sections, name = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return result


# ---- the file ----


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand only once."""


def _mapping_once(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key} stands twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_once)


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's settings; over those of the file that its key `base` names, beside it, if it names one."""
    path = Path(path)
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # _Loader is a SafeLoader
    except OSError as error:
        named = f" (base of {above[-1]})" if above else ""
        raise ValueError(f"{path}: cannot read the config{named}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    base = settings.pop("base", None) if isinstance(settings, dict) else None
    checked = _checked_keys({} if settings is None else settings, str(path))
    if base is None:
        return checked
    below = path.parent / str(base)
    if below.resolve() in {one.resolve() for one in (*above, path)}:
        raise ValueError(f"{path}: base {base} leads back to a file that it is the base of")
    return _laid_over(_read_yaml(below, (*above, path)), dict(_flat(checked)))


def _build(settings: dict[str, Any], *, where: str) -> Config:
    parser = _settings_parser()
    try:
        parsed = parser.parse_object(settings)
    except argparse.ArgumentError as error:
        for key, value in _flat(settings):
            try:
                parser.parse_object(_nested(key, value))
            except argparse.ArgumentError:
                raise _wrong_type(key, value, where) from None
        raise ValueError(f"{where}: {error}") from None
    sections = parser.instantiate(parsed)
    return Config(**{name: sections[name] for name in get_type_hints(Config)})


# ---- the command line ----


class _FlagParser(argparse.ArgumentParser):
    """A parser whose complaints are ValueErrors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{COMMAND_LINE}: {message}")


def _flag_parser(prog: str, description: str, flags: Mapping[str, Flag]) -> argparse.ArgumentParser:
    positionals = "".join(f" [{name}]" for name, flag in flags.items() if flag.positional)
    parser = _FlagParser(
        prog=prog,
        description=description,
        usage=f"{prog} [--config FILE] [--FLAG VALUE ...] [--SECTION.FIELD VALUE ...]{positionals}",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; what it leaves out has the default")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        choices=["latest", "auto"],
        help="go on with the run in run_dir; auto: or begin it when there is none",
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would be done, and stop")
    for name, flag in flags.items():
        if flag.positional:
            nargs = None if flag.required else "?"
            parser.add_argument(name, type=flag.type, nargs=nargs, default=flag.default, help=flag.help)
        elif flag.switch:
            parser.add_argument(f"--{name}", action="store_true", help=flag.help)
        else:
            parser.add_argument(
                f"--{name}", type=flag.type, default=flag.default, required=flag.required, help=flag.help
            )
    return parser


@cache
def _settings_parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    parser.add_class_arguments(Config)
    return parser


def _split_command_line(argv: Sequence[str], flags: Mapping[str, Flag]) -> tuple[list[str], dict[str, str]]:
    """The command's own words, and the settings as texts by key, once every dashed name is known."""
    switches = {"dry_run", "resume", *(name for name, flag in flags.items() if flag.switch)}
    own = {"config", *switches, *(name for name, flag in flags.items() if not flag.positional)}
    words: list[str] = []
    texts: dict[str, str] = {}
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token[2:].partition("=")
        name = SHORT.get(name, name)
        if not token.startswith("--") or token == "--" or (equals and name in own) or name in switches:
            words.append(token)
            continue
        if name not in LEAVES and name not in own:
            if name in SECTIONS:
                example = next(key for key in LEAVES if key.startswith(name + "."))
                raise ValueError(f"{COMMAND_LINE}: {name} is a section; set its fields, as --{example} VALUE")
            raise _unknown(name, [*LEAVES, *sorted(own)], COMMAND_LINE)
        if not equals:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise ValueError(f"{COMMAND_LINE}: --{name} needs a value, as --{name} VALUE")
        if name in own:
            words.append(f"--{name}={value}")
        else:
            texts[name] = value
    return words, texts


def _typed_overrides(texts: Mapping[str, str]) -> dict[str, Any]:
    parser = _settings_parser()
    typed: dict[str, Any] = {}
    for key, text in texts.items():
        try:
            typed[key] = parser.parse_args([f"--{key}={text}"])[key]
        except argparse.ArgumentError:
            raise _wrong_type(key, text, COMMAND_LINE) from None
    return typed


# ---- messages ----


def _wrong_type(key: str, value: Any, where: str) -> ValueError:
    hint = LEAVES[key]
    near = ""
    if choices := [c for h in (hint, *get_args(hint)) if get_origin(h) is Literal for c in get_args(h)]:
        near = _nearest(str(value), choices)
    return ValueError(f"{where}: {key} is {value!r}; expected {_words(hint)}{near and '; ' + near}")


def _words(hint: Any) -> str:
    """A type as a user would say it."""
    plain = {
        int: "a whole number (int)",
        float: "a number (float)",
        bool: "true or false (bool)",
        str: "text (str)",
        NoneType: "null",
    }
    if hint in plain:
        return plain[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(args)}"
    if is_dataclass(hint):
        return f"a mapping with {', '.join(get_type_hints(hint))}"
    if origin is list:
        return f"a list of {_words(args[0])}, as [a, b]"
    if origin is dict:
        return f"a mapping of {_words(args[0])} to {_words(args[1])}, as {{a: 1}}"
    assert origin in (Union, UnionType), f"no words for {hint}"
    return " or ".join(_words(arg) for arg in args)
