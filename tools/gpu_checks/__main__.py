"""One group of checks in a process of its own; its results are lines of JSON on the standard output."""

import argparse
import os
import sys

from utils.memory import use_large_pages

use_large_pages()  # as main.py does
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products; read once

import torch  # noqa: E402

from tools.gpu_checks.common import Setting  # noqa: E402
from tools.gpu_checks.groups import ALL, run_group  # noqa: E402
from tools.gpu_checks.report import Report  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("group", type=int)
parser.add_argument("--device", required=True)
parser.add_argument("--tiny", action="store_true")
args = parser.parse_args()
# Results have the standard output for themselves.
output, sys.stdout = sys.stdout, sys.stderr
setting = Setting(torch.device(args.device), args.tiny)
run_group(ALL[args.group], Report(args.group, output), setting)
