"""The optimum of SVD-LLM: the SVD of each weight whitened by its inputs, one ratio for all weights.

    python whitened_svd.py MODEL.onnx SAMPLES.npz OUT.onnx KEEP

SVD-LLM itself takes LLaMA-like models of Hugging Face alone; this is its decomposition as
`tools/rival_methods.py` states it, on any graph.
"""

import sys
from pathlib import Path

# `rival_methods` lies in the folder above.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from rival_methods import WHITENED_SVD, measure_rival

from onnx_utilrank.compression import build
from onnx_utilrank.config import CompressConfig
from onnx_utilrank.errors import UtilrankError
from onnx_utilrank.job import Job
from onnx_utilrank.planning import make_offers


def main() -> None:
    """Compress as the command line says."""
    model, samples, out, keep = sys.argv[1:]
    config = CompressConfig(moves=("low-rank",), refit=False)
    try:
        job = Job.open(model, samples, config, lambda *_: None)
        everything = range(len(job.data))
        found = measure_rival(job, WHITENED_SVD, everything)
        plan = make_offers(job, found, everything, config).plan(float(keep))
        _, store = build(job, plan, found, config)
        store.save(Path(out))
    except UtilrankError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
