"""Times DeepSparse on y = x W^T + b with an N:M weight, in an environment of its own (it needs Python 3.11 and numpy < 2).

    python3.11 -m venv ds && ds/bin/pip install "deepsparse==1.8.0" "numpy<2" onnx
    ds/bin/python benchmarks/rivals/deepsparse_linear.py 1536 768 3072 2 4 --threads 2

Prints one JSON line: median and 20/80 quantiles in milliseconds. n = m means a dense weight. benchmarks/run.py calls this file with
the interpreter named by MASKOPS_DEEPSPARSE_PYTHON and merges the figures into its rows.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from deepsparse import Engine, __version__
from onnx import TensorProto, helper, numpy_helper


def nm_weight(rng: np.random.Generator, outputs: int, inputs: int, n: int, m: int) -> np.ndarray:
    weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
    groups = weight.reshape(outputs, -1, m)
    rank = np.argsort(np.argsort(-np.abs(groups), axis=2), axis=2)
    return np.where(rank < n, groups, 0).reshape(outputs, inputs)


def save_model(path: Path, rows: int, weight: np.ndarray) -> None:
    outputs, inputs = weight.shape
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    graph = helper.make_graph(
        [node], "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, outputs])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.zeros(outputs, np.float32), "b")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("rows", "inputs", "outputs", "n", "m"):
        parser.add_argument(name, type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    weight = nm_weight(rng, args.outputs, args.inputs, args.n, args.m)
    x = rng.standard_normal((args.rows, args.inputs)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "linear.onnx"
        save_model(path, args.rows, weight)
        engine = Engine(model=str(path), batch_size=args.rows, num_cores=args.threads)
        off = float(np.abs(engine.run([x])[0] - x @ weight.T).max())
        times, start = [], time.perf_counter()
        while len(times) < 10 or time.perf_counter() - start < args.seconds:
            began = time.perf_counter()
            engine.run([x])
            times.append((time.perf_counter() - began) * 1e3)
    times.sort()
    at = {"p20": 0.2, "median": 0.5, "p80": 0.8}
    found = {name: times[round(q * (len(times) - 1))] for name, q in at.items()}
    json.dump({"version": __version__, "worst_error": off, "runs": len(times), **found}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
