"""What comes in: checkpoints, pictures and prompts, sound and unsound. One clear error each."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_case import IMAGES, PROMPTS, run_whole
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_checkpoints import VOCAB, make_checkpoint, picture

from adsc_kernels.errors import UnsupportedError
from adsc_kernels.hub import read_json
from adsc_kernels.llava import Llava, LlavaConfig, bundled_checkpoint, load_image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, layers=2, max_positions=64)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint) -> Llava:
    return Llava.from_pretrained(checkpoint, device="cpu")


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit_config(folder: Path, **changes) -> None:
    """Set values; a dot stands for a level, None removes."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
        if value is None:
            del place[last]
    path.write_text(json.dumps(config))


# ---- Checkpoints ----------------------------------------------------------------------------


def test_a_sparse_text_config_is_filled_in(copy, model):
    """As in the published checkpoints, which leave out what is a default of Llama's."""
    want = [rows.clone() for rows in run_whole(model)]
    for name in ("hidden_act", "attention_bias", "mlp_bias", "head_dim", "rms_norm_eps"):
        edit_config(copy, **{f"text_config__{name}": None})
    again = Llava.from_pretrained(copy, device="cpu")
    assert again.config == model.config
    for got, rows in zip(run_whole(again), want, strict=True):
        assert torch.equal(got, rows)


def test_stop_tokens_come_from_the_generation_config(copy):
    path = copy / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert Llava.from_pretrained(copy, device="cpu").config.stop_token_ids == (2, 7)
    path.unlink()
    edit_config(copy, text_config__eos_token_id=5)
    assert Llava.from_pretrained(copy, device="cpu").config.stop_token_ids == (5,)


def test_a_processor_saved_whole(copy, model):
    """transformers 5 keeps the image processor's settings inside processor_config.json."""
    from transformers import LlavaProcessor

    (copy / "preprocessor_config.json").unlink()
    parts = (model.processor.image_processor, model.processor.tokenizer)
    LlavaProcessor(*parts, patch_size=4).save_pretrained(copy)
    assert not (copy / "preprocessor_config.json").exists()
    again = Llava.from_pretrained(copy, device="cpu")
    assert torch.equal(again.processor.pixels(IMAGES[1]), model.processor.pixels(IMAGES[1]))


def test_schedules_share_the_weights(model):
    half = model.with_schedule("1:1/2")
    assert half is not model
    assert model.schedule.num_stages == 1
    assert half.language_model is model.language_model
    with pytest.raises(ValueError, match="2 layers"):
        model.with_schedule(type(model.schedule).parse("1:1/2", num_layers=9))
    with pytest.raises(ValueError, match="layer"):
        model.with_schedule("5:1/2")


BAD_CONFIGS = {
    "another architecture": ({"model_type": "llava_next"}, UnsupportedError, "llava_next"),
    "no architecture": ({"model_type": None}, UnsupportedError, "model_type"),
    "another decoder": ({"text_config__model_type": "qwen2"}, UnsupportedError, "qwen2"),
    "another tower": (
        {"vision_config__model_type": "siglip_vision_model"},
        UnsupportedError,
        "siglip",
    ),
    "quantized": ({"quantization_config": {"bits": 4}}, UnsupportedError, "quantization"),
    "another activation": ({"text_config__hidden_act": "gelu"}, UnsupportedError, "hidden_act"),
    "heads": ({"text_config__num_key_value_heads": 3}, ValueError, "num_key_value_heads"),
    "image token": ({"image_token_index": 9999}, ValueError, "image_token_index"),
    "feature layer": ({"vision_feature_layer": 9}, ValueError, "vision_feature_layer"),
    "strategy": ({"vision_feature_select_strategy": "some"}, ValueError, "config.json"),
    # Only newer versions of transformers look at types, and say where.
    "a type": (
        {"text_config__hidden_size": "wide"},
        (ValueError, TypeError),
        "hidden_size: expected an int, got 'wide'",
    ),
    "width": ({"text_config__intermediate_size": 40}, ValueError, "expected floats"),
    "depth": ({"text_config__num_hidden_layers": 3}, ValueError, "missing"),
    "too little depth": ({"text_config__num_hidden_layers": 1}, ValueError, "left over"),
    "tied": (
        {"tie_word_embeddings": True, "text_config__tie_word_embeddings": True},
        ValueError,
        "lm_head",
    ),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_config_that_does_not_fit(name, copy):
    changes, error, message = BAD_CONFIGS[name]
    edit_config(copy, **changes)
    with pytest.raises(error, match=message):
        Llava.from_pretrained(copy, device="cpu")


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def weights_without(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file)


def weights_with(folder: Path, name: str, tensor: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), name: tensor}, file)


def index_to(folder: Path, value: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))


