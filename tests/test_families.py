"""Every row of the site table, and rows of a user: the pretrained function, an eager twin, caches, removal, refusals."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import (
    FAMILIES,
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    SHORTCUTS,
    EagerTwin,
    assert_gradients_close,
    assert_restored,
    every_decoder,
    every_family,
    loss_and_gradients,
    loss_of,
    make_inputs,
    make_model,
    make_patched,
    open_adapters,
    patch,
    reference_backend,  # noqa: F401
    snapshot,
)
from torch import nn
from torch.optim import optimizer as torch_optimizer

import heterolora_kernels as hlk

#: Sets of shortcuts that take different ways through a layer: nothing crosses, only f crosses, one end only.
SUBSETS = {"none": (), "ffn": ("shortcut_ffn",), "sa": ("shortcut_sa",), "residuals": ("residual_1", "residual_2")}


def paths_of(model: nn.Module) -> list[str]:
    return [name.removesuffix(".lora_A") for name, _ in model.named_parameters() if name.endswith(".lora_A")]


@every_family
def test_logits_right_after_patching_are_equal_bit_for_bit(family):
    model, inputs = make_model(family), make_inputs()
    before = model(**inputs)
    patch(model, open_B=False)
    after = model(**inputs)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_logits_right_after_patching_are_equal_in_sixteen_bits(family, dtype):
    model, inputs = make_model(family, dtype), make_inputs()
    before = model(**inputs).logits
    patch(model, open_B=False)
    assert torch.equal(before, model(**inputs).logits)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@every_family
def test_logits_in_train_mode_are_equal_bit_for_bit(family):
    model, inputs = make_model(family).train(), make_inputs()
    torch.manual_seed(3)
    before = model(**inputs).logits
    patch(model, open_B=False)
    torch.manual_seed(3)
    assert torch.equal(before, model(**inputs).logits)


@every_family
def test_paths_are_every_linear_and_four_shortcuts_a_layer_less_one(family):
    model = make_model(family)
    head = model.get_output_embeddings()
    linears = [name for name, m in model.named_modules()
               if (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D") and m is not head]
    patch(model)
    shortcuts = {f"{family.layers}.{i}.{site}" for i in range(LAYERS) for site in SHORTCUTS} \
        - {f"{family.layers}.0.shortcut_ffn"}
    found = paths_of(model)
    assert len(found) == len(set(found)) == len(linears) + 4 * LAYERS - 1
    assert set(found) == {*linears, *shortcuts}


@every_family
def test_loss_and_gradients_equal_the_eager_twin(family):
    base, inputs = make_model(family, torch.float64), make_inputs()
    base_loss = loss_of(base, inputs).detach()
    model = patch(make_model(family, torch.float64))
    twin = EagerTwin(base, model, family)
    losses, gradients = loss_and_gradients(model, inputs)
    expected_losses, expected = twin.loss_and_gradients(inputs)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=0)
    assert abs(losses[0] - base_loss) > 1e-4, "the adapters change nothing: the test would see nothing"
    assert_gradients_close(gradients, expected)


@every_family
@pytest.mark.parametrize("shortcuts", SUBSETS.values(), ids=SUBSETS)
def test_gradients_equal_the_eager_twin_for_some_shortcuts(family, shortcuts):
    base, inputs = make_model(family, torch.float64), make_inputs()
    model = patch(make_model(family, torch.float64), shortcuts=shortcuts)
    _, gradients = loss_and_gradients(model, inputs)
    _, expected = EagerTwin(base, model, family).loss_and_gradients(inputs)
    assert_gradients_close(gradients, expected)


@every_family
def test_two_forwards_before_the_backwards_equal_the_eager_twin(family):
    base, batches = make_model(family, torch.float64), (make_inputs(1), make_inputs(2, batch=1, length=5))
    model = patch(make_model(family, torch.float64))
    _, gradients = loss_and_gradients(model, *batches)
    _, expected = EagerTwin(base, model, family).loss_and_gradients(*batches)
    assert_gradients_close(gradients, expected)


@every_family
def test_shortcuts_alone_equal_the_eager_twin(family):
    base, inputs = make_model(family, torch.float64), make_inputs()
    model = patch(make_model(family, torch.float64), target_modules=())
    assert len(paths_of(model)) == 4 * LAYERS - 1
    _, gradients = loss_and_gradients(model, inputs)
    _, expected = EagerTwin(base, model, family).loss_and_gradients(inputs)
    assert_gradients_close(gradients, expected)


@every_decoder
def test_prefill_and_cached_tokens_equal_the_full_forward(family):
    model, ids = make_patched(family), make_inputs(padding=False)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        out = model(input_ids=ids[:, :4], use_cache=True)
        parts = [out.logits]
        for i in range(4, ids.shape[1]):
            out = model(input_ids=ids[:, i:i + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-10, atol=1e-12)


@every_decoder
def test_generate_gives_the_logits_of_the_full_forward(family):
    model, ids = make_patched(family), make_inputs(padding=False)["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=4, max_new_tokens=4, do_sample=False,
                         use_cache=True, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        expected = model(input_ids=out.sequences, use_cache=False).logits
    first = ids.shape[1] - 1
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected[:, first:first + 4].to(out.logits[0].dtype),
                               rtol=1e-5, atol=1e-6)


@every_family
def test_hidden_states_are_those_of_the_base_model(family):
    model, inputs = make_model(family), make_inputs()
    before = make_model(family)(**inputs, output_hidden_states=True).hidden_states
    patch(model, open_B=False)
    after = model(**inputs, output_hidden_states=True).hidden_states
    assert len(before) == len(after) == LAYERS + 1
    assert all(torch.equal(one, other) for one, other in zip(before, after))


@every_family
def test_attentions_are_those_of_the_base_model(family):
    def run(patched: bool):
        model = make_model(family)
        model.set_attn_implementation("eager")
        if patched:
            patch(model, open_B=False)
        return model(**make_inputs(), output_attentions=True).attentions

    before, after = run(False), run(True)
    assert len(before) == len(after) == LAYERS
    assert all(one.shape[1] == HEADS and torch.equal(one, other) for one, other in zip(before, after))


@every_family
def test_patching_works_after_hidden_states_were_asked_for(family):
    model, inputs = make_model(family), make_inputs()
    model(**inputs, output_hidden_states=True)
    before = model(**inputs).logits
    patch(model, open_B=False)
    assert torch.equal(before, model(**inputs).logits)


@every_family
def test_removal_works_after_hidden_states_were_asked_for(family):
    model, inputs = make_model(family), make_inputs()
    before = model(**inputs).logits
    patch(model)
    model(**inputs, output_hidden_states=True)
    hlk.remove_heterolora(model)
    assert torch.equal(before, model(**inputs).logits)


@every_family
def test_tuple_outputs_are_those_of_the_base_model(family):
    model, inputs = make_model(family), make_inputs()
    before = model(**inputs, return_dict=False)
    patch(model, open_B=False)
    after = model(**inputs, return_dict=False)
    assert len(before) == len(after)
    assert torch.equal(before[1], after[1])


@every_family
def test_removal_gives_back_the_very_same_model(family):
    model, inputs = make_model(family), make_inputs()
    list(model.parameters())[3].requires_grad_(False)
    logits = model(**inputs).logits
    before, keys = snapshot(model), list(model.state_dict())
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = {*torch_optimizer._global_optimizer_pre_hooks, *torch_optimizer._global_optimizer_post_hooks}
    patch(model.train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with hlk.collect_statistics(model):
        loss_and_gradients(model, inputs)
    optimizer.step()
    assert not torch.equal(logits, model.eval()(**inputs).logits)
    assert hlk.remove_heterolora(model) is model
    assert_restored(model, before)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert {*torch_optimizer._global_optimizer_pre_hooks, *torch_optimizer._global_optimizer_post_hooks} <= hooks
    assert torch.equal(logits, model(**inputs).logits)


@every_family
def test_base_keys_of_the_state_dict_keep_their_names(family):
    model = make_model(family)
    before = dict(model.state_dict())
    after = patch(model).state_dict()
    assert [key for key in after if "lora_" not in key] == list(before)
    assert all(after[key].data_ptr() == tensor.data_ptr() for key, tensor in before.items())
    masks = [tensor for key, tensor in after.items() if key.endswith("lora_mask")]
    assert len(masks) == len(paths_of(model)) and all(mask.dtype == torch.bool and mask.all() for mask in masks)


@every_family
def test_patching_again_after_removal_gives_the_same_model(family):
    model, inputs = make_patched(family), make_inputs()
    first = model(**inputs).logits
    patch(hlk.remove_heterolora(model))
    assert torch.equal(first, model(**inputs).logits)


@every_family
@pytest.mark.parametrize("rows", [1, 2], ids=["one_token", "two_tokens"])
def test_short_sequences_equal_the_eager_twin(family, rows):
    base, inputs = make_model(family, torch.float64), make_inputs(batch=1, length=rows, padding=False)
    model = patch(make_model(family, torch.float64))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, EagerTwin(base, model, family).model(**inputs).logits,
                                   rtol=1e-11, atol=1e-13)


def test_every_class_of_the_table_has_a_family():
    from heterolora_kernels.sites import SITES
    classes = {type(make_model(family).get_submodule(family.layers)[0]).__name__ for family in FAMILIES.values()}
    assert classes == set(SITES)


# ---- shortcuts elsewhere ----


class Block(nn.Module):
    """A pre-norm block of a user's own transformer."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 9), nn.Linear(9, width)

    def forward(self, x):
        x = x + self.out(torch.tanh(self.mix(self.norm_1(x))))
        return x + self.down(torch.relu(self.up(self.norm_2(x))))


