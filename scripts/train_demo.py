"""Train the demo model that ships with hasten: a small Llama-style model of Python source.

    python scripts/train_demo.py --work build/demo --minutes 100      # resumes where it stopped
    python scripts/train_demo.py --work build/demo --init src/hasten/demo    # goes on from shipped weights
    python scripts/train_demo.py --work build/demo --export src/hasten/demo

Text: the running Python's standard library and the permissively licensed packages found installed.
Several processes share a step when started by `torchrun --nproc-per-node N scripts/train_demo.py ...`; one thread
each (OMP_NUM_THREADS=1) beats one process of N threads wherever the cores do other work too.
Splits are by file (`src/hasten/demo/splits.json` names the held-out modules); a file is dropped when its lines
mostly repeat held-out or earlier text, because packages vendor copies of the standard library.
Needs torch, transformers and tokenizers (`pip install hasten[train]`).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import random
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ROOT / "src/hasten/demo/splits.json"
VOCABULARY = 4096
CONTEXT = 1024
# The pattern llama.cpp knows as "llama-bpe": keeps `.append`, `):\n` and indentation in few tokens.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PERMISSIVE = ("mit", "bsd", "apache", "psf", "python software foundation", "isc", "unlicense", "zlib")
END = "<|endoftext|>"


def licence_is_permissive(distribution: importlib.metadata.Distribution) -> bool:
    meta = distribution.metadata
    words = " ".join(
        [meta.get("License-Expression") or "", (meta.get("License") or "")[:200]]
        + [c for c in meta.get_all("Classifier") or [] if c.startswith("License")]
    ).lower()
    return any(p in words for p in PERMISSIVE) and "gpl" not in words


def source_files(extra: list[Path]) -> list[tuple[str, Path]]:
    """(origin, path) of every candidate: standard library first, so that vendored copies of it are what is dropped."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    found = [
        ("stdlib", p)
        for p in sorted(stdlib.rglob("*.py"))
        if "site-packages" not in p.parts and not {"lib2to3", "idlelib"} & set(p.parts)
    ]
    for distribution in importlib.metadata.distributions(path=[str(p) for p in extra] or sys.path):
        if not licence_is_permissive(distribution):
            continue
        for file in sorted(distribution.files or []):
            if file.suffix == ".py":
                found.append((distribution.metadata["Name"], Path(str(distribution.locate_file(file)))))
    return found


def shingles(text: str) -> set[int]:
    """Hashes of every run of three non-blank lines: what near-duplicate files share."""
    lines = [s for line in text.splitlines() if len(s := line.strip()) > 3]
    return {hash(tuple(lines[i : i + 3])) for i in range(max(0, len(lines) - 2))}


