"""Tiny experts for tests with the Hub: a BERT of 16 dimensions and adapters of it."""

import json

import torch
from peft import LoraConfig, get_peft_model
from tiny import save_peft
from transformers import AutoModelForSequenceClassification, BertConfig, BertTokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LABELS = ("no", "yes", "maybe")
BERT = BertConfig(
    vocab_size=8, **SIZES, id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)}
)


def save_tokenizer(folder):
    vocab = folder / "words.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]))
    BertTokenizer(vocab=str(vocab)).save_pretrained(folder)
    vocab.unlink()


def save_bert(folder, seed=0, processor=True, card=None, auto=AutoModelForSequenceClassification, config=BERT):
    """A BERT with random weights, its tokenizer, and a README where ``card`` is its YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    auto.from_config(config).save_pretrained(folder)
    if processor:
        save_tokenizer(folder)
    if card:
        (folder / "README.md").write_text(f"---\n{card}\n---\n")
    return folder


def save_adapter(folder, base, labels=("no", "yes"), seed=0, base_name=None, **options):
    """An adapter of a saved BERT with a head for ``labels``, and the config.json that names them."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    settings = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS", **options}
    peft_model = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_peft(peft_model, folder)
    (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate(labels))}))
    if base_name:
        edit_json(folder / "adapter_config.json", base_model_name_or_path=base_name)
    return peft_model.eval()


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
