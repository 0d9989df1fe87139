"""Write pictures and questions as a folder in LLaVA's format, for `adsc train` and `adsc eval`.

python dataset.py --split train --pictures 4000 --out data/train
python dataset.py --split held-out --pictures 150 --seed 7 --out data/held-out
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from pictures import Painter, Question, sample_questions, to_rgb

PER_PICTURE = {"cell": 4, "count": 4, "largest": 1, "side": 4, "where": 2, "row": 2, "all": 1}


def record(number: int, image: str, question: Question) -> dict[str, object]:
    """One question about one picture, in LLaVA's format."""
    turns = [
        {"from": "human", "value": f"<image>\n{question.text}"},
        {"from": "gpt", "value": question.answer},
    ]
    return {"id": str(number), "image": image, "kind": question.kind, "conversations": turns}


def write(split: str, pictures: int, seed: int, out: Path, augment: bool, shuffle: bool) -> int:
    """Pictures 0 to `pictures` of the sequence `seed`; each does not depend on the others."""
    painter = Painter(split, augment)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    records: list[dict[str, object]] = []
    for n in tqdm(range(pictures), "pictures", disable=None):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + n)
        batch = painter.sample(1, rng)
        name = f"pictures/{n:05}.png"
        to_rgb(batch.pixels[0]).save(out / name)
        for question in sample_questions(batch.digits[0], rng, PER_PICTURE):
            records.append(record(len(records), name, question))
    if shuffle:
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
        records = [records[n] for n in order.tolist()]
    text = ",\n".join(json.dumps(one) for one in records)
    (out / "conversations.json").write_text(f"[{text}]\n")
    return len(records)


def main() -> None:
    """Write one folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=["train", "held-out"], required=True)
    parser.add_argument("--pictures", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="training digits undistorted")
    parser.add_argument("--shuffle", action="store_true", help="records in random order")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    augment = args.split == "train" and not args.plain
    print(write(args.split, args.pictures, args.seed, args.out, augment, args.shuffle), "questions")


if __name__ == "__main__":
    main()
