"""Engines that take parameters apart: what works, and what is refused by engine, stage and remedy before the first step."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import transformers
from families import make_model, patch

import heterolora_kernels as hlk
from heterolora_kernels.callback import HeteroLoraCallback


@pytest.mark.parametrize("mark, stage", [("_hp_mapping", "ZeRO-1 or 2"), ("ds_id", "ZeRO-3")])
def test_a_search_is_refused_with_partitions(mark, stage):
    model = patch(make_model("llama"), shortcuts=(), search="dynamic", interval=1)
    search = hlk.RankSearch(model)
    for parameter in model.parameters():
        setattr(parameter, mark, 1)
    for call in (lambda: hlk.RankSearch(model), search.step, search.start):
        with pytest.raises(ValueError, match=f"search: DeepSpeed {stage} .*search='off'.*FSDP2"):
            call()


def test_a_search_that_is_off_is_none():
    model = patch(make_model("llama"), shortcuts=())
    for parameter in model.parameters():
        parameter._hp_mapping = 1
    hlk.RankSearch(model)


def test_a_model_that_zero_3_has_sharded_is_refused():
    model = make_model("llama")
    for parameter in model.parameters():
        parameter.ds_id = 1
    with pytest.raises(ValueError, match=r"already sharded \(ZeRO-3\): call apply_heterolora first, then .*deepspeed.initialize"):
        hlk.apply_heterolora(model, hlk.HeteroLoraConfig())


def test_the_callback_refuses_deepspeed_with_a_search(tmp_path):
    model = patch(make_model("llama"), shortcuts=(), search="dynamic", interval=1)
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    args.deepspeed = {"zero_optimization": {"stage": 1}}
    with pytest.raises(ValueError, match="search: under DeepSpeed .*search='off'"):
        HeteroLoraCallback().on_init_end(args, None, None, model=model)


_RUN = """
import sys, torch, deepspeed
sys.path.insert(0, sys.argv[3])
from families import make_inputs, make_model, patch
import heterolora_kernels as hlk
torch.distributed.init_process_group("gloo")
model = patch(make_model("llama"), shortcuts=())
twin = patch(make_model("llama"), shortcuts=())
optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (model, twin)]
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizers[0], dist_init_required=False, config={
    "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
    "zero_optimization": {"stage": int(sys.argv[1]), "stage3_param_persistence_threshold": 0}})
inputs = make_inputs()
for _ in range(3):
    engine.backward(engine(**inputs).loss)
    engine.step()
    twin(**inputs).loss.backward()
    optimizers[1].step()
    optimizers[1].zero_grad()
with torch.no_grad():
    expected = twin.eval()(**inputs).logits
    for format in ("native", "peft", "merged"):
        folder = f"{sys.argv[2]}/{format}"
        hlk.save_adapter(model, folder, format)
        loaded = type(twin).from_pretrained(folder).eval() if format == "merged" else hlk.load_adapter(make_model("llama"),
        folder)
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
hlk.print_trainable_parameters(model)
"""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_and_saves_without_a_search(stage, tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
                   "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(29600 + os.getpid() % 300 + stage)}
    found = subprocess.run([sys.executable, "-c", _RUN, str(stage), str(tmp_path), os.path.dirname(__file__)], env=environment,
                           capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