def collect(extra: list[Path], limit: int) -> tuple[list[str], list[str], dict[str, object]]:
    """Texts to train on, held-out texts, and facts; the standard library, the cleanest text at hand, counts twice."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    splits = json.loads(SPLITS.read_text())
    names = [n for split in ("calibration", "search", "final") for n in splits[split]]
    held = [(stdlib / n).read_text() for n in names if (stdlib / n).exists()]
    held_shingles = [shingles(t) for t in held]
    seen: set[int] = set().union(*held_shingles)
    held_paths = {(stdlib / n).resolve() for n in names}
    train, origins, dropped, per_origin = [], {}, 0, {}
    for origin, path in source_files(extra):
        if path.resolve() in held_paths or not path.exists():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        # Generated tables and data files teach nothing; tests of the held-out modules quote them.
        lines = text.count("\n") + 1
        if not 300 < len(text) < 300_000 or len(text) / lines > 70 or path.stem.startswith("test_"):
            continue
        if sum(c.isdigit() for c in text) > 0.12 * len(text) or not text.isascii():
            continue
        if per_origin.get(origin, 0) > limit:
            continue
        own = shingles(text)
        # Both ways: a long file may hold a short held-out module whole and still be mostly its own.
        copies = any(len(own & h) > 0.05 * len(h) for h in held_shingles)
        if not own or copies or len(own & seen) > 0.2 * len(own):
            dropped += 1
            continue
        seen |= own
        train += [text] * (2 if origin == "stdlib" else 1)
        per_origin[origin] = per_origin.get(origin, 0) + len(text)
    origins = dict(sorted(per_origin.items(), key=lambda item: -item[1]))
    return train, held, {"characters": origins, "near_duplicates_dropped": dropped, "held_out": names}


def make_tokenizer(texts: list[str], path: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def prepare(work: Path, extra: list[Path], limit: int, start: Path | None) -> None:
    """Write tokenizer.json, train.npy and held.npy (uint16 token streams, documents ended by END)."""
    from tokenizers import Tokenizer

    train, held, facts = collect(extra, limit)
    random.Random(0).shuffle(train)
    if start:  # the weights know this tokenizer only
        (work / "tokenizer.json").write_bytes((start / "tokenizer.json").read_bytes())
        earlier = json.loads((start / "training.json").read_text())
        facts["earlier_tokens"] = earlier["tokens"] + earlier.get("earlier_tokens", 0)
    else:
        make_tokenizer(train, work / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    for name, texts in (("train", train), ("held", held)):
        stream: list[int] = []
        for encoding in tokenizer.encode_batch(texts):
            stream += [*encoding.ids, end]
        np.save(work / f"{name}.npy", np.array(stream, dtype=np.uint16))
        facts[f"{name}_tokens"] = len(stream)
        facts[f"{name}_bytes"] = sum(len(t) for t in texts)
    facts["python"] = sys.version.split()[0]
    (work / "data.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps({k: v for k, v in facts.items() if k not in ("characters", "held_out")}))


def make_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            p.data.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), in float32: torch's bf16 is slow on many CPUs.

    The update's root mean square is matched to AdamW's (Moonlight, arXiv:2502.16982, eq. 4), so one rate serves both.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(buffer, group["momentum"])
                wide = x if x.shape[0] <= x.shape[1] else x.T
                wide = wide / (wide.norm() + 1e-7)
                for _ in range(5):
                    a = wide @ wide.T
                    wide = 3.4445 * wide + (-4.7750 * a + 2.0315 * a @ a) @ wide
                update = wide if x.shape[0] <= x.shape[1] else wide.T
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def has_bf16(device: str) -> bool:
    if device != "cpu":
        return True
    info = Path("/proc/cpuinfo")
    return info.exists() and ("avx512_bf16" in info.read_text() or "amx_bf16" in info.read_text())


def batches(stream: np.ndarray, size: int, length: int, step: int) -> torch.Tensor:
    """Tokens [size, length + 1]: windows drawn without replacement within an epoch, keyed by the step alone."""
    windows = (len(stream) - 1) // length
    rows = []
    for k in range(step * size, (step + 1) * size):
        epoch, i = divmod(k, windows)
        order = np.random.default_rng(epoch).permutation(windows)
        rows.append(stream[order[i] * length : order[i] * length + length + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def held_out_perplexity(model, stream: np.ndarray, autocast, tokens: int, device: str) -> float:
    model.eval()
    total, count = 0.0, 0
    for start in range(0, min(tokens, len(stream) - CONTEXT), 8 * CONTEXT):
        rows = [stream[s : s + CONTEXT] for s in range(start, min(start + 8 * CONTEXT, len(stream) - CONTEXT), CONTEXT)]
        x = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
        with autocast():
            loss = model(input_ids=x, labels=x).loss
        total += float(loss) * x[:, 1:].numel()
        count += x[:, 1:].numel()
    model.train()
    return math.exp(total / count)


def train(work: Path, minutes: float, batch: int, device: str, peak: float, start: Path | None) -> None:
    """Warm up, hold, decay: by wall-clock share of `minutes`, so that any machine ends with a finished model."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    train_stream, held_stream = np.load(work / "train.npy"), np.load(work / "held.npy")
    model = make_model().to(device)
    if start:
        from safetensors.torch import load_file

        missing, unexpected = model.load_state_dict(load_file(start / "model.safetensors"), strict=False)
        assert missing == ["lm_head.weight"]  # the head is tied
        assert not unexpected
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    optimizers = [
        Muon(matrices, lr=peak),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    low = has_bf16(device)

    def autocast():
        return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=low)

    step, elapsed, checkpoint = 0, 0.0, work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, elapsed = state["step"], state["elapsed"]
        print(f"resumed at step {step}, {elapsed / 60:.1f} minutes")

    def save() -> None:
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step,
                "elapsed": elapsed,
            },
            temporary,
        )
        os.replace(temporary, checkpoint)

    last_save, mean, begun = time.monotonic(), None, time.monotonic()
    while True:
        if world > 1:  # the schedule hangs on the clock: one process's
            clock = torch.tensor(elapsed, dtype=torch.float64)
            torch.distributed.broadcast(clock, 0)
            elapsed = clock.item()
        if elapsed >= minutes * 60:
            break
        progress = elapsed / (minutes * 60)
        # The optimiser's own warm-up is by steps (its averages need them); the decay is by time.
        scale = min(1.0, (step + 1) / 100) * min(1.0, max(0.02, (1 - progress) / 0.4))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
        length = CONTEXT if progress > 0.5 else CONTEXT // 2
        rows = batch * CONTEXT // length // world
        # Keyed by progress through tokens: both lengths draw from the same epoch order of their own.
        x = batches(train_stream, rows, length, step * world + rank).to(device)
        with autocast():
            logits = model(input_ids=x[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
        loss.backward()
        if world > 1:
            flat = torch.cat([p.grad.flatten() for p in model.parameters()]) / world
            torch.distributed.all_reduce(flat)
            sizes = [p.numel() for p in model.parameters()]
            for p, piece in zip(model.parameters(), flat.split(sizes), strict=True):
                p.grad = piece.view_as(p)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        now = time.monotonic()
        elapsed, begun = elapsed + now - begun, now
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 20 == 0 and rank == 0:
            tokens = step * batch * CONTEXT
            print(
                f"step {step} loss {mean:.4f} lr {peak * scale:.5f} {elapsed / 60:.1f} min "
                f"{tokens / 1e6:.2f}M tokens ({tokens / len(train_stream):.2f} epochs)",
                flush=True,
            )
        if rank == 0 and now - last_save > 180:
            save()
            last_save = now
        if step % 400 == 0 and rank == 0:
            print(
                f"held-out perplexity {held_out_perplexity(model, held_stream, autocast, 65536, device):.3f}",
                flush=True,
            )
            begun = time.monotonic()
    if rank:
        return
    save()
    final = held_out_perplexity(model, held_stream, autocast, len(held_stream), device)
    (work / "result.json").write_text(
        json.dumps(
            {"held_out_perplexity": final, "steps": step, "tokens": step * batch * CONTEXT, "minutes": elapsed / 60}
        )
    )
    print(f"done: held-out perplexity {final:.3f}")


def export(work: Path, out: Path) -> None:
    """Write the package's files: bf16 safetensors, config, tokenizer and the measured facts for the card."""
    from safetensors.torch import save_file

    model = make_model()
    model.load_state_dict(torch.load(work / "checkpoint.pt", map_location="cpu", weights_only=True)["model"])
    weights = {
        n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters() if n != "lm_head.weight"
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    config = model.config.to_dict()
    config["architectures"], config["dtype"] = ["LlamaForCausalLM"], "bfloat16"
    drop = {
        "_name_or_path",
        "transformers_version",
        "attn_implementation",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
    }
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in drop}, indent=1) + "\n")
    (out / "tokenizer.json").write_bytes((work / "tokenizer.json").read_bytes())
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}\n\n"
        "{% else %}# {{ message['content'] }}\n{% endif %}{% endfor %}"
    )
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": END,
                "eos_token": END,
                "model_max_length": CONTEXT,
                "add_bos_token": False,
                "chat_template": template,
            },
            indent=1,
        )
        + "\n"
    )
    facts = json.loads((work / "data.json").read_text())
    result = work / "result.json"
    facts.update(json.loads(result.read_text()) if result.exists() else {})
    (out / "README.md").write_text(card(facts, sum(p.numel() for p in model.parameters())))
    facts["weights_sha256"] = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"wrote {out}: {(out / 'model.safetensors').stat().st_size / 1e6:.1f} MB of weights")


