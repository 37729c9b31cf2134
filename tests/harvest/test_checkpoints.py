"""Checkpoints that cannot be run here, or not as they are: the plan refuses them and says what is missing."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sae_train import config as schema
from sae_train.config import RunConfig
from sae_train.errors import UserError
from sae_train.harvest.build import build_stream, check_stream
from sae_train.harvest.language_model import LanguageModel, Tokenizer
from sae_train.hub import missing_library
from sae_train.ranks.interface import Solo
from tools.one_of_each import only
from tools.tiny_models import planned_config, save_model

CPU = torch.device("cpu")
IDS_BT = torch.arange(10, 28).view(2, 9)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """Return a copy of the model that the test may spoil."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def planned(config: RunConfig) -> str:
    """Return the message with which the plan refuses."""
    with pytest.raises(UserError) as caught:
        check_stream(config.source, n_ranks=1)
    assert caught.value.status == 2
    message = str(caught.value)
    assert message.startswith(f"model.id={config.model.id}: ")
    assert len(message) < 500
    return message


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("given", "method", "said"),
    [({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", "`pip install 'bitsandbytes>="),
     ({"load_in_8bit": True}, "bitsandbytes", "`pip install 'bitsandbytes>="),
     ({"quant_method": "gptq", "bits": 4}, "gptq", "`pip install optimum`"),
     ({"quant_method": "awq", "bits": 4}, "awq", "`pip install gptqmodel`"),
     ({"quant_method": "compressed-tensors"}, "compressed-tensors", "`pip install 'compressed-tensors>="),
     ({"quant_method": "auto-round"}, "auto-round", "`pip install 'auto-round>="),
     ({"quant_method": "hqq"}, "hqq", "cannot be loaded here: A valid HQQ version"),
     ({"quant_method": "of_tomorrow"}, "of_tomorrow", "does not know this method"),
     ({"bits": 4}, "by a method that is not named", "has no `quant_method`")],
)  # fmt: skip
def test_a_quantised_checkpoint_names_its_method_and_library(copy, given, method, said):
    edit(copy / "config.json", quantization_config=given)
    message = planned(planned_config(copy))
    assert f"its weights are quantised ({method}), and " in message
    assert said in message
    assert message.endswith("not quantised.")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_checkpoint_that_runs_here_is_not_refused(copy, llama, dtype):
    """Without a GPU for them, FP8 weights are expanded, and the model is the one with the rounded weights."""
    plain = Path(shutil.copytree(llama, copy.parent / "plain"))
    weights = load_file(copy / "model.safetensors")
    names = [name for name in weights if "proj.weight" in name]
    rounded = {name: weights[name].to(torch.float8_e4m3fn) for name in names}
    scales = {f"{name}_scale_inv": torch.full((1, 1), 0.5) for name in names}
    save_file(weights | rounded | scales, copy / "model.safetensors", metadata={"format": "pt"})
    halved = {name: each.float() / 2 for name, each in rounded.items()}
    save_file(weights | halved, plain / "model.safetensors", metadata={"format": "pt"})
    edit(copy / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    config = planned_config(copy, dtype=dtype)
    check_stream(config.source, n_ranks=1)
    found = only(LanguageModel(config.source, device=CPU).activations(IDS_BT))
    right = only(LanguageModel(planned_config(plain, dtype=dtype).source, device=CPU).activations(IDS_BT))
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize(
    ("files", "said"),
    [(["model-q4.gguf"], "GGUF"), (["adapter_config.json"], "an adapter"), (["params.json"], "Convert it"),
     (["config.json", "tf_model.h5"], "TensorFlow"), (["config.json", "model-q4.gguf"], "GGUF"),
     (["config.json"], "no weights there"), ([], "no readable config.json")],
)  # fmt: skip
def test_a_directory_without_weights_that_can_be_read_is_refused_in_the_plan(llama, tmp_path, files, said):
    for name in files:
        (tmp_path / name).write_text((llama / name).read_text() if name == "config.json" else "{}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, tmp_path)
    message = planned(planned_config(tmp_path))
    assert said in message
    assert "\n" not in message, "one finding is one line"


def test_a_file_that_the_index_names_is_missed_in_the_plan(copy):
    parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (copy / "model.safetensors").rename(copy / parts["a"])
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    assert "names 2 files of weights, and model-00002-of-00002.safetensors is not there" in planned(
        planned_config(copy)
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [({"model_type": "llama_of_tomorrow"}, "`llama_of_tomorrow`"), ({"hidden_size": "many"}, "got str"),
     ({"num_attention_heads": 0}, "ZeroDivisionError")],
)  # fmt: skip
def test_a_broken_configuration_is_refused(copy, values, said):
    edit(copy / "config.json", **values)
    assert said in planned(planned_config(copy))


def test_weights_of_other_shapes_are_refused(copy):
    edit(copy / "config.json", hidden_size=48)
    with pytest.raises(UserError, match="weights have other shapes than its config"):
        LanguageModel(planned_config(copy).source, device=CPU)


@pytest.mark.parametrize(
    ("kind", "file", "library"),
    [("LlamaTokenizer", "tokenizer.model", "sentencepiece"), ("T5Tokenizer", "spiece.model", "sentencepiece"),
     ("MarianTokenizer", "source.spm", "sentencepiece"), ("PreTrainedTokenizerFast", "tiktoken.model", "tiktoken"),
     ("XLMTokenizer", "vocab.json", "sacremoses")],
)  # fmt: skip
def test_a_tokenizer_names_the_library_that_it_needs(copy, kind, file, library):
    assert find_spec(library) is None, "the tests' environment is without it (constraints.txt)"
    (copy / "tokenizer.json").unlink()
    (copy / file).write_text("IQ== 0\nIg== 1\n")
    (copy / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    message = planned(planned_config(copy))
    assert "its tokenizer needs " in message
    assert library in message.partition("pip install ")[2]


def test_a_part_that_sees_names_the_library_that_it_needs(copy):
    assert find_spec("timm") is None, "the tests' environment is without it (constraints.txt)"
    edit(copy / "config.json", model_type="gemma3n", architectures=["Gemma3nForConditionalGeneration"])
    assert "its architecture 'gemma3n' needs " in planned(planned_config(copy))


OWN_CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OwnConfig(PretrainedConfig):
    model_type = "own_kind"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return (x + self.down(self.up(x).relu()),)


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.head = nn.Embedding(320, 32), nn.Linear(32, 320)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, other=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)[0]
        return CausalLMOutput(logits=self.head(x))
"""


@pytest.fixture
def own(llama: Path, tmp_path: Path) -> Path:
    """Return a checkpoint whose architecture is Python code beside its weights."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, folder)
    (folder / "own.py").write_text(OWN_CODE)
    (folder / "config.json").write_text(json.dumps({
        "model_type": "own_kind", "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }))  # fmt: skip
    shapes = {"embed.weight": (320, 32), "head.weight": (320, 32), "head.bias": (320,)}
    for block in range(3):
        shapes |= {f"blocks.{block}.up.weight": (64, 32), f"blocks.{block}.up.bias": (64,),
                   f"blocks.{block}.down.weight": (32, 64), f"blocks.{block}.down.bias": (32,)}  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=draw) / 8 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let transformers keep its copy of foreign code in the test's directory."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def own_config(folder: Path, *, remote_code: bool) -> RunConfig:
    layer = schema.ModuleLayerConfig(kind="module", path="blocks.1", side="output")
    config = planned_config(folder, attention="eager", layer=layer)
    return replace(config, model=replace(config.model, remote_code=remote_code))


def test_foreign_code_is_not_run_unasked(own, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _prompt: "y")
    (own / "own.py").write_text(f"open({str(own / 'ran')!r}, 'w')\n{OWN_CODE}")
    assert "set model.remote_code=true" in planned(own_config(own, remote_code=False))
    assert not (own / "ran").exists()


@pytest.mark.slow
def test_nothing_asks_on_the_terminal(own):
    """With a terminal that would say yes, the code is still not run."""
    command = [sys.executable, "-m", "sae_train", "model=huggingface", f"model.id={own}", "dry_run=true"]
    done = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True, cwd=own, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "set model.remote_code=true" in done.stderr
    assert "Do you wish" not in done.stderr


@pytest.mark.usefixtures("own_cache")
def test_foreign_code_runs_where_it_may(own):
    config = own_config(own, remote_code=True)
    facts = check_stream(config.source, n_ranks=1)
    assert (facts.sites[0].d_model, facts.note) == (32, "")
    language_model = LanguageModel(config.source, device=CPU)
    weights, x = load_file(own / "model.safetensors"), None
    x = weights["embed.weight"][IDS_BT]
    for block in range(2):
        up, down = (weights[f"blocks.{block}.{name}.weight"] for name in ("up", "down"))
        hidden = (x @ up.T + weights[f"blocks.{block}.up.bias"]).relu()
        x = x + hidden @ down.T + weights[f"blocks.{block}.down.bias"]
    torch.testing.assert_close(only(language_model.activations(IDS_BT)), x)
    assert language_model.has_loss
    assert language_model.logits(IDS_BT).shape == (2, 9, 320)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("before", "after", "said"),
    [("import torch\n", "import torch, einops_of_tomorrow\n", "needs einops_of_tomorrow"),
     ("import torch\n", "raise RuntimeError('boom')\n", "RuntimeError: boom"),
     ("block(x)[0]", "block(x)[0] + other", "'own_kind' cannot be run on token ids alone as far as blocks.1")],
)  # fmt: skip
def test_foreign_code_that_fails_is_the_users_fault(own, before, after, said):
    (own / "own.py").write_text(OWN_CODE.replace(before, after, 1))
    assert said in planned(own_config(own, remote_code=True))


@pytest.mark.usefixtures("own_cache")
def test_code_that_looks_at_values_is_asked_with_weights_if_it_is_small(own, monkeypatch):
    """A model that cannot be run without weights is run with arbitrary ones, and the plan says so."""
    looks = "x = self.embed(input_ids)\n        x = x * 2 if float(x.abs().sum()) > 1e9 else x"
    (own / "own.py").write_text(OWN_CODE.replace("x = self.embed(input_ids)", looks))
    config = own_config(own, remote_code=True)
    facts = check_stream(config.source, n_ranks=1)
    assert facts.sites[0].d_model == 32
    assert "own_kind was run with arbitrary weights" in facts.note
    monkeypatch.setattr("sae_train.harvest.probe._LARGEST_REAL", 1000)
    message = planned(config)
    assert "the architecture 'own_kind' cannot be run without its weights" in message
    assert "too large" in message


def test_a_native_class_needs_no_foreign_code(copy):
    edit(copy / "config.json", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    check_stream(planned_config(copy).source, n_ranks=1)
    LanguageModel(planned_config(copy).source, device=CPU)


def test_all_special_tokens_are_left_out(copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"], "mask_token": "<mask>"})
    tokenizer.add_tokens(["plainword"])
    tokenizer.save_pretrained(copy)
    found = Tokenizer(planned_config(copy).model)
    marks = tokenizer.convert_tokens_to_ids(["<bos>", "<eos>", "<|turn|>", "<mask>"])
    assert found.special_ids == sorted(marks)
    assert set(found.encode("the <|turn|> river plainword")) & set(found.special_ids) == {marks[2]}


def test_a_mark_that_only_the_tokenizers_file_calls_special_is_left_out(copy):
    stored = json.loads((copy / "tokenizer.json").read_text())
    mark = max(stored["model"]["vocab"].values()) + 1
    one = dict(stored["added_tokens"][0], id=mark, content="<|end_of_turn|>", special=True)
    stored["added_tokens"].append(one)
    (copy / "tokenizer.json").write_text(json.dumps(stored))
    assert mark in Tokenizer(planned_config(copy).model).special_ids


@pytest.mark.parametrize(
    ("dtype", "value", "said"),
    [("float32", float("nan"), "because its weight model.layers.0.mlp.up_proj.weight is not. No other model.dtype"),
     ("bfloat16", float("inf"), "because its weight model.layers.0.mlp.up_proj.weight is not. No other model.dtype"),
     ("float16", 1e6, "Choose model.dtype=float32 or bfloat16"),
     ("float32", 3e38, "not finite in float32, though all its weights are. Try model.attention=eager")],
)  # fmt: skip
def test_a_message_about_numbers_names_what_is_to_blame(copy, tmp_path, dtype, value, said):
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].fill_(value)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    stream = build_stream(planned_config(copy, dtype=dtype).source, ranks=Solo(CPU))
    with pytest.raises(UserError) as caught:
        stream.start()
    assert said in str(caught.value)
    assert ("Choose model.dtype" in str(caught.value)) == (dtype == "float16")


def test_the_library_is_read_off_what_was_raised():
    def nested(cause: Exception) -> Exception:
        outer = ValueError("wrapped")
        outer.__cause__ = cause
        return outer

    assert missing_library(nested(ImportError("run `pip install -U bitsandbytes>=0.46.1`"))) == "bitsandbytes>=0.46.1"
    assert missing_library(nested(ImportError("(`pip install 'auto-round>=0.5'`)"))) == "auto-round>=0.5"
    assert missing_library(ModuleNotFoundError("x", name="flash_of_tomorrow.ops")) == "flash_of_tomorrow"
    assert missing_library(ImportError("X requires the SentencePiece library but")) == "sentencepiece"
    assert missing_library(ModuleNotFoundError("x", name="torch.of_tomorrow")) is None
    assert missing_library(ValueError("try `pip install --upgrade transformers`")) is None


def test_a_tokenizer_is_read_in_the_plan_whatever_the_text(copy):
    """Text on the hub is not read in the plan; the tokenizer is."""
    (copy / "tokenizer.json").write_text("{}")
    assert "no tokenizer there that can be read" in planned(planned_config(copy, "someone/no-such-text"))
