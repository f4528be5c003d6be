"""Pretrained weights in and out, by the command line, from tiny models that transformers saved."""

import json
import os
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from fork_server import ForkServer, codes, outputs, run_together
from parity.golden import FOLDER, LANGUAGE_MODELS, VISION_ENCODERS
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_pipelines import convert
from unihetero_jax import hf_config, hf_weights
from unihetero_jax.cli import main
from unihetero_jax.config import RopeScalingConfig, to_dict
from unihetero_jax.config_reading import from_config_dict
from unihetero_jax.data.tokenizer import BOI, EOI, extend_tokenizer, load_tokenizer
from unihetero_jax.inference.generate import Prompt, prompt_sample
from unihetero_jax.loaded_run import load_run
from unihetero_jax.metrics import read_metrics
from unihetero_jax.safetensors_files import find_tensors

ROOT = Path(__file__).parents[1]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def add_tokenizer(folder, chat=""):
    """A byte-level tokenizer of fewer tokens than the golden models' 96 rows."""
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?.,<|>_", "Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(vocab_size=70, special_tokens=specials, show_progress=False, initial_alphabet=letters)
    backend.train_from_iterator([], trainer)
    (folder / "tokenizer.json").write_text(backend.to_str())
    declared = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(declared | ({"chat_template": chat} if chat else {})))


def model_folder(tmp_path, name, chat=""):
    folder = tmp_path / name
    shutil.copytree(FOLDER / name, folder)
    if name in LANGUAGE_MODELS:
        add_tokenizer(folder, chat)
    return folder


def imported(tmp_path, language="qwen2", vision="siglip2", *flags, chat=""):
    """A workdir of an import, and the folders that it came from."""
    folders = [model_folder(tmp_path, name, chat) for name in (language, vision)]
    workdir = tmp_path / "imported"
    command = ["import-hf", f"--language-model={folders[0]}", f"--vision-encoder={folders[1]}", f"--workdir={workdir}"]
    assert main([*command, *flags]) == 0
    return workdir, *folders


@pytest.mark.parametrize(("language", "vision"), [("qwen3", "clip"), ("qwen2", "siglip"), ("llama3", "siglip2")])
def test_what_comes_in_goes_out_bit_for_bit(tmp_path, language, vision):
    workdir, language_folder, vision_folder = imported(tmp_path, language, vision)
    out = tmp_path / "out"
    assert main(["export-hf", f"--workdir={workdir}", f"--output={out}", "--original-vocabulary"]) == 0
    ours, theirs = (
        load_file(out / "language_model" / "model.safetensors"),
        load_file(language_folder / "model.safetensors"),
    )
    num_known = load_tokenizer(language_folder).num_known
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        kept = np.ones(len(value), bool)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            kept[num_known : num_known + 2] = False  # spare rows, now of <boi> and <eoi>
        np.testing.assert_array_equal(ours[name][kept], value[kept], err_msg=name)
    ours, theirs = (
        load_file(out / "vision_encoder" / "model.safetensors"),
        load_file(vision_folder / "model.safetensors"),
    )
    for name, value in theirs.items():
        if not name.startswith("head."):
            np.testing.assert_array_equal(ours.pop(f"vision_model.{name}"), value, err_msg=name)
    assert not ours
    again = hf_config.read_language_model(out / "language_model", 64)
    assert again == hf_config.read_language_model(language_folder, 64)
    assert hf_config.read_vision_encoder(out / "vision_encoder") == hf_config.read_vision_encoder(vision_folder)
    assert load_tokenizer(out / "language_model").hash == load_tokenizer(language_folder).hash
    for name in ("language_model", "vision_encoder", "projector", "semantic_head"):
        assert "UniHetero" in (out / name / "README.md").read_text()


