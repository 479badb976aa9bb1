"""What docs/hosts.md shows is what the launchers take, and its Slurm script queues itself anew when it should."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher import runner
from torch.distributed.run import get_args_parser

from bone_ds import cli

PAGE = (Path(__file__).parents[1] / "docs/hosts.md").read_text(encoding="utf-8")
HOSTFILE, = re.findall(r"^```\n(\S+ slots=.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SCRIPT, UNDER_SRUN = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
DEEPSPEED = re.findall(r"^deepspeed (.*?)(?: +#.*)?$", PAGE, re.MULTILINE)
TORCHRUN = re.findall(r"^torchrun (.*?)(?: +#.*)?$", PAGE, re.MULTILINE)
STAND_IN = """#!/bin/sh
echo "$@" >> called/$(basename $0)
mkdir -p runs/a && touch runs/a/config.yaml
exit $(cat code)
"""


def test_deepspeeds_launcher_takes_the_page():
    assert runner._parse_hostfile(HOSTFILE.splitlines()) == {"node-a": 8, "node-b": 8}
    over_ssh, *on_hosts = [runner.parse_args(shlex.split(command)) for command in DEEPSPEED]
    assert not over_ssh.no_ssh and [options.node_rank for options in on_hosts] == [0, 1]
    assert all(options.no_ssh and options.master_addr == "node-a" for options in on_hosts)
    for options in (over_ssh, *on_hosts):
        assert (options.hostfile, options.module, options.user_script) == ("hosts", True, "bone_ds")
        assert options.user_args == ["train", "run.yaml"]


def test_torchrun_takes_the_page():
    under_srun = UNDER_SRUN.partition("torchrun ")[2].replace("\\\n", " ").rstrip("'\n")
    for command in (*TORCHRUN, re.sub(r"\$SLURM_NNODES|\$SLURM_NODEID", "2", under_srun)):
        options = get_args_parser().parse_args(shlex.split(command))
        assert (options.nnodes, options.nproc_per_node, options.module, options.training_script) == ("2", "8", True, "bone_ds")
        assert options.training_script_args == ["train", "run.yaml"] and options.master_port == 29500
    assert len(TORCHRUN) == 2


@pytest.fixture
def starts(tmp_path):
    """Exit code of srun -> that of the script, and the arguments of srun and scontrol."""
    for program in ("srun", "scontrol"):
        (tmp_path / program).write_text(STAND_IN)
        (tmp_path / program).chmod(0o755)
    (tmp_path / "script").write_text(SCRIPT)
    (tmp_path / "called").mkdir()

    def start(code: int) -> tuple[int, str, str]:
        (tmp_path / "code").write_text(str(code))
        done = subprocess.run(["bash", "script"], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "42"})
        called = [tmp_path / "called" / program for program in ("srun", "scontrol")]
        return done.returncode, *(path.read_text().splitlines()[-1] if path.exists() else "" for path in called)

    return start


def test_the_slurm_script_goes_on_and_queues_itself_anew_when_it_was_asked_to_stop(starts):
    train = "--kill-on-bad-exit=1 bone-ds train run.yaml output.directory=runs/a"
    assert starts(137) == (137, train, "")
    assert starts(75) == (75, f"{train} --resume", "requeue 42")
    options = cli._parse(f"{train} --resume".split()[2:])
    assert options.resume is True and options.overrides == ["output.directory=runs/a"]
