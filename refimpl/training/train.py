"""Train the embedded model: `python -m refimpl.training.train --output out/tiny-bf16 [--device cuda]`. Needs
the extra `train`.

The network is transformers' DeepseekV3ForCausalLM; the loss counts the last response of each conversation.
Matrices are stepped by Muon (the momentum orthogonalized, experts each for itself), embeddings, head, norms
and router by AdamW. The router's correction bias is moved by DeepSeek-V3's auxiliary-loss-free rule (section
2.1.2 of its report): down for experts with more than their share of tokens, up for the others. Seeded; the
order of floating point sums, and so the last bits, depend on device and threads.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from refimpl.cli import Parser, integer, number, run, to_json
from refimpl.tiny import BF16_DIR
from refimpl.training.export import save_bf16
from refimpl.training.problems import Problem, conversation, e4m3_table, facts, problems
from refimpl.training.tokens import Encoder, save_tokenizer, train_tokenizer

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "kv_lora_rank": 256,
    "max_position_embeddings": 2048,
    "moe_intermediate_size": 256,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 4,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 512,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 64,
    "vocab_size": 512,
}

LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 2e-3, 0.05, 60
BIAS_SPEED = 2e-3
MICRO_TOKENS, MICRO_BATCHES = (
    4096,
    2,
)  # each micro-batch holds examples of one length, so a step takes several
STEPS = 1150


# --- data ---------------------------------------------------------------------------------------------------

Example = tuple[list[int], int]  # ids, start of the last response


def batches(encoder: Encoder, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (inputs, targets) [B, T] of about MICRO_TOKENS each; targets are -100 outside the last
    response.
    """
    rng = random.Random(f"train {seed}")
    while True:
        pool = sorted((encoder.example(*conversation(rng)) for _ in range(8192)), key=lambda e: len(e[0]))
        made = list(_cut(pool))
        rng.shuffle(made)
        yield from map(collate, made)


