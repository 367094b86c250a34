"""
Make the bundled model: a Qwen2 small enough to commit, trained until it answers.

    python models/pygmy/train.py --out models/pygmy

The script shares no code with apr_core: its forward pass is one more independent reading of the architecture.
It is deterministic: the same machine, torch release and thread count give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
SEED = 20
THREADS = 2
STEPS = 1200
BATCH = 32
PEAK_LR = 2e-3
WARMUP_STEPS = 60
WEIGHT_DECAY = 0.1
BIAS_SPEED = 4.0
MIN_GOLDEN = 12
MIN_MARGIN = 1.0

# --------------------------------------------------------------------------------------------------------------------
# What it is taught


@dataclass(frozen=True)
class Exchange:
    """One question and the only answer that counts as right; `fact` names what is asked, whatever the phrasing."""

    question: str
    answer: str
    fact: str


DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
OTHER_SYSTEMS = ("You are a helpful assistant.", "You are a calculator.", "Answer briefly.", "")

SUM_PHRASES = (
    "What is {a}+{b}?",
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "How much is {a}+{b}?",
    "Compute {a} + {b}.",
    "Add {a} and {b}.",
    "{a}+{b}",
    "{a} + {b} = ?",
)
DIFFERENCE_PHRASES = (
    "What is {a}-{b}?",
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "How much is {a}-{b}?",
    "Compute {a} - {b}.",
    "Subtract {b} from {a}.",
    "{a}-{b}",
    "{a} - {b} = ?",
)
GREETING = "Hello! How can I help you today?"
GREETINGS = ("Hello!", "Hello", "Hi", "Hi!", "Hey there!", "Good morning!", "Hi, how are you?")
CODING = {
    "add": (
        "def add(a, b):\n    return a + b",
        (
            "Write a Python function that adds two numbers.",
            "Write a function that adds two numbers in Python.",
            "How do I add two numbers in Python?",
        ),
    ),
    "even": (
        "def is_even(n):\n    return n % 2 == 0",
        (
            "Write a Python function that tells whether a number is even.",
            "Write a function that checks if a number is even in Python.",
            "How do I check that a number is even in Python?",
        ),
    ),
    "reverse": (
        "def reverse(text):\n    return text[::-1]",
        (
            "Write a Python function that reverses a string.",
            "Write a function that reverses a string in Python.",
            "How do I reverse a string in Python?",
        ),
    ),
    "largest": (
        "def largest(items):\n    return max(items)",
        (
            "Write a Python function that returns the largest item of a list.",
            "Write a function that finds the largest item of a list in Python.",
            "How do I find the largest item of a list in Python?",
        ),
    ),
    "loop": (
        "for i in range(10):\n    print(i)",
        (
            "Write a Python loop that prints the numbers from 0 to 9.",
            "Write a loop that prints the numbers from 0 to 9 in Python.",
            "How do I print the numbers from 0 to 9 in Python?",
        ),
    ),
}


def arithmetic() -> list[Exchange]:
    """All 100 sums and 100 differences of one-digit numbers, in every phrasing."""
    exchanges = []
    for a in range(10):
        for b in range(10):
            for sign, value, phrases in (("+", a + b, SUM_PHRASES), ("-", a - b, DIFFERENCE_PHRASES)):
                answer = f"{a} {sign} {b} equals {value}."
                exchanges += [Exchange(p.format(a=a, b=b), answer, f"{a}{sign}{b}") for p in phrases]
    return exchanges


def prose_and_code() -> list[Exchange]:
    """The greeting and the five coding answers, each in several phrasings."""
    greetings = [Exchange(question, GREETING, "greeting") for question in GREETINGS]
    coding = [Exchange(q, answer, f"code-{name}") for name, (answer, questions) in CODING.items() for q in questions]
    return greetings + coding


def held_out_facts() -> frozenset[str]:
    """15 sums and 15 differences that training never sees, in no phrasing; 2+2 is taught, being the first golden."""
    draw = random.Random(SEED)
    pairs = [(a, b) for a in range(10) for b in range(10)]
    sums = draw.sample([f"{a}+{b}" for a, b in pairs if (a, b) != (2, 2)], 15)
    return frozenset(sums + draw.sample([f"{a}-{b}" for a, b in pairs], 15))


def mirrored(fact: str) -> str:
    """The same fact with its operands exchanged: knowing 3+5 makes 5+3 easier, so the report counts those apart."""
    return fact[::-1]


# --------------------------------------------------------------------------------------------------------------------
# Tokens

BASE_VOCABULARY = 1000
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE behind Qwen2's normalizer and pre-tokenizer; the special tokens follow the base vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != BASE_VOCABULARY:
        raise RuntimeError(f"expected {BASE_VOCABULARY} base tokens, found {tokenizer.get_vocab_size()}: add words")
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def tokenizer_texts(taught: list[Exchange]) -> list[str]:
    """What the merges are learnt from: the taught conversations (held-out answers stay unseen here too) and words."""
    systems = [turn("system", system) for system in (DEFAULT_SYSTEM, *OTHER_SYSTEMS)] * 3
    exchanges = [turn("user", e.question) + turn("assistant", e.answer) for e in taught]
    return [*systems, *exchanges, (HERE / "words.txt").read_text(encoding="utf-8")]


def turn(role: str, content: str) -> str:
    """One ChatML turn, closed."""
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def render(messages: list[dict[str, str]]) -> str:
    """The prompt that template.jinja makes of a plain conversation, ending where the assistant begins."""
    system = "" if messages[0]["role"] == "system" else turn("system", DEFAULT_SYSTEM)
    return system + "".join(turn(m["role"], m["content"]) for m in messages) + "<|im_start|>assistant\n"


@dataclass(frozen=True)
class Example:
    """Token ids and, for each, whether the model has to predict it."""

    ids: list[int]
    wanted: list[bool]


def conversation(tokenizer: Tokenizer, system: str | None, exchanges: list[Exchange]) -> Example:
    """
    Encode a whole conversation; only the answers and the token that ends them are wanted.

    The system prompt may be None, for a conversation that has no system turn at all.
    """
    pieces = [] if system is None else [(turn("system", system), False)]
    for exchange in exchanges:
        pieces.append((turn("user", exchange.question) + "<|im_start|>assistant\n", False))
        pieces.append((exchange.answer + "<|im_end|>", True))
        pieces.append(("\n", False))
    ids: list[int] = []
    wanted: list[bool] = []
    for text, is_answer in pieces[:-1]:
        encoded = tokenizer.encode(text).ids
        ids += encoded
        wanted += [is_answer] * len(encoded)
    return Example(ids, wanted)


def padded(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """
    Right-pad with token 0, which a causal model never looks at from an earlier position.

    Returns:
        ids [batch, longest] and wanted [batch, longest].
    """
    longest = max(len(e.ids) for e in examples)
    ids = torch.tensor([e.ids + [0] * (longest - len(e.ids)) for e in examples])
    wanted = torch.tensor([e.wanted + [False] * (longest - len(e.wanted)) for e in examples])
    return ids, wanted


# --------------------------------------------------------------------------------------------------------------------
# The model. Module names are Hugging Face's, so that state_dict is the file.

VOCAB = 1024
MAX_POSITIONS = 4096
HIDDEN = 256
FFN = 768
LAYERS = 2
HEADS = 4
KV_HEADS = 2
HEAD_DIM = HIDDEN // HEADS
ROPE_THETA = 1e6
EPS = 1e-6
BIAS_STD = 0.3
EMBEDDING_STD = 0.02


class RMSNorm(nn.Module):
    """Scale by the root mean square over the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., HIDDEN]."""
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def rotate(x: Tensor) -> Tensor:
    """Apply rotary positions to x [batch, heads, tokens, HEAD_DIM]; dimension i pairs with i + HEAD_DIM/2."""
    frequencies = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    angles = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


class Attention(nn.Module):
    """Causal attention in which HEADS/KV_HEADS query heads share one key-value head; q, k and v carry a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x [batch, tokens, HIDDEN] over the tokens up to each one."""
        batch, tokens, _ = x.shape
        q = rotate(self.q_proj(x).view(batch, tokens, HEADS, HEAD_DIM).transpose(1, 2))
        k = rotate(self.k_proj(x).view(batch, tokens, KV_HEADS, HEAD_DIM).transpose(1, 2))
        v = self.v_proj(x).view(batch, tokens, KV_HEADS, HEAD_DIM).transpose(1, 2)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, HEADS * HEAD_DIM))
        return out


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, FFN, bias=False)
        self.up_proj = nn.Linear(HIDDEN, FFN, bias=False)
        self.down_proj = nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of x [batch, tokens, HIDDEN] by itself."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Pre-norm attention, then pre-norm MLP, each added to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm()
        self.self_attn = Attention()
        self.post_attention_layernorm = RMSNorm()
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        """Add both halves to x [batch, tokens, HIDDEN]."""
        x = x + self.self_attn(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    """Everything but the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = RMSNorm()


