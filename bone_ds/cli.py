"""`bone-ds COMMAND`: arguments in, exit code out. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bone_ds import __version__, cli_generate, errors, launch, stopping
from bone_ds.errors import USER_ERROR, BoneError, CheckpointError, ConfigError, LostRankError

if TYPE_CHECKING:
    from bone_ds.config import RunConfig
    from bone_ds.run_directory import RunDirectory

BROKEN = 1
UNREAD = 128 + 13
INTERRUPTED = {128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
FULL = (errno.ENOSPC, errno.EDQUOT)
LET_SPEAK_S = 8.0
"""What a rank waits for the one that says the same for all; launchers end the others as soon as one is gone."""
LAST_WORD_S = 10.0
"""What a rank waits whose peer is gone: its launcher knows which, says so, and ends this one."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 after printing what the user can mend."""
    given = _without_local_rank(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parse(given)
        code = options.run(options, given) or 0
        sys.stdout.flush()
        return code
    except BoneError as error:
        _report(error, str(error))
        return USER_ERROR
    except BrokenPipeError:  # who reads stdout, such as `head`, has read enough
        _let_go_of_output()
        return UNREAD
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise
        if error.filename is None:
            _let_go_of_output()
        _report(error, f"{error.filename or 'a file, or the output of this command'}: {error.strerror}")
        return USER_ERROR
    except LostRankError as error:
        if not error.hangs:
            time.sleep(LAST_WORD_S)
        if error.speaks:
            print(f"bone-ds: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(LET_SPEAK_S)
        return BROKEN
    except KeyboardInterrupt:
        return 130


def _let_go_of_output() -> None:
    """What is still buffered would be written at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _without_local_rank(arguments: list[str]) -> list[str]:
    """Launchers put `--local_rank=N` or `--local_rank N` anywhere; the environment says the same."""
    kept, words = [], iter(arguments)
    for word in words:
        if word in ("--local_rank", "--local-rank"):
            next(words, None)
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            kept.append(word)
    return kept


def _report(error: BoneError | OSError, line: str) -> None:
    """Once for all ranks: the launcher ends the others as soon as rank 0 is gone, unless it is theirs alone."""
    ranks = launch.current()
    if ranks and not ranks.is_first:
        time.sleep(LET_SPEAK_S)
        if getattr(error, "of_first_rank", False):
            return
    print(f"bone-ds: {errors.printable(line)}", file=sys.stderr, flush=True)


def _parse(given: list[str]) -> argparse.Namespace:
    """Overrides may stand before, between and after options, which argparse alone doesn't allow."""
    parser = _parser()
    options, rest = parser.parse_known_args(_with_resume_alone(given))
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _with_resume_alone(given: list[str]) -> list[str]:
    """`--resume` moved to the end where the word behind it is a config or an override, which argparse would take for its PATH."""
    before_another = [index for index, word in enumerate(given[:-1])
                      if word == "--resume" and re.match(r".*\.ya?ml$|[a-z_]+\.[a-z_0-9]+=", given[index + 1])]
    kept = [word for index, word in enumerate(given) if index not in before_another]
    return kept + ["--resume"] * bool(before_another)


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bone-ds", description="Fine-tune language models with Bone adapters on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"bone-ds {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="fine-tune a model as a config says",
                                description="Starts ranks on this machine, or trains where a launcher started it.")
    train.add_argument("config", help="YAML file; `bone-ds config` shows every field")
    train.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="replaces a field of the file")
    train.add_argument("--ranks", type=int, help="local processes to start (default: all GPUs, or 1)")
    train.add_argument("--resume", nargs="?", const=True, default=False, type=_path, metavar="PATH",
                       help="continue the run in output.directory from its last whole checkpoint; or from PATH, a checkpoints/step-N of "
                            "this run, or of another like it for a new directory")
    train.add_argument("--max-restarts", type=int, default=0, metavar="N",
                       help="start a run that breaks anew from its last checkpoint, so many times (default 0)")
    train.add_argument("--force", action="store_true", help="start even what the plan says will not fit into memory")
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="memory, FLOPs, steps and disk of a run before it starts",
                               description="Reads no weights (but a .gguf is converted once, as for training) and needs no device. "
                                           "A model or data that aren't there yet are assumed.")
    plan.add_argument("config", help="YAML file; `bone-ds config` shows every field")
    plan.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="replaces a field of the file")
    plan.add_argument("--ranks", type=int, help="processes of the run (default: all GPUs, or 1)")
    plan.add_argument("--device", choices=("cpu", "cuda"),
                      help="of the run (default: cuda where there is a GPU or --device-memory, else cpu)")
    plan.add_argument("--device-memory", metavar="SIZE", help="of one rank, such as 24GiB (default: what this machine has)")
    plan.add_argument("--json", action="store_true", help="print it as JSON")
    plan.set_defaults(run=_plan)

    profile = commands.add_parser(
        "profile", help="measure a step of a config: time by part, memory by component, beside the plan",
        description="Trains a few steps that are thrown away, and writes a page with plots, the figures as JSON and CSV, and traces.")
    profile.add_argument("config", help="YAML file; `bone-ds config` shows every field")
    profile.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="replaces a field of the file")
    profile.add_argument("--ranks", type=int, help="local processes to start (default: all GPUs, or 1)")
    profile.add_argument("--steps", type=int, default=5, metavar="N", help="timed steps of a turn, default 5")
    profile.add_argument("--compare", action="append", metavar="VARIANT", default=[],
                         help='"NAME: section.key=value ...", the config with these changes, or a YAML file of such lines; many times')
    profile.add_argument("--to", metavar="NAME", help="the variant that ratios refer to, default the first")
    profile.add_argument("--turns", type=int, metavar="N", help="how often every variant is measured, default 2 in a comparison, else 1")
    profile.add_argument("--out", type=Path, help="directory to be made, default NAME-profile after the config")
    profile.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    profile.add_argument("--csv", type=Path, metavar="FILE", help="write the figures there too")
    profile.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # where a rank that the command itself starts writes to
    profile.add_argument("--timing-only", action="store_true", help=argparse.SUPPRESS)
    profile.set_defaults(run=_profile)

    data = commands.add_parser(
        "data", help="what the model will see: samples with what bears loss, lengths, counts, packing",
        description="Reads the data and the tokenizer, no weights.")
    data.add_argument("config", help="YAML file; `bone-ds config` shows every field")
    data.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="replaces a field of the file")
    data.add_argument("--samples", type=int, default=2, metavar="N", help="how many of each source are shown, default 2")
    data.add_argument("--colour", choices=("auto", "always", "never"), default="auto", help="default: where the output is a terminal")
    data.add_argument("--json", action="store_true", help="print it as JSON")
    data.set_defaults(run=_data)

    config = commands.add_parser("config", help="show every field of a config with its meaning and default")
    config.add_argument("config", nargs="?", help="a file to check and show as it would be used")
    config.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    config.set_defaults(run=_config)

    merge = commands.add_parser("merge", help="write base + adapter as a plain model")
    merge.add_argument("adapter", type=Path, help="adapter.safetensors of a run")
    merge.add_argument("--out", type=Path, required=True, help="to be made: a directory (Llama), a .pth or .safetensors file (RWKV6)")
    _add_base(merge)
    merge.set_defaults(run=_merge)

    generate = commands.add_parser("generate", help="continue prompts with a model, and an adapter on it",
                                   description="Continues prompts with the likeliest tokens, or drawn ones, or talks.")
    cli_generate.add_arguments(generate)
    generate.set_defaults(run=cli_generate.run)

    inspect = commands.add_parser("inspect", help="what a model, adapter, checkpoint or run directory is, and whether it is whole",
                                  description="Reads headers, no values. Exit code 2 where something is missing or damaged.")
    inspect.add_argument("path", type=Path, help="a directory or a .pth, .safetensors or .gguf file")
    inspect.add_argument("--json", action="store_true", help="print it as JSON")
    inspect.set_defaults(run=_inspect)

    import_ = commands.add_parser("import", help="make an adapter of another program's file")
    import_.add_argument("file", type=Path, help="the program's file, or directory (peft)")
    import_.add_argument("--from", dest="format", choices=("rwkv-peft", "peft"), required=True, help="the program that wrote it")
    import_.add_argument("--base", required=True, help="the model it was trained on; block size, targets and layers are read from the file")
    import_.add_argument("--out", type=Path, required=True, help="adapter.safetensors to be made")
    import_.set_defaults(run=_import)

    export = commands.add_parser("export", help="write an adapter for another program")
    export.add_argument("adapter", type=Path, help="adapter.safetensors of a run")
    export.add_argument("--to", dest="format", choices=("rwkv-peft", "peft", "bone-model"), required=True,
                        help="the program that is to read it; bone-model is BoneModel.from_pretrained of this one")
    export.add_argument("--out", type=Path, required=True, help="to be made: a .pth file (rwkv-peft), a directory (peft, bone-model)")
    export.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto is bf16 where that keeps every bit")
    export.add_argument("--name", choices=("bone", "disha"), help="rwkv-peft: what Bone's tensors are called; disha in later versions")
    export.set_defaults(run=_export)

    init = commands.add_parser("init", help="write a randomly initialised model to pre-train")
    init.add_argument("architecture", choices=("rwkv",))
    init.add_argument("--layers", type=int, required=True, metavar="N")
    init.add_argument("--width", type=int, required=True, metavar="C")
    init.add_argument("--vocab", type=int, required=True, metavar="V", help="65536 for the World tokenizer, 256 for bytes")
    init.add_argument("--head-size", type=int, default=64, metavar="N", help="default 64")
    init.add_argument("--ffn", type=int, metavar="F", help="width of channel mixing, default 3.5 C, a multiple of 32")
    init.add_argument("--seed", type=int, default=0)
    init.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the file, default bf16")
    init.add_argument("--out", type=Path, required=True, help=".pth file to be made")
    init.set_defaults(run=_init)
    return parser


