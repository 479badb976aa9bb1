"""`bone-ds COMMAND`: arguments in, exit code out. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bone_ds import __version__, launch
from bone_ds.errors import BoneError, CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from bone_ds.config import RunConfig
    from bone_ds.generate import Loaded, Sampling

USER_ERROR = 2
KILLED = 128 + 9
UNREAD = 128 + 13


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 after printing what the user can mend."""
    given = _without_local_rank(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parse(given)
        code = options.run(options, given) or 0
        sys.stdout.flush()
        return code
    except BoneError as error:
        _report(error)
        return USER_ERROR
    except BrokenPipeError:  # who reads stdout, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered is written at exit
        return UNREAD
    except OSError as error:
        if error.filename is None:
            raise
        _report(ConfigError(f"{error.filename}: {error.strerror}"))
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
    train.add_argument("--force", action="store_true", help="start even what the plan says will not fit into memory")
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="memory, FLOPs, steps and disk of a run before it starts",
                               description="Reads no weights (but a .gguf is converted once, as for training) and needs no device. "
                                           "A model or data that aren't there yet are assumed.")
    plan.add_argument("config", help="YAML file; `bone-ds config` shows every field")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a field of the file")
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
    profile.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a field of the file")
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
    data.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a field of the file")
    data.add_argument("--samples", type=int, default=2, metavar="N", help="how many of each source are shown, default 2")
    data.add_argument("--colour", choices=("auto", "always", "never"), default="auto", help="default: where the output is a terminal")
    data.add_argument("--json", action="store_true", help="print it as JSON")
    data.set_defaults(run=_data)

    config = commands.add_parser("config", help="show every field of a config with its meaning and default")
    config.add_argument("config", nargs="?", help="a file to check and show as it would be used")
    config.add_argument("overrides", nargs="*", metavar="section.key=value")
    config.set_defaults(run=_config)

    merge = commands.add_parser("merge", help="write base + adapter as a plain model")
    merge.add_argument("adapter", type=Path, help="adapter.safetensors of a run")
    merge.add_argument("--out", type=Path, required=True, help="to be made: a directory (Llama), a .pth or .safetensors file (RWKV6)")
    _add_base(merge)
    merge.set_defaults(run=_merge)

    generate = commands.add_parser("generate", help="continue prompts with a model, and an adapter on it",
                                   description="Continues prompts with the likeliest tokens, or drawn ones, or talks.")
    generate.add_argument("model", help="a Hugging Face directory or hub id, a .gguf, .pth or .safetensors file")
    generate.add_argument("--adapter", type=Path, help="adapter.safetensors of a run, put on in memory")
    generate.add_argument("--prompt", action="append", metavar="TEXT", help="may be given many times; without prompts, all of stdin is one")
    generate.add_argument("--prompts", type=Path, metavar="FILE", help='.jsonl of {"prompt": text} a line')
    generate.add_argument("--out", type=Path, metavar="FILE", help='write {"prompt": text, "completion": text} a line instead of printing')
    generate.add_argument("--chat", action="store_true", help="a conversation: a line a turn, Ctrl-C ends an answer, Ctrl-D the chat")
    generate.add_argument("--chat-template", metavar="TEMPLATE", help="in place of the tokenizer's own: its text or a .jinja file")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    generate.add_argument("--stop", action="append", metavar="TEXT", default=[],
                          help="end a completion before this text, or at this special token; many times")
    generate.add_argument("--do-sample", action="store_true", help="draw tokens instead of taking the likeliest")
    generate.add_argument("--temperature", type=float, metavar="X", help="draw from softmax(logits / X), default 1 with --do-sample")
    generate.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens alone")
    generate.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest tokens that fill this share alone")
    generate.add_argument("--repetition-penalty", type=float, metavar="R",
                          help="make tokens that have been there less likely by this factor above 1, drawn or not")
    generate.add_argument("--seed", type=int, metavar="S", help="of the drawing, default 0")
    generate.add_argument("--ignore-eos", action="store_true", help="go on past the end of a text, up to --max-new-tokens")
    generate.add_argument("--batch-size", type=int, metavar="N", help="prompts that are continued together, default 16")
    generate.add_argument("--ranks", type=int, metavar="N", help="local processes that share the prompts, each with the whole model")
    generate.add_argument("--share", type=Path, help=argparse.SUPPRESS)  # where a rank that the command itself starts writes to
    generate.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    generate.add_argument("--tokenizer", default="auto", help="RWKV6: see model.tokenizer in `bone-ds config`")
    generate.add_argument("--wkv", choices=("auto", "naive", "chunked", "c", "fla"), default="auto",
                          help="RWKV6: see model.wkv in `bone-ds config`")
    generate.add_argument("--cache-dir", help="where a converted GGUF model is kept")
    generate.set_defaults(run=_generate)

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
    from bone_ds import ds_json, monitoring
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
        monitoring.check_installed(ds_json.resolve(config, max(1, world_size)))
        code = launch.start(given, world_size)
        if code == KILLED:
            print("bone-ds: a rank was killed by signal 9, as the system does when memory runs out\n"
                  "Lower data.max_length or train.micro_batch_size, or set train.activation_checkpointing: layer", file=sys.stderr)
        return code
    if options.ranks not in (None, ranks.world_size):
        raise ConfigError(f"--ranks: {options.ranks}, but the launcher started {ranks.world_size}; leave it out under a launcher")
    from bone_ds.train import train

    train(config, ranks, options.resume, options.force)
    return 0


