"""`bone-ds generate`: its arguments, prompts and completions, and the conversation in a terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bone_ds import launch
from bone_ds.errors import USER_ERROR, BoneError, ConfigError, DataError

if TYPE_CHECKING:
    from bone_ds.generate import Loaded, Sampling


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a Hugging Face directory or hub id, a .gguf, .pth or .safetensors file")
    command.add_argument("--adapter", type=Path, help="adapter.safetensors of a run, put on in memory")
    command.add_argument("--prompt", action="append", metavar="TEXT", help="may be given many times; without prompts, all of stdin is one")
    command.add_argument("--prompts", type=Path, metavar="FILE", help='.jsonl of {"prompt": text} a line')
    command.add_argument("--out", type=Path, metavar="FILE", help='write {"prompt": text, "completion": text} a line instead of printing')
    command.add_argument("--chat", action="store_true", help="a conversation: a line a turn, Ctrl-C ends an answer, Ctrl-D the chat")
    command.add_argument("--chat-template", metavar="TEMPLATE", help="in place of the tokenizer's own: its text or a .jinja file")
    command.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    command.add_argument("--stop", action="append", metavar="TEXT", default=[],
                         help="end a completion before this text, or at this special token; many times")
    command.add_argument("--do-sample", action="store_true", help="draw tokens instead of taking the likeliest")
    command.add_argument("--temperature", type=float, metavar="X", help="draw from softmax(logits / X), default 1 with --do-sample")
    command.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens alone")
    command.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest tokens that fill this share alone")
    command.add_argument("--repetition-penalty", type=float, metavar="R",
                         help="make tokens that have been there less likely by this factor above 1, drawn or not")
    command.add_argument("--seed", type=int, metavar="S", help="of the drawing, default 0")
    command.add_argument("--ignore-eos", action="store_true", help="go on past the end of a text, up to --max-new-tokens")
    command.add_argument("--batch-size", type=int, metavar="N", help="prompts that are continued together, default 16")
    command.add_argument("--ranks", type=int, metavar="N", help="local processes that share the prompts, each with the whole model")
    command.add_argument("--share", type=Path, help=argparse.SUPPRESS)  # where a rank that the command itself starts writes to
    command.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    command.add_argument("--tokenizer", default="auto", help="RWKV6: see model.tokenizer in `bone-ds config`")
    command.add_argument("--wkv", choices=("auto", "naive", "chunked", "c", "fla"), default="auto",
                         help="RWKV6: see model.wkv in `bone-ds config`")
    command.add_argument("--cache-dir", help="where a converted GGUF model is kept")


def run(options: argparse.Namespace, given: list[str]) -> int:
    _check(options)
    if options.chat:
        return _chat(options)
    from bone_ds import generate

    prompts = options.prompt or (generate.read_prompts(options.prompts) if options.prompts else [_stdin()])
    sampling = _sampling(options)
    if launch.current():
        return _share(options, prompts, sampling, launch.current())
    if options.ranks and options.ranks > 1:
        return _on_ranks(options, prompts, given)
    if len(prompts) == 1 and not options.out:
        completions = _completions(options, _loaded(options), prompts, sampling, _show)
        print()
        if completions == [""]:
            print("bone-ds: nothing came: the first token ends the text, or a --stop text begins it", file=sys.stderr)
    else:
        _put_out(options, prompts, _completions(options, _loaded(options), prompts, sampling))
    return 0


def _on_ranks(options: argparse.Namespace, prompts: list[str], given: list[str]) -> int:
    from bone_ds import prompt_shares

    with tempfile.TemporaryDirectory(prefix="bone-ds-") as directory:
        code = launch.start([*given, "--share", directory], options.ranks)
        if code == launch.KILLED:
            print("SIGKILL is what the system sends when memory runs out: every rank holds the whole model; give fewer --ranks, or a "
                  "smaller --batch-size", file=sys.stderr)
        elif told := prompt_shares.error(Path(directory)):
            raise BoneError(told)
        elif code == 0:
            _put_out(options, prompts, prompt_shares.together(Path(directory), len(prompts)))
    return code


def _share(options: argparse.Namespace, prompts: list[str], sampling: Sampling, ranks: launch.Ranks) -> int:
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
    print(f"{options.out}: {len(completions)} completion{'s' * (len(completions) > 1)}")


def _loaded(options: argparse.Namespace) -> Loaded:
    from bone_ds import generate
    from bone_ds.config import model_of

    cache = {} if options.cache_dir is None else {"cache_dir": options.cache_dir}
    model = model_of(path=options.model, dtype=options.dtype, tokenizer=options.tokenizer, wkv=options.wkv, **cache)
    return generate.load(model, options.adapter)


def _chat(options: argparse.Namespace) -> int:
    from bone_ds.conversation import Conversation

    sampling = _sampling(options)
    choose = sampling.choice()
    conversation = Conversation(_loaded(options), choose, options.max_new_tokens, sampling.repetition_penalty, options.chat_template)
    if sys.stdin.isatty():
        print(f"{options.model}: a line is a turn, Ctrl-C ends an answer, Ctrl-D the chat")
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


def _check(options: argparse.Namespace) -> None:
    """What is wrong with the options, said before anything heavy is imported or a model read."""
    if options.prompt and options.prompts:
        raise ConfigError("--prompt and --prompts are both given; keep one")
    if options.chat and (options.prompt or options.prompts or options.out or options.stop or options.ignore_eos):
        raise ConfigError("--chat: its prompts are typed and its answers shown; leave out --prompt, --prompts, --out, --stop and "
                          "--ignore-eos")
    if options.chat_template and not options.chat:
        raise ConfigError("--chat-template: has no effect without --chat")
    _check_ranks(options)
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
    check_seed(options.seed or 0)
    if options.out and options.out.exists():
        raise ConfigError(f"--out: {options.out} exists already; name one to be made")
    if options.out and not options.out.parent.is_dir():
        raise ConfigError(f"--out: {options.out}: there is no directory {options.out.parent}")


def _check_ranks(options: argparse.Namespace) -> None:
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


def check_seed(seed: int) -> None:
    """Raises ConfigError for one out of range."""
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed: {seed} is out of range, give 0 to 2^63 - 1")
