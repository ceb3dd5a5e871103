"""The adapter over TransformerBridge, on random models and on a real one."""

import pytest
import torch

import circuitsae
from transcoders.errors import InputError, ModelError, PromptError
from transcoders.loading import load_model, random_model
from transcoders.sites import Site

TOKENS = torch.tensor([[0, 5, 9, 5], [0, 1, 2, 3]])
FAMILIES = ("gpt2", "llama")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return random_model(request.param, dtype=torch.float64)


def test_sites_add_up_to_the_residual_stream(model):
    kinds = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    _, at = model.run(TOKENS, [Site(1, kind) for kind in kinds])
    pre, mid, post, attn_out, mlp_out = (at[Site(1, kind)] for kind in kinds)
    torch.testing.assert_close(pre + attn_out, mid)
    torch.testing.assert_close(mid + mlp_out, post)


def test_mlp_in_is_what_the_mlp_reads(model):
    _, at = model.run(TOKENS, [Site(0, "mlp_in"), Site(0, "mlp_out")])
    torch.testing.assert_close(model.bridge.blocks[0].mlp(at[Site(0, "mlp_in")]), at[Site(0, "mlp_out")])


def test_logits_are_the_final_read_times_the_unembedding(model):
    logits, cache = model.run_hooked(TOKENS, read=["unembed.hook_in"])
    torch.testing.assert_close(cache["unembed.hook_in"] @ model.W_U, logits)


def test_edits_change_what_follows_and_leave_nothing_behind(model):
    clean, _ = model.run(TOKENS)
    edited, at = model.run(TOKENS, [Site(1, "mlp_out")], edits={Site(1, "mlp_out"): torch.zeros_like})
    assert not torch.allclose(clean, edited)
    assert at[Site(1, "mlp_out")].abs().max() == 0
    again, _ = model.run(TOKENS)
    assert torch.equal(clean, again)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_are_seeded(family):
    one, same, other = (random_model(family, seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert one.to(torch.float64).fingerprint() == same.fingerprint()


def test_a_site_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"Cannot read site 'mlp_in'"):
        Site.parse("mlp_in")
    assert Site.parse("3.mlp_in") == Site(3, "mlp_in")


def test_tokens_the_model_cannot_take_are_refused(model):
    with pytest.raises(PromptError, match="at most 64"):
        model.check_tokens(torch.zeros(65, dtype=torch.long))
    with pytest.raises(PromptError, match="ids 0 to 63"):
        model.check_tokens(torch.tensor([0, 64]))
    with pytest.raises(PromptError, match="has no tokenizer"):
        model.to_tokens("Hello")


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/model"])
def test_a_folder_that_is_not_there(path):
    with pytest.raises(ModelError, match="There is no model folder"):
        load_model(path)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match="holds no config.json"):
        load_model(tmp_path)


def test_a_folder_with_a_broken_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ModelError, match="Could not load the model"):
        load_model(tmp_path)


@pytest.fixture(scope="module")
def tinystories(shared):
    return load_model(shared / "data/models/tinystories-656k")


def test_a_real_llama_runs_as_hugging_face_runs_it(shared, tinystories):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(shared / "data/models/tinystories-656k").eval()
    tokens = tinystories.to_tokens("Once upon a time, there was a little girl named Lily.")
    with torch.no_grad():
        expected = reference(tokens[None]).logits
    torch.testing.assert_close(tinystories.run(tokens[None])[0], expected, rtol=1e-4, atol=1e-4)


def test_token_strings_spell_the_text(tinystories):
    text = "Once upon a time, there was a little girl named Lily. She said: no!"
    tokens = tinystories.to_tokens(text)
    assert int(tokens[0]) == tinystories.bos
    assert "".join(tinystories.token_strings(tokens)[1:]).strip() == text
    assert len(tinystories.to_tokens(text, bos=False)) == len(tokens) - 1


def test_an_empty_prompt_is_refused(pocket):
    with pytest.raises(PromptError, match="prompt is empty"):
        pocket.to_tokens("")


@pytest.mark.parametrize("text", [" ", "   ", "\n", "\n\n \t"])
def test_white_space_is_a_prompt(pocket, text):
    tokens = pocket.to_tokens(text, bos=False)
    assert pocket.bridge.tokenizer.decode(tokens) == text


def test_a_text_that_is_not_utf8_is_refused_in_one_sentence(pocket):
    text = b"caf\xe9".decode(errors="surrogateescape")  # as Python hands over such an argument
    with pytest.raises(PromptError, match=r"'caf\\udce9' has bytes that are not UTF-8"):
        pocket.to_tokens(text)
    with pytest.raises(PromptError, match="not UTF-8"):
        pocket.token_id(text)


def test_a_token_is_found_by_its_string_even_where_it_does_not_encode_to_itself(tinystories):
    assert tinystories.token_string(tinystories.token_id("She ")) == "She "


def test_a_word_of_several_tokens_is_no_token(tinystories):
    with pytest.raises(PromptError, match="not one"):
        tinystories.token_id("incomprehensible")


def test_the_fingerprint_follows_the_weights():
    model = random_model()
    before = model.fingerprint()
    assert model.fingerprint() == before
    with torch.no_grad():
        model.W_U[0, 0] += 1
    changed = model.fingerprint()
    assert changed != before
    with torch.no_grad():
        model.W_U[0, 0] -= 1
    assert random_model().fingerprint() == before


def test_other_bars_are_as_they_were_after_loading():
    from transformers.utils import logging

    def hook(make, args, settings):
        return make(*args, **settings)

    earlier = logging.set_tqdm_hook(hook)
    try:
        circuitsae.load_model("pocket")
    finally:
        assert logging.set_tqdm_hook(earlier) is hook
