"""Loss and gradients of the formulas on PyTorch equal transformers' own, so that a graph can be trained."""

import pytest

from hasten import models
from hasten.backends import reference

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "initializer_range": 0.3,
    "pad_token_id": None,  # else transformers stops the gradient of that row
}
EXTRA = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {
        "sliding_window": 5,
        "query_pre_attn_scalar": 12,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.mark.parametrize("model_type", EXTRA)
def test_loss_and_gradients_equal_those_of_transformers(model_type):
    config = transformers.AutoConfig.for_model(model_type, **SHAPE, **EXTRA[model_type])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    tokens = torch.randint(0, config.vocab_size, (2, 17))
    theirs = model(input_ids=tokens, labels=tokens).loss
    theirs.backward()

    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    graph = models.build(config.to_dict())
    weights = {s.name: leaves[s.source][slice(*(s.rows or (None,)))] for s in graph.weights.values()}
    logits = reference.forward(graph, weights, tokens)  # [sequences, tokens, vocabulary]
    ours = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    ours.backward()

    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        error = (leaves[name].grad - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4, f"gradient of {name} differs by {error:.2e} of its size"