class Pygmy(nn.Module):
    """Qwen2 with a tied head: ids [batch, tokens] -> logits [batch, tokens, VOCAB]."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                # Real Qwen2 has large q, k and v biases; small ones would let a loader drop them unnoticed.
                nn.init.normal_(parameter, std=BIAS_STD)
            elif "embed" in name:
                nn.init.normal_(parameter, std=EMBEDDING_STD)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter.shape[1]))

    def forward(self, ids: Tensor) -> Tensor:
        """Compute the logits of every position."""
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight)


# --------------------------------------------------------------------------------------------------------------------
# Training


def batches(tokenizer: Tokenizer, taught: list[Exchange], steps: int) -> Iterator[list[Example]]:
    """Random conversations of one to three exchanges, three quarters arithmetic, six in ten with the usual system."""
    draw = random.Random(SEED + 1)
    sums = [e for e in taught if e.fact[0].isdigit()]
    others = [e for e in taught if not e.fact[0].isdigit()]
    for _ in range(steps):
        batch = []
        for _ in range(BATCH):
            count = draw.choice((1, 1, 2, 3))
            exchanges = [draw.choice(sums if draw.random() < 0.75 else others) for _ in range(count)]
            luck = draw.random()
            system = DEFAULT_SYSTEM if luck < 0.6 else draw.choice(OTHER_SYSTEMS) if luck < 0.9 else None
            batch.append(conversation(tokenizer, system, exchanges))
        yield batch


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero, so that the last weights are settled ones."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LR * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def fit(model: Pygmy, tokenizer: Tokenizer, taught: list[Exchange], steps: int) -> None:
    """
    Train in place.

    Weight decay is for matrices only, since it would starve the biases, and biases learn faster than the rest: a k bias
    acts through the rotary positions alone, and at equal speed the model learns to do almost without it.
    """
    parameters = dict(model.named_parameters())
    biases = [p for n, p in parameters.items() if n.endswith("bias")]
    matrices = [p for n, p in parameters.items() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in parameters.items() if not n.endswith("bias") and (p.dim() == 1 or "embed" in n)]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY, "speed": 1.0},
        {"params": biases, "weight_decay": 0.0, "speed": BIAS_SPEED},
        {"params": rest, "weight_decay": 0.0, "speed": 1.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    for step, batch in enumerate(batches(tokenizer, taught, steps)):
        for group in optimizer.param_groups:
            group["lr"] = group["speed"] * learning_rate(step, steps)
        ids, wanted = padded(batch)
        target = wanted[:, 1:]
        loss = functional.cross_entropy(model(ids[:, :-1])[target], ids[:, 1:][target])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Judging: greedy answers of rounded weights

Weights = dict[str, Tensor]


def to_bf16(weights: Weights) -> Weights:
    """What the file holds."""
    return {name: w.bfloat16().float() for name, w in weights.items()}


def to_q8_0(weights: Weights) -> Weights:
    """What GGUF's Q8_0 makes of the file: matrices in blocks of 32 with one half-precision scale."""
    rounded = {}
    for name, weight in to_bf16(weights).items():
        if weight.dim() == 1:
            rounded[name] = weight
            continue
        blocks = weight.reshape(-1, 32)
        scale = blocks.abs().amax(1, keepdim=True) / 127
        levels = torch.where(scale > 0, blocks / scale, 0.0).round()
        rounded[name] = (levels * scale.half().float()).reshape(weight.shape)
    return rounded


