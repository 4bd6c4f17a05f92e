"""The published settings and counts, the config's written form, what its newer fields refuse; adapters drawn anew."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers_search import (
    NET_PATHS,
    Net,
    adapter,
    fill_B,
    llama_batch,
    make_llama,
    make_net,
    net_batch,
    path_names,
    same_bits,
    snapshot,
    train_step,
    trainable,
)
from transformers import OPTConfig, OPTForCausalLM

import heterolora_kernels as hlk
from heterolora_kernels.allocation import module_budget

Config = hlk.HeteroLoraConfig
SITES = ("residual_1", "residual_2", "shortcut_sa", "shortcut_ffn")


# ---- what is refused ----

@pytest.mark.parametrize("field, values", [
    ("budget_unit", {"budget_unit": "module"}), ("budget_unit", {"budget_unit": None}),
    ("normalize", {"normalize": "scales"}), ("normalize", {"normalize": None}),
    ("rank_step", {"ranks": "graded", "rank_step": 0}), ("rank_step", {"ranks": "graded", "rank_step": 1.0}),
    ("rank_step", {"ranks": "graded", "rank_step": True}), ("rank_step", {"rank_step": 2}),
    ("min_rank", {"ranks": "graded", "min_rank": -1}), ("min_rank", {"ranks": "graded", "min_rank": 1.0}),
    ("min_rank", {"ranks": "graded", "min_rank": True}), ("min_rank", {"ranks": "graded", "rank_step": 2, "min_rank": 3}),
    ("min_rank", {"min_rank": 1}), ("min_rank", {"ranks": "binary", "min_rank": 4}),
    ("hysteresis", {"hysteresis": -0.1}), ("hysteresis", {"hysteresis": math.nan}), ("hysteresis", {"hysteresis": math.inf}),
    ("hysteresis", {"hysteresis": True}), ("hysteresis", {"hysteresis": "0.1"}), ("hysteresis", {"hysteresis": None}),
    ("score_decay", {"score_decay": 1}), ("score_decay", {"score_decay": 1.0}), ("score_decay", {"score_decay": -0.1}),
    ("score_decay", {"score_decay": math.nan}), ("score_decay", {"score_decay": False}), ("score_decay", {"score_decay": None}),
    ("on_reactivate", {"on_reactivate": "restart"}), ("on_reactivate", {"on_reactivate": True}),
    ("synflow_target", {"synflow_target": "logits"}), ("synflow_target", {"synflow_target": None}),
], ids=str)
def test_bad_value_names_the_field(field, values):
    with pytest.raises(ValueError, match=field):
        Config(**values)


@pytest.mark.parametrize("field, value", [
    ("sites", ["LlamaDecoderLayer"]), ("sites", "LlamaDecoderLayer"), ("init_from", 3), ("init_from", ["folder"]),
    ("ranks", 2), ("proxy", None),
], ids=str)
def test_bad_type_names_the_field(field, value):
    with pytest.raises(TypeError, match=field):
        Config(**{field: value})


@pytest.mark.parametrize("field, name", [("ranks", "ternary"), ("proxy", "jacob_cov")])
def test_unknown_registered_name_is_refused_when_it_is_used(field, name):
    with pytest.raises(ValueError, match=rf"{field} must be one of .*'{name}'"):
        hlk.RankSearch(make_net(**{field: name}))


@pytest.mark.parametrize("values", [
    {"ranks": "graded", "rank_step": 2, "min_rank": 4}, {"ranks": "graded", "rank_step": 3}, {"ranks": "graded", "min_rank": 5},
    {"hysteresis": 0}, {"hysteresis": 3.5}, {"score_decay": 0.99}, {"score_decay": 0}, {"on_reactivate": "reset"},
    {"synflow_target": "loss"}, {"budget_unit": "parameters", "budget": 10 ** 6}, {"normalize": "type"},
    {"ranks": "my_own", "rank_step": 2, "min_rank": 2},
], ids=str)
def test_good_values_are_taken_as_they_are(values):
    config = Config(**values)
    assert {name: getattr(config, name) for name in values} == values


def test_init_from_takes_a_path():
    assert Config(init_from=Path("some") / "folder").init_from == str(Path("some") / "folder")


# ---- the published settings ----

PUBLISHED = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "shortcut_r": None, "shortcut_alpha": 4, "use_rslora": False,
             "target_modules": ("q_proj", "v_proj"), "init_B": "zeros", "budget": 0.25, "budget_unit": "modules",
             "ranks": "binary", "mode": "combined", "proxy": "grad_norm", "normalize": "none", "score": "probe",
             "num_batches": 32, "warmup": 0, "hysteresis": 0.0, "score_decay": 0.0, "on_reactivate": "keep", "seed": 0}
SETTINGS = {
    "dynamic": {"search": "dynamic", "shortcuts": SITES, "interval": 0.2},
    "static": {"search": "static", "shortcuts": ()},
    # 64 for both kinds; constant for 2 epochs of 4 reallocations each.
    "llama": {"search": "dynamic", "shortcuts": SITES, "interval": 0.25, "r": 64, "budget": 0.33, "warmup": 8},
}
every_setting = pytest.mark.parametrize("setting", SETTINGS)


@every_setting
def test_paper_gives_the_published_settings(setting):
    expected, config = {**PUBLISHED, **SETTINGS[setting]}, Config.paper(setting)
    assert {name: getattr(config, name) for name in expected} == expected


def test_paper_is_the_dynamic_search_by_default():
    assert Config.paper() == Config.paper("dynamic")


@every_setting
def test_overrides_win_and_leave_the_rest(setting):
    changed = {"r": 32, "seed": 13, "target_modules": ("query", "value"), "search": "off", "shortcuts": ("residual_1",)}
    config = Config.paper(setting, **changed)
    rest = [entry.name for entry in fields(Config) if entry.name not in changed]
    assert {name: getattr(config, name) for name in changed} == changed
    assert all(getattr(config, name) == getattr(Config.paper(setting), name) for name in rest)


def test_unknown_setting_and_override_are_named():
    with pytest.raises(ValueError, match="setting must be one of .*'llama'.*'opt'"):
        Config.paper("opt")
    with pytest.raises(TypeError, match="rank"):
        Config.paper(rank=8)


def test_two_configs_share_nothing():
    Config.paper().rank_pattern["q_proj"] = 3
    assert Config.paper().rank_pattern == {} == Config().rank_pattern


def opt(layers):
    """A model of the kind of OPT-350m: norms last, embeddings of another width."""
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(
        vocab_size=19, hidden_size=8, word_embed_proj_dim=4, ffn_dim=12, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=32, do_layer_norm_before=False, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def kinds(paths):
    """Numbers of LoRA paths and of shortcuts."""
    shortcuts = sum(path.rpartition(".")[2] in SITES for path in paths)
    return len(paths) - shortcuts, shortcuts


def started(layers, setting, **overrides):
    model = hlk.apply_heterolora(opt(layers), Config.paper(setting, proxy="constant", r=2, **overrides))
    search = hlk.RankSearch(model, steps_per_epoch=20)
    search.start()
    return search, [path for path, rank in search.ranks.items() if rank]


@pytest.mark.parametrize("layers", [1, 2, 5, 24])
def test_paths_of_a_model_with_all_shortcuts(layers):
    assert kinds(started(layers, "dynamic", budget=1.0)[0].paths) == (2 * layers, 4 * layers - 1)


@pytest.mark.parametrize("mode, expected", [("combined", 36), ("separated", (12, 24)), ("lora_only", (12, 0))])
def test_published_counts_on_24_layers(mode, expected):
    search, chosen = started(24, "dynamic", mode=mode)
    assert kinds(search.paths) == (48, 95)
    assert (len(chosen) if mode == "combined" else kinds(chosen)) == expected


def test_published_static_search_on_24_layers_has_lora_alone():
    search, chosen = started(24, "static")
    assert (kinds(search.paths), kinds(chosen)) == ((48, 0), (12, 0))


@pytest.mark.parametrize("p, layers, expected", [
    pytest.param(0.25, 24, (12, 24), id="opt-350m"), pytest.param(0.33, 32, (21, 42), id="llama-2-7b"),
    pytest.param(0.25, 1, (0, 1), id="one-layer"), pytest.param(0.25, 5, (2, 5), id="floor-2.5-round-4.75"),
    pytest.param(0.33, 3, (1, 4), id="floor-1.98-round-3.63"), pytest.param(0.5, 1, (1, 2), id="round-half-to-even"),
])
def test_counts_floor_lora_and_round_shortcuts(p, layers, expected):
    assert module_budget(p, 2 * layers, 4 * layers - 1) == expected
    assert kinds(started(layers, "dynamic", budget=p, mode="separated")[1]) == expected


def test_counts_of_opt_350m():
    assert (2 * 24 + 4 * 24 - 1, sum(module_budget(0.25, 48, 95)), module_budget(0.25, 48, 0)) == (143, 36, (12, 0))


def test_scalings_follow_the_published_alphas():
    # alpha stays when r changes: s = 0.5 and 0.125 at r = 32.
    model = hlk.apply_heterolora(opt(1), Config.paper(r=32))
    scaling = {path.kind: path.scaling for path in model.__dict__["_heterolora_state"].paths.values()}
    assert scaling == {"lora": 0.5, "shortcut": 0.125}


def test_published_dynamic_search_scores_the_head_of_the_data_every_fifth_of_an_epoch():
    model = hlk.apply_heterolora(opt(1), Config.paper(r=2))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-4, weight_decay=0.01)
    seen = []
    batches = [{"input_ids": llama_batch(number)["input_ids"] % 19, "number": number} for number in range(35)]

    def loss(model, batch):
        seen.append(batch["number"])
        return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    search = hlk.RankSearch(model, optimizer, batches, steps_per_epoch=10, loss_fn=loss)
    search.start()
    for number in range(5):
        optimizer.zero_grad()
        model(input_ids=batches[number]["input_ids"], labels=batches[number]["input_ids"]).loss.backward()
        optimizer.step()
        search.step()
    assert [entry["step"] for entry in search.history] == [0, 2, 4] and seen == 3 * list(range(32))
    assert all((entry["warmup"], entry["score"], entry["statistics"], entry["batches"]) == (False, "probe", "exact", 32)
               for entry in search.history)


def test_published_llama_search_draws_at_random_for_two_epochs():
    model = make_llama(interval=0.25, warmup=8, score="probe", budget=0.33)
    config = Config.paper("llama")
    assert (config.interval, config.warmup, config.resolved_score) == (0.25, 8, "probe")
    search = hlk.RankSearch(model, dataloader=[llama_batch(0)], steps_per_epoch=8)
    for _ in range(18):
        search.step()
    # start() is the first of the eight: the proxy decides from the second epoch's end on.
    assert [entry["step"] for entry in search.history if not entry["warmup"]] == [16, 18]


# ---- the written form ----

CONFIGS = {
    "default": {}, "dtype": {"adapter_dtype": torch.bfloat16}, "dtype-name": {"adapter_dtype": "float64"},
    "tuples": {"target_modules": ("q_proj", "v_proj"), "exclude_modules": ["lm_head"], "modules_to_save": ("score",)},
    "regular-expressions": {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.0\..*"},
    "no-heads": {"modules_to_save": ()},
    "patterns": {"rank_pattern": {"q_proj": 4, r"layers\.0\..*": 0}, "alpha_pattern": {"v_proj": 2.5}},
    "sites": {"shortcuts": "all", "sites": {"MyLayer": hlk.Site("n1", "n2", "attn.out", "mlp.out", feed_forward_norm="n3"),
                                            "Other": hlk.Site("a", "b", "c", "d", "e")}},
    "no-sites": {"sites": {}},
    "shortcuts": {"shortcuts": ("residual_2",), "shortcut_r": 3, "shortcut_alpha": 1.5},
    "search": {"search": "static", "budget": 12, "budget_unit": "parameters", "mode": "separated", "proxy": "synflow",
               "synflow_target": "loss", "normalize": "type", "num_batches": 3, "seed": 2 ** 62},
    "share": {"budget": 1.0, "interval": 1.0, "score": "in_step", "warmup": 0}, "numbers": {"budget": 1, "interval": 1},
    "graded": {"ranks": "graded", "rank_step": 2, "min_rank": 4, "hysteresis": 0.1, "score_decay": 0.3, "on_reactivate": "reset"},
    "others": {"r": 3, "lora_alpha": 1e-3, "lora_dropout": 0.25, "use_rslora": True, "init_B": "kaiming_uniform",
               "init_from": Path("adapters") / "old"},
    "none": {"exclude_modules": None, "shortcuts": None, "rank_pattern": None, "alpha_pattern": None},
}
every_config = pytest.mark.parametrize("values", [pytest.param(values, id=name) for name, values in CONFIGS.items()])


@every_config
def test_config_is_the_same_after_json(values):
    config = Config(**values)
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    for entry in fields(Config):
        value, back = getattr(config, entry.name), getattr(again, entry.name)
        assert back == value and type(back) is type(value), entry.name
    assert again == config and again.to_dict() == config.to_dict()


@every_setting
def test_published_settings_are_the_same_after_json(setting):
    assert Config.from_dict(json.loads(json.dumps(Config.paper(setting).to_dict()))) == Config.paper(setting)


@every_config
def test_written_form_has_every_field_in_plain_types(values):
    written = Config(**values).to_dict()

    def is_plain(value):
        if isinstance(value, dict):
            return all(type(key) is str and is_plain(entry) for key, entry in value.items())
        return all(map(is_plain, value)) if isinstance(value, list) else type(value) in (str, int, float, bool, type(None))

    assert list(written) == [entry.name for entry in fields(Config)] and is_plain(written)


def test_written_form_of_some_fields():
    written = Config(adapter_dtype=torch.float16, sites={"A": hlk.Site("h", "f", "a", "m")}, shortcuts="all").to_dict()
    assert (written["adapter_dtype"], written["shortcuts"]) == ("float16", list(SITES))
    assert written["sites"]["A"] == {"h": "h", "f": "f", "attention": "a", "feed_forward": "m", "attention_norm": None,
                                     "feed_forward_norm": None}


def test_written_form_is_a_copy():
    config = Config(rank_pattern={"q_proj": 4}, sites={"A": hlk.Site("h", "f", "a", "m")})
    written = config.to_dict()
    written["rank_pattern"]["q_proj"] = 1
    written["sites"]["A"]["h"] = "other"
    assert config.rank_pattern == {"q_proj": 4} and config.sites["A"].h == "h"


def test_missing_fields_have_their_defaults():
    assert Config.from_dict({}) == Config() and Config.from_dict({"r": 3}) == Config(r=3)


@pytest.mark.parametrize("values, name", [({"rank": 8}, "rank"), ({"r": 8, "zeta": 1}, "zeta"), ({"R": 1}, "R")], ids=str)
def test_unknown_key_is_named(values, name):
    with pytest.raises(ValueError, match=rf"no field '{name}'"):
        Config.from_dict(values)


@pytest.mark.parametrize("values", [None, [("r", 8)], "r: 8"], ids=str)
def test_what_is_no_dictionary_is_refused(values):
    with pytest.raises(TypeError, match="values must be a dictionary"):
        Config.from_dict(values)


@pytest.mark.parametrize("values, error, name", [
    ({"r": 0}, ValueError, "r must"), ({"hysteresis": -1}, ValueError, "hysteresis"), ({"sites": [1]}, TypeError, "sites"),
    ({"adapter_dtype": "int8"}, ValueError, "adapter_dtype"),
], ids=str)
def test_bad_value_is_refused_from_a_file_as_well(values, error, name):
    with pytest.raises(error, match=name):
        Config.from_dict(values)


def test_from_dict_leaves_its_argument_as_it_is():
    values = Config(sites={"A": hlk.Site("h", "f", "a", "m")}).to_dict()
    before = json.dumps(values)
    Config.from_dict(values)
    assert json.dumps(values) == before


def test_function_among_the_sites_has_no_written_form():
    config = Config(sites={"A": hlk.Site("h", "f", "a", "m"), "MyLayer": lambda layer: layer})
    with pytest.raises(ValueError, match=r"sites\['MyLayer'\]"):
        config.to_dict()


# ---- adapters drawn anew ----

def adapters(model):
    return {name: value for name, value in snapshot(model).items() if name.endswith(("lora_A", "lora_B"))}


RESETS = {
    "net": (lambda: make_net(zero_B=True, search="off"), net_batch),
    "B-not-zero": (lambda: make_net(zero_B=True, search="off", init_B="kaiming_uniform", seed=3), net_batch),
    "mixed-ranks": (lambda: make_net(zero_B=True, search="off", rank_pattern={"layers.1": 1, "layers.2": 6}), net_batch),
    "bfloat16": (lambda: make_net(zero_B=True, search="off", adapter_dtype="bfloat16"), net_batch),
    "llama": (lambda: make_llama(zero_B=True, search="off", init_B="kaiming_uniform", adapter_dtype=torch.float16), llama_batch),
}


@pytest.mark.parametrize("name", RESETS)
def test_reset_adapters_gives_the_bits_of_patching(name):
    make, batch = RESETS[name]
    model = make()
    before, parameters = snapshot(model), {path: adapter(model, path).lora_A for path in path_names(model)}
    search, optimizer = hlk.RankSearch(model), torch.optim.SGD(trainable(model), lr=0.1)
    search.apply({path: list(torch.arange(path_r(model, path)) % 2 == 0) for path in search.paths[1:]})
    for step in range(3):
        train_step(model, optimizer, batch(step))
    trained, masks = adapters(model), {path: adapter(model, path).lora_mask.clone() for path in search.paths}
    hlk.reset_adapters(model)
    now = snapshot(model)
    assert not same_bits(trained, adapters(model))
    assert all(torch.equal(now[key], value) for key, value in before.items() if key.endswith(("lora_A", "lora_B", "weight")))
    assert all(torch.equal(adapter(model, path).lora_mask, mask) for path, mask in masks.items())
    assert all(adapter(model, path).lora_A is parameter for path, parameter in parameters.items())
    assert not all(map(torch.all, masks.values()))


def path_r(model, path):
    return adapter(model, path).lora_mask.shape[0]


def test_reset_model_trains_as_one_patched_anew_with_these_ranks():
    def trained(model, number):
        search, optimizer = hlk.RankSearch(model), torch.optim.AdamW(trainable(model), lr=0.01)
        search.apply({"layers.1": 0, "layers.2": [True, False, False, True]})
        for step in range(number, number + 3):
            train_step(model, optimizer, net_batch(step))
        return adapters(model)

    used = make_net(search="off")
    trained(used, 0)
    hlk.reset_adapters(used)
    assert same_bits(trained(used, 5), trained(make_net(zero_B=True, search="off"), 5))


def test_a_static_search_trains_its_ranks_from_fresh_weights():
    model = make_net(search="static")
    search = hlk.RankSearch(model, dataloader=[net_batch(0)])
    search.start()
    ranks = search.ranks
    hlk.reset_adapters(model)
    assert search.ranks == ranks and sorted(ranks.values()) == [0, 0, 4, 4]
    torch.manual_seed(0)
    with hlk.use_backend("reference"):
        assert torch.equal(model.eval()(**net_batch(1)).out, Net().eval()(**net_batch(1)).out)


def test_reset_adapters_leaves_heads_and_optimizer_alone():
    model = make_net(search="off", modules_to_save=["norm"])
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
    train_step(model, optimizer, net_batch(0))
    head = model.norm.weight.detach().clone()
    state = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
    hlk.reset_adapters(model)
    assert torch.equal(model.norm.weight, head) and not torch.equal(head, torch.ones_like(head))
    assert all(map(torch.equal, state, (value for entry in optimizer.state.values() for value in entry.values())))


def test_reset_adapters_looks_into_a_wrapper():
    model, wrapper = make_net(search="off"), torch.nn.Module()
    wrapper.module = model
    hlk.reset_adapters(wrapper)
    assert same_bits(adapters(model), adapters(make_net(zero_B=True, search="off")))


def test_reset_adapters_draws_from_no_global_generator():
    model = fill_B(make_net(search="off"))
    before = torch.get_rng_state()
    hlk.reset_adapters(model)
    assert torch.equal(torch.get_rng_state(), before) and not any(adapter(model, path).lora_B.any() for path in NET_PATHS)


def test_reset_adapters_of_a_model_that_is_not_patched_is_an_error():
    with pytest.raises(ValueError, match="not patched"):
        hlk.reset_adapters(Net())


def test_published_synflow_sums_the_loss():
    assert hlk.HeteroLoraConfig.paper(proxy="synflow").synflow_target == "loss"


@pytest.mark.parametrize("site", [{"h": "x"}, {"bad": 1}], ids=str)
def test_bad_site_in_a_file_names_the_field(site):
    with pytest.raises((TypeError, ValueError), match=r"sites\['A'\]"):
        hlk.HeteroLoraConfig.from_dict({"sites": {"A": site}})


def test_a_key_that_is_no_string_is_named():
    with pytest.raises((TypeError, ValueError), match="HeteroLoraConfig has no field 3"):
        hlk.HeteroLoraConfig.from_dict({3: 1, "x": 2})
