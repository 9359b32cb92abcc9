"""Small models of torch, some of them of transformers."""

import torch
import transformers

_SMALL = {
    "vocab_size": 21,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


class Toy(torch.nn.Module):
    """Kinds of layers that language models do not have: convolutions, fused attention."""

    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(21, 12)
        self.attn = torch.nn.MultiheadAttention(12, 3, batch_first=True)
        self.conv1 = torch.nn.Conv1d(12, 10, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(1, 6, (3, 2))
        self.square = torch.nn.Linear(6, 6)
        self.out = torch.nn.Linear(6, 5)

    def forward(self, input_ids):
        x = self.emb(input_ids)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        x = torch.tanh(self.conv1(x.transpose(1, 2)))
        x = torch.tanh(self.conv2(x[:, None])).mean((2, 3))
        return self.out(torch.tanh(self.square(x)))


class Experts(torch.nn.Module):
    """A stack of matrices as one parameter, `(experts, in, out)`."""

    is_transposed = True

    def __init__(self, n_experts, n_in, n_hidden):
        super().__init__()
        self.up = torch.nn.Parameter(torch.zeros(n_experts, n_in, n_hidden))
        self.down = torch.nn.Parameter(torch.zeros(n_experts, n_hidden, n_in))

    def forward(self, x):
        hidden = torch.tanh(torch.einsum("ti,eih->eth", x, self.up))
        return torch.einsum("eth,eho->to", hidden, self.down)


class ToyExperts(torch.nn.Module):
    """An embedding, experts and a head."""

    def __init__(self, n_experts=3):
        super().__init__()
        self.emb = torch.nn.Embedding(21, 8)
        self.experts = Experts(n_experts, 8, 10)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, input_ids):
        x = self.emb(input_ids).reshape(-1, 8)
        return self.head(x + self.experts(x))


class Tied(torch.nn.Module):
    """An embedding that is the output head too."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(21, 8)
        self.up = torch.nn.Linear(8, 8, bias=False)
        self.lm_head = torch.nn.Linear(8, 21, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids):
        return self.lm_head(torch.tanh(self.up(self.embed_tokens(input_ids))))


def build(name):
    """A model with the values that torch gives it."""
    small = dict(_SMALL)
    if name == "llama":
        config = transformers.LlamaConfig(**small, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config)
    if name in ("llama_tied", "llama_untied"):
        tied = name == "llama_tied"
        config = transformers.LlamaConfig(**small, tie_word_embeddings=tied)
        return transformers.LlamaForCausalLM(config)
    if name == "llama_scores":
        config = transformers.LlamaConfig(**small, num_labels=3, pad_token_id=0)
        return transformers.LlamaForSequenceClassification(config)
    if name == "bert":
        config = transformers.BertConfig(**small, num_labels=3)
        return transformers.BertForSequenceClassification(config)
    if name in ("gpt2", "gpt2_untied"):
        sizes = {"vocab_size": 21, "n_embd": 16, "n_layer": 2, "n_head": 4}
        tied = name == "gpt2"
        config = transformers.GPT2Config(**sizes, n_positions=8, tie_word_embeddings=tied)
        return transformers.GPT2LMHeadModel(config)
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=21, d_model=16, d_ff=24, d_kv=4, num_layers=2, num_heads=4
        )
        return transformers.T5ForConditionalGeneration(config)
    if name == "mixtral":
        config = transformers.MixtralConfig(
            **small, num_key_value_heads=2, num_local_experts=3
        )
        return transformers.MixtralForCausalLM(config)
    if name == "gpt_oss":
        config = transformers.GptOssConfig(
            **small,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
            head_dim=4,
        )
        return transformers.GptOssForCausalLM(config)
    return {"toy": Toy, "toy_experts": ToyExperts, "tied": Tied}[name]()
