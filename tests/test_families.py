"""Every row of the site table: the pretrained function, shortcuts against an eager twin, caches, removal."""

from __future__ import annotations

import pytest
import torch
from families import (
    FAMILIES,
    HEADS,
    LAYERS,
    SHORTCUTS,
    EagerTwin,
    assert_gradients_close,
    assert_restored,
    every_decoder,
    every_family,
    loss_and_gradients,
    make_inputs,
    make_model,
    make_patched,
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
    base_loss = base(**inputs).loss.detach()
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
    hooks = len(torch_optimizer._global_optimizer_pre_hooks), len(torch_optimizer._global_optimizer_post_hooks)
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
    assert (len(torch_optimizer._global_optimizer_pre_hooks), len(torch_optimizer._global_optimizer_post_hooks)) == hooks
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