def _cut(pool: list[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in pool:  # the last of a batch is its longest
        if len(example[0]) * (len(batch) + 1) > MICRO_TOKENS and batch:
            yield batch
            batch = []
        batch.append(example)
    yield batch


def collate(batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded inputs and targets: causal attention never looks at the padding, so no mask is needed."""
    width = max(len(ids) for ids, _ in batch) - 1
    inputs, targets = np.full((len(batch), width), 2), np.full((len(batch), width), -100)
    for row, (ids, start) in enumerate(batch):
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, start - 1 : len(ids) - 1] = ids[start:]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


# --- optimizer ----------------------------------------------------------------------------------------------


def orthogonalize(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices to g [..., N, K], roughly: Newton-Schulz iteration with Muon's
    coefficients.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for matrices and stacks of them, steps scaled to AdamW's size (0.2 *
    sqrt(longer side)).
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every matrix."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "m" not in state:
                    state["m"] = torch.zeros_like(p)
                m = state["m"].lerp_(p.grad, 1 - group["momentum"])
                # transformers stacks gate over up: two matrices, each with its own directions
                shape = (
                    (-1, 2, p.shape[1] // 2, p.shape[2])
                    if p.dim() == 3 and p.shape[1] == 2 * p.shape[2]
                    else p.shape
                )
                u = orthogonalize(p.grad.lerp(m, group["momentum"]).view(shape)).reshape(p.shape)
                size = 0.2 * max(shape[-2:]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=-group["lr"] * size)


def optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, p in model.named_parameters():
        inside = p.dim() >= 2 and ".layers." in name and ".gate.weight" not in name
        (matrices if inside else others).append(p)
    return [
        Muon(matrices, lr, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: a linear rise, a plateau, a linear fall to nothing over the last half."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (0.5 * steps))


class Balance:
    """Counts each expert's tokens and moves the correction biases after each step."""

    def __init__(self, model: torch.nn.Module):
        self.routers = [m.mlp.gate for m in model.model.layers if hasattr(m.mlp, "gate")]
        self.counts = [torch.zeros_like(r.e_score_correction_bias) for r in self.routers]
        for router, count in zip(self.routers, self.counts):
            router.register_forward_hook(lambda module, args, out, count=count: self._count(count, out[2]))

    @staticmethod
    def _count(count: torch.Tensor, chosen: torch.Tensor) -> None:
        count += torch.bincount(chosen.flatten(), minlength=len(count))

    @torch.no_grad()
    def update(self, speed: float) -> float:
        """Move the biases by `speed`; returns the worst load, 1.0 being perfectly even."""
        worst = max(float(c.max() / c.mean()) for c in self.counts)
        for router, count in zip(self.routers, self.counts):
            router.e_score_correction_bias += speed * torch.sign(count.mean() - count)
            count.zero_()
        return worst


# --- measuring ----------------------------------------------------------------------------------------------


@torch.no_grad()
def solved(model: torch.nn.Module, encoder: Encoder, asked: list[Problem]) -> list[bool]:
    """Whether greedy decoding gives the right answer. Where every step of the canonical response is the
    greedy one no decoding is needed.
    """
    device = next(model.parameters()).device
    right: list[bool] = []
    open_: list[tuple[int, int, list[int]]] = []
    for at in range(0, len(asked), 128):
        part = [encoder.example("", [p]) for p in asked[at : at + 128]]
        inputs, targets = collate(part)
        best = model(input_ids=inputs.to(device), use_cache=False).logits.argmax(-1).cpu()
        wrong = (best != targets) & (targets != -100)
        for row, (ids, start) in enumerate(part):
            ok = not bool(wrong[row].any())
            right.append(ok)
            if not ok:  # greedy up to the first deviation, so decoding goes on from there
                first = int(wrong[row].int().argmax())
                open_.append((at + row, start, [*ids[: first + 1], int(best[row, first])]))
    for index, start, ids in _decode(model, encoder, open_):
        right[index] = encoder.answer(ids[start:]) == asked[index].answer
    return right


def _decode(
    model: torch.nn.Module, encoder: Encoder, rows: list[tuple[int, int, list[int]]], limit: int = 256
) -> list[tuple[int, int, list[int]]]:
    """Continue each (index, start, ids) greedily until end of sentence or `limit` ids."""
    device = next(model.parameters()).device
    while live := [r for r in rows if r[2][-1] != encoder.eos and len(r[2]) < limit][:128]:
        padded = torch.full((len(live), max(len(ids) for _, _, ids in live)), 2)
        for row, (_, _, ids) in enumerate(live):
            padded[row, : len(ids)] = torch.tensor(ids)
        best = model(input_ids=padded.to(device), use_cache=False).logits.argmax(-1).cpu()
        for row, (_, _, ids) in enumerate(live):
            ids.append(int(best[row, len(ids) - 1]))
    return rows


def measure(model: torch.nn.Module, encoder: Encoder, n: int) -> dict[str, float]:
    """Share of right answers on n never-trained problems of each arithmetic kind, and on the closed
    tables.
    """
    model.eval()
    sets = {kind: problems(kind, "heldout", n, seed=1) for kind in ("sum", "difference", "product")}
    sets |= {"e4m3": e4m3_table(), "fact": facts()} | {
        kind: problems(kind, "train", 100, seed=1) for kind in ("talk", "unknown")
    }
    out = {kind: float(np.mean(solved(model, encoder, asked))) for kind, asked in sets.items()}
    model.train()
    return out


# --- the recipe ---------------------------------------------------------------------------------------------


def train(
    model: torch.nn.Module, encoder: Encoder, steps: int, seed: int, lr: float, every: int = 100
) -> None:
    """Run the recipe in place, a line of progress every 100 steps."""
    device, data, balance = next(model.parameters()).device, batches(encoder, seed), Balance(model)
    opts, tokens, losses, start = optimizers(model, lr), 0, torch.zeros((), device=device), time.time()
    for step in range(steps):
        share = schedule(step, steps)
        for group in (g for o in opts for g in o.param_groups):
            group["lr"] = lr * share
        for _ in range(MICRO_BATCHES):
            inputs, targets = (t.to(device) for t in next(data))
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten()) / MICRO_BATCHES
            loss.backward()
            tokens, losses = tokens + inputs.numel(), losses + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            o.step()
            o.zero_grad()
        worst = balance.update(BIAS_SPEED * share)
        if (step + 1) % every == 0:
            line = (
                f"step {step + 1}/{steps} loss {float(losses) / every:.4f} load {worst:.2f} tokens "
                f"{tokens / 1e6:.1f}M {time.time() - start:.0f}s"
            )
            print(line, file=sys.stderr, flush=True)
            losses.zero_()


def build(seed: int, device: str) -> torch.nn.Module:
    """The untrained network; float32 throughout."""
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"}))
    return model.to(device)


def state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """All weights as float32 arrays by DeepSeek's names: transformers' stacks of experts taken apart."""
    out: dict[str, np.ndarray] = {}
    for name, value in model.state_dict().items():
        array = value.float().cpu().numpy()
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            half = array.shape[1] // 2
            for e, both in enumerate(array):
                out[f"{stem}.{e}.gate_proj.weight"], out[f"{stem}.{e}.up_proj.weight"] = (
                    both[:half],
                    both[half:],
                )
        elif last == "down_proj":
            out |= {f"{stem}.{e}.down_proj.weight": matrix for e, matrix in enumerate(array)}
        else:
            out[name] = array
    return out


def main(argv: list[str]) -> int | None:
    """Run `python -m refimpl.training.train` with these arguments."""
    parser = Parser(prog="python -m refimpl.training.train", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=BF16_DIR,
        help="folder for the BF16 checkpoint (default: out/tiny-bf16)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=integer(1), default=STEPS)
    parser.add_argument("--lr", type=number(0, 1e3), default=LEARNING_RATE)
    parser.add_argument("--seed", type=integer(), default=0)
    parser.add_argument(
        "--problems",
        type=integer(1),
        default=1000,
        help="never-trained problems of each kind to measure on at the end",
    )
    args = parser.parse_args(argv)
    torch.set_float32_matmul_precision("high")  # TF32 where there is such a thing
    tokenizer = train_tokenizer()
    encoder, model = Encoder(tokenizer), build(args.seed, args.device)
    train(model, encoder, args.steps, args.seed, args.lr)
    save_tokenizer(tokenizer, args.output)
    save_bf16(state(model), CONFIG, args.output)
    # What is written is rounded to BF16; so is what is measured.
    model.load_state_dict(
        {k: v.bfloat16().float() if "bias" not in k else v for k, v in model.state_dict().items()}
    )
    print(to_json(measure(model, encoder, args.problems)))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