def card(facts: dict, parameters: int) -> str:
    """The model card: what it is, what it was trained on, how well it predicts, what it is not for."""
    origins = list(facts["characters"])
    earlier = facts.get("earlier_tokens", 0)
    tokens, at_hand = (facts["tokens"] + earlier) / 1e6, facts["train_tokens"] / 1e6
    runs = f" (the first {earlier / 1e6:.1f} million in an earlier run)" if earlier else ""
    perplexity, bytes_each = facts["held_out_perplexity"], facts["held_bytes"] / facts["held_tokens"]
    return f"""# The demo model

A Llama-style language model of Python source with {parameters / 1e6:.1f} million parameters (8 blocks, width 256,
4 query and 2 key/value heads, {VOCABULARY} byte-level BPE tokens, tied head, context {CONTEXT}), made by
`scripts/train_demo.py` so that hasten can be tried and tested without a network.

- **Trained on** {tokens:.1f} million tokens{runs},
  of {at_hand:.1f} million at hand, on a CPU:
  Python {facts["python"]}'s standard library and {len(origins) - 1} permissively licensed packages found installed,
  the largest of them {", ".join(origins[:8])}.
  Files whose lines mostly repeat held-out or earlier text were dropped ({facts["near_duplicates_dropped"]} of them),
  and so were test files.
- **Held out**: {len(facts["held_out"])} standard-library modules (`splits.json`), {facts["held_tokens"]} tokens.
  Perplexity on them is {perplexity:.2f} a token ({bytes_each:.2f} bytes), {math.log2(perplexity) / bytes_each:.3f} bits
  a byte, in windows of {CONTEXT} tokens, float32.
- **It is** a small model that has seen {tokens * 1e6 / parameters:.1f} tokens a parameter: it writes what
  passes for Python at a glance (imports, signatures, docstrings, checks that raise, indentation), repeats itself, makes
  mistakes of syntax, and seldom means anything. It is no assistant: its chat template only puts what you say into a
  comment.
- **Licence**: Apache-2.0, like the project. `training.json` holds the figures above.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the data, checkpoints and log")
    parser.add_argument("--minutes", type=float, default=100, help="wall-clock training time in all")
    parser.add_argument("--batch", type=int, default=4, help=f"sequences of {CONTEXT} tokens a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--packages", type=Path, nargs="*", default=[], help="site-packages folders to read (default: this one)"
    )
    parser.add_argument("--per-package", type=int, default=12_000_000, help="characters taken from one package at most")
    parser.add_argument("--init", type=Path, help="a folder of shipped files to go on from (default: afresh)")
    parser.add_argument("--export", type=Path, help="write the shipped files here and stop")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.export:
        export(arguments.work, arguments.export)
        return
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not (arguments.work / "data.json").exists():
        sys.exit("prepare the data first: run once with one process and --minutes 0")
    if not (arguments.work / "data.json").exists():
        prepare(arguments.work, arguments.packages, arguments.per_package, arguments.init)
    train(
        arguments.work,
        arguments.minutes,
        arguments.batch,
        arguments.device,
        arguments.learning_rate,
        arguments.init,
    )


if __name__ == "__main__":
    main()
