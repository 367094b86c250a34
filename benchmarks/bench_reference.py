"""Print one JSON line: decode and prefill rates of the reference engine on a model, and the ceiling of this machine."""

from __future__ import annotations

import argparse
import json

import numpy as np

from apr_core.bench.roofline import Bandwidth, bytes_per_token
from apr_core.bench.timing import measure_decode, measure_prefill
from apr_core.contract.admit import admit
from apr_core.engines.load import build
from apr_core.engines.subject import resolve_model
from apr_core.model.tokens import prepare_tokens


def main() -> None:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="pygmy", help="a model file or folder, or pygmy")
    parser.add_argument("--tokens", type=int, default=32, help="decoded tokens per repeat")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    admission = admit(resolve_model(args.model))
    model = build(admission)
    ids = np.random.default_rng(args.seed).integers(0, model.config.vocab_size, args.prompt).tolist()
    prompt = prepare_tokens(model, ids=ids)
    geometry = admission.require().geometry
    once = bytes_per_token(admission.checkpoint.tensors, geometry)
    ceiling = Bandwidth(once.read())
    decode = measure_decode(model, prompt, max_new_tokens=args.tokens, repeats=args.repeats, between=ceiling.sample)
    prefill = measure_prefill(model, prompt, repeats=args.repeats)
    roofline = ceiling.roofline()
    low, high = decode.steps.median_interval(seed=args.seed)
    line = {
        "model": str(admission.checkpoint.path),
        "backend": model.backend,
        "device": model.device,
        "decode_tok_s": decode.decode_tok_s,
        "tpot_s": decode.tpot_s,
        "tpot_s_interval": [low, high],
        "ttft_s": decode.ttft.median,
        "prefill_tok_s": prefill.prefill_tok_s,
        "bytes_stored_per_token": once.stored,
        "bytes_read_per_token": roofline.read_bytes,
        "read_gb_s": roofline.read_gb_s,
        "ceiling_tok_s": roofline.ceiling_tok_s,
        "mbu": roofline.mbu(decode.decode_tok_s),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
