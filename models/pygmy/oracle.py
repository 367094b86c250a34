"""
Compute the bundled model's logits with transformers in float64, as the one oracle that a clone carries.

    python models/pygmy/oracle.py

It needs transformers, reads the committed files only and writes transformers_f64.npz beside them. Even in a float64
model transformers keeps three islands of float32 (RMS norm, softmax, the rotary angles); they are left as they are, for
an oracle that was patched here would no longer be somebody else's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
STIMULUS_TOKENS = 96
MAX_NEW_TOKENS = 48


def main() -> int:
    """Write ids, logits, prompt and greedy; exit 1 if the greedy answer is not the golden one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE, help="folder of the model (default: this one)")
    folder: Path = parser.parse_args().model

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").double()
    model.eval()

    cases = json.loads((folder / "golden.json").read_text(encoding="utf-8"))["cases"]
    rendered = [
        tokenizer.apply_chat_template(case["messages"], add_generation_prompt=True, tokenize=False) for case in cases
    ]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    ids = [token for prompt in prompts for token in prompt][:STIMULUS_TOKENS]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    greedy = continuation(model, prompts[0], set(model.generation_config.eos_token_id))
    answer = tokenizer.decode(greedy, skip_special_tokens=True)
    if answer != cases[0]["answer"]:
        print(f"expected {cases[0]['answer']!r}, found {answer!r}", file=sys.stderr)
        return 1
    np.savez_compressed(
        folder / "transformers_f64.npz",
        ids=np.array(ids, dtype=np.int64),
        logits=logits,
        prompt=np.array(prompts[0], dtype=np.int64),
        greedy=np.array(greedy, dtype=np.int64),
    )
    print(f"{len(ids)} ids, logits {logits.shape} {logits.dtype}, greedy answer {answer!r}")
    return 0


@torch.no_grad()
def continuation(model: torch.nn.Module, prompt: list[int], ends: set[int]) -> list[int]:
    """Decode greedily without a cache, up to and including the token that ends the answer."""
    new: list[int] = []
    while len(new) < MAX_NEW_TOKENS and not (new and new[-1] in ends):
        new.append(int(model(torch.tensor([prompt + new])).logits[0, -1].argmax()))
    return new


if __name__ == "__main__":
    sys.exit(main())