@pytest.mark.slow
def test_the_pixel_decoder_goes_out_with_its_sizes(tmp_path):
    workdir, *_ = imported(tmp_path, "qwen2", "siglip2", "--config.objective=unihetero")
    out = tmp_path / "out"
    assert main(["export-hf", f"--workdir={workdir}", f"--output={out}"]) == 0
    run = load_run(str(workdir), -1, 0)
    written = load_file(out / "pixel_decoder" / "model.safetensors")
    assert len(written) == len(jax.tree.leaves(run.params["pixel_decoder"]))
    np.testing.assert_array_equal(written["pixel_decoder/patch/kernel"], run.params["pixel_decoder"]["patch"]["kernel"])
    sizes = json.loads((out / "pixel_decoder" / "config.json").read_text())
    assert sizes["pixel_decoder"]["dim"] == run.config.model.pixel_decoder.dim and sizes["patch_size"] == 4


def test_new_rows_are_the_mean_and_spare_ones_stay(tmp_path):
    workdir, folder, _ = imported(tmp_path)
    run = load_run(str(workdir), -1, 0)
    table, stored = np.asarray(run.params["decoder"]["embedding"]), load_file(folder / "model.safetensors")
    stored = stored["model.embed_tokens.weight"]
    num_known = load_tokenizer(folder).num_known
    assert table.shape == (128, 32) and (run.tokenizer.boi_id, run.tokenizer.eoi_id) == (num_known, num_known + 1)
    np.testing.assert_array_equal(table[:num_known], stored[:num_known])
    np.testing.assert_array_equal(table[num_known + 2 : 96], stored[num_known + 2 :])
    mean = stored[:num_known].mean(axis=0, dtype=np.float64)
    for row in (num_known, num_known + 1, 96, 127):
        np.testing.assert_allclose(table[row], mean, rtol=1e-6)
    rms = np.sqrt((stored[:num_known].astype(np.float64) ** 2).mean())
    assert run.config.model.projector.output_rms == pytest.approx(rms, rel=1e-6)
    np.testing.assert_allclose(run.params["projector"]["norm"]["gain"], rms, rtol=1e-6)


@pytest.mark.slow
def test_all_meshes_load_the_same(tmp_path):
    one, *_ = imported(tmp_path / "one")
    eight, *_ = imported(tmp_path / "eight", "qwen2", "siglip2", "--config.mesh.fsdp=4", "--config.mesh.tensor=2",
                         "--config.eval.batch_rows=8")  # fmt: skip
    plain = load_run(str(one), -1, 0).params
    split = load_run(str(eight), -1, 0, ["--config.mesh.fsdp=1", "--config.mesh.tensor=1"]).params
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(split), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


def test_clip_reads_an_image_in_the_whole_model(tmp_path, capsys):
    """Its class tokens stand behind the patches, whom the attention has to know."""
    workdir, *_ = imported(tmp_path, "qwen3", "clip")
    Image.new("RGB", (24, 24), "red").save(tmp_path / "red.png")
    command = ["generate", f"--workdir={workdir}", "--prompt=what is", f"--image={tmp_path / 'red.png'}"]
    assert main([*command, "--max-new-tokens=3"]) == 0, capsys.readouterr().err


def test_layer_by_layer_loads_the_same(tmp_path, monkeypatch):
    """The way to accelerators, whose memory is not the host's, on the mesh of eight."""
    flags = ["--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--config.eval.batch_rows=8"]
    whole, *_ = imported(tmp_path / "whole", "qwen2", "siglip2", *flags)
    monkeypatch.setattr(hf_weights, "_is_on_hosts", lambda sharding: False)
    layers, *_ = imported(tmp_path / "layers", "qwen2", "siglip2", *flags)
    a, b = (load_run(str(workdir), -1, 0).params for workdir in (whole, layers))
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


@pytest.mark.slow
def test_training_starts_from_pretrained_models(tmp_path, tiny_experiment):
    """`init_from` inside `train`: refused for another architecture, with what to set."""
    from unihetero_jax import step
    from unihetero_jax import train as train_module
    from unihetero_jax.sharding import make_mesh

    workdir, language_folder, vision_folder = imported(tmp_path)
    values = to_dict(load_run(str(workdir), -1, 0).config)
    values["init_from"] |= {"language_model": str(language_folder), "vision_encoder": str(vision_folder)}
    config = from_config_dict(values)
    state = step.init_state(config, make_mesh(config.mesh))
    found = train_module._init_from(config, state).params
    kept = load_run(str(workdir), -1, 0).params
    for name in ("decoder", "encoder"):
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(found[name]), jax.tree.leaves(kept[name]), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))
    values["model"]["decoder"]["mlp_dim"] = 32
    other = from_config_dict(values)
    with pytest.raises(ValueError, match=r"model\.decoder\.mlp_dim: 32 -> 48"):
        train_module._init_from(other, step.init_state(other, make_mesh(other.mesh)))


