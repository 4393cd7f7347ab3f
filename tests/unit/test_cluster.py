"""The files for clusters: the Kubernetes job's commands can be parsed, the container's requirements can be installed.

pytest tests/unit/test_cluster.py -m "slow or not slow"    # the container needs a network
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

import config

ROOT = Path(__file__).parents[2]


def test_the_pods_of_the_kubernetes_job_find_each_other_and_start_main():
    service, job = yaml.safe_load_all(
        (ROOT / "tools" / "kubernetes.yaml").read_text(encoding="utf-8")
    )
    spec, name = job["spec"], job["metadata"]["name"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    program, *words = container["command"]
    index = f"$({container['env'][0]['name']})"  # Kubernetes puts the pod's number in its place
    args = get_args_parser().parse_args([word.replace(index, "3") for word in words])
    assert program == "torchrun"
    assert int(args.nnodes) == spec["completions"] == spec["parallelism"]
    assert args.node_rank == 3
    assert args.master_addr == f"{name}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert args.training_script == "main.py"
    assert config.parse(args.training_script_args).cfg.MODEL.NAME == "dat_tiny"
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        v["name"] for v in pod["volumes"]
    }


@pytest.mark.slow
def test_the_requirements_of_the_container_can_be_installed(tmp_path):
    """pip resolves them in a new environment, without installing."""
    text = (ROOT / "tools" / "Containerfile").read_text(encoding="utf-8")
    (line,) = re.findall(r"^RUN (python -m pip .*)", text, re.MULTILINE)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    _, *words = shlex.split(line)
    command = [tmp_path / "venv" / "bin" / "python", *words, "--dry-run", "--quiet"]
    subprocess.run(command, cwd=ROOT, check=True)
