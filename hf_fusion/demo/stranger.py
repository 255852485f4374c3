"""What somebody who never heard of hf_fusion does with a published model. Run by the demo in a fresh process:

    python -I stranger.py REPO REVISION FOLDER

FOLDER holds PNG images. The logits go to FOLDER/logits.safetensors, the pipeline's answers to stdout as JSON.
"""

import json
import sys
from pathlib import Path


class _Absent:
    """Makes hf_fusion impossible to import, as where it is not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "hf_fusion":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(repo: str, revision: str, folder: Path) -> None:
    """Loads by id, three times over, and answers."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoModelForImageClassification, AutoProcessor, pipeline

    images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
    processor = AutoProcessor.from_pretrained(repo, revision=revision, trust_remote_code=True)
    inputs = processor(images=images, return_tensors="pt")
    logits = {}
    for auto in (AutoModel, AutoModelForImageClassification):
        model = auto.from_pretrained(repo, revision=revision, trust_remote_code=True)
        with torch.no_grad():
            logits[auto.__name__] = model(**inputs).logits
    save_file(logits, folder / "logits.safetensors")
    classify = pipeline("image-classification", model=repo, revision=revision, trust_remote_code=True)
    answers = [classify(image, top_k=1)[0] for image in images]
    sys.stdout.write(json.dumps({"class": type(model).__name__, "module": type(model).__module__, "answers": answers}))


if __name__ == "__main__":
    sys.meta_path.insert(0, _Absent())
    try:
        import hf_fusion  # noqa: F401
    except ModuleNotFoundError:
        main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit("hf_fusion can be imported here, so this would prove nothing")
