"""`serve`: a policy behind HTTP, for robots and simulators. The server is in labkit/serving/http.py, its core in labkit/serving/core.py."""

import argparse
import math
import os

HELP = "answer robots over HTTP with a policy, in OpenVLA's /act protocol"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_arguments(parser):
    parser.add_argument("--policy", default="tiny", help="tiny, generic, the folder of a fine-tuned policy, or a hub id (default: tiny)")
    parser.add_argument("--adapter", help="folder of a peft adapter to attach")
    parser.add_argument("--host", default="127.0.0.1", help="who can reach it: 0.0.0.0 is everybody (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes one that is free (default: 8000)")
    parser.add_argument("--token", help="clients must send it: Authorization: Bearer TOKEN (default: the environment variable LABKIT_TOKEN, or none)")
    parser.add_argument("--max-body", type=_positive, default=4.0, metavar="MIB", help="the largest request (default: 4)")
    parser.add_argument("--patience", type=_positive, default=10.0, metavar="S", help="seconds that a request may take to arrive (default: 10)")
    parser.add_argument("--max-batch", type=int, default=8, metavar="N",
                        help="observations that waiting requests may share a forward with; 1: each alone (default: 8)")
    parser.add_argument("--wait-ms", type=float, default=3.0, metavar="MS", help="how long a forward waits for others at most (default: 3)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads (default: 1, as in the lessons)")
    parser.add_argument("--deadline-ms", type=_positive, default=100.0, metavar="MS", help="a decision that takes longer is counted (default: 100)")


def _positive(text):
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def main(args):
    import numpy as np
    import torch

    from labkit.quiet import quiet_libraries
    from labkit.serving.core import PolicyCore, policy_named
    from labkit.serving.http import Limits, PolicyServer
    from labkit.serving.monitor import Monitor
    from labkit.tabletop.camera import OBSERVATION_SIZE

    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port is {args.port}; it is 0 to 65535")
    if args.threads < 1:
        raise ValueError(f"--threads is {args.threads}; it is at least 1")
    limits, monitor = Limits(body=int(args.max_body * 2**20), seconds=args.patience), Monitor(args.deadline_ms / 1000)
    token = os.environ.get("LABKIT_TOKEN") if args.token is None else args.token
    quiet_libraries()
    torch.set_num_threads(args.threads)
    policy = policy_named(args.policy, args.adapter)
    # The first forward is the slowest, and shows whether the policy works at all: better before a robot waits for it.
    policy.decide([{"rgb": np.zeros((OBSERVATION_SIZE, OBSERVATION_SIZE, 3), np.uint8), "instruction": "pick up the red block", "holding": 0}])
    with PolicyCore(policy, args.max_batch, args.wait_ms / 1000, monitor=monitor) as core:
        server = PolicyServer(core, args.host, args.port, token, limits)
        if args.host not in LOOPBACK and token is None:
            print("everybody who reaches this machine can ask the policy: --token TOKEN lets only some", flush=True)
        server.run(on_start=lambda: print(f"{args.policy} answers at {server.url}/act; Ctrl-C ends it", flush=True))
    print(monitor.look())
    return 0