@pytest.mark.slow
def test_two_processes_start_from_pretrained_models_as_one(tmp_path, repo_root):
    """Each reads from the folders what its devices hold; the losses of the first steps are those of one process."""
    workdir, language_folder, vision_folder = imported(tmp_path)
    for number in range(8):
        Image.new("RGB", (24, 24), (30 * number, 0, 99)).save(tmp_path / f"{number}.png")
    talk = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": "a colour"}]
    records = [{"id": str(n), "image": f"{n}.png", "conversations": talk} for n in range(8)]
    (tmp_path / "talk.json").write_text(json.dumps(records))
    data = ["llava", f"--input={tmp_path / 'talk.json'}", f"--images={tmp_path}", "--licence=CC-BY-4.0",
            f"--tokenizer={workdir / 'tokenizer'}", f"--output={tmp_path / 'data'}", "--patch-size=4",
            "--min-patches=4", "--max-patches=36"]  # fmt: skip
    assert convert.main(data) == 0

    def command(run):
        changes = {
            "init_from.workdir": "", "init_from.components": (), "init_from.language_model": language_folder,
            "init_from.vision_encoder": vision_folder, "data.sources.instructions.path": tmp_path / "data",
            "train.num_steps": 2, "train.global_batch_rows": 4, "train.log_every_steps": 1, "mesh.data": 2,
            "mesh.fsdp": 2, "data.row_tokens": 64, "data.row_patches": 64, "data.num_data_shards": 4,
            "eval.batch_rows": 4, "train.eval_every_steps": 100, "eval.rollout_source": "",
        }  # fmt: skip
        return ["train", f"--config=experiments/finetune.py:{workdir}", f"--workdir={tmp_path / run}",
                *(f"--config.{name}={value}" for name, value in changes.items())]  # fmt: skip

    with ForkServer(repo_root) as first, ForkServer(repo_root) as second:
        one = run_together([first], 1, lambda _: command("one"))
        two = run_together([first, second], 2, lambda _: command("two"))
    assert codes(one) | codes(two) == {0: 0, 1: 0}, outputs(one) + outputs(two)
    assert f"decoder initialised from {language_folder}" in two[0].output
    for ours, theirs in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_chat_template_stands_around_the_prompt(tmp_path, capsys):
    workdir, *_ = imported(tmp_path, chat=CHAT)
    run = load_run(str(workdir), -1, 0)
    assert run.config.eval.chat_template
    before, after = run.tokenizer.chat
    specials = {token: run.tokenizer._backend.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>")}
    assert before[0] == specials["<|im_start|>"] and after[0] == specials["<|im_end|>"]
    # What a user says ends no turn: its characters are ordinary ones.
    (piece_before, piece) = prompt_sample(run.config, run.tokenizer, Prompt("a<|im_end|>b")).pieces
    assert list(piece_before.ids) == before and list(piece.ids[-len(after) :]) == after
    assert specials["<|im_end|>"] not in piece.ids[: -len(after)]
    capsys.readouterr()
    assert main(["generate", f"--workdir={workdir}", "--prompt=what is this", "--max-new-tokens=4"]) == 0
    plain = ["--config.eval.chat_template=False", f"--workdir={workdir}", "--prompt=what is this"]
    assert main(["generate", *plain, "--max-new-tokens=4"]) == 0
    with_chat, without = capsys.readouterr().out.splitlines()
    assert with_chat != without


def test_a_tokenizer_without_a_template_is_said_so(tmp_path, refused):
    workdir, *_ = imported(tmp_path)
    message = refused("generate", f"--workdir={workdir}", "--prompt=a", "--config.eval.chat_template=True")
    assert "has no chat template" in message


def test_extended_tokenizer_keeps_all_ids(tmp_path):
    folder = model_folder(tmp_path, "qwen2")
    ours, num_known = extend_tokenizer(folder, tmp_path / "extended")
    theirs = load_tokenizer(folder)
    assert ours.extends(theirs) and ours.encode("what is") == theirs.encode("what is")
    assert ours.vocab_size == num_known + 2 and {BOI, EOI} <= ours._backend.get_vocab().keys()
    assert not theirs.extends(load_tokenizer(make_tiny_tokenizer(tmp_path)))


def make_tiny_tokenizer(tmp_path):
    from unihetero_jax.data.tokenizer import train_tokenizer

    train_tokenizer(["some text"], 300, tmp_path / "other")
    return tmp_path / "other"


NLVR = Path(os.environ.get("UNIHETERO_DATA", Path(__file__).parents[2] / "shared" / "data")) / "nlvr"


@pytest.mark.slow
@pytest.mark.skipif(not NLVR.is_dir(), reason=f"no NLVR at {NLVR}")
def test_the_finetuning_recipe_from_weights_to_weights(tmp_path, monkeypatch):
    """Pretrained pair and LLaVA JSON in; frozen encoder, two learning rates; exported model out, and read again."""
    monkeypatch.chdir(tmp_path)
    workdir, _, vision_folder = imported(tmp_path)
    data = [
        "llava", f"--input={NLVR / 'llava_val.json'}", f"--images={NLVR / 'images_val.zip'}", "--licence=CC-BY-4.0",
        f"--tokenizer={workdir / 'tokenizer'}", "--output=data/instructions", "--patch-size=4", "--min-patches=4",
        "--max-patches=36",
    ]  # fmt: skip
    assert convert.main(data) == 0
    flags = [f"--config={ROOT / 'experiments' / 'finetune.py'}:{workdir}", f"--workdir={tmp_path / 'tuned'}",
             "--config.train.num_steps=30", "--config.data.row_tokens=512", "--config.data.row_patches=256",
             "--config.optimizer.learning_rate=1e-3", "--config.optimizer.warmup_steps=3",
             "--config.train.global_batch_rows=4", "--config.train.eval_every_steps=30", "--config.eval.batch_rows=4",
             "--config.data.num_data_shards=4", "--config.train.log_every_steps=10"]  # fmt: skip
    assert main(["train", *flags]) == 0
    first, *_, last = [line["terms"]["text"]["mean"] for line in read_metrics(tmp_path / "tuned")]
    assert last < 0.8 * first
    before, after = (load_run(str(folder), -1, 0).params for folder in (workdir, tmp_path / "tuned"))
    np.testing.assert_array_equal(before["encoder"]["patch"]["kernel"], after["encoder"]["patch"]["kernel"])
    moved = {name: np.abs(np.asarray(before[name]["norm"]["gain"]) - after[name]["norm"]["gain"]).max()
             for name in ("projector", "decoder")}  # fmt: skip
    assert moved["projector"] > moved["decoder"] > 0
    assert main(["export-hf", f"--workdir={tmp_path / 'tuned'}", "--output=exported"]) == 0
    ours = load_file("exported/vision_encoder/model.safetensors")
    theirs = load_file(vision_folder / "model.safetensors")
    np.testing.assert_array_equal(ours["vision_model.post_layernorm.weight"], theirs["post_layernorm.weight"])
    assert hf_config.read_language_model(Path("exported/language_model"), 64).family == "qwen2"


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"model_type": "mamba"}, "model_type 'mamba' is not supported; there are qwen2, qwen3, llama"),
        ("qwen2", {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ("llama3", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("llama3", {"mlp_bias": True}, "mlp_bias=True is not supported"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not supported"),
        ("qwen3", {"hidden_size": "wide"}, "hidden_size: a positive number was expected, got 'wide'"),
        ("llama3", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope' is not supported"),
        ("llama3", {"rope_parameters": {"rope_type": "llama3"}}, "factor: a positive number was expected"),
    ],
)  # fmt: skip
def test_unsupported_language_models_are_refused_by_name(tmp_path, name, changes, message):
    folder = model_folder(tmp_path, name)
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        hf_config.read_language_model(folder, 64)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("clip", {"model_type": "vit"}, "model_type 'vit' is not supported"),
        ("siglip", {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ("siglip", {"num_channels": 1}, "num_channels=1 is not supported"),
        ("siglip2", {"num_patches": 35}, "num_patches=35 is no square"),
    ],
)
def test_unsupported_vision_encoders_are_refused_by_name(tmp_path, name, changes, message):
    folder = model_folder(tmp_path, name)
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        hf_config.read_vision_encoder(folder)


def test_config_json_of_older_transformers(tmp_path):
    """`rope_theta` and `rope_scaling` beside each other, as on the hub."""
    folder = model_folder(tmp_path, "llama3")
    values = json.loads((folder / "config.json").read_text())
    parameters = values.pop("rope_parameters")
    values["rope_theta"] = parameters.pop("rope_theta")
    values["rope_scaling"] = parameters
    expected = hf_config.read_language_model(folder, 64)
    (folder / "config.json").write_text(json.dumps(values))
    assert hf_config.read_language_model(folder, 64) == expected
    assert expected.decoder.rope_scaling == RopeScalingConfig("llama3", 8.0, 16, 1.0, 4.0)


def test_all_faults_of_the_tensors_in_one_message(tmp_path, refused):
    folder = model_folder(tmp_path, "qwen3")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.7.extra"] = np.zeros(3, np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 31), np.float32)
    save_file(tensors, folder / "model.safetensors")
    message = refused("import-hf", f"--language-model={folder}", f"--workdir={tmp_path / 'w'}")
    assert "missing: model.norm.weight [32]" in message and "surplus: model.layers.7.extra [3]" in message
    assert "misshapen: model.layers.1.mlp.up_proj.weight [48, 31], expected [48, 32]" in message


def test_damaged_and_hostile_files_are_refused(tmp_path):
    folder = model_folder(tmp_path, "qwen3")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for broken in (content[:-4], content[:100], struct.pack("<Q", 1 << 40) + content[8:], b"", b"{}"):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match="no readable safetensors file"):
            find_tensors(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(ValueError, match="names a file outside its folder"):
        find_tensors(folder)
    index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match="names files that are not there"):
        find_tensors(folder)
    index.unlink()
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin may run code when it is read: convert it"):
        find_tensors(folder)


def test_parts_of_a_tensor(tmp_path):
    value = np.arange(6 * 5 * 4, dtype=np.float32).reshape(6, 5, 4)
    save_file({"x": value, "scalar": np.array(3, np.float32)}, tmp_path / "a.safetensors")
    found = find_tensors(tmp_path)
    np.testing.assert_array_equal(found["x"].read(), value)
    np.testing.assert_array_equal(found["x"].read((slice(1, 4),)), value[1:4])
    np.testing.assert_array_equal(found["x"].read((slice(None), slice(2, 3))), value[:, 2:3])
    np.testing.assert_array_equal(found["x"].read((slice(2, 6), slice(0, 5), slice(1, 3))), value[2:, :, 1:3])
    assert found["scalar"].read() == 3


def test_flags_say_what_to_do(tmp_path, refused):
    workdir = f"--workdir={tmp_path / 'w'}"
    assert "name at least one" in refused("import-hf", workdir)
    message = refused("import-hf", workdir, "--language-model=nowhere")
    assert "nowhere: no such folder" in message and "owner/name@revision" in message
    (tmp_path / "empty").mkdir()
    assert "give a folder with config.json" in refused("import-hf", workdir, f"--vision-encoder={tmp_path / 'empty'}")
    done, *_ = imported(tmp_path)
    assert "there is a run already" in refused(
        "import-hf", f"--workdir={done}", f"--language-model={tmp_path / 'qwen2'}"
    )
    output = f"--output={tmp_path / 'qwen2'}"
    assert "not empty" in refused("export-hf", f"--workdir={done}", output)
    assert "--vision-family clip: what the encoder computes is that of siglip2" in refused(
        "export-hf", f"--workdir={done}", f"--output={tmp_path / 'o'}", "--vision-family=clip"
    )


def test_every_golden_model_is_here():
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} - {"__pycache__"} == {
        *LANGUAGE_MODELS,
        *VISION_ENCODERS,
    }
