"""`benchmark`: speed as ratios against a peer in the same run (labkit/benchmarks.py), or a large model on a GPU (labkit/gpu_benchmark.py)."""

import json

HELP = ("measure speed on this machine, as ratios: camera, fine_tune, evaluation, matrix_peak, reading, serving, serving_generic; "
        "or --gpu: fine-tuning of a 7B model")


def add_arguments(parser):
    parser.add_argument("--only", action="append", metavar="NAME", help="only this one; may be given several times")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1, as in the lessons)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON a measurement")
    parser.add_argument("--gpu", action="store_true", help="instead: memory and speed of fine-tuning a 7B model with random weights, on a CUDA GPU")


def main(args):
    import torch

    from labkit.benchmarks import BENCHMARKS
    from labkit.quiet import quiet_libraries

    if args.gpu:
        return _gpu()
    unknown = set(args.only or ()) - set(BENCHMARKS)
    if unknown:
        raise ValueError(f"unknown benchmark {sorted(unknown)[0]!r}; there are {', '.join(BENCHMARKS)}")
    quiet_libraries()
    torch.set_num_threads(args.threads)
    for name in args.only or BENCHMARKS:
        m = BENCHMARKS[name]()
        if args.json:
            print(json.dumps({"name": m.name, "ours": m.ours, "peer": m.peer, "unit": m.unit, "ratio": m.ratio, "note": m.note}), flush=True)
        else:
            print(f"{m.name:<16} {m.ours:10.1f} {m.unit:<15} peer {m.peer:10.1f}   ratio {m.ratio:6.2f}   {m.note}", flush=True)
    return 0


def _gpu():
    from labkit.gpu_benchmark import run_benchmark
    from labkit.quiet import quiet_libraries

    quiet_libraries()
    print(f"stored in {run_benchmark()}")
    return 0
