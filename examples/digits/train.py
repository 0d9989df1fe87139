"""Train ``tiny-llava-digits`` in four stages: ``tower``, ``llm``, ``grow`` and ``export``.

Each stage writes a checkpoint into ``--work`` and picks it up again with ``--resume``::

    python train.py tower  --work runs/digits --minutes 18
    python train.py llm    --work runs/digits --minutes 16
    python train.py llm    --work runs/digits --minutes 40 --look --focus
    python train.py export --work runs/digits --out tiny-llava-digits

The learning rate follows the share of ``--minutes`` (or of ``--steps``) that is spent.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenizer as words
from export import export
from model import Layer, Reader, Sizes, Tower, init_weights, normalise
from pictures import CELL, CELLS, EMPTY, PATCH, SIDE, Batch, Painter, Question, sample_questions

DEPTH = 16
# Where the layers of the shallow decoder end up, with and without the looking layer.
PLACES = {4: (0, 3, 6, 10), 5: (0, 1, 3, 6, 10)}
STAGES = ("tower", "llm", "grow", "export")
STEP_CAP = 4.0  # a step that took this many times the usual one was a pause of the machine


@dataclass
class Budget:
    """Counts steps and the time spent computing, and says how much of the budget is used."""

    minutes: float | None
    steps: int | None
    step: int = 0
    seconds: float = 0.0
    usual: float = 0.0
    _last: float = field(default_factory=time.monotonic)

    def tick(self) -> None:
        """Note that a step is done. Pauses of the machine do not count as time spent."""
        now = time.monotonic()
        took, self._last = now - self._last, now
        if self.usual:
            took = min(took, STEP_CAP * self.usual)
            self.usual += 0.05 * (took - self.usual)
        else:
            self.usual = took
        self.seconds += took
        self.step += 1

    def skip(self) -> None:
        """Leave the time since the last step (an evaluation, a save) out of the account."""
        self._last = time.monotonic()

    @property
    def share(self) -> float:
        """How much of the budget is used, 0..1."""
        if self.steps is not None:
            return min(1.0, self.step / self.steps)
        assert self.minutes is not None
        return min(1.0, self.seconds / 60 / self.minutes)


def rate(base: float, budget: Budget, warmup: int = 25) -> float:
    """Warm-up, then a cosine down to one per cent of ``base``."""
    cosine = 0.5 * (1 + math.cos(math.pi * budget.share))
    return base * min(1.0, (budget.step + 1) / warmup) * (0.01 + 0.99 * cosine)


def optimizer(module: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def save(path: Path, **state: object) -> None:
    """Write a checkpoint so that an interruption leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


class Run:
    """The frame of a training stage: its budget, its rate, and a checkpoint to go on from."""

    def __init__(self, args: argparse.Namespace, name: str, lr: float, module: nn.Module) -> None:
        self.name, self.module, self.lr, self.every = name, module, args.lr or lr, args.every
        self.adam = optimizer(module, self.lr)
        self.budget = Budget(args.minutes, args.steps)
        self.rng = torch.Generator().manual_seed(args.seed * 1000 + STAGES.index(name))
        self.path = args.work / f"{name}.pt"
        self.losses: list[float] = []
        if (args.resume or args.restart) and self.path.exists():
            state = torch.load(self.path, map_location=args.device)
            module.load_state_dict(state["module"])
            if args.resume:
                self.adam.load_state_dict(state["adam"])
                self.rng.set_state(state["rng"].cpu())
                self.budget.step, self.budget.seconds = state["step"], state["seconds"]

    def train(self, loss_of_batch: Callable[[], Tensor], score: Callable[[], str]) -> None:
        """Steps until the budget is used up; a score and a checkpoint every `every` steps."""
        self.budget.skip()
        while self.budget.share < 1.0:
            self._step(loss_of_batch())
            if self.budget.step % self.every == 0 or self.budget.share >= 1.0:
                print(f"{self.name} step {self.budget.step} held-out {score()}", flush=True)
                save(
                    self.path,
                    module=self.module.state_dict(),
                    adam=self.adam.state_dict(),
                    rng=self.rng.get_state(),
                    step=self.budget.step,
                    seconds=self.budget.seconds,
                )
                self.budget.skip()

    def _step(self, loss: Tensor) -> None:
        self.adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate(self.lr, self.budget)
        self.adam.step()
        self.budget.tick()
        self.losses.append(loss.item())
        if self.budget.step % 20 == 0:
            mean = sum(self.losses) / len(self.losses)
            self.losses.clear()
            print(
                f"{self.name} step {self.budget.step} {self.budget.share:6.1%} loss {mean:.3f} "
                f"{self.budget.usual:.2f} s/step",
                flush=True,
            )