def _add_base(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", help="where the base model lies now (default: where it lay in training)")
    command.add_argument("--cache-dir", help="where a converted GGUF base is kept")


def _train(options: argparse.Namespace, given: list[str]) -> int:
    if options.max_restarts < 0:
        raise ConfigError(f"--max-restarts: {options.max_restarts} is less than none, give 0 or more")
    launch.adopt_slurm_step()
    ranks = launch.current()
    if ranks is None:
        with stopping.ending_at_once():
            return _start_ranks(options, given)
    with stopping.listening(speaks=ranks.is_first) as stop:  # all imports of weight come after it
        return _train_as(ranks, options, stop)


def _start_ranks(options: argparse.Namespace, given: list[str]) -> int:
    from bone_ds import ds_json, monitoring, restarts

    config, run = _checked(options)
    run.check_unlocked()
    world_size = options.ranks if options.ranks is not None else max(1, launch.count_gpus())
    monitoring.check_installed(ds_json.resolve(config, max(1, world_size)))
    code = restarts.start(given, world_size, run, options.max_restarts) if options.max_restarts else launch.start(given, world_size)
    if code == launch.KILLED:
        print("SIGKILL is what the system sends when memory runs out: lower data.max_length or train.micro_batch_size, or set "
              "train.activation_checkpointing: layer", file=sys.stderr)
    if code in INTERRUPTED and run.adapter.exists():  # written with every checkpoint
        print(f"bone-ds: stopped; with --resume the run in {run.path} goes on from its last checkpoint", file=sys.stderr)
    return code


def _train_as(ranks: launch.Ranks, options: argparse.Namespace, stop: stopping.StopRequest) -> int:
    config, _ = _checked(options, of_run=False)  # that is said to all ranks alike, when they have met
    if options.max_restarts:
        raise ConfigError(f"--max-restarts: {options.max_restarts} is for `bone-ds train` without another launcher; torchrun has its own")
    if options.ranks not in (None, ranks.world_size):
        raise ConfigError(f"--ranks: {options.ranks}, but the launcher started {ranks.world_size}; leave it out under a launcher")
    from bone_ds.train import train

    result = train(config, ranks, options.resume, options.force, stop)
    return stopping.STOPPED if result.stopped else 0


def _checked(options: argparse.Namespace, of_run: bool = True) -> tuple[RunConfig, RunDirectory]:
    """What is wrong is said before ranks and their imports are paid for."""
    from bone_ds.config import load_config
    from bone_ds.run_directory import RunDirectory

    config = load_config(options.config, options.overrides)
    run = RunDirectory.planned(config)
    try:
        if of_run:
            run.check(config, options.resume)
        _check_paths(config)
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    return config, run


def _check_paths(config: RunConfig) -> None:
    """What is not there at all; what is wrong inside a file is found by those that read it."""
    from bone_ds import data_paths

    data_paths.check(config.data)
    model = config.model.path
    looks_like_a_path = model.startswith((".", "/", "~")) or model.endswith((".gguf", ".pth", ".safetensors")) or model.count("/") > 1
    if looks_like_a_path and not _path(model).exists():
        raise CheckpointError(f"model.path: {model}: there is no such file or directory")


def _profile(options: argparse.Namespace, given: list[str]) -> int:
    ranks = launch.current()
    if ranks:
        return _profile_rank(options, ranks)
    from bone_ds import ds_json
    from bone_ds.profile.variants import variants

    found = variants(options.config, options.overrides, options.compare)
    out = options.out or Path(f"{Path(options.config).stem}-profile")
    _check_profile(options, [variant.name for variant in found], out)
    world_size = options.ranks or max(1, launch.count_gpus())
    for variant in found:
        _check_paths(variant.config)
        ds_json.resolve(variant.config, world_size)
    from bone_ds.profile import report

    turns = options.turns or (2 if options.compare else 1)
    request = report.Request(found, options.to or found[0].name, world_size, options.steps, turns, out)
    return report.run(request, options.json, options.csv, lambda line: print(line, flush=True))


def _profile_rank(options: argparse.Namespace, ranks: launch.Ranks) -> int:
    """One rank that `bone-ds profile` has started."""
    if not options.worker:
        raise ConfigError("profile: starts its ranks itself, run it without a launcher and give --ranks")
    from bone_ds.config import load_config
    from bone_ds.profile import worker

    return worker.measure(load_config(options.config), ranks, options.steps, not options.timing_only, options.worker)


def _check_profile(options: argparse.Namespace, names: list[str], out: Path) -> None:
    """What is wrong with the options, said before anything heavy is imported."""
    for option in ("steps", "turns", "ranks"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option}: {value} is too small, give 1 or more")
    if options.to is not None and options.to not in names:
        raise ConfigError(f"--to: {options.to!r} is no variant, choose one of {', '.join(names)}")
    for option, path in (("out", out), ("json", options.json), ("csv", options.csv)):
        if path is None:
            continue
        if path.exists():
            raise ConfigError(f"--{option}: {path} exists already; name one to be made")
        if not path.parent.is_dir():
            raise ConfigError(f"--{option}: {path}: there is no directory {path.parent}")


def _plan(options: argparse.Namespace, given: list[str]) -> int:
    from bone_ds.config import load_config
    from bone_ds.plan.process import parse_bytes

    config = load_config(options.config, options.overrides)
    if options.ranks is not None and options.ranks < 1:
        raise ConfigError(f"--ranks: {options.ranks} is no number of ranks, give 1 or more")
    capacity_bytes = None if options.device_memory is None else parse_bytes("--device-memory", options.device_memory)
    gpus = launch.count_gpus()
    world_size = options.ranks or max(1, gpus)
    device = options.device or ("cuda" if gpus or capacity_bytes else "cpu")
    from bone_ds import plan

    if capacity_bytes:  # of a machine that may be another
        planned = plan.plan(config, world_size, device, capacity_bytes)
    else:
        planned = plan.plan(config, world_size, device, plan.process.capacity_bytes(device, world_size),
                            plan.process.host_capacity_bytes(device, world_size))
    print(json.dumps(planned.as_dict(), indent=2) if options.json else plan.table(planned))
    return 0


def _data(options: argparse.Namespace, given: list[str]) -> int:
    from bone_ds.config import load_config

    config = load_config(options.config, options.overrides)
    if options.samples < 0:
        raise ConfigError(f"--samples: {options.samples} is less than none, give 0 or more")
    from bone_ds import arch, data_paths, resolution
    from bone_ds.data.preview import as_text, preview

    data_paths.check(config.data)
    architecture = arch.resolve(config.model)
    source = architecture.without_weights(config.model)
    shown = preview(config, architecture.tokenizer(source), options.samples)
    warning = resolution.context_warning(architecture, source, shown.longest)
    if options.json:
        print(json.dumps(shown.as_dict() | {"warning": warning}, indent=2, ensure_ascii=False))
        return 0
    print(as_text(shown, config.data.max_length, options.colour == "always" or options.colour == "auto" and sys.stdout.isatty()))
    if warning:
        print(warning)
    return 0


def _config(options: argparse.Namespace, given: list[str]) -> int:
    from bone_ds.config import describe_fields, dump_yaml, load_config

    print(dump_yaml(load_config(options.config, options.overrides)) if options.config else describe_fields(), end="")
    return 0


def _merge(options: argparse.Namespace, given: list[str]) -> int:
    from bone_ds.merge import merge

    source = merge(options.adapter, options.out, options.base, options.cache_dir)
    print(f"{options.out}: {source.origin} with {options.adapter}")
    return 0


def _inspect(options: argparse.Namespace, given: list[str]) -> int:
    from bone_ds.inspection import inspect

    found = inspect(options.path)
    print(json.dumps(found.as_dict(), indent=2) if options.json else errors.printable(found.as_text(), 10**6))
    return USER_ERROR if found.problems else 0


def _import(options: argparse.Namespace, given: list[str]) -> int:
    from bone_ds.formats import peft, rwkv_peft

    program = {"rwkv-peft": rwkv_peft, "peft": peft}[options.format]
    header = program.import_adapter(options.file, options.base, options.out)
    form = f"grouping {header.grouping}, rank {header.rank}, {', '.join(header.targets)}" if header.method == "bone" else "initial states"
    print(f"{options.out}: {header.method}, {form}, {f'layers {header.layers}' if header.layers else 'all layers'}")
    return 0


def _export(options: argparse.Namespace, given: list[str]) -> int:
    if options.name and options.format != "rwkv-peft":
        raise ConfigError(f"--name: {options.name!r} is for --to rwkv-peft, remove it")
    from bone_ds.formats import peft, rwkv_peft

    if options.format == "rwkv-peft":
        dtype = rwkv_peft.export_adapter(options.adapter, options.out, options.dtype, options.name or "bone")
    else:
        dtype = peft.export_adapter(options.adapter, options.out, options.dtype, options.format)
    print(f"{options.out}: {options.adapter} in {dtype}")
    return 0


def _init(options: argparse.Namespace, given: list[str]) -> int:
    cli_generate.check_seed(options.seed)
    import torch

    from rwkv_adapters import initialise

    sizes = initialise.sizes(options.layers, options.width, options.vocab, options.head_size, options.ffn)
    initialise.write(options.out, sizes, options.seed, {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype])
    print(f"{options.out}: {options.layers} layers of {options.width}, {options.out.stat().st_size / 2**20:.1f} MiB")
    return 0