HEAD = "language_model.lm_head.weight"
BAD_FILES = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json"),
    "config cut": (lambda f: cut(f / "config.json", 0.5), ValueError, "not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), ValueError, "JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "neither"),
    "weights cut": (lambda f: cut(f / "model.safetensors", 0.7), ValueError, "damaged"),
    "weights cut short": (lambda f: cut(f / "model.safetensors", 0.01), ValueError, "damaged"),
    "weights empty": (lambda f: cut(f / "model.safetensors", 0), ValueError, "damaged"),
    "a weight missing": (lambda f: weights_without(f, HEAD), ValueError, "lm_head"),
    "a weight left over": (
        lambda f: weights_with(f, "language_model.extra", torch.zeros(2)),
        ValueError,
        "extra",
    ),
    "a weight twice": (
        lambda f: weights_with(f, "lm_head.weight", torch.zeros(48, 32)),
        ValueError,
        "twice",
    ),
    "a weight of another shape": (
        lambda f: weights_with(f, HEAD, torch.zeros(48, 31)),
        ValueError,
        "lm_head",
    ),
    "a weight of ints": (
        lambda f: weights_with(f, HEAD, torch.zeros(48, 32, dtype=torch.int8)),
        ValueError,
        "int8",
    ),
    "an index without a map": (lambda f: index_to(f, {}), ValueError, "weight_map"),
    "a shard missing": (
        lambda f: index_to(f, {"weight_map": {HEAD: "model-00002-of-00002.safetensors"}}),
        FileNotFoundError,
        "model-00002",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ValueError, "tokenizer"),
    "no image processor": (
        lambda f: (f / "preprocessor_config.json").unlink(),
        ValueError,
        "image processor",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_missing_or_damaged(name, copy):
    damage, error, message = BAD_FILES[name]
    damage(copy)
    with pytest.raises(error, match=message):
        Llava.from_pretrained(copy, device="cpu")


def test_an_image_processor_for_another_size(copy):
    path = copy / "preprocessor_config.json"
    path.write_text(path.read_text().replace("16", "20"))
    other = Llava.from_pretrained(copy, device="cpu")
    with pytest.raises(ValueError, match="image processor"):
        other.generate(PROMPTS[:1], IMAGES[:1], max_new_tokens=1)


def test_neither_folder_nor_hub_id(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (tmp_path / "nowhere", "nobody/nothing-of-that-name"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            Llava.from_pretrained(name)


def test_the_bundled_checkpoint_loads():
    model = Llava.from_pretrained(bundled_checkpoint(), device="cpu")
    assert model.config.tokens_per_image == 576
    assert model.config.num_layers >= 16


# ---- Pictures -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_pictures_of_all_modes_become_rgb(mode, tmp_path, model):
    suffix = "tiff" if mode == "CMYK" else "png"
    picture(1).convert(mode).save(tmp_path / f"a.{suffix}")
    image = load_image(tmp_path / f"a.{suffix}")
    assert image.mode == "RGB"
    assert image.size == picture(1).size
    assert model.processor.pixels([image]).shape == (1, 3, 16, 16)
    assert model.processor.pixels([picture(1).convert(mode)]).shape == (1, 3, 16, 16)


def test_pictures_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees
    picture(1, (20, 10)).save(tmp_path / "a.png", exif=exif)
    assert load_image(tmp_path / "a.png").size == (10, 20)


def write_bomb(path: Path) -> None:
    """A PNG of a few bytes that says it has 20000 x 20000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def write_large(path: Path) -> None:
    """Only suspicious, where Pillow warns and goes on."""
    Image.new("1", (10000, 10000)).save(path)


def write_cut(path: Path) -> None:
    picture(1).save(path)
    cut(path, 0.6)


def write_broken(path: Path) -> None:
    picture(1).save(path)
    data = bytearray(path.read_bytes())
    data[60:80] = bytes(20)
    path.write_bytes(data)


BAD_PICTURES = {
    "text": (lambda p: p.write_text("a picture of a cat"), "can't be read"),
    "nothing": (lambda p: p.write_bytes(b""), "can't be read"),
    "cut": (write_cut, "can't be read"),
    "broken": (write_broken, "can't be read"),
    "bomb": (write_bomb, "too large"),
    "large": (write_large, "too large"),
    "16 bits": (lambda p: Image.new("I;16", (8, 8)).save(p), "8 bits"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_files_that_are_no_pictures(name, tmp_path):
    write, message = BAD_PICTURES[name]
    write(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"a\.png.*{message}"):
        load_image(tmp_path / "a.png")


def test_no_picture_at_all(tmp_path):
    for path in (tmp_path / "a.png", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_image(path)


# ---- Prompts --------------------------------------------------------------------------------


BAD_PROMPTS = {
    "none": (([], []), ValueError, "prompts"),
    "a string": (("w1 <image>", None), TypeError, "list of str"),
    "no strings": (([1], None), TypeError, "list of str"),
    "empty": ((["w1", ""], None), ValueError, "empty"),
    "no placeholder": ((["w1"], [[picture(1)]]), ValueError, "got 0 for 1"),
    "no image": ((["w1 <image> w2"], None), ValueError, "got 1 for 0"),
    "too many images": ((["<image> w2"], [[picture(1), picture(2)]]), ValueError, "got 1 for 2"),
    "lists of images": ((["w1", "w2"], [[]]), ValueError, "2 prompts, 1 lists"),
    "no PIL image": ((["<image> w1"], [["a.png"]]), TypeError, "PIL"),
    "a strip": ((["<image> w1"], [[picture(1, (900, 2))]]), ValueError, "100:1"),
    "too long": ((["w1 " * 61], None), ValueError, "at most 64 .*, got 66"),
    "images too long": ((["<image>" * 4 + "w1"], [[picture(1)] * 4]), ValueError, "at most 64"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_prompts_that_do_not_fit(name, model):
    arguments, error, message = BAD_PROMPTS[name]
    with pytest.raises(error, match=message):
        model.generate(*arguments, max_new_tokens=4)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("prefill_chunk", -1),
        ("prefill_chunk", 0),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ],
)
def test_options_out_of_range(option, value, model):
    with pytest.raises(ValueError, match=option):
        model.generate(["w1"], **{option: value})


def test_the_longest_prompt_that_fits(model):
    answer = model.generate(["w1 " * 60], max_new_tokens=3)  # and the opening token: 64
    assert len(answer.conversation.tokens[0]) == 64


def test_a_prompt_may_end_in_a_picture_only_without_compression(model):
    prompt, images = ["w1 <image>"], [[picture(1)]]
    assert len(model.generate(prompt, images, max_new_tokens=1).token_ids[0]) == 1
    with pytest.raises(ValueError, match="behind a picture"):
        model.with_schedule("1:1/2").generate(prompt, images, max_new_tokens=1)


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(model):
    talk = model.generate(["w1", "w2"], max_new_tokens=2).conversation
    tokens = [list(some) for some in talk.tokens]
    again = model.generate(["w3", "w4"], max_new_tokens=2, conversation=talk)
    other = model.generate(["w1", "w2"], max_new_tokens=2).conversation
    for prompts, schedule, message in (
        (["w3"], "", "1 prompts"),
        (["w3", "<image>"], "", "got 1 for 0"),
        (["w3", "w4"], "1:1/2", "schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            model.with_schedule(schedule).generate(prompts, max_new_tokens=2, conversation=other)
        assert other.tokens == tokens
    after = model.generate(["w3", "w4"], max_new_tokens=2, conversation=other)
    assert after.token_ids == again.token_ids


BAD_OPTIONS = {
    "max_new_tokens": [1.5, True, "4", None, 0, -1, 2**63, [1], float("nan")],
    "prefill_chunk": [1.5, True, "4", 0, -1, 2**63, [1]],
    "temperature": [-1, float("nan"), float("inf"), 1e-50, "hot", True, None, 10**5000],
    "top_p": [0, 1.5, float("nan"), "1", True, None, -(10**5000)],
    "seed": [1.5, "1", True, 2**64, -(2**64)],
    "stop": [[5], 5, [""], "", [None], b"w1", {"w1": 1}],
    "on_token": [5, "print"],
    "compact_early_layers": [1, None, "yes"],
    "progress": [1, None],
    "images": [[], [[]], [[5], []], ["a.png", "b.png"], 5, [[picture(1)], []]],
    "prompts": ["w1", [], ["w1"], ["w1", 5], ["w1", ""], None, 5, b"w1", ["w1 " * 80, "w2"]],
    "conversation": [5, "talk", object()],
}


@pytest.fixture(scope="module")
def talk(model):
    return model.generate(["w1", "w2"], max_new_tokens=2).conversation


def state(talk) -> tuple:
    rows = [t.clone() for stage in talk.cache.stages for t in (*stage.k, *stage.v)]
    lens = [stage.lens for stage in talk.cache.stages]
    return (
        [list(some) for some in talk.tokens],
        list(talk.cached),
        list(talk.vision_spans),
        lens,
        rows,
    )


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(BAD_OPTIONS)), st.data())
def test_a_bad_option_moves_nothing_on(model, talk, name, data):
    value = data.draw(st.sampled_from(BAD_OPTIONS[name]))
    good = dict(prompts=["w3", "w4"], max_new_tokens=2, conversation=talk)
    *facts, rows = state(talk)
    # Pictures and prompts that don't go together are told of either.
    named = "(images|prompts)" if name == "images" else name
    with pytest.raises((TypeError, ValueError), match=rf"^{named}\b.*: "):
        model.generate(**good | {name: value})
    *now, rows_now = state(talk)
    assert now == facts
    assert all(map(torch.equal, rows, rows_now))


def test_a_conversation_of_another_model_is_refused(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    make_checkpoint(folder, layers=2, heads=2, kv_heads=2, max_positions=64)
    other = Llava.from_pretrained(folder, device="cpu")
    talk = other.generate(["w1"], max_new_tokens=1).conversation
    with pytest.raises(
        ValueError, match=r"conversation: expected a cache of \(4, 8\) .*, got \(2,"
    ):
        model.generate(["w2"], conversation=talk)


def change(config: dict, name: str, value: object) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[last] = value


NO_SIZE = [0, -1, -4, 1.5, "wide", None, [1], True, 2**40, {}]
BAD_VALUES = {
    **{
        f"text_config.{name}": NO_SIZE
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    },
    "text_config.num_key_value_heads": [0, -1, -4, 3, 1.5, "two", [1]],
    "text_config.num_hidden_layers": [0, -1, 10**7, 1.5, "deep"],
    "vision_config.num_hidden_layers": [0, -1, 10**7, 1.5, "deep"],
    "vision_config.patch_size": [0, -1, 17, "four"],
    "vision_config.image_size": [0, -1, 3, 2**30, "wide"],
    "image_token_index": [-1, 48, 10**9, "image", 1.5],
    "vision_feature_layer": [9, -9, [], [9], "last", 1.5],
    "text_config.rope_parameters": [{"rope_type": "spiral", "rope_theta": 1e4}, 5, "default"],
    "text_config.eos_token_id": ["</s>", -1, [2, "</s>"], 48, 1.5, True],
    "model_type": ["llava_next", 5, None, []],
}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(BAD_VALUES)), st.data())
def test_a_bad_value_in_a_config_is_named(checkpoint, name, data):
    value = data.draw(st.sampled_from(BAD_VALUES[name]))
    config = json.loads((checkpoint / "config.json").read_text())
    change(config, name, value)
    last = name.split(".")[-1].replace("rope_parameters", "rope")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        with pytest.raises((ValueError, UnsupportedError)) as caught:
            LlavaConfig.from_folder(path.parent)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert last in message or "doesn't fit" in message, message


@pytest.mark.parametrize("value", ["</s>", [2, "</s>"], -1, 1.5, True, 10**9])
def test_stop_tokens_that_would_never_stop(value, copy):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id: expected"):
        LlavaConfig.from_folder(copy)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.integers(65, 5000).map(lambda n: "[" * n + "]" * n),
        st.integers(65, 3000).map(lambda n: '{"a":' * n + "1" + "}" * n),
        st.integers(65, 5000).map(lambda n: '{"a": ' + "[" * n),
        st.integers(401, 9000).map(lambda n: '{"a": ' + "9" * n + "}"),
        st.sampled_from(["[]", "5", "null", '"a"', "", "{", '{"a": 1,}']),
    )
)
def test_json_that_is_a_bomb_or_no_object(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(text)
        with pytest.raises(
            ValueError, match=r"config\.json: (not valid JSON|expected a JSON object)"
        ):
            read_json(path)
        path.write_text('{"a": "' + "[{" * 500 + '\\"[[", "b": [[1]]}')
        assert read_json(path)["b"] == [[1]]


@pytest.mark.parametrize(
    "value", [None, 5, ["model.safetensors"], {}, "../model.safetensors", "a/b"]
)
def test_an_index_that_names_no_file_of_the_folder(value, copy):
    index_to(copy, {"weight_map": {HEAD: value}})
    with pytest.raises(ValueError, match="weight_map: expected names of safetensors files, got "):
        Llava.from_pretrained(copy, device="cpu")


def test_pictures_without_pixels(model):
    empty = Image.new("RGB", (4, 4)).crop((0, 0, 0, 0))
    with pytest.raises(ValueError, match="images: expected at least 1 x 1 pixels"):
        model.processor.pixels([empty])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"device": "nope"}, ValueError, "device: expected a device"),
        ({"device": "meta"}, UnsupportedError, "device: expected one that holds weights"),
        ({"dtype": "float16"}, TypeError, "dtype: expected a torch.dtype, got 'float16'"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected torch.float16 or .*, got torch.int8"),
        ({"schedule": 5}, TypeError, "schedule: expected a str, got int"),
        ({"path_or_id": None}, TypeError, "path_or_id: expected a path, got None"),
        ({"path_or_id": ""}, ValueError, "path_or_id: expected a path, got ''"),
    ],
)
def test_from_pretrained_names_what_is_wrong(given, error, message, checkpoint):
    with pytest.raises(error, match=message):
        Llava.from_pretrained(**{"path_or_id": checkpoint} | given)


def test_the_vocabulary_is_as_the_tests_take_it(model):
    assert model.config.image_token_id == VOCAB["<image>"]