class TowerHeads(nn.Module):
    """What the tower learns from: the digit on each patch, and the row and column of its cell."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(sizes.tower_width)
        self.out = nn.Linear(sizes.tower_width, 11 + 2 * CELLS)
        init_weights(self)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        digit, row, column = self.out(self.norm(features)).split([11, CELLS, CELLS], -1)
        return digit, row, column


def cell_places(device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of the cell of every patch."""
    cell = torch.arange(SIDE, device=device) // (CELL // PATCH)
    return cell.repeat_interleave(SIDE), cell.repeat(SIDE)


@torch.no_grad()
def tower_accuracy(tower: Tower, heads: TowerHeads, device: torch.device, n: int) -> float:
    """Share of held-out digits that the patches of their box name rightly together."""
    batch = Painter("held-out", augment=False).sample(n, torch.Generator().manual_seed(1))
    right = total = 0
    for i in range(0, n, 32):
        pixels = normalise(batch.pixels[i : i + 32].to(device))
        digit = heads(tower(pixels))[0][..., :10].float().softmax(-1).cpu()
        covered = (batch.patches[i : i + 32].flatten(1) != EMPTY)[..., None]
        step = CELL // PATCH
        votes = (digit * covered).view(-1, CELLS, step, CELLS, step, 10).sum((2, 4))
        truth = batch.digits[i : i + 32]
        right += int(((votes.argmax(-1) == truth) & (truth != EMPTY)).sum())
        total += int((truth != EMPTY).sum())
    return right / total


def train_tower(args: argparse.Namespace) -> None:
    """Pretrain the vision tower alone: each patch names the digit whose box covers it."""
    device = torch.device(args.device)
    sizes = Sizes()
    torch.manual_seed(args.seed)
    tower, heads = Tower(sizes).to(device), TowerHeads(sizes).to(device)
    run = Run(args, "tower", 1.5e-3, nn.ModuleList([tower, heads]))
    painter = Painter("train", augment=True)
    rows, columns = cell_places(device)

    def loss_of_batch() -> Tensor:
        batch = painter.sample(args.batch, run.rng)
        cells = CELLS if run.budget.share < args.local_share else 0
        digit, row, column = heads(tower(normalise(batch.pixels.to(device)), cells))
        target = batch.patches.flatten(1).to(device)
        target = torch.where(target == EMPTY, 10, target)
        each = F.cross_entropy(digit.flatten(0, 1), target.flatten(), reduction="none")
        covered = target.flatten() != 10
        loss = each[covered].mean() + 0.3 * each[~covered].mean()
        n = len(target)
        place = F.cross_entropy(row.flatten(0, 1), rows.repeat(n))
        place = place + F.cross_entropy(column.flatten(0, 1), columns.repeat(n))
        return loss + 0.1 * place

    def share() -> str:
        return f"digits {tower_accuracy(tower, heads, device, args.pictures):.2%}"

    run.train(loss_of_batch, share)


