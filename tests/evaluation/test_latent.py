"""What training changed inside a student: linear CKA of hidden states, norms of the weights."""

import copy

import peft
import pytest
import torch

from compact.evaluation import latent
from compact.lab.zoo_student import build_model, build_tokenizer

TEXTS = ["Ann has 3 apples . How many ?", ("Ben has 4 apples .", "The answer is 4 .")]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def base(tokenizer):
    return build_model(tokenizer, seed=0, layers=3).eval()


def test_cka_ignores_rotation_and_scale_and_sees_other_states():
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    turned = 3 * x @ torch.linalg.qr(torch.randn(6, 6))[0] + 5
    assert latent.linear_cka(x, turned) == pytest.approx(1, abs=1e-6)
    y = torch.randn(200, 4)
    # The same by the centred Gram matrices (Kornblith et al. 2019, eq. 3).
    centre = torch.eye(200).double() - 1 / 200
    k, m = (centre @ (a.double() @ a.double().T) @ centre for a in (x, y))
    assert latent.linear_cka(x, y) == pytest.approx(
        float((k * m).sum() / (k.norm() * m.norm())), abs=1e-9
    )
    assert latent.linear_cka(torch.ones(5, 2), torch.ones(5, 3)) == 1
    assert latent.linear_cka(torch.ones(5, 2), x[:5]) == 0


def test_only_the_changed_layer_and_those_above_it_differ(base, tokenizer):
    student = copy.deepcopy(base)
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight.mul_(3)
    drift = latent.layer_drift(student, base, tokenizer, {"text": TEXTS})
    moved = drift["moved"]
    assert moved[0] == moved[2] == 0
    layer = base.model.layers[1].requires_grad_(False)
    whole = sum(float(w.double().square().sum()) for w in layer.parameters())
    mine = float(layer.mlp.down_proj.weight.double().square().sum())
    assert moved[1] == pytest.approx((4 * mine / whole) ** 0.5)
    before, first, second, third = drift["states"]["text"]
    assert before == pytest.approx(1) and first == pytest.approx(1)
    assert second < 0.999 and third < 0.999


def test_an_adapter_counts_as_the_weights_that_it_adds(base, tokenizer):
    plain = copy.deepcopy(base)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    student = peft.get_peft_model(base, config)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    own = latent.layer_drift(student.eval(), student, tokenizer, {"text": TEXTS})
    merged = student.merge_and_unload()
    apart = latent.layer_drift(merged, plain, tokenizer, {"text": TEXTS})
    assert own["moved"] == pytest.approx(apart["moved"], rel=1e-4) and min(own["moved"]) > 0
    assert own["states"]["text"] == pytest.approx(apart["states"]["text"], abs=1e-5)


def test_texts_without_a_token_to_compare_are_an_error(base, tokenizer):
    with pytest.raises(ValueError, match="at least two tokens"):
        latent.hidden_similarity(base, base, tokenizer, [("Ann has 3 apples .", "")])
