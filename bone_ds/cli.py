"""`bone-ds COMMAND`: arguments in, exit code out. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bone_ds import __version__, launch
from bone_ds.errors import BoneError, CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from bone_ds.config import RunConfig

USER_ERROR = 2
KILLED = 128 + 9


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 after printing what the user can mend."""
    given = _without_local_rank(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parse(given)
        return options.run(options, given) or 0
    except BoneError as error:
        _report(error)
        return USER_ERROR
    except RuntimeError as error:
        if launch.current() and "by peer" in str(error):
            time.sleep(5)  # the rank that is gone has said why, and the launcher ends this one
        raise
    except KeyboardInterrupt:
        return 130


def _without_local_rank(arguments: list[str]) -> list[str]:
    """Launchers put `--local_rank=N` or `--local_rank N` anywhere; the environment says the same."""
    kept, words = [], iter(arguments)
    for word in words:
        if word in ("--local_rank", "--local-rank"):
            next(words, None)
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            kept.append(word)
    return kept


def _report(error: BoneError) -> None:
    """Once for all ranks: the launcher ends the others as soon as rank 0 is gone, unless it is theirs alone."""
    ranks = launch.current()
    if ranks and not ranks.is_first:
        time.sleep(5)
    print(f"bone-ds: {error}", file=sys.stderr, flush=True)


def _parse(given: list[str]) -> argparse.Namespace:
    """Overrides may stand before, between and after options, which argparse alone doesn't allow."""
    parser = _parser()
    options, rest = parser.parse_known_args(given)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bone-ds", description="Fine-tune language models with Bone adapters on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"bone-ds {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="fine-tune a model as a config says",
                                description="Starts DeepSpeed's launcher on this machine, or trains where a launcher started it.")
    train.add_argument("config", help="YAML file; `bone-ds config` shows every field")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a field of the file")
    train.add_argument("--ranks", type=int, help="local processes to start (default: all GPUs, or 1)")
    train.add_argument("--resume", action="store_true", help="continue the run in output.directory from its last checkpoint")
    train.set_defaults(run=_train)

    config = commands.add_parser("config", help="show every field of a config with its meaning and default")
    config.add_argument("config", nargs="?", help="a file to check and show as it would be used")
    config.add_argument("overrides", nargs="*", metavar="section.key=value")
    config.set_defaults(run=_config)

    merge = commands.add_parser("merge", help="write base + adapter as a plain model directory")
    merge.add_argument("adapter", type=Path, help="adapter.safetensors of a run")
    merge.add_argument("--out", type=Path, required=True, help="directory to be made")
    merge.add_argument("--base", help="where the base model lies now (default: where it lay in training)")
    merge.add_argument("--cache-dir", help="where a converted GGUF base is kept")
    merge.set_defaults(run=_merge)
    return parser


def _train(options: argparse.Namespace, given: list[str]) -> int:
    from bone_ds import ds_json
    from bone_ds.config import load_config
    from bone_ds.run_directory import RunDirectory

    config = load_config(options.config, options.overrides)
    # What is wrong is said before the launcher and its imports are paid for.
    try:
        RunDirectory.planned(config).check(config, options.resume)
        _check_paths(config)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    ranks = launch.current()
    if ranks is None:
        world_size = options.ranks if options.ranks is not None else max(1, launch.count_gpus())
        ds_json.resolve(config, max(1, world_size))
        code = launch.start(given, world_size)
        if code == KILLED:
            print("bone-ds: a rank was killed by signal 9, as the system does when memory runs out\n"
                  "Lower data.max_length or train.micro_batch_size, or set train.activation_checkpointing: layer", file=sys.stderr)
        return code
    if options.ranks not in (None, ranks.world_size):
        raise ConfigError(f"--ranks: {options.ranks}, but the launcher started {ranks.world_size}; leave it out under a launcher")
    from bone_ds.train import train

    train(config, ranks, options.resume)
    return 0


def _check_paths(config: RunConfig) -> None:
    """What is not there at all; what is wrong inside a file is found by those that read it."""
    for field in ("train", "eval"):
        for path in getattr(config.data, field):
            if not Path(path).expanduser().exists():
                raise DataError(f"data.{field}: {path}: there is no such file, looked in {Path(path).expanduser().absolute().parent}")
    directory = Path(config.output.directory).expanduser().absolute()
    above = next(path for path in (directory, *directory.parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ConfigError(f"output.directory: {config.output.directory}: can't be made, {above} is no directory to write to")
    model = config.model.path
    looks_like_a_path = model.startswith((".", "/", "~")) or model.endswith(".gguf") or model.count("/") > 1
    if looks_like_a_path and not Path(model).expanduser().exists():
        raise CheckpointError(f"model.path: {model}: there is no such file or directory")


def _config(options: argparse.Namespace, given: list[str]) -> int:
    from bone_ds.config import describe_fields, dump_yaml, load_config

    print(dump_yaml(load_config(options.config, options.overrides)) if options.config else describe_fields(), end="")
    return 0


def _merge(options: argparse.Namespace, given: list[str]) -> int:
    from bone_ds.merge import merge

    source = merge(options.adapter, options.out, options.base, options.cache_dir)
    print(f"{options.out}: {source.origin} with {options.adapter}")
    return 0