class Quiz:
    """Turns pictures into question tokens with the answers to learn."""

    MIX: ClassVar = {"cell": 5, "count": 4, "largest": 1, "side": 3, "where": 2, "row": 2, "all": 1}
    # The second half of the training: most of it on what is learned last.
    FOCUS: ClassVar = {
        "cell": 2,
        "count": 12,
        "largest": 1,
        "side": 14,
        "where": 4,
        "row": 2,
        "all": 1,
    }

    def __init__(self, focus: bool = False) -> None:
        self.mix = self.FOCUS if focus else self.MIX
        self.with_hints = focus
        self.tokenizer = words.build()
        self.opening = torch.tensor(self.tokenizer(words.OPENING)["input_ids"])
        self.known: dict[str, list[int]] = {}

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text inside a prompt."""
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.known[text]

    def hints(self, question: Question, tail: list[int], digits: Tensor) -> list[tuple[int, int]]:
        """Where a question names a digit to be found, what its own token is to predict.

        That is the answer of a "where", and the digit's column in a "side". Without it both stay at
        chance for thousands of steps: the search has to form before it can be used.
        """
        if not self.with_hints or question.kind not in ("where", "side"):
            return []
        found = []
        for d in range(10):
            (token,) = self.tokens(f" {d}")
            if token not in tail:
                continue
            column = int((digits == d).nonzero()[0, 1]) + 1
            text = question.answer if question.kind == "where" else str(column)
            found.append((tail.index(token), self.tokens(f" {text}")[0]))
        return found

    def ask(self, batch: Batch, rng: torch.Generator) -> tuple[Tensor, Tensor, list[list[str]]]:
        """Question tokens [b, q, t], next-token targets (-100 where none), and the kinds."""
        questions = [sample_questions(digits, rng, self.mix) for digits in batch.digits]
        rows, hints = [], []
        for digits, picture in zip(batch.digits, questions, strict=True):
            for question in picture:
                tail = self.tokens(words.question_tail(question.text))
                answer = [*self.tokens(f" {question.answer}"), self.tokenizer.eos_token_id]
                rows.append((tail, answer))
                hints.append(self.hints(question, tail, digits))
        q = max(len(picture) for picture in questions)
        t = max(len(tail) + len(answer) for tail, answer in rows)
        tokens = torch.full((len(questions), q, t), self.tokenizer.pad_token_id)
        targets = torch.full((len(questions), q, t), -100)
        i = 0
        for p, picture in enumerate(questions):
            for k in range(len(picture)):
                tail, answer = rows[i]
                i += 1
                tokens[p, k, : len(tail) + len(answer)] = torch.tensor(tail + answer)
                end = len(tail) + len(answer) - 1
                targets[p, k, len(tail) - 1 : end] = torch.tensor(answer)
                for at, hint in hints[i - 1]:
                    targets[p, k, at] = hint
        return tokens, targets, [[question.kind for question in picture] for picture in questions]


def load_module(args: argparse.Namespace, name: str) -> dict[str, Tensor]:
    """The weights that the stage `name` has reached."""
    return torch.load(args.work / f"{name}.pt", map_location=args.device)["module"]


def load_tower(args: argparse.Namespace, device: torch.device) -> Tower:
    """The pretrained tower, frozen."""
    state = load_module(args, "tower")
    tower = Tower(Sizes()).to(device)
    tower.load_state_dict({k[2:]: v for k, v in state.items() if k.startswith("0.")})
    return tower.requires_grad_(False).eval()


@torch.no_grad()
def score(
    reader: Reader, tower: Tower, quiz: Quiz, device: torch.device, pictures: int
) -> dict[str, float]:
    """Share of held-out questions whose whole answer is right, by kind."""
    painter = Painter("held-out", augment=False)
    rng = torch.Generator().manual_seed(7)
    right: dict[str, list[bool]] = {}
    for start in range(0, pictures, 16):
        batch = painter.sample(min(16, pictures - start), rng)
        tokens, targets, kinds = quiz.ask(batch, rng)
        features = tower(normalise(batch.pixels.to(device)))
        logits = reader(features, quiz.opening.to(device), tokens.to(device)).cpu()
        hit = ((logits.argmax(-1) == targets) | (targets < 0)).all(-1)
        for p, picture in enumerate(kinds):
            for k, kind in enumerate(picture):
                right.setdefault(kind, []).append(bool(hit[p, k]))
    everything = [h for hits in right.values() for h in hits]
    shares = {kind: sum(hits) / len(hits) for kind, hits in right.items()}
    return {"overall": sum(everything) / len(everything), **shares}


def train_reader(args: argparse.Namespace, name: str, lr: float, reader: Reader) -> None:
    """Train projector and decoder on the frozen tower's features; loss on answers alone."""
    device = torch.device(args.device)
    tower, quiz = load_tower(args, device), Quiz(args.focus)
    reader.to(device)
    run = Run(args, name, lr, reader)
    painter = Painter("train", augment=True)
    opening = quiz.opening.to(device)

    def loss_of_batch() -> Tensor:
        batch = painter.sample(args.batch, run.rng)
        tokens, targets, _ = quiz.ask(batch, run.rng)
        with torch.no_grad():
            features = tower(normalise(batch.pixels.to(device)))
        logits = reader(features, opening, tokens.to(device))
        return F.cross_entropy(logits.flatten(0, 2), targets.flatten().to(device))

    def shares() -> str:
        each = score(reader, tower, Quiz(), device, args.pictures)
        return " ".join(f"{kind} {share:.1%}" for kind, share in each.items())

    run.train(loss_of_batch, shares)