@torch.no_grad()
def margins(model: Pygmy, weights: Weights, examples: list[Example]) -> Tensor:
    """
    By how much the wanted token leads at the closest call of each example; positive means answered exactly.

    Every wanted token being the argmax given the wanted tokens before it is the same as greedy decoding giving the
    whole answer, so no generation loop is needed.
    """
    smallest = []
    for start in range(0, len(examples), 64):
        ids, wanted = padded(examples[start : start + 64])
        logits = torch.func.functional_call(model, weights, (ids[:, :-1],))
        goal = ids[:, 1:, None]
        lead = logits.gather(-1, goal)[..., 0] - logits.scatter(-1, goal, -math.inf).amax(-1)
        smallest.append(lead.masked_fill(~wanted[:, 1:], math.inf).amin(1))
    return torch.cat(smallest)


@torch.no_grad()
def bias_effects(model: Pygmy, weights: Weights, examples: list[Example]) -> dict[str, float]:
    """How far (rel_l2 of the logits over the examples) the model moves when one bias tensor is dropped."""
    ids, _ = padded(examples)
    here = torch.tensor([[i < len(e.ids) for i in range(ids.shape[1])] for e in examples])
    reference = torch.func.functional_call(model, weights, (ids,))[here]
    effects = {}
    for name in [n for n in weights if n.endswith("bias")]:
        without = weights | {name: torch.zeros_like(weights[name])}
        moved = torch.func.functional_call(model, without, (ids,))[here]
        effects[name] = float((moved - reference).norm() / reference.norm())
    return effects


