"""Shrink the thin LLaVA's cache in a chat: early layers after the prompt, older pictures later.

With the bundled tiny-llava-digits. Bytes are read off the tensors' storages.
"""

from PIL import Image

from adsc_kernels.llava import Llava, bundled_checkpoint

folder = bundled_checkpoint()
model = Llava.from_pretrained(folder, "4:1/4,8:1/4,12:1/4")
pictures = [Image.open(path) for path in sorted((folder / "pictures").glob("*.png"))[:2]]
prompt = "USER: <image>\nWhat digit is at row 2 column 3? ASSISTANT:"


def told(what: str, cache) -> None:
    stages = ", ".join(f"{n:,}" for n in cache.bytes_per_stage)
    print(f"{what:32}{sum(cache.bytes_per_stage):>11,} bytes  ({stages})")


for early in (False, True):
    answer = model.generate([prompt], [[pictures[0]]], max_new_tokens=4, compact_early_layers=early)
    talk = answer.conversation
    told("early layers shrunk" if early else "as the schedule leaves it", talk.cache)
    print("  answer:", answer.texts[0])

answer = model.generate(
    [prompt], [[pictures[1]]], max_new_tokens=4, compact_early_layers=True, conversation=talk
)
told("a second picture", talk.cache)
print("  answer:", answer.texts[0])
talk.compact_images(older_than=1, keep="1/4")
told("the first picture shrunk again", talk.cache)