@torch.no_grad()
def looking_layer(reader: Reader, tower: Tower, seed: int) -> Layer:
    """A new second layer in which two heads start by looking at the digit that a token names.

    Reading a place from a name ("the 7") needs a head that finds the patches of a 7 from the token
    "7"; from random heads it takes thousands of steps to appear. Here its queries and keys are
    fitted by ridge regression to the digit that the token names and to the digit on the patch, its
    values to the row and column of the patch, on training pictures. The output matrices are zero:
    what to do with it is left to the training.
    """
    device = reader.lm_head.weight.device
    sizes = reader.sizes
    rng = torch.Generator().manual_seed(seed + 2)
    layer = Layer(sizes)
    init_weights(layer)
    nn.init.zeros_(layer.self_attn.o_proj.weight)
    nn.init.zeros_(layer.mlp.down_proj.weight)
    layer.to(device)
    quiz = Quiz()
    batch = Painter("train", augment=True).sample(24, rng)
    tokens, targets, _ = quiz.ask(batch, rng)
    states: list[Tensor] = []
    hook = reader.layers[0].register_forward_hook(lambda *call: states.append(call[2]))
    reader(tower(normalise(batch.pixels.to(device))), quiz.opening.to(device), tokens.to(device))
    hook.remove()
    hidden = layer.input_layernorm(states[0])
    start = len(quiz.opening)
    image, text = hidden[:, start : start + SIDE * SIDE], hidden[:, start + SIDE * SIDE :]

    def fit(inputs: Tensor, wanted: Tensor) -> Tensor:
        square = inputs.T @ inputs / len(inputs)
        ridge = 1e-3 * square.diagonal().mean() * torch.eye(len(square), device=device)
        return torch.linalg.solve(square + ridge, inputs.T @ wanted / len(inputs)).T

    named = torch.full((len(quiz.tokenizer),), 10)
    for d in range(10):
        named[quiz.tokens(f" {d}")] = d
    asked = (targets < 0) & (tokens != quiz.tokenizer.pad_token_id)
    names = F.one_hot(named[tokens[asked]], 11)[:, :10].float().to(device)
    queries = fit(text.reshape(*tokens.shape, -1)[asked.to(device)], names)
    seen = batch.patches.flatten(1)
    seen = F.one_hot(torch.where(seen == EMPTY, 10, seen), 11)[..., :10].float().to(device)
    keys = fit(image.flatten(0, 1), seen.flatten(0, 1))
    rows, columns = cell_places(device)
    places = torch.cat([F.one_hot(rows, CELLS), F.one_hot(columns, CELLS)], 1).float()
    values = fit(image.flatten(0, 1), places.repeat(len(image), 1))
    # The slowest five pairs of the rotary embedding hardly turn over a picture; the queries are
    # turned half a picture ahead.
    head, half = layer.head, layer.head // 2
    pairs = torch.arange(half - 5, half)
    turn = SIDE * SIDE / 2 * sizes.rope_theta ** (-pairs.float() / half)
    cos, sin = turn.cos()[:, None].to(device), turn.sin()[:, None].to(device)
    first, second = queries[:5], queries[5:]
    a = layer.self_attn
    for h in range(layer.groups):
        q = a.q_proj.weight[h * head : (h + 1) * head]
        q.zero_()
        q[pairs] = 9.0 * (first * cos + second * sin)
        q[pairs + half] = 9.0 * (second * cos - first * sin)
    k = a.k_proj.weight[:head]
    k.zero_()
    k[pairs], k[pairs + half] = 9.0 * keys[:5], 9.0 * keys[5:]
    a.v_proj.weight[: 2 * CELLS] = values
    return layer