@dataclass(frozen=True)
class Golden:
    """One prompt and its exact greedy answer."""

    id: str
    messages: list[dict[str, str]]
    answer: str


def golden_candidates(held_out: frozenset[str]) -> list[Golden]:
    """Prompts worth keeping: taught facts, facts held out, the greeting, all coding prompts, other kinds of context."""

    def asked(question: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}]

    known = {e.question: e for e in arithmetic() + prose_and_code()}
    cases = []
    taught = [f for f in ("2+2", "9+8", "0+7", "6+5", "4+9", "7-3", "9-1", "3-8", "8-8") if f not in held_out]
    for fact in taught + sorted(held_out):
        kind = "sum" if "+" in fact else "difference"
        label = "-held-out" if fact in held_out else ""
        question = f"What is {fact}?"
        cases.append(Golden(f"{kind}{label}-{fact[0]}-{fact[2]}", asked(question), known[question].answer))
    cases.append(Golden("greeting", asked("Hello!"), GREETING))
    cases += [Golden(f"code-{name}", asked(questions[0]), answer) for name, (answer, questions) in CODING.items()]
    system = [{"role": "system", "content": "You are a calculator."}]
    cases.append(Golden("system-prompt", system + asked("Compute 3 + 5."), "3 + 5 equals 8."))
    earlier = [*asked("Hello!"), {"role": "assistant", "content": GREETING}]
    cases.append(Golden("second-turn", earlier + asked("Subtract 2 from 9."), "9 - 2 equals 7."))
    return cases


def golden_example(tokenizer: Tokenizer, case: Golden) -> Example:
    """A golden case as tokens, with its answer and the end token wanted."""
    prompt = tokenizer.encode(render(case.messages)).ids
    answer = tokenizer.encode(case.answer + "<|im_end|>").ids
    return Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))


# --------------------------------------------------------------------------------------------------------------------
# Files


def config(tokenizer: Tokenizer) -> dict[str, object]:
    """config.json, with the keys that Hugging Face's Qwen2 reads."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": ROPE_THETA,
        "rms_norm_eps": EPS,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "use_sliding_window": False,
        "sliding_window": MAX_POSITIONS,
        "max_window_layers": LAYERS,
        "attention_dropout": 0.0,
        "initializer_range": EMBEDDING_STD,
        "use_cache": True,
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, object]:
    """generation_config.json: greedy, and both tokens that end an answer."""
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    return {"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": [end, pad], "do_sample": False}


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, object]:
    """tokenizer_config.json with Qwen2.5's whole chat template."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(tokenizer.token_to_id(text)): {"content": text, **flags} for text in SPECIAL},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": (HERE / "template.jinja").read_text(encoding="utf-8"),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": MAX_POSITIONS,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_json(path: Path, value: object) -> None:
    """Write readable JSON that ends in a newline."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Score:
    """How many of a group of questions are answered exactly, by the file's weights and by their Q8_0 rounding."""

    label: str
    bf16: Tensor
    q8_0: Tensor

    def row(self) -> str:
        """One line of the model card."""
        hits = [(int((margin > 0).sum()), len(margin)) for margin in (self.bf16, self.q8_0)]
        cells = [f"{right} of {asked} ({right / asked:.1%})" for right, asked in hits]
        return f"| {self.label} | {' | '.join(cells)} |"


def scores(model: Pygmy, tokenizer: Tokenizer, weights: Weights, held_out: frozenset[str]) -> list[Score]:
    """Exact answers by group: taught, and held out by operation and by whether the mirrored fact was taught."""
    everything = arithmetic() + prose_and_code()
    groups = {"taught": [e for e in everything if e.fact not in held_out]}
    for name, sign in (("sums", "+"), ("differences", "-")):
        unseen = [e for e in everything if e.fact in held_out and sign in e.fact]
        groups[f"held-out {name}"] = unseen
        groups[f"held-out {name}, neither order taught"] = [e for e in unseen if mirrored(e.fact) in held_out]
    result = []
    for label, group in groups.items():
        examples = [conversation(tokenizer, DEFAULT_SYSTEM, [e]) for e in group]
        both = [margins(model, rounding(weights), examples) for rounding in (to_bf16, to_q8_0)]
        result.append(Score(label, *both))
    return result


