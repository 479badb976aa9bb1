"""Ranks that are gone or hang: how long the others wait for them, and how they find out which these are.

Facts about torch 2.13 that shape this module:
- an operation of all ranks that waits too long, or whose peer is gone, raises in every rank that takes part, over gloo; over NCCL a
  thread of torch's ends the process instead (docs/faults.md);
- a group that is made later, as DeepSpeed's own are, has torch's default timeout, whatever the first group was given;
- the store that the ranks met in works without any group. The first rank holds it, or torchrun on its host does.
"""

from __future__ import annotations

import contextlib
import platform
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from bone_ds.errors import LostRankError
from bone_ds.launch import Ranks

ANSWER_S = 3.0
"""How long the ranks that wait for others give each other to say so: they may have begun to wait at different times."""


def limit(timeout_s: float) -> None:
    """Of all operations of the groups that there are now."""
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def hosts(ranks: Ranks) -> list[str]:
    """The name of each rank's host. Every rank calls it, when they have met."""
    store = c10d._get_default_store()
    store.set(f"bone_ds/host/{ranks.rank}", platform.node())
    return [store.get(f"bone_ds/host/{rank}").decode() for rank in range(ranks.world_size)]


def is_cause(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def described(error: RuntimeError, ranks: Ranks, hosts: list[str]) -> LostRankError:
    """Every rank that meets such an error asks; the lowest of them is to say what comes of it.

    hosts: as `hosts` gave them. Where the store's host is out of reach each host is alone with it, and the lowest rank there says it.
    """
    hangs = "imed out" in str(error) or "timeout" in str(error)
    here = _here(ranks)
    speaks = here[0] == ranks.rank if here else ranks.rank == max(1, ranks.rank - ranks.local_rank)
    missing = [rank for rank in range(ranks.world_size) if rank not in here] if here else [0]
    if not missing:
        return LostRankError(f"ranks lost touch with each other: {_one_line(error)}", speaks, hangs)
    one = len(missing) == 1
    which = f"rank{'s' * (not one)} {', '.join(map(str, missing))}"
    where = f" on {', '.join(dict.fromkeys(hosts[rank] for rank in missing))}" if len(set(hosts)) > 1 else ""
    why = "it hangs, or its host is gone" if hangs else "its process or host is gone"
    return LostRankError(f"{which}{where} {'does' if one else 'do'} not answer: {why}", speaks, hangs)


def never_met(error: dist.DistError, ranks: Ranks) -> LostRankError:
    """One rank of each host says it: a host's firewall, its name, or the others' start may be at fault."""
    return LostRankError(f"rank {ranks.rank} has not met the others at the start: {_one_line(error)}", ranks.local_rank == 0, hangs=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _here(ranks: Ranks) -> list[int] | None:
    """The ranks that ask too; None where the store does not answer."""
    answer: list[list[int]] = []
    # In a thread: no timeout of the store holds for each of its operations.
    thread = threading.Thread(target=_ask, args=(ranks, answer), daemon=True)
    thread.start()
    thread.join(2 * ANSWER_S)
    return answer[0] if answer else None


def _ask(ranks: Ranks, answer: list[list[int]]) -> None:
    with contextlib.suppress(RuntimeError, OSError):  # the rank that holds the store is gone
        store = c10d._get_default_store()
        _reach(store)
        store.set(f"bone_ds/waits/{ranks.rank}", "")
        time.sleep(ANSWER_S)
        _reach(store)
        answer.append([rank for rank in range(ranks.world_size) if store.check([f"bone_ds/waits/{rank}"])])


def _reach(store: dist.Store) -> None:
    """Raises OSError where nobody holds the store any more: asked itself, it prints the frames of torch's own failure first."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        socket.create_connection((store.host, store.port), timeout=ANSWER_S).close()