def depth_of(state: dict[str, Tensor]) -> int:
    """How many layers a stored decoder has."""
    return 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))


def train_llm(args: argparse.Namespace) -> None:
    """Train a decoder of four layers, or of five with the looking layer."""
    torch.manual_seed(args.seed)
    stored = None
    if (args.resume or args.restart or args.look) and (args.work / "llm.pt").exists():
        stored = load_module(args, "llm")
    reader = Reader(Sizes(), depth_of(stored) if stored else 4, len(words.build()))
    if args.look and len(reader.layers) == 4:
        if stored is None:
            raise SystemExit(f"--look goes on from {args.work / 'llm.pt'}, which is not there")
        reader.load_state_dict(stored)
        tower = load_tower(args, torch.device(args.device))
        reader.layers.insert(1, looking_layer(reader.to(args.device), tower, args.seed))
        args.resume = args.restart = False  # what is stored has no such layer yet
    train_reader(args, "llm", 1.5e-3, reader)


def deepened(state: dict[str, Tensor]) -> Reader:
    """Put the layers of ``state`` among others that start as the identity.

    A layer whose output projections are zero adds nothing to the residual stream, so the deep model
    begins where the shallow one ended: most of the training costs a quarter.
    """
    reader = Reader(Sizes(), depth_of(state), len(words.build()))
    reader.load_state_dict(state)
    trained = list(reader.layers)
    places = PLACES[len(trained)]
    layers = []
    for place in range(DEPTH):
        if place in places:
            layers.append(trained[places.index(place)])
            continue
        layer = Layer(Sizes())
        init_weights(layer)
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
        layers.append(layer)
    reader.layers = nn.ModuleList(layers)
    return reader


def train_grown(args: argparse.Namespace) -> None:
    """Train all sixteen layers, from where the shallow decoder ended."""
    torch.manual_seed(args.seed + 1)
    train_reader(args, "grow", 6e-4, deepened(load_module(args, "llm")))


def load_reader(args: argparse.Namespace) -> Reader:
    """The newest decoder there is, at full depth."""
    if not (args.work / "grow.pt").exists():
        torch.manual_seed(args.seed + 1)
        return deepened(load_module(args, "llm"))
    reader = Reader(Sizes(), DEPTH, len(words.build()))
    reader.load_state_dict(load_module(args, "grow"))
    return reader


def run_export(args: argparse.Namespace) -> None:
    """Write the trained parts as a Hugging Face checkpoint."""
    args.device = "cpu"
    export(load_tower(args, torch.device("cpu")), load_reader(args), words.build(), args.out)


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=Path("runs/digits"), help="checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--batch", type=int, default=16, help="pictures in a step")
    parser.add_argument(
        "--every", type=int, default=200, help="steps from checkpoint to checkpoint"
    )
    parser.add_argument("--pictures", type=int, default=64, help="held-out pictures in a score")
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--out", type=Path, default=Path("tiny-llava-digits"), help="export")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--restart", action="store_true", help="old weights, new budget")
    parser.add_argument("--look", action="store_true", help="add the looking layer (llm)")
    parser.add_argument("--focus", action="store_true", help="more of what is learned last")
    parser.add_argument(
        "--local-share", type=float, default=0.55, help="of the tower's budget: cells on their own"
    )
    args = parser.parse_args()
    if args.stage != "export" and args.minutes is None and args.steps is None:
        parser.error("say how long: --minutes or --steps")
    stages = {"tower": train_tower, "llm": train_llm, "grow": train_grown, "export": run_export}
    stages[args.stage](args)


if __name__ == "__main__":
    main()