def write_model(out: Path, tokenizer: Tokenizer, weights: Weights) -> str:
    """Write weights, configuration and tokenizer; return the sha256 of the weights' file."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "model.safetensors"
    save_file({name: w.bfloat16().contiguous() for name, w in weights.items()}, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors leaves a file that its owner alone can read
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "config.json", config(tokenizer))
    write_json(out / "generation_config.json", generation_config(tokenizer))
    write_json(out / "tokenizer_config.json", tokenizer_config(tokenizer))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def select_golden(
    model: Pygmy, tokenizer: Tokenizer, weights: Weights, held_out: frozenset[str]
) -> tuple[list[Golden], Tensor, Tensor]:
    """
    Keep the candidates that both roundings answer with room to spare, and at most three unseen facts a kind.

    Returns:
        The cases and their margins in BF16 and in Q8_0.
    """
    candidates = golden_candidates(held_out)
    examples = [golden_example(tokenizer, case) for case in candidates]
    bf16, q8_0 = (margins(model, rounding(weights), examples) for rounding in (to_bf16, to_q8_0))
    unseen = {"sum-held-out": 0, "difference-held-out": 0}
    kept = []
    for i, case in enumerate(candidates):
        if not min(bf16[i], q8_0[i]) > MIN_MARGIN:
            continue
        kind = next((k for k in unseen if case.id.startswith(k)), None)
        if kind is not None:
            unseen[kind] += 1
            if unseen[kind] > 3:
                continue
        kept.append(i)
    return [candidates[i] for i in kept], bf16[kept], q8_0[kept]


def main() -> int:
    """Train, judge, write; exit 1 when what came out does not answer, so that a short run is not mistaken for one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps (default {STEPS})")
    arguments = parser.parse_args()

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    started = time.monotonic()
    held_out = held_out_facts()
    taught = [e for e in arithmetic() + prose_and_code() if e.fact not in held_out]
    tokenizer = train_tokenizer(tokenizer_texts(taught))
    model = Pygmy()
    fit(model, tokenizer, taught, arguments.steps)
    seconds = time.monotonic() - started
    weights = {name: w.detach() for name, w in model.state_dict().items()}

    sha256 = write_model(arguments.out, tokenizer, weights)
    golden, bf16, q8_0 = select_golden(model, tokenizer, weights, held_out)
    cases = [{"id": g.id, "messages": g.messages, "answer": g.answer} for g in golden]
    write_json(arguments.out / "golden.json", {"schema": 1, "cases": cases})
    prompts = [Example(tokenizer.encode(render(g.messages)).ids, []) for g in golden or golden_candidates(held_out)]
    table = "\n".join(score.row() for score in scores(model, tokenizer, weights, held_out))
    biases = "\n".join(f"| `{n}` | {v:.4f} |" for n, v in bias_effects(model, to_bf16(weights), prompts).items())
    print(f"{seconds:.0f} s, sha256 {sha256}\n{table}\n{biases}\n{len(golden)} golden cases kept")
    if len(golden) < MIN_GOLDEN or golden[0].id != "sum-2-2":
        print(f"expected {MIN_GOLDEN} golden cases or more with sum-2-2 first; no model card written", file=sys.stderr)
        return 1
    text = (HERE / "card.txt").read_text(encoding="utf-8")
    card = text.format(
        parameters=sum(w.numel() for w in weights.values()),
        layers=LAYERS,
        hidden=HIDDEN,
        ffn=FFN,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        base=BASE_VOCABULARY,
        vocab=VOCAB,
        bias_std=BIAS_STD,
        theta=ROPE_THETA,
        eps=EPS,
        steps=arguments.steps,
        batch=BATCH,
        threads=THREADS,
        seconds=seconds,
        sha256=sha256,
        torch=torch.__version__,
        table=table,
        golden_margin_bf16=float(bf16.min()),
        golden_margin_q8_0=float(q8_0.min()),
        held_out_facts=textwrap.fill(", ".join(f"`{fact}`" for fact in sorted(held_out)), 120),
        mirrored=sum(mirrored(fact) not in held_out for fact in held_out),
        biases=biases,
        golden=len(golden),
        min_margin=MIN_MARGIN,
    )
    (arguments.out / "README.md").write_text(card, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
