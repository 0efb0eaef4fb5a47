"""Cluster files, held against what Ray itself ships to read them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli
from typer.main import get_command

from raybilevel._cluster.resources import fitting
from raybilevel._config.experiment import read_config
from raybilevel.cli import app

FOLDER = Path(__file__).parents[2] / "configs" / "cluster"
FILES = sorted(path for path in FOLDER.iterdir() if path.is_file())


def parsed(command: click.Command, arguments: list[str]) -> click.Context:
    """The command's own parser reads these arguments; an option that does not exist is an error."""
    return command.make_context(command.name or "", list(arguments), resilient_parsing=False)


def check_raybilevel(words: list[str]) -> dict[str, Any]:
    """A `raybilevel run ...` as its own command line reads it."""
    assert words[:2] == ["raybilevel", "run"]
    run = get_command(app).commands["run"]  # type: ignore[attr-defined]
    return parsed(run, words[2:]).params


def check_ray(words: list[str]) -> list[str]:
    """A `ray ...` as Ray's command line reads it; what is left over for somebody else."""
    command: Any = cli
    words = words[1:]
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    left = words[words.index("--") + 1 :] if "--" in words else []
    own = words[: words.index("--")] if left else words
    if command.name == "symmetric_run":  # hands what it does not know to `ray start`
        known = [str(option) for parameter in command.params for option in parameter.opts]
        start = [word for at, word in enumerate(own) if word not in known and (at == 0 or own[at - 1] not in known)]
        parsed(cli.commands["start"], start)
    parsed(command, [*own, "--", *left] if left else own)
    return left


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_secret_and_token_authentication(path: Path) -> None:
    text = path.read_text()
    assert (
        "RAY_AUTH_MODE=token" in text
        or yaml.safe_load(text)["spec"]["rayClusterSpec"]["authOptions"]["mode"] == "token"
    )
    assert not re.search(r"(?i)(secret|password|token|key)\s*[:=]\s*['\"]?[A-Za-z0-9+/_-]{16,}", text)
    assert "AKIA" not in text


@pytest.mark.parametrize("name", ["ray_up.yaml", "slurm.sh"])
def test_a_token_is_for_its_owner_s_eyes(name: str, tmp_path: Path) -> None:
    """Ray itself (2.60) writes it as the umask has it."""
    line = re.search(r"\(umask 077 .*?\)", (FOLDER / name).read_text())
    assert line is not None
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("RAY_AUTH_TOKEN_PATH", None)
    subprocess.run(["sh", "-c", line[0]], check=True, env=environment, capture_output=True)
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0


def test_the_cluster_of_ray_up_is_valid() -> None:
    config = prepare_config(yaml.safe_load((FOLDER / "ray_up.yaml").read_text()))
    validate_config(config)
    assert config["provider"]["type"] == "local"
    assert "~/.ray/auth_token" in config["file_mounts"]
    for command in [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]:
        words = shlex.split(command)
        while "=" in words[0]:
            words = words[1:]
        check_ray([word.replace("$RAY_HEAD_IP", "192.0.2.10") for word in words])
    lines = (FOLDER / "ray_up.yaml").read_text()
    command = re.search(r"'(raybilevel run .*)'", lines)
    assert command is not None
    given = check_raybilevel(shlex.split(command[1]))
    assert given["address"] == "auto"
    assert "search.max_failures=3" in given["settings"]


def test_the_kuberay_job_is_one_that_ray_s_autoscaler_reads() -> None:
    job = yaml.safe_load((FOLDER / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = {"metadata": job["metadata"], "spec": job["spec"]["rayClusterSpec"]}
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    validate_config(config)
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0  # trainings go to workers
    assert types["gpu"]["resources"] == types["gpu"]["resources"] | {"CPU": 8, "GPU": 1}
    assert types["gpu"]["max_workers"] == 8
    given = check_raybilevel(shlex.split(job["spec"]["entrypoint"]))
    assert given["storage"].startswith("s3://")
    # What the file says of lost pods and of added ones holds.
    assert "search.max_failures=3" in given["settings"]
    assert "search.max_concurrent=8" in given["settings"]
    config_of_gpus = read_config(FOLDER.parent / "digits.yaml", given["settings"])
    resources, on_gpu = config_of_gpus.resources, config_of_gpus.on_gpu
    lower, upper = resources.of_training(on_gpu).bundles, [resources.of_step(on_gpu)]
    assert config_of_gpus.options["device"] == "cuda"
    both = {"CPU": lower[0]["CPU"], "GPU": lower[0]["GPU"] + upper[0]["GPU"]}
    assert fitting([types["gpu"]["resources"]], [both]) == 1  # a training, and a step beside it
    mounts = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert given["config"].is_relative_to(mounts[0]["mountPath"])


def test_the_slurm_script_is_a_script_and_calls_commands_that_exist() -> None:
    path = FOLDER / "slurm.sh"
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    assert subprocess.run([bash, "-n", str(path)], check=False).returncode == 0
    text = path.read_text().replace("\\\n", " ")
    call = next(line for line in text.splitlines() if line.startswith("srun "))
    words = shlex.split(
        call.replace('"$@" "${resume[@]}"', "--data folder --resume")
        .replace('"$SLURM_JOB_NUM_NODES"', "4")
        .replace('"$SLURM_CPUS_PER_TASK"', "8")
    )
    assert words[1] == "--cpus-per-task"
    left = check_ray(words[3:])
    given = check_raybilevel(left)
    assert given["address"] == "auto"
    assert given["resume"]
    assert "search.max_failures=3" in given["settings"]
    generate = re.search(r"ray get-auth-token --generate", text)
    assert generate is not None
    check_ray(shlex.split(generate[0]))


def test_the_submission_is_one_that_ray_s_command_line_reads() -> None:
    line = (FOLDER / "submit.sh").read_text().splitlines()[-1]
    words = shlex.split(line)
    assert words[0] == "RAY_AUTH_MODE=token"
    given = check_raybilevel(check_ray(words[1:]))
    assert (FOLDER.parent / given["config"]).is_file()  # --working-dir configs
    assert "search.max_failures=3" in given["settings"]