class Stack(nn.Module):
    """A user's own transformer."""

    def __init__(self, layers: int = 3):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.score = nn.Linear(6, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.score(x)


SITE = {"Block": hlk.Site("norm_1", "norm_2", "out", "down")}


def test_shortcuts_of_a_users_class():
    torch.manual_seed(0)
    model = Stack().double()
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    base, before = model(x), snapshot(model)
    patch(model, open_B=False, sites=SITE)
    assert torch.equal(base, model(x))
    assert len(paths_of(model)) == 12 + 11
    open_adapters(model)
    parameters = dict(model.named_parameters())

    def delta(path, source):
        return 2 * source @ parameters[f"{path}.lora_A"].t() @ parameters[f"{path}.lora_B"].t()

    def linear(path, value):
        return nn.functional.linear(value, parameters[f"{path}.weight"], parameters[f"{path}.bias"]) + delta(path, value)

    h, f_prev = x, None
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        f = h + linear(f"{name}.out", torch.tanh(linear(f"{name}.mix", block.norm_1(h)))) + delta(f"{name}.residual_1", h)
        if f_prev is not None:
            f = f + delta(f"{name}.shortcut_ffn", f_prev)
        out = f + linear(f"{name}.down", torch.relu(linear(f"{name}.up", block.norm_2(f))))
        h, f_prev = out + delta(f"{name}.residual_2", f) + delta(f"{name}.shortcut_sa", h), f
    expected = model.score(h)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    trainable = [p for p in parameters.values() if p.requires_grad]
    for one, other in zip(torch.autograd.grad(model(x).square().sum(), trainable),
                          torch.autograd.grad(expected.square().sum(), trainable)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    assert_restored(hlk.remove_heterolora(model), before)


class Towers(nn.Module):
    """Two stacks in one module, whose layers take turns."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.ModuleList(Block() for _ in range(2)) for _ in range(2))

    def forward(self, x, y):
        for left, right in zip(self.left, self.right):
            x, y = left(x), right(x=y)
        return x, y


def test_f_does_not_pass_from_one_stack_to_another():
    torch.manual_seed(0)
    model, alone = Towers().double(), Stack(2).double()
    alone.blocks.load_state_dict(model.right.state_dict())
    alone.score = nn.Identity()
    x, y = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64)
    patch(model, sites=SITE)
    patch(alone, sites=SITE)
    assert len(paths_of(model)) == 2 * len(paths_of(alone)) == 2 * (8 + 7)
    alone.blocks.load_state_dict(model.right.state_dict())
    assert torch.equal(model(x, y)[1], alone(y))


def test_layer_that_returns_neither_tensor_nor_tuple_is_named():
    class Dict(Block):
        def forward(self, x):
            return {"x": super().forward(x)}

    class Dicts(Stack):
        def forward(self, x):
            for block in self.blocks:
                x = block(x)["x"]
            return x

    model, x = Dicts(), torch.randn(2, 6)
    model.blocks = nn.ModuleList(Dict() for _ in range(2))
    with pytest.raises(TypeError, match=r"blocks\.0.*dict"):
        patch(model, sites={"Dict": SITE["Block"]})(x)
    hlk.remove_heterolora(model)
    patch(model, sites={"Dict": SITE["Block"]}, shortcuts=("shortcut_sa", "residual_2"))(x)


def test_unknown_class_is_told_of_sites():
    with pytest.raises(ValueError, match=r"LlamaDecoderLayer.*sites=.*attention_norm.*'Block'"):
        patch(Stack())


def test_users_row_goes_before_the_table():
    with pytest.raises(ValueError, match="LlamaDecoderLayer.*nowhere"):
        patch(make_model("llama"), sites={"LlamaDecoderLayer": hlk.Site("nowhere", "mlp", "self_attn.o_proj", "mlp.down_proj")})


BAD_SITES = {
    "no_module": (hlk.Site("norm_1", "missing", "out", "down"), ValueError, "missing.*f"),
    "no_linear": (hlk.Site("norm_1", "norm_2", "norm_1", "down"), ValueError, "norm_1.*attention"),
    "no_site": (("norm_1", "norm_2", "out", "down"), TypeError, "Site"),
}


@pytest.mark.parametrize(("site", "error", "match"), BAD_SITES.values(), ids=BAD_SITES)
def test_wrong_row_is_named(site, error, match):
    model = Stack()
    before = snapshot(model)
    with pytest.raises(error, match=match):
        patch(model, sites={"Block": site})
    assert_restored(model, before)


def test_row_in_the_wrong_order_is_found_in_the_forward():
    model = patch(Stack(), sites={"Block": hlk.Site("norm_2", "norm_1", "out", "down")})
    with pytest.raises(RuntimeError, match="sites"):
        model(torch.randn(2, 6))


def make_bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=61, d_model=HIDDEN, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, max_position_embeddings=32, dropout=0.0)
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(config).eval()


def test_encoder_decoder_takes_lora():
    model, inputs = make_bart(), make_inputs(padding=False)
    before = model(**inputs).logits
    patch(model, shortcuts=(), open_B=False)
    assert torch.equal(before, model(**inputs).logits)
    open_adapters(model)
    _, gradients = loss_and_gradients(model, inputs)
    assert len(gradients) == 2 * (6 + 2 * 10) and all(gradient.any() for gradient in gradients.values())


def test_encoder_decoder_refuses_shortcuts():
    with pytest.raises(ValueError, match="encoder-decoder"):
        patch(make_bart())


def test_chunked_feed_forward_is_refused_by_name():
    family = FAMILIES["bert"]
    model = make_model(family)
    for layer in model.get_submodule(family.layers):
        layer.chunk_size_feed_forward = 2
    with pytest.raises(ValueError, match=r"layer\.0.*chunk_size_feed_forward"):
        patch(model)
    inputs = make_inputs(length=8)
    before = model(**inputs).logits
    assert torch.equal(before, patch(model, shortcuts=(), open_B=False)(**inputs).logits)


def test_cross_attention_is_refused():
    config = transformers.GPT2Config(vocab_size=61, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=16, add_cross_attention=True)
    with pytest.raises(ValueError, match="cross-attention"):
        patch(transformers.GPT2LMHeadModel(config))


def test_parallel_blocks_are_not_in_the_table():
    config = transformers.GPTNeoXConfig(vocab_size=61, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4,
                                        intermediate_size=INNER, max_position_embeddings=16)
    with pytest.raises(ValueError, match="sites=.*GPTNeoXLayer"):
        patch(transformers.GPTNeoXForCausalLM(config))