def _check_paths(config: RunConfig) -> None:
    """What is not there at all; what is wrong inside a file is found by those that read it."""
    from bone_ds import data_paths

    data_paths.check(config.data)
    directory = Path(config.output.directory).expanduser().absolute()
    above = next(path for path in (directory, *directory.parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ConfigError(f"output.directory: {config.output.directory}: can't be made, {above} is no directory to write to")
    model = config.model.path
    looks_like_a_path = model.startswith((".", "/", "~")) or model.endswith((".gguf", ".pth", ".safetensors")) or model.count("/") > 1
    if looks_like_a_path and not Path(model).expanduser().exists():
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
    capacity_bytes = options.device_memory and parse_bytes("--device-memory", options.device_memory)
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


def _generate(options: argparse.Namespace, given: list[str]) -> int:
    _check_generate(options)
    if options.chat:
        return _chat(options)
    from bone_ds import generate

    prompts = options.prompt or (generate.read_prompts(options.prompts) if options.prompts else [_stdin()])
    sampling = _sampling(options)
    if launch.current():
        return _generate_share(options, prompts, sampling, launch.current())
    if options.ranks and options.ranks > 1:
        return _generate_on_ranks(options, prompts, given)
    if len(prompts) == 1 and not options.out:
        _completions(options, _loaded(options), prompts, sampling, _show)
        print()
    else:
        _put_out(options, prompts, _completions(options, _loaded(options), prompts, sampling))
    return 0


def _generate_on_ranks(options: argparse.Namespace, prompts: list[str], given: list[str]) -> int:
    from bone_ds import prompt_shares

    with tempfile.TemporaryDirectory(prefix="bone-ds-") as directory:
        code = launch.start([*given, "--share", directory], options.ranks)
        if code == KILLED:
            print("bone-ds: a rank was killed by signal 9, as the system does when memory runs out\n"
                  "Every rank holds the whole model: give fewer --ranks, or a smaller --batch-size", file=sys.stderr)
        elif told := prompt_shares.error(Path(directory)):
            _report(BoneError(told))
        elif code == 0:
            _put_out(options, prompts, prompt_shares.together(Path(directory), len(prompts)))
    return code


def _generate_share(options: argparse.Namespace, prompts: list[str], sampling: Sampling, ranks: launch.Ranks) -> int:
    """One rank that `bone-ds generate` has started, which says what is wrong."""
    from bone_ds import engine, prompt_shares

    engine.device(ranks)  # the rank's own GPU, or its share of the cores
    try:
        prompt_shares.write(options.share, ranks, _texts_of_share(options, prompts, sampling, ranks))
    except BoneError as error:
        prompt_shares.write_error(options.share, ranks, str(error))
        return USER_ERROR
    return 0


def _texts_of_share(options: argparse.Namespace, prompts: list[str], sampling: Sampling, ranks: launch.Ranks) -> dict[int, str]:
    """By place."""
    from bone_ds import generate, prompt_shares

    loaded = _loaded(options)
    lengths = [len(ids) for ids in generate.encoded(prompts, loaded.tokenizer)]  # of all: every rank refuses the same prompt
    places = prompt_shares.places(lengths, ranks)
    own = replace(sampling, seed=prompt_shares.seed(sampling.seed, ranks))
    return dict(zip(places, _completions(options, loaded, [prompts[place] for place in places], own), strict=True))


def _completions(options: argparse.Namespace, loaded: Loaded, prompts: list[str], sampling: Sampling,
                 show: Callable[[str], None] | None = None) -> list[str]:
    from bone_ds import generate

    return generate.continuations(loaded, prompts, options.max_new_tokens, sampling.choice(), options.batch_size or 16,
                                  options.ignore_eos, sampling.repetition_penalty, options.stop, show)


def _put_out(options: argparse.Namespace, prompts: list[str], completions: list[str]) -> None:
    from bone_ds import generate

    if not options.out:
        print(generate.as_text(prompts, completions))
        return
    aside = options.out.with_name(options.out.name + ".partial")
    aside.write_text(generate.as_jsonl(prompts, completions), encoding="utf-8")
    os.replace(aside, options.out)


def _loaded(options: argparse.Namespace) -> Loaded:
    from bone_ds import generate
    from bone_ds.config import ModelConfig

    cache = {"cache_dir": options.cache_dir} if options.cache_dir else {}
    model = ModelConfig(path=options.model, dtype=options.dtype, tokenizer=options.tokenizer, wkv=options.wkv, **cache)
    return generate.load(model, options.adapter)


def _chat(options: argparse.Namespace) -> int:
    from bone_ds.conversation import Conversation

    sampling = _sampling(options)
    choose = sampling.choice()
    conversation = Conversation(_loaded(options), choose, options.max_new_tokens, sampling.repetition_penalty, options.chat_template)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print(end="\n" if sys.stdin.isatty() else "")
            return 0
        except UnicodeDecodeError as error:
            raise _not_utf_8(error) from None
        if text.strip():
            with _interruptions() as interrupted:
                conversation.answer(text, _show, lambda interrupted=interrupted: bool(interrupted))
            print("\n")


@contextlib.contextmanager
def _interruptions() -> Iterator[list[int]]:
    """A list that grows by what Ctrl-C sends, which ends nothing by itself meanwhile."""
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def _sampling(options: argparse.Namespace) -> Sampling:
    from bone_ds.generate import Sampling

    fields = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    given = {field: getattr(options, field) for field in fields if getattr(options, field) is not None}
    sampling = Sampling(do_sample=options.do_sample or options.temperature is not None, **given)
    sampling.check()
    return sampling


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _check_generate(options: argparse.Namespace) -> None:
    """What is wrong with the options, said before anything heavy is imported or a model read."""
    if options.prompt and options.prompts:
        raise ConfigError("--prompt and --prompts are both given; keep one")
    if options.chat and (options.prompt or options.prompts or options.out or options.stop or options.ignore_eos):
        raise ConfigError("--chat: its prompts are typed and its answers shown; leave out --prompt, --prompts, --out, --stop and "
                          "--ignore-eos")
    if options.chat_template and not options.chat:
        raise ConfigError("--chat-template: has no effect without --chat")
    _check_generate_ranks(options)
    if not options.chat and not options.prompt and not options.prompts and sys.stdin.isatty():
        raise ConfigError("no prompt: give --prompt TEXT, --prompts FILE.jsonl, or a text on stdin")
    for option in ("max_new_tokens", "batch_size", "ranks"):
        if getattr(options, option) is not None and getattr(options, option) < 1:
            raise ConfigError(f"--{option.replace('_', '-')}: {getattr(options, option)} is too small, give 1 or more")
    for option in ("top_k", "top_p", "seed"):
        if getattr(options, option) is not None and options.temperature is None and not options.do_sample:
            raise ConfigError(f"--{option.replace('_', '-')}: {getattr(options, option)} has no effect without --do-sample or "
                              "--temperature, which draw")
    if "" in options.stop:
        raise ConfigError("--stop: '' stands in every text; give one to stop at")
    _check_seed(options.seed or 0)
    if options.out and options.out.exists():
        raise ConfigError(f"--out: {options.out} exists already; name one to be made")
    if options.out and not options.out.parent.is_dir():
        raise ConfigError(f"--out: {options.out}: there is no directory {options.out.parent}")


def _check_generate_ranks(options: argparse.Namespace) -> None:
    if launch.current() and not options.share:
        raise ConfigError("generate: starts its ranks itself, run it without a launcher and give --ranks")
    for option in ("ranks", "batch_size"):
        if getattr(options, option) and options.chat:
            raise ConfigError(f"--{option.replace('_', '-')}: {getattr(options, option)}, but a conversation is one text of one process; "
                              "leave it out with --chat")
    if options.ranks and not options.prompt and not options.prompts:
        raise ConfigError(f"--ranks: {options.ranks} share the prompts of --prompts or --prompt; give some")


def _stdin() -> str:
    """All of it, without the last line's end."""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise _not_utf_8(error) from None


def _not_utf_8(error: UnicodeDecodeError) -> DataError:
    return DataError(f"stdin: is no UTF-8 text (byte {error.start})")


def _inspect(options: argparse.Namespace, given: list[str]) -> int:
    from bone_ds.inspection import inspect

    found = inspect(options.path)
    print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False) if options.json else found.as_text())
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
    _check_seed(options.seed)
    import torch

    from rwkv_adapters import initialise

    sizes = initialise.sizes(options.layers, options.width, options.vocab, options.head_size, options.ffn)
    initialise.write(options.out, sizes, options.seed, {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype])
    print(f"{options.out}: {options.layers} layers of {options.width}, {options.out.stat().st_size / 2**20:.1f} MiB")
    return 0


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed: {seed} is out of range, give 0 to 2^63 - 1")
